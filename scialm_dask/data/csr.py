"""CSR blocks: taken from what people give, their values checked, changed in small ways, and written into stores."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import zarr
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from scialm_dask.config import short_repr
from scialm_dask.data.arrays import new_array, set_encoding, write_chunk
from scialm_dask.errors import InputError

Observed = Literal["nonzero", "finite"]

CHUNK_VALUES = 1 << 18  # values in one chunk of `data` or `indices`; a block reads few values it does not want
CHUNK_ROWS = 1 << 16
_MOST_THREADS = 4  # that compress
_LARGEST = 1e15  # value; of larger ones, and of smaller than its inverse, products leave what float32 holds


def row_of(csr: sp.csr_matrix) -> NDArray[np.intp]:
    """Row of each stored value, shape ``(nnz,)``."""
    return np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))


def entries_where(csr: sp.csr_matrix, chosen: NDArray[np.bool_]) -> sp.csr_matrix:
    """Keep the chosen ones of the stored values, of which `chosen` tells in their order."""
    indptr = np.concatenate([[0], np.cumsum(chosen)])[csr.indptr]
    return sp.csr_matrix((csr.data[chosen], csr.indices[chosen], indptr), shape=csr.shape)


def scaled_rows(csr: sp.csr_matrix, factors: NDArray[np.floating]) -> sp.csr_matrix:
    """Multiply each row by its factor: float32, in a matrix of the same pattern."""
    values = (csr.data * np.repeat(factors, np.diff(csr.indptr))).astype(np.float32)
    return sp.csr_matrix((values, csr.indices, csr.indptr), shape=csr.shape)


class CSRWriter:
    """Writes a CSR matrix into an AnnData Zarr store, rows in order, whole chunks at a time.

    Memory is a few chunks, whatever the number of rows. Use as a context manager; the matrix is whole only after it has
    been left.
    """

    def __init__(self, parent: zarr.Group, name: str, *, n_columns: int, dtype: Any = np.float32) -> None:
        self._group = parent.create_group(name)
        self._columns = n_columns
        self._rows = 0
        self._stored = 0
        self._threads = _Threads()
        self._data = _Appender(self._threads, self._group, "data", np.dtype(dtype), CHUNK_VALUES)
        self._indices = _Appender(self._threads, self._group, "indices", np.dtype(np.int32), CHUNK_VALUES)
        self._indptr = _Appender(self._threads, self._group, "indptr", np.dtype(np.int64), CHUNK_ROWS)
        self._indptr.append(np.zeros(1, np.int64))

    def append(self, rows: sp.csr_matrix) -> None:
        """Add the next rows, a CSR matrix with `n_columns` columns, which is not to be changed afterwards."""
        self._data.append(rows.data)
        self._indices.append(rows.indices)
        self._indptr.append(rows.indptr[1:].astype(np.int64) - int(rows.indptr[0]) + self._stored)
        self._stored += int(rows.nnz)
        self._rows += rows.shape[0]

    def __enter__(self) -> CSRWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for appender in (self._data, self._indices, self._indptr):
                    appender.close()
                if self._stored <= np.iinfo(np.int32).max:
                    self._narrow_indptr()
                set_encoding(self._group, "csr_matrix", "0.1.0", shape=[self._rows, self._columns])
        finally:
            self._threads.end()

    def _narrow_indptr(self) -> None:
        """Give indptr the type of the indices: SciPy fails on a matrix that has two, as AnnData would read it."""
        wide: Any = self._group["indptr"]
        values = wide[...]
        del self._group["indptr"]
        narrow = _Appender(self._threads, self._group, "indptr", np.dtype(np.int32), CHUNK_ROWS)
        narrow.append(values)
        narrow.close()


class _Threads:
    """A few threads that write; no more chunks wait for them than there are of them."""

    def __init__(self) -> None:
        self._most = min(CPU_COUNT, _MOST_THREADS)
        self._pool = ThreadPoolExecutor(self._most)
        self._under_way: deque[Future[None]] = deque()

    def write(self, array: Any, number: int, values: np.ndarray[Any, Any]) -> None:
        self._under_way.append(self._pool.submit(write_chunk, array, number, values))
        self.wait(self._most)

    def wait(self, most: int = 0) -> None:
        """Wait until so many chunks are left; raises what writing one has raised."""
        while len(self._under_way) > most:
            self._under_way.popleft().result()

    def end(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Appender:
    """A 1-D Zarr array that grows by whole chunks; what does not fill one waits in memory."""

    def __init__(self, threads: _Threads, group: zarr.Group, name: str, dtype: np.dtype[Any], chunk: int) -> None:
        self._array = new_array(group, name, (0,), (chunk,), dtype)
        self._threads, self._chunk, self._chunks, self._length = threads, chunk, 0, 0
        self._waiting: list[np.ndarray[Any, Any]] = []

    def append(self, values: np.ndarray[Any, Any]) -> None:
        values = np.asarray(values, self._array.dtype)
        self._length += len(values)
        if self._waiting:
            missing = self._chunk - sum(map(len, self._waiting))
            self._waiting.append(values[:missing].copy())
            values = values[missing:]
            if len(self._waiting[-1]) == missing:
                self._write_waiting()
        whole = len(values) - len(values) % self._chunk
        for start in range(0, whole, self._chunk):
            self._write(values[start : start + self._chunk])
        if whole < len(values):
            self._waiting.append(values[whole:].copy())

    def close(self) -> None:
        self._write_waiting()
        self._array.resize((self._length,))
        self._threads.wait()

    def _write_waiting(self) -> None:
        if self._waiting:
            self._write(np.concatenate(self._waiting))
            self._waiting = []

    def _write(self, values: np.ndarray[Any, Any]) -> None:
        self._threads.write(self._array, self._chunks, values)
        self._chunks += 1


def held_array(matrix: Any, name: str) -> Any:
    """Take what is in memory, SciPy sparse or anything that NumPy takes; raises `InputError` as `check_array`.

    A sparse data frame stays sparse, and the bytes of numbers are put into the order of this machine.
    """
    if np.ma.is_masked(matrix):
        raise InputError(f"{name}: has masked entries; fill them, with zeros or NaN, whatever stands for the unknown")
    if hasattr(matrix, "columns") and all(
        hasattr(kind, "fill_value") and kind.fill_value == 0 for kind in matrix.dtypes
    ):
        matrix = matrix.sparse.to_coo().tocsr()
    try:
        held = matrix if sp.issparse(matrix) else np.asarray(matrix)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: a {type(matrix).__name__}, not a matrix of numbers ({error})") from error
    if held.ndim == 0:
        raise InputError(f"{name} is {short_repr(matrix)}; give a matrix of numbers")
    check_array(held, name)
    return held.astype(held.dtype.newbyteorder("="), copy=False)


def unmasked(matrix: Any, observed: Observed) -> Any:
    """Put what stands for the unknown where a masked array is masked."""
    if not isinstance(matrix, np.ma.MaskedArray):
        return matrix
    if observed == "nonzero":
        return matrix.filled(0)
    filled = matrix.filled(0).astype(np.float64)
    filled[np.ma.getmaskarray(matrix)] = np.nan
    return filled


def check_array(array: Any, name: str) -> None:
    """Raise `InputError` if an array, of NumPy, SciPy or Dask, is not a matrix of numbers of known size."""
    if array.ndim != 2 or any(np.isnan(n) or n == 0 for n in array.shape):
        raise InputError(
            f"{name}: shape {array.shape}; give a matrix: two dimensions of known size, one cell and gene at least"
        )
    if array.dtype.kind not in "buif" or array.dtype == np.float16:
        raise InputError(
            f"{name}: values are of type {array.dtype}, not numbers that can be computed with; convert them first"
        )


def check_values(csr: sp.csr_matrix, name: str, first_row: int) -> None:
    """Raise `InputError` if a value is negative, NaN or infinite."""
    smallest, largest = (csr.data.min(), csr.data.max()) if csr.nnz else (0, 0)
    if smallest >= 0 and largest < np.inf:  # false for NaN too
        return
    at = int(np.flatnonzero(~((csr.data >= 0) & (csr.data < np.inf)))[0])
    row = int(np.searchsorted(csr.indptr, at, side="right")) - 1
    raise InputError(
        f"{name}: value {csr.data[at]} at cell {first_row + row}, gene {csr.indices[at]}; expression must be "
        "finite and not negative: give counts or normalised counts, not scaled or centred data"
    )


def check_observed(n_observed: int, name: str) -> None:
    """Raise `InputError` if a matrix turned out to have no observed entry."""
    if n_observed == 0:
        raise InputError(
            f"{name}: no entry is observed, all are zero; give a matrix with non-zeros, e.g. another layer"
        )


def finite_entries(csr: sp.csr_matrix, name: str) -> sp.csr_matrix:
    """All entries that are not NaN, zeros stored explicitly."""
    dense = csr.toarray()
    if np.isinf(dense).any():
        raise InputError(f"{name}: holds an infinite value; mark missing entries as NaN")
    keep = ~np.isnan(dense)
    indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return sp.csr_matrix((dense[keep], np.nonzero(keep)[1].astype(np.int32), indptr), shape=csr.shape)


def check_size(csr: sp.csr_matrix, name: str, first_row: int) -> None:
    """Raise `InputError` if values are so large or small that they cannot be computed with."""
    largest, last_row = np.abs(csr.data).max(initial=0), first_row + csr.shape[0] - 1
    if largest and not 1 / _LARGEST <= largest <= _LARGEST:
        raise InputError(
            f"{name}: cells {first_row} to {last_row} have values up to {largest:g}, whose squares are beyond "
            f"float32; multiply the matrix so that they lie between {1 / _LARGEST:g} and {_LARGEST:g}"
        )
