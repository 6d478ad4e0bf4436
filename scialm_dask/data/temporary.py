"""Temporary copies by cells, on disk, of matrices that cannot be read by row blocks where they are."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import dask
import numpy as np
import scipy.sparse as sp
import zarr
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from scialm_dask.data.arrays import ZARR_FORMAT
from scialm_dask.data.csr import CSRWriter, Observed, check_array, unmasked
from scialm_dask.data.lease import held_name
from scialm_dask.data.rows import StoredRows, narrowed, numeric, read_indptr, widened
from scialm_dask.data.store import open_store, output_error, readable
from scialm_dask.errors import InputError, OutputError
from scialm_dask.reduction import current_client

_PIECE = 1 << 20  # entries handled at once
_BUCKET = 1 << 21  # entries sorted at once
_MOST_BUCKETS = 512


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a temporary folder, in Dask's temporary-directory; raises `OutputError` if its disk is full."""
    parent = dask.config.get("temporary-directory", None)
    if parent is not None:
        os.makedirs(parent, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"scialm-{held_name()}-", dir=parent))
    try:
        yield folder
    except OSError as error:
        raise output_error(folder, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_csr(blocks: Iterable[sp.csr_matrix], n_columns: int, dtype: np.dtype[Any], name: str) -> StoredRows:
    """Write blocks of rows, in order, to a temporary store.

    It is in Dask's ``temporary-directory``, else the system's, until nothing in this process refers to the rows. Raises
    `InputError` if workers of the Dask cluster do not see the folder, `OutputError` if the disk is full.
    """
    n_rows = 0
    with ExitStack() as opened:
        folder = opened.enter_context(temporary_folder())
        check_seen(folder, name)
        root = zarr.open_group(folder / "rows.zarr", mode="w-", zarr_format=ZARR_FORMAT)
        with CSRWriter(root, "X", n_columns=n_columns, dtype=numeric(dtype)) as writer:
            for block in blocks:
                writer.append(block)
                n_rows += block.shape[0]
        rows = StoredRows(os.fspath(folder / "rows.zarr"), "X", "csr_matrix", (n_rows, n_columns), label=name)
        weakref.finalize(rows, opened.pop_all().close)
    return rows


def is_seen(folder: str | os.PathLike[str]) -> bool:
    """Return whether all workers of the Dask cluster, if there is one, see a folder."""
    client = current_client()
    return client is None or all(client.run(os.path.isdir, os.fspath(folder)).values())


def check_seen(folder: Path, name: str) -> None:
    """Raise `InputError` unless workers see the folder with a temporary copy of the matrix of this name."""
    if not is_seen(folder):
        raise InputError(
            f"{name}: a temporary copy of it for the workers is put in {folder.parent}, which they do not see; set "
            "Dask's temporary-directory to a folder that all see, or write the matrix there and pass its path"
        )


def computed(array: Any, name: str, observed: Observed) -> StoredRows:
    """Compute a Dask array, a row of chunks at a time, and write it to a temporary store."""
    if hasattr(array, "to_dask_array"):
        raise InputError(f"{name}: a Dask data frame, of unknown length; give frame.to_dask_array(lengths=True)")
    check_array(array, name)

    def chunk(*place: int) -> sp.csr_matrix:
        return sp.csr_matrix(unmasked(array.blocks[place].compute(), observed))

    dtype = np.dtype(np.float64) if observed == "finite" else array.dtype.newbyteorder("=")
    if array.numblocks[0] > 1 or array.numblocks[1] == 1:
        array = array.rechunk({1: -1})
        return temporary_csr((chunk(i) for i in range(array.numblocks[0])), array.shape[1], dtype, name)
    starts = np.cumsum([0, *array.chunks[1]])  # chunks hold all cells of some genes

    def pieces() -> Iterator[Entries]:
        for number, start in enumerate(starts[:-1]):
            entries = chunk(0, number).tocoo()
            yield Entries(entries.row, (entries.col + start).astype(np.int32), entries.data)

    n_values = array.shape[0] * array.shape[1] // 10  # a guess, since only reading them tells
    return temporary_csr(rows_in_order(pieces(), array.shape, dtype, n_values, name), array.shape[1], dtype, name)


class Entries(NamedTuple):
    """Some entries of a matrix, in any order, as arrays of the same length."""

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
    """Yield some entries of a CSC element at a time; raises `InputError` if they do not fit its shape."""
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
            last = rows.shape[0] - 1
            raise InputError(f"{rows.name}: cell index {bad} is outside 0 to {last}; write the store again")
        yield Entries(cells, columns, values)


def rows_in_order(
    pieces: Iterable[Entries], shape: tuple[int, int], dtype: np.dtype[Any], n_expected: int, name: str
) -> Iterator[sp.csr_matrix]:
    """Sort about `n_expected` entries by row and column on disk, and yield all rows, block by block.

    The entries are distributed to bucket files, one for each range of rows, and each file is sorted in memory, or
    distributed again if it is too large. Duplicate entries are summed.
    """
    record = np.dtype([("row", np.int64), ("column", np.int32), ("value", dtype)])
    with temporary_folder() as folder:
        for span, entries in _deal(pieces, (0, shape[0]), n_expected, record, folder):
            yield csr_of(entries, span, shape[1], dtype, name)


def csr_of(entries: Entries, span: tuple[int, int], n_columns: int, dtype: np.dtype[Any], name: str) -> sp.csr_matrix:
    """Return rows ``span[0]`` to ``span[1] - 1`` from all their entries; duplicates are summed."""
    place = (entries.rows - span[0], entries.columns)
    csr = sp.coo_matrix((widened(entries.values), place), shape=(span[1] - span[0], n_columns)).tocsr()
    csr.data = narrowed(csr.data, dtype, name)
    return csr


class _Bucket:
    """A file of entries, and the CRC-32 of its content."""

    def __init__(self, path: Path) -> None:
        self.path, self._crc, self.n_bytes = path, 0, 0
        path.touch()

    def append(self, records: NDArray[Any]) -> None:
        with self.path.open("ab") as file:
            file.write(records.data)  # tofile would hide why it fails
        self._crc, self.n_bytes = crc32(records, self._crc), self.n_bytes + records.nbytes

    def read(self, record: np.dtype[Any], at_once: int) -> Iterator[Entries]:
        crc = 0
        with self.path.open("rb") as stream:
            while len(records := np.fromfile(stream, record, at_once)):
                crc = crc32(records, crc)
                yield Entries(records["row"], records["column"], records["value"])
        if crc != self._crc:
            raise OutputError(f"{self.path}: is not what was written there; check that disk, or sort on another")


def _deal(
    pieces: Iterable[Entries], span: tuple[int, int], n_expected: int, record: np.dtype[Any], folder: Path
) -> Iterator[tuple[tuple[int, int], Entries]]:
    """Distribute the entries of rows `span` to bucket files; yield the rows and entries of each."""
    start, stop = span
    n_buckets = min(max(1, -(-n_expected // (_BUCKET // 2))), _MOST_BUCKETS, stop - start)
    bounds = np.linspace(start, stop, n_buckets + 1).round().astype(np.int64)
    buckets = [_Bucket(folder / uuid.uuid4().hex) for _ in range(n_buckets)]
    for piece in pieces:
        of_bucket = np.searchsorted(bounds, piece.rows, side="right") - 1
        order = np.argsort(of_bucket, kind="stable")
        records = np.empty(len(order), record)
        records["row"], records["column"], records["value"] = (part[order] for part in piece)
        cuts = np.searchsorted(of_bucket[order], np.arange(len(buckets) + 1))
        for b in np.flatnonzero(np.diff(cuts)):
            buckets[b].append(records[cuts[b] : cuts[b + 1]])
    for bucket, first, last in zip(buckets, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        n_entries = bucket.n_bytes // record.itemsize
        if n_entries > _BUCKET and last - first > 1:
            yield from _deal(bucket.read(record, _PIECE), (first, last), n_entries, record, folder)
        else:
            parts = [Entries(*(np.empty(0, kind) for kind in (np.int64, np.int32, record["value"])))]
            parts += bucket.read(record, max(1, n_entries))
            yield (first, last), parts[-1]
        bucket.path.unlink()
