"""Gzip chunks of HDF5 files are inflated here, with the values that HDF5 gives."""

import zlib

import h5py
import numpy as np
import pytest

from scialm_dask.data import arrays
from scialm_dask.data.arrays import read_span

FILTERS = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "gzip and shuffle": {"compression": "gzip", "shuffle": True},
    "gzip and a checksum": {"compression": "gzip", "fletcher32": True},
    "lzf": {"compression": "lzf"},
}


@pytest.fixture
def inflated(monkeypatch):
    """Sizes of what was inflated here."""
    sizes = []

    def counted(*args):
        sizes.append((found := unpacked(*args)).nbytes)
        return found

    unpacked = arrays._unpacked
    monkeypatch.setattr(arrays, "_unpacked", counted)
    return sizes


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", ["<f4", ">i8", "u1", "?"])
def test_any_span_of_any_array_is_read(tmp_path, inflated, filters, dtype):
    values = np.random.default_rng(0).integers(0, 200, 1000).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("a", data=values, chunks=(64,), **FILTERS[filters])
        for start, stop in ((0, 1000), (64, 128), (63, 129), (990, 1000), (500, 500)):
            read = read_span(array, slice(start, stop))
            np.testing.assert_array_equal(read, values[start:stop])
            assert read.dtype == values.dtype
    ours = filters in ("gzip", "gzip and shuffle") and dtype != "?"
    assert inflated == ([64 * values.itemsize] * (16 + 1 + 3 + 1) if ours else [])


def test_a_chunk_that_was_stored_as_it_is_is_read(tmp_path):
    values = np.arange(128, dtype=np.int32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("a", data=values * 0, chunks=(64,), compression="gzip")
        array.id.write_direct_chunk((64,), values[64:].tobytes(), filter_mask=1)
        np.testing.assert_array_equal(read_span(array, slice(60, 128)), np.r_[[0] * 4, values[64:]])


@pytest.mark.parametrize("n_values", [0, 63, 65, 1 << 20])
def test_a_chunk_that_inflates_to_another_size_is_refused(tmp_path, n_values):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("a", data=np.zeros(128, np.int32), chunks=(64,), compression="gzip")
        array.id.write_direct_chunk((64,), zlib.compress(bytes(4 * n_values)))
        with pytest.raises(ValueError, match="a chunk of 256 bytes inflates to another size"):
            read_span(array, slice(0, 128))
