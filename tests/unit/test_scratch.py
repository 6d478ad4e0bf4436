"""Scratch on disk: there as long as something lazy reads it, and no longer; and what becomes of it when work fails."""

import gc
import os
from pathlib import Path

import anndata
import dask
import dask.array as da
import faults
import numpy as np
import pytest
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, InputError, biological_zeros, impute
from scialm_dask.data import temporary
from scialm_dask.data.scratch import MemoryScratch, ZarrScratch, new_scratch
from scialm_dask.errors import OutputError
from scialm_dask.linalg.kernels import BlockState

COUNTS = low_rank_counts(90, 40, density=0.4, seed=1)
QUICK = {"preset": "paper", "max_iterations": 5}


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def left_in(folder):
    """What is there, once nobody holds what nobody needs."""
    gc.collect()
    return os.listdir(folder)


def test_none_is_in_memory():
    with new_scratch(None, ExpressionMatrix.of(COUNTS).rows) as store:
        assert store == MemoryScratch()


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_temporary_copy_of_the_matrix_stays_as_long(tmp_path, on_disk):
    with dask.config.set({"temporary-directory": str(tmp_path / "temporary")}):
        rows = ExpressionMatrix.of(da.from_array(COUNTS.toarray(), chunks=(30, -1))).rows
    with new_scratch(tmp_path if on_disk else None, rows) as store:
        del rows
    assert len(left_in(tmp_path / "temporary")) == 1
    del store
    assert left_in(tmp_path) == ["temporary"]
    assert left_in(tmp_path / "temporary") == []


def test_a_lazy_factor_outlives_its_result(tmp_path):
    expected = impute(COUNTS, scratch="memory", **QUICK).left.compute()
    left = impute(COUNTS, scratch=f"zarr:{tmp_path}", **QUICK).left
    assert len(left_in(tmp_path)) == 1
    np.testing.assert_array_equal(left.compute(), expected)
    part = left[3:20]
    del left
    assert len(left_in(tmp_path)) == 1
    np.testing.assert_array_equal(part.compute(), expected[3:20])
    del part
    assert left_in(tmp_path) == []


def test_a_lazy_anndata_outlives_its_result(tmp_path):
    cells = anndata.AnnData(da.from_array(COUNTS.toarray(), chunks=(30, -1)))
    impute(cells, scratch=f"zarr:{tmp_path}", **QUICK)
    gc.collect()
    product = cells.obsm["scialm_factors"].compute() @ cells.varm["scialm_factors"].T
    np.testing.assert_allclose(
        np.maximum(product, 0), impute(COUNTS, scratch="memory", **QUICK)[:, :], rtol=1e-4, atol=1e-4
    )
    del cells
    assert left_in(tmp_path) == []


def test_lazy_zeros_outlive_their_rule(tmp_path):
    rule = biological_zeros(ExpressionMatrix.of(COUNTS), scratch_folder=str(tmp_path))
    left = rule.left
    del rule
    assert len(left_in(tmp_path)) == 1
    assert left.compute().shape[0] == 90
    del left
    assert left_in(tmp_path) == []


def of_factors(folder):
    impute(COUNTS, scratch=f"zarr:{folder}", **QUICK)


def of_zeros(folder):
    biological_zeros(ExpressionMatrix.of(COUNTS), scratch_folder=str(folder))


@pytest.mark.parametrize("work", [of_factors, of_zeros])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path, work):
    (tmp_path / "s").mkdir()
    repair = faults.inject("scialm_dask.data.scratch:ZarrScratch._write", tmp_path / "calls", {7: faults.fill_disk})
    try:
        with pytest.raises(OutputError, match="could not be written, the disk is full; free some space"):
            work(tmp_path / "s")
    finally:
        repair()
    assert left_in(tmp_path / "s") == []


@pytest.mark.parametrize("work", [of_factors, of_zeros])
def test_a_folder_that_is_not_there(tmp_path, work):
    with pytest.raises(InputError, match="nowhere: no such folder for scratch; create it first"):
        work(tmp_path / "nowhere")
    with pytest.raises(InputError, match="scratch is 'zarr:'; give auto"):
        impute(COUNTS, scratch="zarr:", **QUICK)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-4], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])])
@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int32), np.ones((2, 3), np.float32)])
def test_what_the_disk_has_changed_is_not_handed_out(tmp_path, array, damage):
    with new_scratch(tmp_path, ExpressionMatrix.of(COUNTS).rows) as store:
        kept = store.put(BlockState(array, array, array), 0, 0)
        np.testing.assert_array_equal(store.get(kept).left, array)
        path = Path(kept.left.chunk)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(OutputError, match=rf"{path}: is not what was written there; check that disk"):
            store.get(kept)
        path.unlink()
        with pytest.raises(
            OutputError, match=rf"{path}: cannot be read \(No such file or directory\); check that disk"
        ):
            store.get(kept)


def test_a_bit_of_scratch_that_flips_during_a_run_ends_it(tmp_path, monkeypatch):
    write = ZarrScratch._write

    def flipping(self, name, version, block, array):
        reference = write(self, name, version, block, array)
        if array.dtype.kind == "i":  # an index too large once ended in a segmentation fault
            raw = bytearray(Path(reference.chunk).read_bytes())
            raw[-1] ^= 0x40
            Path(reference.chunk).write_bytes(raw)
        return reference

    monkeypatch.setattr(ZarrScratch, "_write", flipping)
    with pytest.raises(OutputError, match="is not what was written there"):
        impute(COUNTS, scratch=f"zarr:{tmp_path}", **QUICK)
    assert left_in(tmp_path) == []


def test_a_bit_that_flips_while_entries_are_sorted_is_noticed(monkeypatch):
    def flipping(self, records, append=temporary._Bucket.append):
        append(self, records)
        raw = bytearray(self.path.read_bytes())
        raw[-1] ^= 1
        self.path.write_bytes(raw)

    monkeypatch.setattr(temporary._Bucket, "append", flipping)
    entries = temporary.Entries(np.array([1, 0]), np.array([0, 2]), np.array([1.0, 2.0], np.float32))
    with pytest.raises(OutputError, match="is not what was written there"):
        list(temporary.rows_in_order([entries], (2, 3), np.dtype(np.float32), 2, "matrix"))
