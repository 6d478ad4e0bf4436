import html

import anndata
import cloudpickle
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, Imputation, InputError, impute
from scialm_dask.data.csr import RowBlocks
from scialm_dask.events import Note
from scialm_dask.report.diagnostics import warnings_of

N_CELLS, N_GENES = 240, 90
NAMES = np.array([f"gene{j}" for j in range(N_GENES)])


@pytest.fixture(scope="module")
def cells():
    return low_rank_counts(N_CELLS, N_GENES, rank=3, density=0.5, seed=3)


@pytest.fixture(scope="module")
def fitted(cells):
    result = impute(ExpressionMatrix.of(cells[:200]), preset="complete", max_rank=6)
    result.var = pd.DataFrame(index=NAMES)
    return result


def annotated(X, names=NAMES):
    return anndata.AnnData(
        X, obs=pd.DataFrame(index=[f"c{i}" for i in range(X.shape[0])]), var=pd.DataFrame(index=names)
    )


def test_new_cells_resemble_what_the_fit_says_of_them(cells, fitted):
    again = fitted.transform(cells[:200])
    assert again.shape == fitted.shape
    one, other = again[:, :], fitted[:, :]
    assert np.linalg.norm(one - other) < 0.15 * np.linalg.norm(other)


def test_blocks_change_nothing(cells, fitted):
    matrix = ExpressionMatrix.of(cells[200:])
    whole = fitted.transform(matrix.with_blocks(RowBlocks((0, 40))))
    cut = fitted.transform(matrix.with_blocks(RowBlocks((0, 1, 17, 40))))
    np.testing.assert_array_equal(whole.left.compute(), cut.left.compute())


def test_what_blocks_share_travels_once(cells, fitted):
    matrix = ExpressionMatrix.of(cells[200:]).with_blocks(RowBlocks(tuple(range(41))))
    tasks = dict(fitted.transform(matrix).left.__dask_graph__()).values()
    sizes = sorted(len(cloudpickle.dumps(task)) for task in tasks)
    assert len(sizes) > 40
    assert sizes[-2] < 2000 < 10 * sizes[-2] < sizes[-1]


def test_genes_are_matched_by_name(cells, fitted):
    new = cells[200:]
    order = np.random.default_rng(0).permutation(N_GENES)
    shuffled = sp.hstack([new[:, order], sp.csr_matrix(np.ones((40, 2)))]).tocsr()
    straight = fitted.transform(annotated(new))
    other = fitted.transform(annotated(shuffled, [*NAMES[order], "unknown1", "unknown2"]))
    np.testing.assert_allclose(other.left.compute(), straight.left.compute(), rtol=1e-3, atol=1e-4)
    assert other.summary["n_genes_matched"] == N_GENES
    assert other.summary["n_genes_not_in_fit"] == 2


@pytest.mark.parametrize("preset", ["complete", "denoise"])
def test_genes_may_be_missing(cells, preset):
    """What is said of them is on their scale, though the totals of the new cells lack their counts."""
    fitted = impute(ExpressionMatrix.of(cells[:200]), preset=preset, max_rank=6)
    fitted.var = pd.DataFrame(index=NAMES)
    new = cells[200:]
    whole, fifth = fitted.transform(annotated(new)), fitted.transform(annotated(new[:, ::5], NAMES[::5]))
    assert fifth.shape == (40, N_GENES)
    assert fifth.summary["n_genes_matched"] == N_GENES // 5
    missing = np.arange(N_GENES) % 5 > 0  # of which nothing is known but what the others say
    one, other = np.maximum(whole.left.compute() @ whole.right.T, 0), fifth[:, :]
    assert np.linalg.norm(other[:, missing] - one[:, missing]) < 0.5 * np.linalg.norm(one[:, missing])
    assert other[:, missing].mean() == pytest.approx(one[:, missing].mean(), rel=0.1)


def test_genes_in_another_order_change_nothing():
    """Of more genes than a tile of the kernels holds, which need ascending indices."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(2, 1, (60, 4)) @ rng.gamma(1, 0.5, (4, 5000))).astype(np.float32)
    cells = anndata.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=[f"gene{j}" for j in range(5000)]))
    fitted = impute(cells, max_rank=4, key_added=None)
    shuffled = cells[:, rng.permutation(5000)].copy()
    np.testing.assert_allclose(fitted.transform(shuffled)[:, :], fitted.transform(cells)[:, :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_matched", "few"), [(N_GENES, False), (45, False), (44, True), (6, True)])
def test_less_than_half_of_the_genes_is_said(cells, fitted, n_matched, few):
    told = []
    some = fitted.transform(annotated(cells[200:, :n_matched], NAMES[:n_matched]), listen=told.append)
    words = [event.words for event in told if isinstance(event, Note)]
    warnings = [f"{what} {why}" for what, why in warnings_of(some) if "Few genes" in what]
    assert len(words) == len(warnings) == few
    assert ("few_genes" in some.summary) == few
    for line in (*words, *warnings):
        assert f"{n_matched} of the fit's 90 genes match" in line
        assert "\n" not in line
    assert some.summary["n_genes_matched"] == n_matched


def test_fewer_genes_than_the_rank_are_refused(cells, fitted):
    few = fitted.rank - 1
    with pytest.raises(InputError, match=f"{few} of {few} genes are in the fit.*{fitted.rank} at least"):
        fitted.transform(annotated(cells[200:, :few], NAMES[:few]))


def test_a_cell_without_entries_is_zero(cells, fitted):
    new = cells[200:].tolil()
    new[7] = 0
    assert not fitted.transform(new.tocsr())[7].any()


def test_a_result_from_disk_transforms_alike(cells, fitted, tmp_path):
    fitted.to_zarr(tmp_path / "fit.zarr")
    opened = Imputation.open(tmp_path / "fit.zarr")
    np.testing.assert_array_equal(
        opened.transform(cells[200:]).left.compute(), fitted.transform(cells[200:]).left.compute()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X: annotated(X, [f"ENSG{j}" for j in range(N_GENES)]), "0 of 90 genes are in the fit"),
        (lambda X: annotated(X, [*NAMES[:-1], NAMES[0]]), "several genes are named gene0"),
        (lambda X: X[:, 1:], "89 genes without names"),
        (lambda X: X * 0.37, "are not raw counts"),
        (lambda X: X * 0, "no entry of the sampled cells"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_unusable_cells_are_refused(cells, fitted, change, message):
    with pytest.raises(InputError, match=message):
        fitted.transform(change(cells[200:]))


def test_the_cells_of_a_denoised_fit_are_denoised_alike(cells, tmp_path):
    """Weights of components and of genes apply to them; what is kept of the counts is of their own."""
    fitted = impute(ExpressionMatrix.of(cells), preset="denoise", max_rank=6)
    fitted.to_zarr(tmp_path / "fit.zarr")
    expected = fitted[:, :]
    for fit in (fitted, Imputation.open(tmp_path / "fit.zarr")):
        again = fit.transform(cells)
        assert np.linalg.norm(again[:, :] - expected) < 0.05 * np.linalg.norm(expected)
        np.testing.assert_allclose(again[5, :], again[:, :][5], rtol=1e-5)
        assert again.embedding.shape == fitted.embedding.shape


def test_new_cells_keep_their_share_of_their_own_counts(cells):
    fitted = impute(ExpressionMatrix.of(cells[:200]), preset="denoise", max_rank=6)
    fitted.residual_weight[:] = 1
    np.testing.assert_allclose(fitted.transform(cells[200:])[:, :], cells[200:].toarray(), atol=1e-4)
    fitted.var = pd.DataFrame(index=NAMES)
    order = np.random.default_rng(0).permutation(N_GENES)[:50]
    some = fitted.transform(annotated(cells[200:, order], NAMES[order]))[:, :]
    np.testing.assert_allclose(some[:, order], cells[200:, order].toarray(), atol=1e-4)


def test_a_fit_of_observed_zeros_observes_those_of_new_cells(cli, store_of, cells, tmp_path):
    train, new = store_of(cells[:200], "train.zarr"), store_of(cells[200:], "new.zarr")
    words = ("--max-rank", 6, "--max-iterations", 8, "--observed", "finite", "--quiet")
    assert cli("impute", train, tmp_path / "fit.zarr", *words).exit_code == 0
    assert cli("transform", tmp_path / "fit.zarr", new, tmp_path / "out.zarr", "--quiet").exit_code == 0
    fit = Imputation.open(tmp_path / "fit.zarr")
    expected = fit.transform(ExpressionMatrix.open(new, observed="finite"))[:, :]
    np.testing.assert_allclose(Imputation.open(tmp_path / "out.zarr")[:, :], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="opened with observed='nonzero', and 'finite' is needed"):
        fit.transform(ExpressionMatrix.open(new))


def test_command(cli, store_of, cells, tmp_path):
    train, new = store_of(cells[:200], "train.zarr"), store_of(cells[200:], "new.zarr")
    assert (
        cli("impute", train, tmp_path / "fit.zarr", "--preset", "complete", "--max-rank", 6, "--quiet").exit_code == 0
    )
    done = cli("transform", tmp_path / "fit.zarr", new, tmp_path / "out.zarr")
    assert done.exit_code == 0, done.output
    assert Imputation.open(tmp_path / "out.zarr").shape == (40, N_GENES)
    assert "few genes" not in done.output


def test_command_says_that_few_genes_match(cli, store_of, cells, tmp_path):
    train, new = store_of(cells[:200], "train.zarr"), store_of(cells[200:, :20], "new.zarr")
    assert (
        cli("impute", train, tmp_path / "fit.zarr", "--preset", "complete", "--max-rank", 6, "--quiet").exit_code == 0
    )
    done = cli("transform", tmp_path / "fit.zarr", new, tmp_path / "out.zarr")
    assert done.exit_code == 0, done.output
    assert f"{new}:X: 20 of the fit's 90 genes match" in done.stderr
    page = tmp_path / "report.html"
    assert cli("report", tmp_path / "out.zarr", "-o", page, "--quiet").exit_code == 0
    assert "20 of the fit's 90 genes match" in html.unescape(page.read_text())
