"""AnnData objects of every kind go in, and get the factors put beside their matrix."""

import gc

import anndata
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, Imputation, InputError, impute
from scialm_dask.data.annotated import as_matrix
from scialm_dask.data.ingest import convert
from scialm_dask.data.qc import quality_control
from scialm_dask.evaluate.mask import mask

SETTINGS = {"preset": "complete", "max_rank": 6, "validation": 0.05, "max_iterations": 8}
OLD_FORMAT = "ignore:Writing zarr v2 data will no longer be the default"


@pytest.fixture(scope="module")
def counts():
    return low_rank_counts(160, 70, rank=3, density=0.4, seed=1)


@pytest.fixture
def adata(counts):
    normalised = counts.multiply(1000 / counts.sum(axis=1)).tocsr().astype(np.float32)
    obs = pd.DataFrame({"total_counts": np.asarray(counts.sum(axis=1)).ravel()})
    obs.index = [f"cell{i}" for i in range(160)]
    var = pd.DataFrame(index=[f"gene{j}" for j in range(70)])
    return anndata.AnnData(normalised, obs=obs, var=var, layers={"counts": counts})


@pytest.fixture
def expected(adata):
    return impute(adata, key_added=None, **SETTINGS)


def same(one, other):
    np.testing.assert_allclose(one.left.compute(), other.left.compute(), rtol=1e-3, atol=1e-4)
    assert list(one.obs.index) == list(other.obs.index)
    assert list(one.var.index) == list(other.var.index)


def test_the_factors_are_put_into_the_anndata(adata, tmp_path):
    before = adata.X.copy()
    result = impute(adata, **SETTINGS)
    assert isinstance(adata.obsm["scialm_factors"], np.ndarray)
    product = np.maximum(adata.obsm["scialm_factors"] @ adata.varm["scialm_factors"].T, 0)
    np.testing.assert_allclose(product, result[:, :], rtol=1e-4, atol=1e-4)
    assert abs(adata.X - before).nnz == 0
    assert "cells by obs['total_counts']" in result.summary["scaling"]
    adata.write_h5ad(tmp_path / "with.h5ad")
    assert anndata.read_h5ad(tmp_path / "with.h5ad").uns["scialm"]["clip"]


@pytest.mark.filterwarnings(OLD_FORMAT)
def test_an_anndata_written_by_its_user_opens_as_a_result(adata, tmp_path):
    result = impute(adata, **SETTINGS)
    adata.write_zarr(tmp_path / "with.zarr")
    opened = Imputation.open(tmp_path / "with.zarr")
    same(opened, result)
    assert opened.summary.keys() == result.summary.keys() | {"X"}  # which says that X is none of ours
    assert opened.summary["X"] is None
    assert opened.X is None


def test_so_does_an_h5ad_which_holds_the_left_factor_in_one_piece(adata, tmp_path):
    result = impute(adata, **SETTINGS)
    adata.write_h5ad(tmp_path / "with.h5ad")
    opened = Imputation.open(tmp_path / "with.h5ad")
    same(opened, result)
    np.testing.assert_allclose(opened.transform(adata)[:, :], result.transform(adata)[:, :], rtol=1e-3, atol=1e-3)


def test_names_and_none(adata, expected):
    assert list(adata.obsm) == list(adata.varm) == list(adata.uns) == []
    impute(adata, key_added="filled", **SETTINGS)
    assert (list(adata.obsm), list(adata.varm), list(adata.uns)) == (
        ["filled_factors", "X_filled"],
        ["filled_factors"],
        ["filled"],
    )


def test_a_layer(adata, counts):
    result = impute(adata, layer="counts", **SETTINGS)
    assert result.summary["raw_counts"]
    same(result, impute(anndata.AnnData(counts, obs=adata.obs, var=adata.var), **SETTINGS))


@pytest.mark.parametrize(
    "kind",
    [
        sp.csc_matrix,
        sp.csr_array,
        lambda X: X.toarray(),
        lambda X: np.asfortranarray(X.toarray().astype(np.float64)),
        lambda X: da.from_array(X.toarray(), chunks=(30, 40)),
        lambda X: da.from_array(X.toarray(), chunks=(30, -1)).map_blocks(sp.csr_matrix),
    ],
    ids=["csc", "csr array", "dense", "Fortran", "Dask dense", "Dask sparse"],
)
def test_any_matrix_will_do(adata, expected, kind):
    adata.X = kind(adata.X)
    same(impute(adata, **SETTINGS), expected)
    assert isinstance(adata.obsm["scialm_factors"], da.Array) == isinstance(adata.X, da.Array)


def test_a_data_frame_keeps_its_names(adata):
    result = impute(adata.to_df(), **SETTINGS)
    assert result["cell3", "gene5"] == result[3, 5]
    assert list(result.transform(adata.to_df()[["gene3", *adata.var_names[10:]]]).obs.index) == list(adata.obs_names)


def test_a_view_becomes_an_anndata_of_its_own(adata):
    view = adata[20:140]
    result = impute(view, **SETTINGS)
    assert not view.is_view
    assert view.obsm["X_scialm"].shape == (120, result.rank)
    assert "X_scialm" not in adata.obsm


def test_a_backed_anndata_is_read_from_its_file(adata, expected, tmp_path, monkeypatch):
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    monkeypatch.setattr(anndata.AnnData, "X", property(lambda self: pytest.fail("X was read as a whole")))
    same(impute(backed, **SETTINGS), expected)
    monkeypatch.undo()
    assert backed.obsm["X_scialm"].shape[0] == 160
    same(impute(backed, layer="counts", **SETTINGS), impute(adata, layer="counts", **SETTINGS))
    with pytest.raises(InputError, match=r"view of a backed AnnData; give view\.to_memory"):
        impute(backed[:100], **SETTINGS)
    backed.file.close()


@pytest.mark.filterwarnings(OLD_FORMAT)
def test_a_lazy_anndata(adata, expected, tmp_path):
    adata.write_zarr(tmp_path / "a.zarr")
    lazy = anndata.experimental.read_lazy(tmp_path / "a.zarr")
    result = impute(lazy, **SETTINGS)
    same(result, expected)
    assert isinstance(lazy.obsm["X_scialm"], da.Array)


def test_the_temporary_copy_of_a_lazy_matrix_goes_with_the_result(adata, tmp_path):
    import dask

    adata.X = da.from_array(adata.X.toarray(), chunks=(50, -1))
    with dask.config.set({"temporary-directory": str(tmp_path)}):
        result = impute(adata, key_added=None, **SETTINGS)
        assert len(list(tmp_path.glob("scialm-*"))) == 1
        result.transform(adata)[:3]
    del result
    gc.collect()
    assert list(tmp_path.glob("scialm-*")) == []


def test_new_cells_of_any_kind(adata, expected, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(expected.transform(backed)[:, :], expected.transform(adata)[:, :])
    backed.file.close()


def test_a_result_as_an_anndata_is_lazy(expected):
    lazy = expected.to_anndata()
    assert isinstance(lazy.X, da.Array)
    part = lazy[["cell3", "cell5"], "gene7"].to_memory()
    np.testing.assert_allclose(part.X, expected[["cell3", "cell5"], ["gene7"]], rtol=1e-6)


def with_mark(adata):
    import scanpy

    scanpy.pp.log1p(adata)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (with_mark, {}, r"holds logarithms, as expm1\(x\) gives whole multiples in each cell; .* of: counts"),
        (lambda a: None, {"layer": "raw"}, "no layer 'raw'; its layers are: counts"),
        (lambda a: setattr(a, "X", None), {}, "has no X; name one of its layers: counts"),
        (lambda a: setattr(a, "X", a.X * -1), {}, "AnnData:X: value -.* must be finite and not negative"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_added(adata, change, options, message):
    change(adata)
    with pytest.raises(InputError, match=message):
        impute(adata, **options, **SETTINGS)
    assert "X_scialm" not in adata.obsm


def test_logarithms_in_a_file_are_refused_and_counts_under_the_mark_are_not(adata, tmp_path):
    with_mark(adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="holds logarithms"):
        impute(tmp_path / "a.h5ad", **SETTINGS)
    impute(tmp_path / "a.h5ad", layer="counts", **SETTINGS)
    convert(tmp_path / "a.h5ad", tmp_path / "a.zarr")
    for call in (
        lambda path: impute(path, preset="complete"),
        lambda path: quality_control(path, tmp_path / "q.zarr"),
        lambda path: mask(path, tmp_path / "m.zarr"),
    ):
        with pytest.raises(InputError, match="holds logarithms"):
            call(tmp_path / "a.zarr")
    quality_control(tmp_path / "a.zarr", tmp_path / "q.zarr", layer="counts")
    convert(tmp_path / "a.h5ad", tmp_path / "c.zarr", layer="counts")
    mask(tmp_path / "c.zarr", tmp_path / "m.zarr")
    adata.X = adata.layers["counts"]
    impute(adata, **SETTINGS)


def test_the_mark_of_logarithms_is_about_x_however_that_is_stored(adata, tmp_path):
    with_mark(adata)
    adata.X, adata.layers["normalised"] = adata.X.tocsc(), (adata.layers["counts"] * 0.3).tocsc()
    adata.write_h5ad(tmp_path / "a.h5ad")
    impute(ExpressionMatrix.open(tmp_path / "a.h5ad", "normalised"), **SETTINGS)
    with pytest.raises(InputError, match="holds logarithms"):
        impute(ExpressionMatrix.open(tmp_path / "a.h5ad"), **SETTINGS)


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ("text.zarr", "no such file or folder"),
        ({"a": 1}, "give a matrix of numbers"),
        ([["a", "b"]], "not numbers to compute with"),
        (np.ones((2, 2, 2)), r"shape \(2, 2, 2\); give a matrix"),
    ],
)
def test_other_things_are_refused(thing, words):
    with pytest.raises(InputError, match=words):
        impute(thing)
    with pytest.raises(InputError, match="layer is 'raw', but a list has none"):
        impute([[1.0]], layer="raw")


def test_a_matrix_that_is_opened_is_taken_as_it_is_or_refused(counts):
    finite = ExpressionMatrix.of(counts, observed="finite", name="opened")
    assert as_matrix(finite) is as_matrix(finite, observed="finite") is finite
    with pytest.raises(InputError, match="opened: is opened already; give the layer, 'raw', to"):
        impute(finite, layer="raw")
    with pytest.raises(InputError, match="opened with observed='finite', and 'nonzero' is needed"):
        impute(finite, observed="nonzero")
    assert impute(finite, **SETTINGS).observed == "finite"
    assert impute(ExpressionMatrix.of(counts), **SETTINGS).observed == "nonzero"


def test_chunks_of_unknown_size_are_refused():
    array = da.from_array(np.ones((20, 5)), chunks=(5, -1))
    with pytest.raises(InputError, match="known size"):
        ExpressionMatrix.of(array[array.sum(axis=1) > 2])
