"""Reading: every kind of store gives the same blocks, and nothing damaged gets through."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import cloudpickle
import dask
import dask.array as da
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from scialm_dask.data.annotation import Annotation
from scialm_dask.data.csr import check_observed
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError


def whole(matrix):
    return sp.vstack([matrix.read_block(b) for b in range(len(matrix.blocks))], format="csr")


def same(a, b):
    return a.shape == b.shape and abs(a - b).sum() == 0


FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda m: m.toarray()}


@pytest.mark.parametrize("name", ["s.zarr", "s.h5ad"])
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("layer", [None, "raw"])
def test_every_store_gives_the_same_matrix(counts, store_of, name, zarr_format, form, layer):
    X = FORMS[form](counts)
    path = store_of(X, name, zarr_format=zarr_format) if layer is None else store_of(X * 0, name, raw=X)
    matrix = ExpressionMatrix.open(path, layer, blocks=7)
    assert len(matrix.blocks) == 7
    assert matrix.shape == counts.shape
    got = whole(matrix)
    assert got.dtype == np.float32
    assert got.has_canonical_format
    assert same(got, counts)
    assert matrix.read_block(2, as_stored=True).dtype == np.int32
    assert list(matrix.obs.columns) == ["batch"]
    assert matrix.var.index[3] == "gene3"


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_bare_array_is_read(counts, tmp_path, zarr_format):
    array = zarr.create_array(
        tmp_path / "bare.zarr", data=counts.toarray(), chunks=(50, 17), zarr_format=zarr_format, write_data=True
    )
    assert array.shape == counts.shape
    matrix = ExpressionMatrix.open(tmp_path / "bare.zarr")
    assert same(whole(matrix), counts)
    assert list(matrix.obs.index[:2]) == ["0", "1"]
    with pytest.raises(InputError, match="no layer 'x'"):
        ExpressionMatrix.open(tmp_path / "bare.zarr", "x")


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float64])
def test_any_type_of_number_is_read(counts, store_of, dtype):
    dense = counts.toarray().astype(dtype)
    expected = sp.csr_matrix(dense.astype(np.float32))
    assert same(whole(ExpressionMatrix.open(store_of(dense))), expected)
    if dtype != np.float16:  # which SciPy does not have
        assert same(whole(ExpressionMatrix.open(store_of(sp.csr_matrix(dense)))), expected)


def test_to_dask_gives_the_same(counts, store_of):
    lazy = ExpressionMatrix.open(store_of(counts), blocks=3).to_dask()
    assert lazy.shape == counts.shape
    assert lazy.numblocks == (3, 1)
    assert lazy.dtype == np.float32
    got = [lazy.blocks[b].compute() for b in range(3)]
    assert all(isinstance(block, sp.csr_matrix) for block in got)
    assert same(sp.vstack(got), counts)


def test_a_matrix_in_memory_and_reduce(counts):
    matrix = ExpressionMatrix.of(counts, blocks=5)
    first_rows = matrix.reduce(lambda block, row: [(row, block.nnz)], lambda a, b: a + b)
    assert [row for row, _ in first_rows] == [start for start, _ in matrix.blocks]
    assert sum(nnz for _, nnz in first_rows) == counts.nnz
    assert same(sp.vstack(list(matrix.stream())), counts)
    with pytest.raises(InputError, match=r"shape \(0, 3\); give a matrix"):
        ExpressionMatrix.of(np.zeros((0, 3)))


def test_it_travels_small(counts, store_of):
    matrix = ExpressionMatrix.open(store_of(counts))
    assert len(matrix.obs) == 120
    sent = pickle.dumps(matrix)
    assert len(sent) < 1000
    assert same(whole(pickle.loads(sent)), counts)


def test_a_pickled_matrix_keeps_names_and_origin(counts, store_of):
    names = pd.DataFrame(index=[f"g{j}" for j in range(40)])
    given = replace(ExpressionMatrix.of(counts), annotation=Annotation(pd.DataFrame(index=range(120)), names))
    assert list(pickle.loads(pickle.dumps(given)).var.index) == list(names.index)
    path = store_of(counts)
    opened = ExpressionMatrix.open(path)
    again = pickle.loads(pickle.dumps(opened))
    assert (again.origin, again.stamp) == (opened.origin, opened.stamp)
    assert (again.origin.path, again.origin.layer) == (str(path), None)


def test_names_in_memory_do_not_go_to_workers(counts, monkeypatch):
    frames = Annotation(*(pd.DataFrame(index=[f"{n}" for n in range(size)]) for size in counts.shape))
    monkeypatch.setattr("scialm_dask.data.matrix.current_client", object)
    shipped = replace(ExpressionMatrix.of(counts), annotation=frames).for_workers()
    assert list(shipped.var.index) == list(frames.var.index)
    assert pickle.loads(pickle.dumps(shipped)).annotation is None
    assert same(whole(pickle.loads(pickle.dumps(shipped))), counts)


def test_a_matrix_in_memory_is_hashed_once_and_read_from_a_store_by_workers(counts, monkeypatch):
    hashed, matrix = [], ExpressionMatrix.of(counts, blocks=10)
    normal = dask.base.normalize_token.dispatch(np.ndarray)
    monkeypatch.setitem(dask.base.normalize_token._lookup, np.ndarray, lambda a: hashed.append(a.nbytes) or normal(a))
    lazy = matrix.to_dask()
    assert sum(hashed) < 2 * sum(a.nbytes for a in (matrix.rows.matrix.data, matrix.rows.matrix.indices))
    assert same(sp.vstack([lazy.blocks[b].compute(scheduler="sync") for b in range(10)]), counts)
    sent = []
    monkeypatch.setattr("scialm_dask.data.matrix.current_client", object)
    monkeypatch.setattr(
        "scialm_dask.data.matrix.tree_reduce",
        lambda parts, combine: sent.extend(len(cloudpickle.dumps(part)) for part in parts) or dask.delayed(len)(sent),
    )
    matrix.reduce(lambda csr, _: csr.nnz, int.__add__)
    assert len(sent) == 10
    assert max(sent) < counts.data.nbytes


def test_duplicates_are_summed_and_unsorted_sorted(counts, store_of):
    rng = np.random.default_rng(0)
    coo = counts.tocoo()
    twice = rng.permutation(np.repeat(np.arange(coo.nnz), 2))
    twice = twice[np.argsort(coo.row[twice], kind="stable")]
    indptr = counts.indptr * 2
    X = sp.csr_matrix((coo.data[twice].astype(np.uint8), coo.col[twice], indptr), shape=counts.shape)
    for form in (X, sp.csc_matrix((X.data, X.indices, X.indptr), shape=X.shape[::-1]).T.tocsr()):
        assert same(whole(ExpressionMatrix.open(store_of(form))), 2 * counts)
    X.data[:] = 200
    with pytest.raises(InputError, match="more than uint8 holds"):
        ExpressionMatrix.open(store_of(X)).read_block(0, as_stored=True)


def test_explicit_zeros_are_not_observed(counts, store_of):
    X = counts.copy()
    X.data[::4] = 0
    assert whole(ExpressionMatrix.open(store_of(X))).nnz == np.count_nonzero(X.data)


@pytest.mark.parametrize("form", list(FORMS))
def test_with_finite_observed_zeros_count_and_nan_is_missing(counts, store_of, form):
    dense = counts.toarray().astype(np.float64) - 1
    dense[3, 4] = dense[100, :] = np.nan
    got = whole(ExpressionMatrix.open(store_of(FORMS[form](sp.csr_matrix(dense))), observed="finite", blocks=4))
    assert got.nnz == np.isfinite(dense).sum()
    filled = got.toarray()
    np.testing.assert_array_equal(filled, np.nan_to_num(dense))
    dense[0, 0] = np.inf
    with pytest.raises(InputError, match="infinite"):
        whole(ExpressionMatrix.open(store_of(dense), observed="finite"))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_values_that_are_no_expression_are_refused(counts, store_of, form, value):
    X = counts.astype(np.float64).tolil()
    X[77, 5] = value
    matrix = ExpressionMatrix.open(store_of(FORMS[form](X.tocsr())), blocks=3)
    with pytest.raises(InputError, match=rf"value {value} at cell 77, gene 5;.*give counts"):
        whole(matrix)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (sp.csr_matrix((0, 5)), r"shape \(0, 5\)"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        (np.full((2, 2), "a"), "stored as string_array, not as numbers"),
        (np.ones((2, 2), complex), "not numbers"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(store_of, X, message):
    with pytest.raises(InputError, match=message):
        ExpressionMatrix.open(store_of(X))


def test_what_may_be_observed_is_checked_before_anything_is_read(counts, store_of):
    unread = da.from_array(counts.toarray(), chunks=(50, -1)).map_blocks(
        lambda _: pytest.fail("read"), meta=np.ones((0, 0))
    )
    for make in (
        lambda **o: ExpressionMatrix.of(unread, **o),
        lambda **o: ExpressionMatrix.open(store_of(counts), **o),
    ):
        with pytest.raises(InputError, match="observed is 'Finite'; choose one of nonzero, finite"):
            make(observed="Finite")


def test_a_matrix_of_zeros_opens_and_is_refused_by_who_needs_more(store_of):
    matrix = ExpressionMatrix.open(store_of(sp.csr_matrix((6, 4))))
    assert whole(matrix).nnz == 0
    with pytest.raises(InputError, match="no entry is observed"):
        check_observed(0, matrix.name)


def test_missing_things_are_named(counts, store_of, tmp_path):
    path = store_of(counts, raw=counts)
    with pytest.raises(InputError, match=r"has no layers/spliced; its layers are: raw"):
        ExpressionMatrix.open(path, "spliced")
    with pytest.raises(InputError, match="no such file or folder"):
        ExpressionMatrix.open(tmp_path / "nothing.zarr")
    (tmp_path / "text.h5ad").write_text("hello")
    with pytest.raises(InputError, match="not an HDF5 file"):
        ExpressionMatrix.open(tmp_path / "text.h5ad")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="not a Zarr store"):
        ExpressionMatrix.open(tmp_path / "folder")


def damage(path, form, name, change):
    group = zarr.open_group(path, mode="r+")["X"]
    values = group[name][:]
    group[name][:] = change(values)


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("wrong", [-1, 1000])
def test_indices_out_of_range_are_refused(counts, store_of, form, wrong):
    path = store_of(FORMS[form](counts))
    damage(path, form, "indices", lambda v: np.where(np.arange(len(v)) == 50, wrong, v))
    with pytest.raises(InputError, match=f"index {wrong} is outside 0 to"):
        whole(ExpressionMatrix.open(path))


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize(
    "change", [lambda v: v[::-1], lambda v: v + 1, lambda v: np.where(np.arange(len(v)) == 20, v[-1], v)]
)
def test_an_indptr_that_does_not_fit_is_refused(counts, store_of, form, change):
    path = store_of(FORMS[form](counts))
    damage(path, form, "indptr", change)
    with pytest.raises(InputError, match="indptr does not fit"):
        ExpressionMatrix.open(path)


def test_an_indptr_of_the_wrong_length_is_refused(counts, store_of):
    path = store_of(counts)
    zarr.open_group(path, mode="r+")["X"].attrs["shape"] = [121, 40]
    with pytest.raises(InputError, match="indptr does not fit 121 cells"):
        ExpressionMatrix.open(path)


@pytest.mark.parametrize("name", ["s.zarr", "s.h5ad"])
@pytest.mark.parametrize("part", ["data", "indices", "indptr", "shape"])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_a_part_that_is_gone_is_named(counts, store_of, form, part, name):
    path = store_of(FORMS[form](counts), name)
    root = h5py.File(path, "r+") if name == "s.h5ad" else zarr.open_group(path, mode="r+")
    del (root["X"].attrs if part == "shape" else root["X"])[part]
    if name == "s.h5ad":
        root.close()
    with pytest.raises(InputError, match=f"X: has no {part}; the store is damaged"):
        ExpressionMatrix.open(path)


def test_a_dense_array_marked_as_sparse_is_refused(counts, tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=counts.toarray()).attrs["encoding-type"] = "csr_matrix"
    with pytest.raises(InputError, match="has no data, indices, indptr, shape; the store is damaged"):
        ExpressionMatrix.open(tmp_path / "a.zarr")


def chunked_store(path, counts, form, zarr_format, shards):
    """An AnnData store in small chunks, which are easily lost."""
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    dense = form == "dense"
    parts = (
        {"": counts.toarray()} if dense else {n: getattr(FORMS[form](counts), n) for n in ("data", "indices", "indptr")}
    )
    group = root if dense else root.create_group("X")
    for name, values in parts.items():
        step = (50, 20) if dense else (30,)
        group.create_array(
            name or "X", data=values, chunks=step, shards=tuple(2 * s for s in step) if shards else None
        ).attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    if not dense:
        kind = f"{form}_matrix"
        group.attrs.update({"encoding-type": kind, "encoding-version": "0.1.0", "shape": list(counts.shape)})
    return str(path)


@pytest.mark.parametrize(
    ("form", "name"),
    [(form, name) for form in ("csr", "csc") for name in ("data", "indices", "indptr")] + [("dense", "")],
)
@pytest.mark.parametrize(("zarr_format", "shards"), [(2, False), (3, False), (3, True)])
def test_lost_chunks_are_refused(counts, tmp_path, form, name, zarr_format, shards):
    path = chunked_store(tmp_path / "s.zarr", counts, form, zarr_format, shards)
    assert same(whole(ExpressionMatrix.open(path)), counts)
    folder = Path(path, "X", name)
    chunks = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("zarr.json", ".zarray", ".zattrs"))
    for lost in (chunks[0], chunks[-1]):
        kept = lost.with_name("kept")
        shutil.move(lost, tmp_path / "kept")
        with pytest.raises(InputError, match=r"missing|does not fit"):
            ExpressionMatrix.open(path)
        if form == "dense":
            assert whole(ExpressionMatrix.open(path, missing_chunks_are_zeros=True)).nnz < counts.nnz
        shutil.move(tmp_path / "kept", lost)
        assert not kept.exists()


def test_zeros_that_zarr_did_not_write_are_not_lost(tmp_path):
    """Chunks of indptr before the first value, and of indices where each cell has gene 0 alone."""
    X = sp.csr_matrix(
        (np.ones(100), np.zeros(100, np.int32), np.r_[np.zeros(100, int), np.arange(101)]), shape=(200, 3)
    )
    path = chunked_store(tmp_path / "s.zarr", X, "csr", 2, False)
    assert not Path(path, "X", "indices", "0").exists()
    assert not Path(path, "X", "indptr", "0").exists()
    assert same(whole(ExpressionMatrix.open(path)), X)


def test_chunks_are_read_in_tasks_with_nothing_but_a_path(counts, store_of):
    """An open file handle would not survive the processes scheduler."""
    lazy = ExpressionMatrix.open(store_of(counts), blocks=2).to_dask()
    graph = dict(lazy.__dask_graph__())
    assert len(pickle.dumps(graph)) < 5000
    with dask.config.set(scheduler="synchronous"):
        assert same(sp.vstack([lazy.blocks[b].compute() for b in range(2)]), counts)


def test_real_cells(shared):
    path = shared / "data" / "pbmc_donor_a.h5ad"
    matrix = ExpressionMatrix.open(path)
    assert matrix.shape == (2896, 13939)
    assert same(whole(matrix), anndata.read_h5ad(path).X.astype(np.float32))
