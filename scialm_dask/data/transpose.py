"""Bringing entries that come in any order into row order on disk, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from scialm_dask.data.rows import StoredRows, narrowed, numeric, read_indptr, widened
from scialm_dask.data.store import open_store, readable
from scialm_dask.data.temporary import temporary_csr, temporary_folder
from scialm_dask.errors import InputError, OutputError

_PIECE = 1 << 20  # entries handled at once
_BUCKET = 1 << 21  # entries sorted at once
_MOST_BUCKETS = 512


class Entries(NamedTuple):
    """Some entries of a matrix, in any order: arrays of the same length."""

    rows: NDArray[np.integer]
    columns: NDArray[np.integer]
    values: NDArray[Any]


def spill_to_csr(rows: StoredRows) -> StoredRows:
    """Write a CSC element as CSR to a temporary store; see `temporary_csr`."""
    data = open_store(rows.path)[rows.element]["data"]
    dtype, n_stored = numeric(data.dtype), int(data.shape[0])
    ordered = rows_in_order(columns_of(rows), rows.shape, dtype, n_stored, rows.name)
    return temporary_csr(ordered, rows.shape[1], dtype, rows.name)


def columns_of(rows: StoredRows) -> Iterator[Entries]:
    """Read the entries of a CSC element in the order in which they are stored, some at a time.

    Raises
    ------
    InputError
        If indptr or indices do not fit the shape.
    """
    with readable(rows.name):
        element = open_store(rows.path)[rows.element]
        indptr, data, indices = read_indptr(rows, element), element["data"], element["indices"]
    for start in range(0, data.shape[0], _PIECE):
        stop = min(start + _PIECE, data.shape[0])
        with readable(f"{rows.name}: values {start} to {stop}"):
            cells, values = np.asarray(indices[start:stop]), np.asarray(data[start:stop])
        first, last = np.searchsorted(indptr, [start, stop - 1], side="right") - 1
        edges = np.clip(indptr[first : last + 2], start, stop)
        columns = np.repeat(np.arange(first, last + 1, dtype=np.int32), edges[1:] - edges[:-1])
        if cells.min() < 0 or cells.max() >= rows.shape[0]:
            bad = cells[(cells < 0) | (cells >= rows.shape[0])][0]
            raise InputError(
                f"{rows.name}: cell index {bad} is outside 0 to {rows.shape[0] - 1}; write the store again"
            )
        yield Entries(cells, columns, values)


def rows_in_order(
    pieces: Iterable[Entries], shape: tuple[int, int], dtype: np.dtype[Any], n_expected: int, name: str
) -> Iterator[sp.csr_matrix]:
    """Sort entries by row and column on disk and hand out the rows, block after block.

    The entries are first dealt out to bucket files, each of a range of rows, then each file is sorted in memory;
    one that is too big for that is dealt out once more.

    Parameters
    ----------
    pieces
        The entries in any order, indices within `shape`. Those at the same place are added.
    shape
        Rows × columns.
    dtype
        Of the values handed out.
    n_expected
        About how many entries there are.
    name
        What to call the matrix in messages.

    Yields
    ------
    scipy.sparse.csr_matrix
        The next rows, all of them in the end, also those without entries.
    """
    record = np.dtype([("row", np.int64), ("column", np.int32), ("value", dtype)])
    with temporary_folder() as folder:
        names = (folder / f"{number}" for number in count())
        for span, entries in _deal(pieces, (0, shape[0]), n_expected, record, names):
            yield csr_of(entries, span, shape[1], dtype, name)


def csr_of(entries: Entries, span: tuple[int, int], n_columns: int, dtype: np.dtype[Any], name: str) -> sp.csr_matrix:
    """Build rows ``span[0]`` to ``span[1] - 1`` from all their entries; those at the same place are added."""
    place = (entries.rows - span[0], entries.columns)
    csr = sp.coo_matrix((widened(entries.values), place), shape=(span[1] - span[0], n_columns)).tocsr()
    csr.data = narrowed(csr.data, dtype, name)
    return csr


class _Bucket:
    """A file of entries, and the CRC-32 of what was written there."""

    def __init__(self, path: Path) -> None:
        self._path, self._crc, self.n_bytes = path, 0, 0
        path.touch()

    def append(self, records: NDArray[Any]) -> None:
        with self._path.open("ab") as file:
            file.write(records.data)  # tofile hides why it fails
        self._crc, self.n_bytes = crc32(records, self._crc), self.n_bytes + records.nbytes

    def read(self, record: np.dtype[Any], at_once: int) -> Iterator[Entries]:
        crc = 0
        with self._path.open("rb") as stream:
            while len(records := np.fromfile(stream, record, at_once)):
                crc = crc32(records, crc)
                yield Entries(records["row"], records["column"], records["value"])
        if crc != self._crc:
            raise OutputError(f"{self._path}: is not what was written there; check that disk, or sort on another")

    def remove(self) -> None:
        self._path.unlink()


def _deal(
    pieces: Iterable[Entries], span: tuple[int, int], n_expected: int, record: np.dtype[Any], names: Iterator[Path]
) -> Iterator[tuple[tuple[int, int], Entries]]:
    """Deal the entries of rows `span` out to bucket files and hand out each, in turn, with its rows."""
    start, stop = span
    n_buckets = min(max(1, -(-n_expected // (_BUCKET // 2))), _MOST_BUCKETS, stop - start)
    bounds = np.linspace(start, stop, n_buckets + 1).round().astype(np.int64)
    buckets = [_Bucket(next(names)) for _ in range(n_buckets)]
    for piece in pieces:
        _append(piece, bounds, buckets, record)
    for bucket, first, last in zip(buckets, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        n_entries = bucket.n_bytes // record.itemsize
        if n_entries > _BUCKET and last - first > 1:
            yield from _deal(bucket.read(record, _PIECE), (first, last), n_entries, record, names)
        else:
            parts = [Entries(*(np.empty(0, kind) for kind in (np.int64, np.int32, record["value"])))]
            parts += bucket.read(record, max(1, n_entries))
            yield (first, last), parts[-1]
        bucket.remove()


def _append(piece: Entries, bounds: NDArray[np.int64], buckets: list[_Bucket], record: np.dtype[Any]) -> None:
    bucket = np.searchsorted(bounds, piece.rows, side="right") - 1
    order = np.argsort(bucket, kind="stable")
    records = np.empty(len(order), record)
    records["row"], records["column"], records["value"] = (part[order] for part in piece)
    cuts = np.searchsorted(bucket[order], np.arange(len(buckets) + 1))
    for b in np.flatnonzero(np.diff(cuts)):
        buckets[b].append(records[cuts[b] : cuts[b + 1]])
