"""The report: what it says, that it is self-contained, safe and the same every time; and the numbers behind it."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, Imputation, InputError, PooledALS, impute, write_report
from scialm_dask.errors import OutputError
from scialm_dask.pooled.design import random_pools
from scialm_dask.report.diagnostics import Comparison, compare, sample, warnings_of
from scialm_dask.report.plotting import Colouring

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
    obs = pd.DataFrame({"<style>": np.where(np.arange(90) % 4, "<i>a", "b&amp;")}, index=[f"c{i}" for i in range(90)])
    return anndata.AnnData(COUNTS.astype(np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(NAMES, dtype=object)))


@pytest.fixture(scope="module")
def result(strange):
    return impute(strange, preset="complete", validation=0.1)


def test_the_command(cli, store_of, tmp_path):
    path, store, page = store_of(COUNTS), tmp_path / "r.zarr", tmp_path / "r.html"
    assert cli("impute", path, store, "--preset", "complete", "--validation", "0.1").exit_code == 0
    done = cli("report", store, "-o", page, "--color", "batch", "--json")
    assert done.exit_code == 0, done.output
    read = Page(page)
    headings = "Warnings Error Rank Singular Levels genes Cells Summary Settings".split()
    assert [heading for heading in headings if heading not in read.text] == []
    assert "Coloured by batch" in read.text
    assert [len(image["alt"].split()) > 10 for image in read.all("img")] == [True] * 6
    assert str(path) in read.text
    assert re.search(
        rf"Imputed on \d{{4}}-\d\d-\d\d \d\d:\d\d UTC by scialm-dask impute {path} {store} --preset complete", read.text
    )
    assert f"of at most {Imputation.open(store).summary['settings']['max_rank']}" in read.text
    again = cli("report", store, "-o", page)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    first = page.read_bytes()
    assert cli("report", store, "-o", page, "--color", "batch", "--overwrite").exit_code == 0
    assert page.read_bytes() == first


def test_it_is_self_contained_and_safe(result, strange, tmp_path, monkeypatch):
    monkeypatch.setattr("scialm_dask.report.report._MOST_GENES", 60)
    write_report(result, tmp_path / "r.html", source=strange, color="<style>")
    page = Page(tmp_path / "r.html")
    assert page.all("script") == []
    assert page.all("b") == []
    assert len(page.all("style")) == 1
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]
    for name, attributes in page.elements:
        assert not {"href", "action", "data"} & attributes.keys() or name == "link"
        assert not [key for key in attributes if key.startswith("on")]
        pictures = [attributes[key] for key in ("src", "srcset") if key in attributes]
        assert all(picture.startswith("data:image/svg+xml;base64,") for picture in pictures)
        for picture in pictures:
            ElementTree.fromstring(b64decode(picture.partition(",")[2]))  # is XML, whatever genes are called
    assert not re.findall(r"url\(|@import", page.source)
    assert "default-src 'none'" in next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    for shown in ("<script>alert(1)</script>", "$x^2$", r"bell\x07", r"half\ud800", "<style>", "<i>a", "b&amp;"):
        assert shown in page.text
    assert len(page.all("img")) == len(page.all("source")) == 6


@pytest.mark.parametrize("gene", NAMES[:5])
def test_cells_are_coloured_by_a_gene(result, strange, tmp_path, gene, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "scialm_dask.report.plotting.cells",
        lambda points, shares, colouring: drawn.append(colouring) or (lambda axes, colours: None),
    )
    write_report(result, tmp_path / "r.html", source=strange, color=gene)
    before, after = (colouring.values for colouring in drawn)
    number = NAMES.index(gene)
    np.testing.assert_array_equal(before, COUNTS.toarray()[:, number])
    np.testing.assert_allclose(after, result.to_dask().compute()[:, number], rtol=1e-5)


def test_genes_are_shown_and_found_by_their_symbols(tmp_path):
    ids, symbols = [f"ENSG{j:011d}" for j in range(60)], [f"gene{j}" for j in range(59)] + ["gene58"]
    cells = anndata.AnnData(COUNTS.astype(np.float32), var=pd.DataFrame({"feature_name": symbols}, index=ids))
    result = impute(cells, preset="complete", validation=0.1, max_iterations=8)
    write_report(result, tmp_path / "r.html", source=cells, color="gene7")
    changed = compare(result, ExpressionMatrix.of(COUNTS)).genes
    noisiest = int((changed["change"] / changed["mean_observed"] ** 0.5).to_numpy().argmax())
    assert f"{symbols[noisiest]} {ids[noisiest]}" in Page(tmp_path / "r.html").text
    with pytest.raises(InputError, match=f"gene58: 2 genes are called so; name one of {ids[58]}, {ids[59]}"):
        write_report(result, tmp_path / "r.html", source=cells, color="gene58", overwrite=True)


def test_without_the_source_it_says_so(result, tmp_path):
    write_report(result, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "cannot be read" in page.text
    assert "Name it with --source" in page.text
    assert len(page.all("img")) == 3


def test_what_is_refused(result, strange, store_of, tmp_path):
    with pytest.raises(InputError, match="nothing: neither a gene nor a column of obs; its columns are: <style>"):
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
    fit = impute(strange[:60].copy(), preset="complete", validation=0.1, max_iterations=12)
    P = random_pools(60, 20, density=0.3, random_state=0)
    pooled = PooledALS(3, max_sweeps=5).fit(COUNTS.toarray() @ P, P).to_imputation()
    general = impute(COUNTS.toarray() + 1.0, observed="finite", stop="residual", max_iterations=12)
    for kind, words in {
        fit.transform(strange[60:].copy()): "imputed with an earlier fit",
        pooled: "The minimised objective",
        general: "Zeros of this matrix are observed values",
    }.items():
        told = write_report(kind, tmp_path / "r.html", overwrite=True)
        page = Page(tmp_path / "r.html")
        assert words in page.text
        assert f"{kind.shape[0]:,} cells × {kind.shape[1]:,} genes" in page.text
        assert [fact for fact in told["warnings"] if fact not in page.text] == []
    assert "relative, on observed entries as scaled" in page.text


def test_a_denoised_result(result, strange, tmp_path):
    """What unseen molecules tell is shown; there is no history."""
    errors = {"observed": 0.588, "gene_mean": 0.712, "imputed": 0.53}
    values = result.summary["singular_values"]
    denoised = of(
        result,
        pd.DataFrame(),
        unseen=errors,
        residual_share=0.31,
        verdict="Imputation helps <here>.",
        held_out_error=None,
        weights=[0.9] * len(values),
        chosen_iteration=None,
        command="scialm-dask impute a b",
        **GOOD,
    )
    write_report(denoised, tmp_path / "r.html", source=strange)
    page = Page(tmp_path / "r.html")
    for words in (
        "0.530 0.588 as observed, 0.712 by gene means",
        "31%",
        "Imputation helps <here>.",
        "recurs in unseen molecules.",
    ):
        assert words in page.text
    assert "by scialm-dask impute a b" in page.text
    assert len(page.all("img")) == 4  # singular values, levels, cells before and after
    assert warnings_of(denoised) == []
    at_the_limit = denoised.summary["settings"] | {"max_rank": denoised.rank}
    denoised.summary["settings"] = at_the_limit
    assert len(warnings_of(denoised)) == 1  # even the last component is mostly structure
    denoised.summary["weights"] = list(np.linspace(1, 0.1, len(values)))
    assert warnings_of(denoised) == []
    denoised.summary["unseen"] = {"observed": 0.5, "gene_mean": 0.712, "imputed": 0.53}
    (what, _), *_ = warnings_of(denoised)
    assert what == "Unseen molecules are predicted no better than by the raw counts."


def test_what_denoising_tells(tmp_path):
    result = impute(COUNTS, preset="denoise")
    write_report(result, tmp_path / "r.html", source=COUNTS)
    page, errors = Page(tmp_path / "r.html"), result.summary["unseen"]
    assert f"Does imputation help? {result.summary['verdict']}" in page.text
    assert f"{errors['imputed']:.3f} {errors['observed']:.3f} as observed" in page.text
    assert len(page.all("img")) == 4


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


def test_colouring():
    numbers = Colouring.of("depth", pd.Series([np.nan, *range(100)]))
    assert not numbers.groups
    np.testing.assert_array_equal(numbers.values, [np.nan, *range(100)])
    assert not Colouring.of("depth", pd.Series([None, *range(100)], dtype="Int64")).groups
    words = Colouring.of("type", pd.Series([*"aaabbc", None], dtype="category"))
    assert list(words.groups) == ["a", "b", "c", "unknown"]
    assert list(words.values) == [0, 0, 0, 1, 1, 2, 3]
    many = Colouring.of("type", pd.Series([f"t{n:02d}" for n in range(14) for _ in range(14 - n)]))
    assert many.groups[-1] == "5 others"
    assert len(many.groups) == 10
    assert list(Colouring.of("flag", pd.Series([True, False, True])).groups) == ["True", "False"]


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
    from scialm_dask.report import diagnostics as module

    monkeypatch.setattr(module, "_PANEL_BYTES", 4 * 60 * 7)
    heights, rows = [], Imputation.__getitem__
    monkeypatch.setattr(Imputation, "__getitem__", lambda self, cells: heights.append(len(cells)) or rows(self, cells))
    panelled = compare(result, ExpressionMatrix.of(COUNTS, blocks=3))
    assert max(heights) == 7
    monkeypatch.undo()
    whole = compare(result, ExpressionMatrix.of(sp.csr_matrix(COUNTS)))
    np.testing.assert_allclose(panelled.genes, whole.genes, rtol=1e-5)
    np.testing.assert_allclose(panelled.after, whole.after, atol=1e-3)
