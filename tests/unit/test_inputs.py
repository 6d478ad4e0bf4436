"""Inputs of every kind that people have in memory or as old files: an answer, or one line."""

import shutil
import tracemalloc
import warnings

import anndata
import dask.array as da
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scialm_dask import ExpressionMatrix, InputError, impute
from scialm_dask.data.annotated import as_dask, as_matrix
from scialm_dask.data.ingest import convert


def whole(matrix):
    return sp.vstack(list(matrix.stream()), format="csr")


def same(a, b):
    return a.shape == b.shape and abs(a - b).sum() == 0


@pytest.fixture
def masked(counts):
    mask = np.random.default_rng(0).random(counts.shape) < 0.3
    return np.ma.masked_array(counts.toarray(), mask)


@pytest.mark.parametrize("lazy", [False, True])
def test_masked_entries_are_unknown(masked, lazy):
    given = da.from_array(masked, chunks=(50, -1), asarray=False) if lazy else masked
    got = whole(ExpressionMatrix.of(given))
    assert got.nnz == np.count_nonzero(masked.filled(0)) < np.count_nonzero(masked.data)
    assert same(got, sp.csr_matrix(masked.filled(0)))
    got = whole(ExpressionMatrix.of(given, observed="finite"))
    assert got.nnz == np.count_nonzero(~masked.mask)
    with pytest.raises(InputError, match="truth: has masked entries; fill them"):
        as_dask(masked, "truth")


def test_bytes_in_the_other_order(counts, store_of):
    big = counts.toarray().astype(">f8")
    assert same(whole(ExpressionMatrix.of(big)), counts)
    assert same(whole(ExpressionMatrix.open(store_of(big, "big.h5ad"))), counts)
    path = store_of(counts, "sparse.h5ad")
    with h5py.File(path, "r+") as file:
        for part in ("data", "indices", "indptr"):
            values = file["X"][part][:]
            del file["X"][part]
            file["X"][part] = values.astype(values.dtype.newbyteorder(">"))
    assert same(whole(ExpressionMatrix.open(path)), counts)


def test_a_sparse_data_frame_stays_sparse():
    X = sp.random(4000, 400, 0.01, format="csr", random_state=0)
    frame = pd.DataFrame.sparse.from_spmatrix(X, index=[f"c{i}" for i in range(4000)])
    tracemalloc.start()
    try:
        matrix = as_matrix(frame)
        assert tracemalloc.get_traced_memory()[1] < X.shape[0] * X.shape[1] * 8 / 3
    finally:
        tracemalloc.stop()
    assert abs(whole(matrix) - X).max() < 1e-6
    assert matrix.obs.index[3] == "c3"


def test_a_lazy_matrix_by_genes_is_read_some_genes_at_a_time(counts, tmp_path, monkeypatch):
    anndata.AnnData(sp.csc_matrix(counts)).write_h5ad(tmp_path / "a.h5ad")
    lazy = anndata.experimental.read_lazy(tmp_path / "a.h5ad")
    lazy.X = anndata.experimental.read_elem_lazy(h5py.File(tmp_path / "a.h5ad")["X"], chunks=(120, 7))
    assert lazy.X.numblocks == (1, 6)
    monkeypatch.setattr(da.Array, "rechunk", lambda *_: pytest.fail("all genes were put together"))
    assert same(whole(as_matrix(lazy)), counts)


def test_collections_and_lazy_frames_are_refused_in_one_line(counts):
    import dask.dataframe as dd

    frame = dd.from_pandas(pd.DataFrame(counts.toarray()), npartitions=2)
    with pytest.raises(InputError, match=r"a Dask data frame, of unknown length; give frame\.to_dask_array"):
        as_matrix(frame)
    assert same(whole(as_matrix(frame.to_dask_array(lengths=True))), counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collection = anndata.experimental.AnnCollection([anndata.AnnData(counts), anndata.AnnData(counts)])
    with pytest.raises(InputError, match=r"AnnCollection has no matrix of its own; give anndata\.concat"):
        as_matrix(collection)


def test_files_of_anndata_before_0_7(counts, tmp_path):
    """obs and var as tables of records, the matrix under its old names."""
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", np.array(counts.shape)
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(counts, part)
        file["obs"] = np.array([(f"cell{i}".encode(), i) for i in range(120)], [("index", "S10"), ("n", "i4")])
        file["var"] = np.array([(f"gene{j}".encode(),) for j in range(40)], [("index", "S10")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file is old
        matrix = ExpressionMatrix.open(path)
        assert same(whole(matrix), counts)
        assert list(matrix.obs.index[:2]) == ["cell0", "cell1"]
        assert list(matrix.obs["n"]) == list(range(120))
        convert(path, tmp_path / "new.zarr")
    assert same(anndata.read_zarr(tmp_path / "new.zarr").X, counts)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_in_a_zip_file(counts, store_of, tmp_path, zarr_format):
    source = store_of(counts, zarr_format=zarr_format)
    packed = shutil.make_archive(tmp_path / "packed.zarr", "zip", source)
    matrix = ExpressionMatrix.open(packed)
    assert same(whole(matrix), counts)
    assert list(matrix.obs.columns) == ["batch"]
    convert(packed, tmp_path / "d.zarr")
    assert same(anndata.read_zarr(tmp_path / "d.zarr").X, counts)


@pytest.mark.parametrize("observed", ["nonzero", "finite"])
@pytest.mark.parametrize("factor", [1e25, 1e40, 1e-30])
def test_values_of_which_float32_does_not_hold_the_squares(counts, observed, factor):
    with pytest.raises(InputError, match=r"have values up to .* multiply the matrix|infinite|value inf at cell 0"):
        impute(counts.astype(np.float64) * factor, observed=observed)
