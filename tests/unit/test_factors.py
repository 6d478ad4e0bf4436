"""The result on disk and in Python: factors that AnnData and scanpy open, multiplied where they are asked for."""

import gc
import json
import os
import weakref
from pathlib import Path

import anndata
import numpy as np
import pytest
import scanpy as sc
import zarr

from scialm_dask import ExpressionMatrix, Imputation, InputError, impute
from scialm_dask.errors import OutputError
from scialm_dask.evaluate.metrics import score_held_out
from scialm_dask.solve import stored

SETTINGS = {"preset": "paper", "max_iterations": 8, "max_rank": 6}


@pytest.fixture
def matrix(counts, store_of):
    return ExpressionMatrix.open(store_of(counts, "source.zarr"), blocks=4)


@pytest.fixture
def result(matrix):
    return impute(matrix, **SETTINGS)


@pytest.fixture
def dense(result):
    return result.to_dask().compute()


def test_the_matrix_is_the_clipped_product(result, dense, counts):
    product = result.left.compute() @ result.right.T
    assert product.min() < 0
    assert dense.dtype == np.float32
    np.testing.assert_allclose(dense, np.maximum(product, 0), rtol=1e-5, atol=1e-6)
    assert result.shape == dense.shape == counts.shape
    assert result.rank == result.right.shape[1] == result.summary["rank"] <= 6
    assert repr(result) == f"Imputation of 120 cells × 40 genes, rank {result.rank}"
    assert result.to_dask().chunks[1] == (40,)


def test_every_key_of_the_summary_is_described(result, matrix, tmp_path):
    words = Path(__file__).parents[2].joinpath("notebooks", "site", "summary.md").read_text()
    for summary in (result.to_zarr(tmp_path / "r.zarr"), result.transform(matrix).summary):
        assert [key for key in summary if f"`{key}`" not in words] == []


def test_empty_cells_and_genes_are_kept_and_zero(result, dense, counts):
    empty_cells, empty_genes = counts.getnnz(axis=1) == 0, counts.getnnz(axis=0) == 0
    assert not dense[empty_cells].any()
    assert not dense[:, empty_genes].any()
    assert result.summary["n_empty_cells"] == empty_cells.sum() >= 2
    assert result.summary["n_empty_genes"] == empty_genes.sum() >= 2


def test_the_lazy_matrix_holds_the_factors_alone(matrix, dense):
    """Whatever is in its tasks goes to the workers of a cluster with them."""
    result = impute(matrix, **SETTINGS)
    lazy, gone = result.to_dask(), weakref.ref(result)
    del result
    gc.collect()
    assert gone() is None
    np.testing.assert_array_equal(lazy.compute(), dense)


def test_anndata_and_scanpy_open_it(result, dense, tmp_path):
    result.to_zarr(tmp_path / "r.zarr")
    adata = anndata.read_zarr(tmp_path / "r.zarr")
    assert list(adata.obs_names[:2]) == ["cell0", "cell1"]
    assert list(adata.var_names[:2]) == ["gene0", "gene1"]
    assert adata.obs["batch"].dtype == "category"
    assert adata.X is None
    np.testing.assert_allclose(
        np.maximum(adata.obsm["scialm_factors"] @ adata.varm["scialm_factors"].T, 0), dense, rtol=1e-5, atol=1e-6
    )
    history = adata.uns["scialm"]["history"]
    assert set(history) == {"iteration", "rank", "threshold", "residual", "held_out", "passes"}
    assert list(history["iteration"]) == list(range(1, 9))
    assert json.loads(str(adata.uns["scialm"]["summary"]))["settings"]["max_rank"] == 6
    adata = sc.read_zarr(tmp_path / "r.zarr") if hasattr(sc, "read_zarr") else adata
    sc.pp.neighbors(adata, n_neighbors=5, use_rep="X_scialm")
    assert adata.obsp["connectivities"].shape == (120, 120)


def test_what_is_opened_is_what_was_written(result, dense, tmp_path):
    result.to_zarr(tmp_path / "r.zarr")
    opened = Imputation.open(tmp_path / "r.zarr")
    np.testing.assert_array_equal(opened.left.compute(), result.left.compute())
    np.testing.assert_array_equal(opened.right, result.right)
    np.testing.assert_allclose(opened.to_dask().compute(), dense, rtol=1e-5, atol=1e-6)
    assert opened.summary == json.loads(json.dumps(result.summary)) | {"X": None}
    assert opened.history.equals(result.history)
    assert opened.obs.equals(result.obs)
    opened.to_zarr(tmp_path / "again.zarr")
    np.testing.assert_array_equal(Imputation.open(tmp_path / "again.zarr").right, result.right)


CELLS = [3, -1, "cell7", np.int64(9), slice(2, 30, 7), [5, 1, 5], ["cell9", "cell2"], np.arange(4), slice(None)]


@pytest.mark.parametrize("cells", CELLS, ids=str)
@pytest.mark.parametrize(
    "genes", [4, "gene4", slice(None, 5), [0, 39], ["gene1", "gene0"], np.arange(40) % 3 == 0], ids=str
)
def test_indexing_by_name_position_slice_and_mask(result, dense, cells, genes):
    def positions(key, stem):
        number = lambda name: int(name.removeprefix(stem))  # noqa: E731
        if isinstance(key, str):
            return number(key)
        return [number(k) if isinstance(k, str) else k for k in key] if isinstance(key, list) else key

    expected = dense[positions(cells, "cell")][..., positions(genes, "gene")]
    got = result[cells, genes]
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_cells_alone_give_all_genes(result, dense):
    np.testing.assert_allclose(result[["cell3"]], dense[[3]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result["cell3"], dense[3], rtol=1e-5, atol=1e-6)
    mask = (result.obs["batch"] == "a").to_numpy()
    np.testing.assert_allclose(result[mask], dense[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", [("cell3", "Gapdh"), (["cell3", "nobody"], 1), (120, 0), (0, -41), ([0, 500], 0)])
def test_what_is_not_there_is_named(result, key):
    with pytest.raises((InputError, IndexError), match=r"'Gapdh'|'nobody'|120|-41|500"):
        result[key]


def test_a_mask_of_the_wrong_length_is_refused(result):
    with pytest.raises(IndexError):
        result[np.ones(7, bool)]


def test_dense_writing_and_keeping_what_was_observed(result, dense, matrix, counts, tmp_path):
    result.to_zarr(tmp_path / "r.zarr", dense=True)
    X = anndata.read_zarr(tmp_path / "r.zarr").X
    np.testing.assert_allclose(X, dense, rtol=1e-5, atol=1e-6)
    result.to_zarr(tmp_path / "k.zarr", dense=True, keep_observed=matrix)
    X = anndata.read_zarr(tmp_path / "k.zarr").X
    known = counts.toarray() > 0
    np.testing.assert_array_equal(X[known], counts.toarray()[known])
    np.testing.assert_allclose(X[~known], dense[~known], rtol=1e-5, atol=1e-6)


def test_options_that_do_not_go_together_are_refused(result, matrix, tmp_path):
    for options, message in (
        ({"dense": True, "preserve_zeros": object()}, "both say what X is to be; give one of them"),
        ({"keep_observed": matrix}, "keep_observed is about X, and none is written"),
        ({"preserve_zeros": True}, r"preserve_zeros is True; give the rule .* biological_zeros\(matrix\)"),
    ):
        with pytest.raises(InputError, match=message):
            result.to_zarr(tmp_path / "r.zarr", **options)
    assert not (tmp_path / "r.zarr").exists()


def test_what_was_written_as_x_is_on_record_and_scored(result, dense, matrix, counts, tmp_path):
    """The mean of X over the mean observed, and the scores, are those of X, not of the factors."""
    path, observed = tmp_path / "r.zarr", counts.toarray()
    for options in ({}, {"dense": True}, {"dense": True, "keep_observed": matrix}):
        told = result.to_zarr(path, overwrite=True, **options)["X"]
        opened, X = Imputation.open(path), anndata.read_zarr(path).X
        assert opened.summary["X"] == told
        scores = score_held_out(opened, matrix, matrix)
        if not options:
            assert (told, opened.X) == (None, None)
            X = dense
        else:
            assert (told["written"], told["keep_observed"]) == ("dense", "keep_observed" in options)
            assert (
                opened.mean_ratio == told["mean_over_observed"] == pytest.approx(X.mean() / observed.mean(), rel=1e-5)
            )
        seen = observed > 0
        assert scores["mse"] == pytest.approx(np.square(X[seen] - observed[seen]).mean(), rel=1e-4, abs=1e-9)


def test_factors_put_beside_another_x_are_scored_themselves(result, dense, matrix, counts, tmp_path):
    result.to_zarr(tmp_path / "r.zarr", dense=True)
    cells = anndata.AnnData(counts.astype(np.float32), obs=result.obs, var=result.var)
    Imputation.open(tmp_path / "r.zarr").add_to(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    opened, seen = Imputation.open(tmp_path / "cells.h5ad"), counts.toarray() > 0
    assert opened.X is None
    error = np.square(dense[seen] - counts.toarray()[seen]).mean()
    assert score_held_out(opened, matrix, matrix)["mse"] == pytest.approx(error, rel=1e-4)


def test_dense_chunks_are_whole_rows_and_all_written(result, tmp_path):
    result.to_zarr(tmp_path / "r.zarr", dense=True)
    X = zarr.open_group(tmp_path / "r.zarr", mode="r")["X"]
    assert X.chunks[1] == 40
    assert X.nchunks_initialized == X.nchunks
    assert ExpressionMatrix.open(tmp_path / "r.zarr").shape == (120, 40)  # which refuses lost chunks


def test_nothing_is_there_until_it_is_complete(result, tmp_path, monkeypatch):
    seen = []
    write = stored.write_dense

    def watched(*args):
        total = write(*args)
        seen.append((tmp_path / "r.zarr").exists())
        return total

    monkeypatch.setattr(stored, "write_dense", watched)
    result.to_zarr(tmp_path / "r.zarr", dense=True)
    assert seen == [False]
    monkeypatch.setattr(stored, "write_dense", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.to_zarr(tmp_path / "bad.zarr", dense=True)
    with pytest.raises(ZeroDivisionError):
        result.to_zarr(tmp_path / "r.zarr", dense=True, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["r.zarr", "source.zarr"]
    assert Imputation.open(tmp_path / "r.zarr").rank == result.rank


def test_overwriting_must_be_asked_for(result, tmp_path):
    result.to_zarr(tmp_path / "r.zarr")
    with pytest.raises(OutputError, match="exists already"):
        result.to_zarr(tmp_path / "r.zarr")
    Imputation.open(tmp_path / "r.zarr").to_zarr(tmp_path / "copy.zarr")
    result.to_zarr(tmp_path / "r.zarr", overwrite=True)
    with pytest.raises(OutputError, match="overlaps the input"):
        result.to_zarr(tmp_path / "source.zarr", overwrite=True, sources=(tmp_path / "source.zarr",))


def test_a_result_may_replace_itself(result, tmp_path):
    """The factors are read from what is replaced, which goes only when the new one is in place."""
    result.to_zarr(tmp_path / "r.zarr")
    left = result.left.compute()
    Imputation.open(tmp_path / "r.zarr").to_zarr(tmp_path / "r.zarr", dense=True, overwrite=True)
    np.testing.assert_array_equal(Imputation.open(tmp_path / "r.zarr").left.compute(), left)


def test_what_is_no_result_is_refused(matrix, tmp_path):
    zarr.create_array(tmp_path / "bare.zarr", data=np.ones((3, 2)))
    (tmp_path / "text").write_text("hello")
    for path, message in [
        (tmp_path / "source.zarr", "not a result of this version"),
        (tmp_path / "bare.zarr", "not a result of this version"),
        (tmp_path / "none.zarr", "no such file"),
        (tmp_path / "text", "not an HDF5 file"),
    ]:
        with pytest.raises(InputError, match=message):
            Imputation.open(path)


def test_scratch_on_disk_is_gone_with_the_result(matrix, tmp_path):
    (tmp_path / "scratch").mkdir()
    result = impute(matrix, scratch=f"zarr:{tmp_path / 'scratch'}", **SETTINGS)
    (folder,) = os.listdir(tmp_path / "scratch")
    assert folder.startswith("scialm-")
    assert result[3].shape == (40,)
    result.to_zarr(tmp_path / "r.zarr")
    del result
    assert os.listdir(tmp_path / "scratch") == []


def test_a_result_of_rank_zero_is_refused(counts, store_of, cli, tmp_path):
    """Nothing is written, checkpoints neither."""
    words = ("--preset", "complete", "--max-iterations", "1", "--checkpoint", tmp_path / "c")
    done = cli("impute", store_of(counts), tmp_path / "r.zarr", *words, "--quiet")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert "max_iterations is 1, in which the threshold falls to" in line
    assert [path.name for path in tmp_path.iterdir()] == ["source.zarr"]


def test_with_finite_observed_nan_is_completed_and_nothing_clipped():
    """A matrix of rank two with a tenth missing, negative values and zeros included."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 50))
    truth[3] = 0
    holes = rng.random(truth.shape) < 0.1
    result = impute(np.where(holes, np.nan, truth), preset="paper", observed="finite")
    assert result.summary["n_observed"] == (~holes).sum()
    got = result.to_dask().compute()
    assert got.min() < -1
    assert np.linalg.norm(got - truth) < 1e-2 * np.linalg.norm(truth)
