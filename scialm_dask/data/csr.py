"""CSR blocks: cut, taken from what people give, checked, changed in small ways, and written into stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
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
_MOST_NONZEROS = 2_000_000  # some 80 MB of a task's memory: any worker has that
_LEAST_NONZEROS = 500_000  # below this a task is overhead
_USEFUL_BLOCKS = 8  # enough for every core to have work on a small matrix
_MOST_ROWS = 1 << 16
_ROW_VALUES = 16  # a row takes as much of a task as so many values, beside its own


@dataclass(frozen=True)
class RowBlocks:
    """A partition of the rows of a matrix into consecutive blocks."""

    bounds: tuple[int, ...]  # strictly increasing row numbers; block b is rows bounds[b] to bounds[b + 1] - 1

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] != 0 or np.any(np.diff(self.bounds) <= 0):
            raise ValueError(f"bounds must rise from 0, got {self.bounds[:5]}…")

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return pairwise(self.bounds)

    def __getitem__(self, block: int) -> tuple[int, int]:
        return self.bounds[block], self.bounds[block + 1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each block."""
        return tuple(stop - start for start, stop in self)

    @classmethod
    def even(cls, n_rows: int, n_blocks: int) -> RowBlocks:
        """Cut into ``n_blocks`` blocks of (nearly) the same number of rows, fewer if there are fewer rows."""
        n_blocks = max(1, min(n_blocks, n_rows))
        return cls(tuple(int(b) for b in np.linspace(0, n_rows, n_blocks + 1).round()))

    @classmethod
    def by_nonzeros(cls, indptr: NDArray[np.integer], n_blocks: int | None = None) -> RowBlocks:
        """Cut so that blocks hold about the same number of stored values, of a size made for one task by default."""
        n_rows, total = len(indptr) - 1, int(indptr[-1])
        if n_blocks is not None:
            effort = indptr + _ROW_VALUES * np.arange(n_rows + 1, dtype=np.int64)
            cuts = np.searchsorted(effort, np.linspace(0, effort[-1], min(n_blocks, n_rows) + 1)[1:-1])
            return cls(tuple(np.unique(np.concatenate([[0], cuts, [n_rows]])).tolist()))
        target = min(_MOST_NONZEROS, max(_LEAST_NONZEROS, -(-total // _USEFUL_BLOCKS)))
        n_blocks = max(1, -(-total // target))
        cuts = np.searchsorted(indptr, np.linspace(0, total, n_blocks + 1)[1:-1])
        bounds = np.unique(np.concatenate([[0], cuts, [n_rows]]))
        return cls(tuple(_split_long(bounds.tolist())))

    @classmethod
    def by_width(cls, n_rows: int, row_values: int, chunk_rows: int = 1) -> RowBlocks:
        """Cut a dense matrix, each row of which holds `row_values` values, stored in chunks of `chunk_rows` rows.

        Blocks are whole chunks where that is not far too much for one task, so that no chunk is read twice.
        """
        blocks = cls.by_nonzeros(np.arange(n_rows + 1, dtype=np.int64) * row_values)
        rows = blocks.sizes[0]
        if chunk_rows <= rows:
            rows -= rows % chunk_rows
        elif chunk_rows * row_values <= 4 * _MOST_NONZEROS:
            rows = chunk_rows
        return cls((*range(0, n_rows, rows), n_rows))

    @classmethod
    def panels(cls, n_rows: int, n_columns: int, most_bytes: int) -> RowBlocks:
        """Cut so that each block takes `most_bytes` at most as dense float32, or is a single row."""
        rows = max(1, min(n_rows, most_bytes // (4 * n_columns)))
        return cls((*range(0, n_rows, rows), n_rows))


def _split_long(bounds: list[int]) -> Iterator[int]:
    for start, stop in pairwise(bounds):
        pieces = -(-(stop - start) // _MOST_ROWS)
        yield from (start + (stop - start) * i // pieces for i in range(pieces))
    yield bounds[-1]


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
