"""Wherever two things are put together, cells and genes are matched by their names, or refused."""

import anndata
import numpy as np
import pandas as pd
import pytest

from scialm_dask import ExpressionMatrix, Imputation, InputError, biological_zeros, impute
from scialm_dask.data.annotated import aligned, as_matrix, match_names
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.metrics import gene_scores, score_held_out
from scialm_dask.report.diagnostics import compare

RNG = np.random.default_rng(1)


def shuffled(path, to):
    """Write the cells and genes of a store in another order."""
    adata = anndata.read_zarr(path)
    order = RNG.permutation(adata.n_obs), RNG.permutation(adata.n_vars)
    adata[order[0]][:, order[1]].copy().write_h5ad(to)
    return str(to)


@pytest.fixture
def masked(counts, store_of, tmp_path):
    mask(store_of(counts), tmp_path / "masked.zarr", seed=0)
    return str(tmp_path / "masked.zarr")


@pytest.fixture
def result(masked):
    return impute(masked, preset="paper", max_iterations=5, max_rank=4)


def named(n, letter):
    return pd.Index([f"{letter}{i}" for i in range(n)])


def test_names_in_another_order_are_found():
    order = RNG.permutation(30)
    names = named(30, "c")
    np.testing.assert_array_equal(match_names(names[order], names, "cell", "it"), np.argsort(order))
    assert match_names(names, names, "cell", "it") is None
    numbers = pd.RangeIndex(30).astype(str)
    assert match_names(names, numbers, "cell", "it") is None
    assert match_names(numbers, names, "cell", "it") is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b"], "it: 2 cells where there should be 3"),
        (["a", "b", "d"], "it: cell 2 is 'd' where 'c' is expected"),
        (["a", "a", "c"], "it: cell 1 is 'a' where 'b' is expected"),
    ],
)
def test_other_names_are_refused(names, words):
    with pytest.raises(InputError, match=words):
        match_names(pd.Index(names), pd.Index(["a", "b", "c"]), "cell", "it")


@pytest.mark.parametrize("read", [lambda path: ExpressionMatrix.open(path, blocks=7), anndata.read_h5ad])
def test_a_matrix_is_put_in_order(counts, store_of, tmp_path, read):
    path = store_of(counts)
    other = as_matrix(read(shuffled(path, tmp_path / "other.h5ad")))
    back = aligned(other, ExpressionMatrix.open(path))
    assert list(back.obs.index) == list(ExpressionMatrix.open(path).obs.index)
    assert list(back.obs["batch"]) == list(ExpressionMatrix.open(path).obs["batch"])
    np.testing.assert_array_equal(back.to_dask().compute().toarray(), counts.toarray())


@pytest.mark.parametrize("dense", [False, True])
def test_masked_entries_in_another_order_have_the_same_scores(result, masked, tmp_path, dense):
    result.to_zarr(tmp_path / "result.zarr", dense=dense)
    stored = Imputation.open(tmp_path / "result.zarr")
    scores = [
        score_held_out(stored, ExpressionMatrix.open(path, "held_out"), ExpressionMatrix.open(path))
        for path in (masked, shuffled(masked, tmp_path / "other.h5ad"))
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_a_source_in_another_order_is_compared_by_names(result, masked, tmp_path):
    other = ExpressionMatrix.open(shuffled(masked, tmp_path / "other.h5ad"))
    pd.testing.assert_frame_equal(compare(result, other).genes, compare(result, ExpressionMatrix.open(masked)).genes)


def test_observed_entries_are_kept_by_names(result, masked, tmp_path):
    for name, path in (("a", masked), ("b", shuffled(masked, tmp_path / "other.h5ad"))):
        result.to_zarr(tmp_path / f"{name}.zarr", dense=True, keep_observed=ExpressionMatrix.open(path))
    a, b = (anndata.read_zarr(tmp_path / f"{name}.zarr").X for name in "ab")
    np.testing.assert_array_equal(a, b)


def test_observed_entries_of_more_cells_are_refused(result, counts, tmp_path):
    twice = ExpressionMatrix.of(np.vstack([counts.toarray()] * 2))
    with pytest.raises(InputError, match="240 cells × 40 genes, but 120 × 40 are expected"):
        result.to_zarr(tmp_path / "r.zarr", dense=True, keep_observed=twice)
    assert not (tmp_path / "r.zarr").exists()


def test_zeros_of_a_matrix_in_another_order_are_refused(result, masked, tmp_path):
    rule = biological_zeros(ExpressionMatrix.open(shuffled(masked, tmp_path / "other.h5ad")))
    with pytest.raises(InputError, match="in another order"):
        result.to_zarr(tmp_path / "r.zarr", preserve_zeros=rule)


def test_factors_are_added_to_the_cells_that_they_are_of(result, masked):
    adata = anndata.read_zarr(masked)
    order = RNG.permutation(adata.n_obs)
    adata = adata[order].copy()[:, np.arange(40)[::-1]].copy()
    result.add_to(adata)
    dense = np.maximum(adata.obsm["scialm_factors"] @ adata.varm["scialm_factors"].T, 0)
    np.testing.assert_allclose(dense, result.to_dask().compute()[order][:, ::-1], atol=1e-5)
    adata.obs_names = named(adata.n_obs, "other")
    with pytest.raises(InputError, match="is expected; give the same cells"):
        result.add_to(adata)


def test_a_repeated_name_is_ambiguous_and_no_name_is_no_cell(counts):
    names = ["A", "A", *(f"gene{j}" for j in range(2, 40))]
    table = pd.DataFrame(counts.toarray(), columns=names)
    result = impute(table, preset="paper", max_iterations=3, max_rank=3)
    with pytest.raises(InputError, match="several genes are named 'A'; pick one by its number"):
        result["0", "A"]
    assert result["0", "gene2"] == result[0, 2]
    assert result[[], :].shape == (0, 40)
    assert result[:3, []].shape == (3, 0)


def test_genes_are_scored_by_their_names(counts):
    truth = pd.DataFrame(counts.toarray(), index=named(120, "cell"), columns=named(40, "gene"))
    other = truth.iloc[RNG.permutation(120), RNG.permutation(40)]
    scores = gene_scores(truth, other)
    assert scores.relative_error == 0
    assert scores.pearson[1:13] == pytest.approx(np.ones(12))
    with pytest.raises(InputError, match="recovered: gene 0 is 'other' where 'gene0' is expected"):
        gene_scores(truth, truth.rename(columns={"gene0": "other"}))
