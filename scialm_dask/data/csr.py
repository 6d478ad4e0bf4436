"""CSR blocks: row partitions, checks of values, small changes, and a writer for stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
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

CHUNK_VALUES = 1 << 18  # values in a chunk of `data` or `indices`; a block reads few values of other blocks
CHUNK_ROWS = 1 << 16
_THREADS = min(CPU_COUNT, 4)  # that compress
_LARGEST = 1e15  # squares of larger values, or of values below its inverse, are beyond float32
_MOST_NONZEROS = 2_000_000  # about 80 MB of memory in a task
_LEAST_NONZEROS = 500_000  # smaller tasks are mostly overhead
_USEFUL_BLOCKS = 8  # gives every core work on a small matrix
_MOST_ROWS = 1 << 16
_ROW_VALUES = 16  # the cost of a row, in values


@dataclass(frozen=True)
class RowBlocks:
    """A partition of the rows of a matrix into consecutive blocks."""

    bounds: tuple[int, ...]  # strictly increasing; block b is rows bounds[b] to bounds[b + 1] - 1

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
        """Number of rows of each block."""
        return tuple(stop - start for start, stop in self)

    @classmethod
    def even(cls, n_rows: int, n_blocks: int) -> RowBlocks:
        """Cut into `n_blocks` blocks, one row each at least, with nearly equal numbers of rows."""
        n_blocks = max(1, min(n_blocks, n_rows))
        return cls(tuple(int(b) for b in np.linspace(0, n_rows, n_blocks + 1).round()))

    @classmethod
    def by_nonzeros(cls, indptr: NDArray[np.integer], n_blocks: int | None = None) -> RowBlocks:
        """Cut into blocks with about equal numbers of stored values; by default as many as one task should have."""
        n_rows, total = len(indptr) - 1, int(indptr[-1])
        if n_blocks is not None:
            effort = indptr + _ROW_VALUES * np.arange(n_rows + 1, dtype=np.int64)
            cuts = np.searchsorted(effort, np.linspace(0, effort[-1], min(n_blocks, n_rows) + 1)[1:-1])
            return cls(tuple(np.unique(np.concatenate([[0], cuts, [n_rows]])).tolist()))
        target = min(_MOST_NONZEROS, max(_LEAST_NONZEROS, -(-total // _USEFUL_BLOCKS)))
        n_blocks = max(1, -(-total // target))
        cuts = np.searchsorted(indptr, np.linspace(0, total, n_blocks + 1)[1:-1])
        bounds: list[int] = []
        for start, stop in pairwise(np.unique(np.concatenate([[0], cuts, [n_rows]])).tolist()):
            pieces = -(-(stop - start) // _MOST_ROWS)
            bounds += (start + (stop - start) * i // pieces for i in range(pieces))
        return cls((*bounds, n_rows))

    @classmethod
    def by_width(cls, n_rows: int, row_values: int, chunk_rows: int = 1) -> RowBlocks:
        """Cut a dense matrix with `row_values` values in a row, stored in chunks of `chunk_rows` rows.

        Blocks are whole chunks, so that no chunk is read twice, unless a chunk is far too large for one task.
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
        """Cut into blocks that take at most `most_bytes` as dense float32, or are a single row."""
        rows = max(1, min(n_rows, most_bytes // (4 * n_columns)))
        return cls((*range(0, n_rows, rows), n_rows))


def row_of(csr: sp.csr_matrix) -> NDArray[np.intp]:
    """Return the row of each stored value, of shape (nnz,)."""
    return np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))


def entries_where(csr: sp.csr_matrix, chosen: NDArray[np.bool_]) -> sp.csr_matrix:
    """Return the matrix with only the stored values where `chosen`, of shape (nnz,), is true."""
    indptr = np.concatenate([[0], np.cumsum(chosen)])[csr.indptr]
    return sp.csr_matrix((csr.data[chosen], csr.indices[chosen], indptr), shape=csr.shape)


def renumbered(csr: sp.csr_matrix, columns: NDArray[np.intp], n_columns: int) -> sp.csr_matrix:
    """Return the matrix with column j as column ``columns[j]`` of `n_columns`, without columns where that is −1.

    Its indices ascend in each row, as kernels need them.
    """
    kept = entries_where(csr, columns[csr.indices] >= 0)
    moved = sp.csr_matrix((kept.data, columns[kept.indices], kept.indptr), shape=(csr.shape[0], n_columns))
    moved.sort_indices()
    return moved


def scaled_rows(csr: sp.csr_matrix, factors: NDArray[np.floating]) -> sp.csr_matrix:
    """Return the matrix with each row multiplied by its factor, as float32."""
    values = (csr.data * np.repeat(factors, np.diff(csr.indptr))).astype(np.float32)
    return sp.csr_matrix((values, csr.indices, csr.indptr), shape=csr.shape)


class CSRWriter:
    """Writes a CSR matrix into an AnnData Zarr store, some rows at a time, in order.

    Memory is a few chunks, and 8 bytes per row. It is a context manager; the matrix is complete after the block.
    """

    def __init__(self, parent: zarr.Group, name: str, *, n_columns: int, dtype: Any = np.float32) -> None:
        self._group, self._columns = parent.create_group(name), n_columns
        kinds = {"data": np.dtype(dtype), "indices": np.dtype(np.int32)}
        self._arrays = [new_array(self._group, part, (0,), (CHUNK_VALUES,), kind) for part, kind in kinds.items()]
        self._indptr, self._stored = [np.zeros(1, np.int64)], 0
        self._waiting: tuple[list[NDArray[Any]], ...] = ([], [])  # values of a chunk that is not full yet, by array
        self._pool, self._under_way = ThreadPoolExecutor(_THREADS), deque[Future[None]]()

    def append(self, rows: sp.csr_matrix) -> None:
        """Add the next rows, a CSR matrix with `n_columns` columns, whose values must not change afterwards."""
        for array, waiting, part in zip(self._arrays, self._waiting, (rows.data, rows.indices), strict=True):
            values, chunk = np.asarray(part, array.dtype), array.chunks[0]
            start = min(-self._stored % chunk, len(values))  # the first ones go on with a chunk that is not full
            if start:
                waiting.append(values[:start].copy())
                if (self._stored + start) % chunk == 0:
                    self._write(array, self._stored, np.concatenate(waiting))
                    waiting.clear()
            stop = len(values) - (len(values) - start) % chunk
            for at in range(start, stop, chunk):
                self._write(array, self._stored + at, values[at : at + chunk])
            if stop < len(values):
                waiting.append(values[stop:].copy())
        self._indptr.append(rows.indptr[1:].astype(np.int64) - int(rows.indptr[0]) + self._stored)
        self._stored += int(rows.nnz)

    def _write(self, array: Any, position: int, values: NDArray[Any]) -> None:
        """Write the chunk with this position in a thread; no more chunks wait than there are threads."""
        self._under_way.append(self._pool.submit(write_chunk, array, position // array.chunks[0], values))
        while len(self._under_way) > _THREADS:
            self._under_way.popleft().result()

    def __enter__(self) -> CSRWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for array, waiting in zip(self._arrays, self._waiting, strict=True):
                    if waiting:
                        self._write(array, self._stored, np.concatenate(waiting))
                    array.resize((self._stored,))
                for writing in self._under_way:
                    writing.result()
                finish_csr(self._group, self._indptr, self._columns)
        finally:
            self._pool.shutdown(cancel_futures=True)


def finish_csr(group: zarr.Group, indptr: Sequence[NDArray[np.int64]], n_columns: int) -> None:
    """Write the encoding of a CSR matrix and its `indptr`, given in parts.

    It is int32 like the indices if it can be, since SciPy fails on a matrix with two types.
    """
    starts = np.concatenate(indptr)
    starts = starts.astype(np.int32 if starts[-1] <= np.iinfo(np.int32).max else np.int64)
    new_array(group, "indptr", starts.shape, (CHUNK_ROWS,), starts.dtype)[:] = starts
    set_encoding(group, "csr_matrix", "0.1.0", shape=[len(starts) - 1, n_columns])


def held_array(matrix: Any, name: str) -> Any:
    """Return a matrix in memory as a NumPy or SciPy sparse array; raises `InputError` as `check_array` does.

    A sparse data frame stays sparse. Numbers get this machine's byte order.
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
    """Return a masked array with its masked entries as unknown: zero, or NaN if zeros are observed."""
    if not isinstance(matrix, np.ma.MaskedArray):
        return matrix
    if observed == "nonzero":
        return matrix.filled(0)
    filled = matrix.filled(0).astype(np.float64)
    filled[np.ma.getmaskarray(matrix)] = np.nan
    return filled


def check_array(array: Any, name: str) -> None:
    """Raise `InputError` unless a NumPy, SciPy or Dask array is a matrix of numbers of known size."""
    if array.ndim != 2 or any(np.isnan(n) or n == 0 for n in array.shape):
        raise InputError(f"{name}: shape {array.shape}; give a matrix of known size with at least one cell and gene")
    if array.dtype.kind not in "buif" or array.dtype == np.float16:
        raise InputError(f"{name}: values are of type {array.dtype}, not numbers to compute with; convert them first")


def check_values(csr: sp.csr_matrix, name: str, first_row: int) -> None:
    """Raise `InputError` if a value is negative, NaN or infinite."""
    smallest, largest = (csr.data.min(), csr.data.max()) if csr.nnz else (0, 0)
    if smallest >= 0 and largest < np.inf:  # false for NaN too
        return
    at = int(np.flatnonzero(~((csr.data >= 0) & (csr.data < np.inf)))[0])
    row = int(np.searchsorted(csr.indptr, at, side="right")) - 1
    remedy = "expression must be finite and not negative: give counts or normalised counts, not scaled or centred data"
    raise InputError(f"{name}: value {csr.data[at]} at cell {first_row + row}, gene {csr.indices[at]}; {remedy}")


def check_observed(n_observed: int, name: str) -> None:
    """Raise `InputError` if a matrix has no observed entry."""
    if n_observed == 0:
        raise InputError(f"{name}: no entry is observed, all are zero; give a matrix with non-zeros or another layer")


def finite_entries(csr: sp.csr_matrix, name: str) -> sp.csr_matrix:
    """Return all entries that are not NaN, with explicit zeros; raises `InputError` if one is infinite."""
    dense = csr.toarray()
    if np.isinf(dense).any():
        raise InputError(f"{name}: holds an infinite value; mark missing entries as NaN")
    keep = ~np.isnan(dense)
    indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return sp.csr_matrix((dense[keep], np.nonzero(keep)[1].astype(np.int32), indptr), shape=csr.shape)


def check_size(csr: sp.csr_matrix, name: str, first_row: int) -> None:
    """Raise `InputError` if the squares of the values are beyond float32."""
    largest, last_row = np.abs(csr.data).max(initial=0), first_row + csr.shape[0] - 1
    if largest and not 1 / _LARGEST <= largest <= _LARGEST:
        raise InputError(
            f"{name}: cells {first_row} to {last_row} have values up to {largest:g}, whose squares are beyond "
            f"float32; multiply the matrix so that they lie between {1 / _LARGEST:g} and {_LARGEST:g}"
        )
