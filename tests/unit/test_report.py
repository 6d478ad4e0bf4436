"""The report: what it says, that it is self-contained, safe and the same every time; and the numbers behind it."""

import re
from html.parser import HTMLParser

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, Imputation, InputError, PooledALS, impute, write_report
from scialm_dask.errors import OutputError
from scialm_dask.pooled.design import random_pools
from scialm_dask.report.comparison import Comparison, compare, sample
from scialm_dask.report.diagnostics import warnings_of
from scialm_dask.report.panels import groups_of

COUNTS = low_rank_counts(90, 60, density=0.6, rank=3, dispersion=4, seed=1)
NAMES = [
    "<script>alert(1)</script>",
    "$x^2$",
    '"quoted" & <b>',
    "bell\x07",
    "half\ud800",
    *(f"g{j}" for j in range(55)),
]


class Page(HTMLParser):
    """What is in a page: elements with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts = [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def strange():
    """Cells and genes with names that would do harm if they stood in a page as they are."""
    obs = pd.DataFrame({"</style>": np.where(np.arange(90) % 4, "<i>a", "b&amp;")}, index=[f"c{i}" for i in range(90)])
    return anndata.AnnData(COUNTS.astype(np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(NAMES, dtype=object)))


@pytest.fixture(scope="module")
def result(strange):
    return impute(strange, validation=0.1)


def test_the_command(cli, store_of, tmp_path):
    path, store, page = store_of(COUNTS), tmp_path / "r.zarr", tmp_path / "r.html"
    assert cli("impute", path, store, "--validation", "0.1").exit_code == 0
    done = cli("report", store, "-o", page, "--color", "batch", "--json")
    assert done.exit_code == 0, done.output
    read = Page(page)
    headings = "Warnings Convergence Held-out Spectrum Inflation genes Cells Summary Settings".split()
    assert [heading for heading in headings if heading not in read.text] == []
    assert "Coloured by batch" in read.text
    assert [figure["role"] for figure in read.all("svg")] == ["img"] * 7
    assert str(path) in read.text
    again = cli("report", store, "-o", page)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    first = page.read_bytes()
    assert cli("report", store, "-o", page, "--color", "batch", "--overwrite").exit_code == 0
    assert page.read_bytes() == first


def test_it_is_self_contained_and_safe(result, strange, tmp_path, monkeypatch):
    monkeypatch.setattr("scialm_dask.report.report._MOST_GENES", 60)
    write_report(result, tmp_path / "r.html", source=strange, color="</style>")
    page = Page(tmp_path / "r.html")
    assert page.all("script") == []
    assert page.all("b") == []
    assert len(page.all("style")) == 1
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]
    for name, attributes in page.elements:
        assert not {"src", "srcset", "action", "data"} & attributes.keys()
        assert not [key for key in attributes if key.startswith("on")]
        assert all(v.startswith("#") for k, v in attributes.items() if k.endswith("href") and name != "link")
    assert not re.findall(r"(?:url\(|@import)(?!#)[^)]*", page.source)
    assert "default-src 'none'" in next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    for shown in ("<script>alert(1)</script>", "$x^2$", "bell\ufffd", "half\ufffd", "</style>", "<i>a", "b&amp;"):
        assert shown in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    known = {f"#{name}" for name in ids}
    used = re.findall(r'(?:href="|url\()(#[^")]+)', page.source)
    assert used
    assert set(used) <= known
    for svg in page.all("svg"):
        assert {f"#{name}" for name in svg["aria-labelledby"].split()} <= known


def test_without_the_source_it_says_so(result, tmp_path):
    write_report(result, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "cannot be read" in page.text
    assert "Name it with --source" in page.text
    assert len(page.all("svg")) == 4


def test_what_is_refused(result, strange, store_of, tmp_path):
    with pytest.raises(InputError, match=r"nothing: no such column of obs; its columns are: </style>"):
        write_report(result, tmp_path / "r.html", color="nothing")
    with pytest.raises(InputError, match="90 cells × 59 genes, but 90 × 60 are expected"):
        write_report(result, tmp_path / "r.html", source=strange[:, :59].copy())
    with pytest.raises(InputError, match="not a result"):
        write_report(store_of(COUNTS, "cells.zarr"), tmp_path / "r.html")
    with pytest.raises(OutputError, match="no such folder"):
        write_report(result, tmp_path / "none" / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["cells.zarr"]


def test_results_of_other_kinds(tmp_path, strange):
    """Of cells that were not in the fit, of pools, of a matrix with observed zeros."""
    fit = impute(strange[:60].copy(), validation=0.1, max_iterations=12)
    P = random_pools(60, 20, density=0.3, random_state=0)
    pooled = PooledALS(3, max_sweeps=5).fit(COUNTS.toarray() @ P, P).to_imputation()
    general = impute(COUNTS.toarray() + 1.0, observed="finite", stop="residual", max_iterations=12)
    for kind, words in {
        fit.transform(strange[60:].copy()): "completed by a fit that was made before",
        pooled: "Objective",
        general: "Zeros of this matrix are observed values",
    }.items():
        told = write_report(kind, tmp_path / "r.html", overwrite=True)
        page = Page(tmp_path / "r.html")
        assert words in page.text
        assert f"{kind.shape[0]:,} cells × {kind.shape[1]:,} genes" in page.text
        assert [fact for fact in told["warnings"] if fact not in page.text] == []


def test_choices_by_count_splitting_are_shown(tmp_path):
    result = impute(COUNTS, preset="denoise", max_rank=8)
    written = result.to_zarr(tmp_path / "r.zarr")["count_splitting"]
    assert Imputation.open(tmp_path / "r.zarr").summary["count_splitting"] == written
    write_report(tmp_path / "r.zarr", tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    (best,) = (fit for fit in written["tried"] if fit["chosen"])
    assert "Held-out error" not in page.text
    told = f"Iteration {best['chosen_iteration']}, with {best['error']:.3g}, was kept"
    first = sum(rank == 0 for rank in written["ranks"])  # until then nothing is predicted
    assert f"Error on unseen molecules: {written['errors'][first]:.3g} at iteration {first + 1}, " in page.text
    assert told in page.text
    assert f"{len(written['tried'])} confidences in zeros" in page.text
    for fit in written["tried"]:
        name = f"{fit['zeros']:g}{' (chosen)' if fit['chosen'] else ''}"
        row = (name, f"{fit['gene_exponent']:g}", "0.5", fit["iterations"], fit["chosen_iteration"])
        assert " ".join(map(str, row)) in page.text


# The numbers


def evened(X):
    totals = X.sum(axis=1, keepdims=True)
    return np.log1p(X / totals * np.median(totals))


def components(X):
    U, s, _ = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    return U[:, :2] * s[:2], s[:2] ** 2 / (s**2).sum()


@pytest.fixture(params=[1, 3, 7])
def compared(request, result):
    return compare(result, ExpressionMatrix.of(COUNTS, blocks=request.param), most_cells=40)


def test_against_the_dense_matrices(compared, result):
    before, after = COUNTS.toarray()[compared.cells], result.to_dask().compute()[compared.cells].astype(np.float64)
    assert len(compared.cells) == 40
    np.testing.assert_array_equal(compared.genes_seen, (before > 0).sum(axis=1))
    typical = before.sum(axis=0) / (before > 0).sum(axis=0)
    large = (before == 0) & (after >= typical)
    oracle = {
        "detected": (before > 0).mean(axis=0),
        "mean_observed": before.mean(axis=0),
        "mean_imputed": after.mean(axis=0),
        "change": np.sqrt(((after - before) ** 2).mean(axis=0)),
        "filled": large.sum(axis=0) / (before == 0).sum(axis=0),
    }
    for name, values in oracle.items():
        np.testing.assert_allclose(compared.genes[name], values, rtol=1e-4, err_msg=name)
    assert compared.filled == pytest.approx(large.sum() / (before == 0).sum(), rel=1e-6)
    for ours, X, shares in ((compared.before, before, compared.shares[0]), (compared.after, after, compared.shares[1])):
        theirs, explained = components(evened(X))
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-3 * np.abs(theirs).max())
        np.testing.assert_allclose(shares, explained, rtol=1e-3)


def test_pictures_are_the_same_way_round(compared):
    assert np.all((compared.before * compared.after).sum(axis=0) >= 0)


def test_a_cell_is_drawn_by_its_number():
    drawn = sample(1000, 100)
    assert len(set(drawn)) == 100
    assert list(sample(1000, 100)) == list(drawn)
    assert set(drawn[drawn < 900]) <= set(sample(900, 100))  # other cells do not matter to it
    assert list(sample(50, 100)) == list(range(50))


def test_groups():
    numbers = groups_of("depth", pd.Series(np.arange(100.0)))
    assert len(numbers.names) == 5
    assert np.all(np.diff(numbers.codes) >= 0)
    assert max(abs(np.bincount(numbers.codes) - 20)) <= 1
    words = groups_of("type", pd.Series([*"aaabbc", None], dtype="category"))
    assert words.names == ("a", "b", "c", "unknown")
    assert list(words.codes) == [0, 0, 0, 1, 1, 2, 3]
    many = groups_of("type", pd.Series([f"t{n:02d}" for n in range(14) for _ in range(14 - n)]))
    assert many.names[-1] == "5 others"
    assert len(many.names) == len(many.colours) == 10
    assert groups_of("flag", pd.Series([True, False, True])).names == ("True", "False")
    holes = groups_of("depth", pd.Series([np.nan, *range(10)]))
    assert holes.names[-1] == "unknown"
    assert (holes.codes == len(holes.names) - 1).sum() == 1


# The warnings


def of(result, history=None, right=None, **summary):
    """A result with some facts changed."""
    return Imputation(
        result.left,
        result.right if right is None else right,
        obs=result.obs,
        var=result.var,
        summary={**result.summary, **summary},
        history=(result.history if history is None else history).to_dict("list"),
    )


GOOD = {"mean_imputed_over_observed": 1.1, "converged": True, "settings": {"max_rank": 128, "stop": "held-out"}}


def test_nothing_to_warn_of(result, tmp_path):
    good = of(result, **GOOD)
    assert warnings_of(good) == []
    write_report(good, tmp_path / "r.html")
    assert "Nothing to warn of." in Page(tmp_path / "r.html").text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"converged": False}, "It did not converge"),
        ({"mean_imputed_over_observed": 2.5}, "the imputed mean is 2.5 times the observed one"),
        ({"n_empty_cells": 4}, "4 cells have no observed entry"),
        ({"n_empty_genes": 1}, "1 gene has no observed entry"),
        ({"scaling": "genes scaled; cells not, as obs has no total_counts"}, "Cells were not scaled"),
        ({"settings": {"max_rank": 2}}, "The rank reached its limit, 2"),
    ],
)
def test_each_warning(result, facts, words):
    warnings = warnings_of(of(result, **{**GOOD, **facts}))
    assert [words in what for what, _ in warnings] == [True]
    assert all(remedy.endswith(".") for _, remedy in warnings)


def test_a_general_matrix_is_not_called_inflated(result):
    general = of(result, **{**GOOD, "mean_imputed_over_observed": 2.5})
    general.clip = False
    assert warnings_of(general) == []


def test_warnings_of_the_history(result):
    history = result.history
    kept = result.summary["chosen_iteration"]
    assert kept < len(history)
    for stopped, falling in ((history[:kept], True), (history, False)):
        ((what, remedy),) = warnings_of(of(result, stopped, **{**GOOD, "converged": False}))
        assert what == "It did not converge."
        assert ("still falling" in remedy) == falling
    unseen = of(result, history.assign(held_out=np.where(history["rank"] > 0, np.nan, 1.0)), **GOOD)
    assert warnings_of(unseen) == []
    unseen.summary["settings"] = {"stop": "residual"}
    assert [what for what, _ in warnings_of(unseen)] == ["Nothing was held out."]


def test_warnings_of_rank(result):
    for rank, words in ((0, "The rank is 0"), (1, "The rank is 1")):
        assert [words in what for what, _ in warnings_of(of(result, right=result.right[:, :rank], **GOOD))] == [True]


def test_a_warning_of_filled_zeros(result):
    nothing = np.zeros((0, 2))
    compared = Comparison(np.zeros(0, int), np.zeros(0, int), pd.DataFrame(), 0.2, nothing, nothing, ((0, 0), (0, 0)))
    assert ["20% of the zeros" in what for what, _ in warnings_of(of(result, **GOOD), compared)] == [True]


def test_it_is_out_of_core(result, monkeypatch):
    """Never more rows in dense form than the panel allows."""
    from scialm_dask.report import comparison as module

    monkeypatch.setattr(module, "_PANEL_BYTES", 4 * 60 * 7)
    heights, product = [], Imputation.product
    monkeypatch.setattr(Imputation, "product", lambda self, left: heights.append(len(left)) or product(self, left))
    panelled = compare(result, ExpressionMatrix.of(COUNTS, blocks=3))
    assert max(heights) == 7
    monkeypatch.undo()
    whole = compare(result, ExpressionMatrix.of(sp.csr_matrix(COUNTS)))
    np.testing.assert_allclose(panelled.genes, whole.genes, rtol=1e-5)
    np.testing.assert_allclose(panelled.after, whole.after, atol=1e-3)
