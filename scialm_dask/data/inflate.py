"""Gzip chunks of HDF5 files, inflated in the thread that asks: HDF5 inflates one at a time for all threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from isal import isal_zlib
from numcodecs import Shuffle
from numpy.typing import NDArray


def read_span(array: Any, span: slice) -> NDArray[Any]:
    """Return ``array[span]``, of a one-dimensional array of Zarr or HDF5; `span` has a start and a stop within it."""
    shuffled = None if isinstance(array, zarr.Array) else _is_shuffled(array)
    if shuffled is None or span.start == span.stop:
        return np.asarray(array[span])
    chunk, dtype = array.chunks[0], array.dtype
    values = np.empty(span.stop - span.start, dtype)
    for first in range(span.start - span.start % chunk, span.stop, chunk):
        skipped, stored = array.id.read_direct_chunk((first,))
        # A filter may be left out of a chunk; HDF5 knows how to read that.
        whole = array[first : first + chunk] if skipped else _unpacked(stored, shuffled, dtype, chunk)
        start, stop = max(first, span.start), min(first + chunk, span.stop)
        values[start - span.start : stop - span.start] = whole[start - first : stop - first]
    return values


def _unpacked(stored: bytes, shuffled: bool, dtype: np.dtype[Any], chunk: int) -> NDArray[Any]:
    n_bytes = chunk * dtype.itemsize
    stream = isal_zlib.decompressobj()
    inflated: Any = stream.decompress(stored, n_bytes + 1)  # no more than that, whatever the bytes make of it
    if len(inflated) != n_bytes or not stream.eof:
        raise ValueError(f"a chunk of {n_bytes} bytes inflates to another size")
    return np.frombuffer(Shuffle(dtype.itemsize).decode(inflated) if shuffled else inflated, dtype)


def _is_shuffled(dataset: Any) -> bool | None:
    """Tell whether bytes of numbers were shuffled before gzip; None if other filters, or none, were used."""
    import h5py

    made = dataset.id.get_create_plist()
    filters = tuple(made.get_filter(i)[0] for i in range(made.get_nfilters()))
    plain, shuffled = (h5py.h5z.FILTER_DEFLATE,), (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE)
    return {plain: False, shuffled: True}.get(filters) if dataset.dtype.kind in "iuf" else None
