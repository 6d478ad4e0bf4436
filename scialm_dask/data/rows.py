"""Rows of one matrix of a store: found, checked for damage, read where they are needed; and whether it has changed."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from scialm_dask.data.arrays import MOST_MISSING, is_checksummed, missing_chunks, n_chunks, read_span
from scialm_dask.data.csr import RowBlocks
from scialm_dask.data.remote import RemoteStore, is_url
from scialm_dask.data.store import open_store, readable
from scialm_dask.errors import InputError

_METADATA = {".zarray", ".zattrs", ".zgroup", "zarr.json"}


@dataclass(frozen=True)
class StoredRows:
    """Rows of one element of a store on disk, opened anew wherever it is read."""

    path: str  # of the store, or its URL
    element: str  # its name in the store, such as X; empty for a bare array
    encoding: str  # "csr_matrix", "csc_matrix" or "array"
    shape: tuple[int, int]  # cells × genes
    label: str | None = None  # of a temporary copy alone: what it is a copy of, to call it by
    # of a 10x file that has other features too: one byte for each, 1 for genes, which alone are read
    features: bytes | None = None
    transposed: bool = False  # whether a dense element is stored as genes × cells

    @property
    def name(self) -> str:
        """What to call it in messages."""
        if self.label is not None:
            return self.label
        return f"{self.path}:{self.element}" if self.element else self.path

    @property
    def n_stored(self) -> int:
        """Number of stored values; all entries of a dense element."""
        if self.encoding == "array":
            return self.shape[0] * self.shape[1]
        return int(open_store(self.path)[self.element]["data"].shape[0])

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop` as stored."""
        with readable(f"{self.name}: rows {start} to {stop}"):
            store = open_store(self.path)
            element = store[self.element] if self.element else store
            if self.encoding == "array":
                dense = np.asarray(element[:, start:stop].T if self.transposed else element[start:stop])
                return sp.csr_matrix(dense.astype(numeric(dense.dtype), copy=False))
            indptr = np.asarray(element["indptr"][start : stop + 1], dtype=np.int64)
            _check_rising(self.name, indptr, element["data"].shape[0])
            span = slice(int(indptr[0]), int(indptr[-1]))
            data, indices = read_span(element["data"], span), read_span(element["indices"], span)
        return _assemble(self, data, indices, indptr - indptr[0], start)


@dataclass(frozen=True)
class MemoryRows:
    """Rows of a matrix that is in memory already."""

    matrix: sp.csr_matrix
    name: str = "matrix"

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.matrix.shape  # type: ignore[no-any-return]

    @property
    def n_stored(self) -> int:
        """Number of stored values."""
        return int(self.matrix.nnz)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop`."""
        return self.matrix[start:stop]


@dataclass(frozen=True)
class _Derived:
    """Rows that are read from others."""

    rows: Rows

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.rows.name

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.rows.shape

    @property
    def n_stored(self) -> int:
        """Number of stored values, the most that there can be."""
        return self.rows.n_stored


@dataclass(frozen=True)
class _ReorderedRows(_Derived):
    """Rows in another order, by their numbers: each that is asked for is read with the block that it lies in."""

    blocks: RowBlocks
    cells: NDArray[np.intp]

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop` of the new order."""
        wanted = self.cells[start:stop]
        block = np.searchsorted(self.blocks.bounds, wanted, side="right") - 1
        first = np.asarray(self.blocks.bounds)[block]
        pieces = [self.rows.read(*self.blocks[b])[(wanted - first)[block == b]] for b in np.unique(block)]
        return sp.vstack(pieces, format="csr")[np.argsort(np.argsort(block, kind="stable"))]


@dataclass(frozen=True)
class RenamedRows(_Derived):
    """Rows with other columns: column j is number ``columns[j]`` of `n_columns`, or none of them if that is −1."""

    columns: NDArray[np.intp]
    n_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.rows.shape[0], self.n_columns

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop`."""
        csr = self.rows.read(start, stop)
        at = self.columns[csr.indices]
        some = at >= 0
        indptr = np.concatenate([[0], np.cumsum(some)])[csr.indptr]
        return sp.csr_matrix((csr.data[some], at[some], indptr), shape=(csr.shape[0], self.n_columns))


Rows = StoredRows | MemoryRows | _ReorderedRows | RenamedRows  # hand out rows as CSR; small, or shared with tasks


def reordered(rows: Rows, blocks: RowBlocks, cells: NDArray[np.intp] | None, genes: NDArray[np.intp] | None) -> Rows:
    """Return rows `cells`, columns `genes`, permutations both, of a matrix that is stored in these blocks."""
    if isinstance(rows, MemoryRows):
        csr = rows.matrix if cells is None else rows.matrix[cells]
        return MemoryRows(csr if genes is None else csr[:, genes], rows.name)
    in_order = rows if cells is None else _ReorderedRows(rows, blocks, cells)
    return in_order if genes is None else RenamedRows(in_order, np.argsort(genes), len(genes))


def _assemble(
    rows: StoredRows, data: NDArray[Any], indices: NDArray[Any], indptr: NDArray[np.int64], start: int
) -> sp.csr_matrix:
    if len(indptr) < 2 or not len(data) == len(indices) == indptr[-1]:
        raise InputError(f"{rows.name}: indptr does not fit data and indices from row {start}; write the store again")
    width = rows.shape[1] if rows.features is None else len(rows.features)
    if len(indices) and (indices.min() < 0 or indices.max() >= width):
        bad = indices[(indices < 0) | (indices >= width)][0]
        raise InputError(f"{rows.name}: gene index {bad} is outside 0 to {width - 1}; write the store again")
    data, indices = data.astype(numeric(data.dtype), copy=False), indices.astype(np.int32, copy=False)
    csr = sp.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, width))
    return csr if rows.features is None else csr[:, np.flatnonzero(np.frombuffer(rows.features, bool))]


def _check_rising(name: str, indptr: NDArray[np.int64], n_stored: int) -> None:
    if np.any(np.diff(indptr) < 0) or indptr.min(initial=0) < 0 or indptr.max(initial=0) > n_stored:
        raise InputError(
            f"{name}: indptr falls, or leads beyond its {n_stored} values; the store is damaged, write it again"
        )


def numeric(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Type that holds the values of `dtype` and that SciPy can compute with."""
    kind = {"b": np.uint8, "e": np.float32}.get(dtype.char if dtype.kind == "f" else dtype.kind, dtype)
    return np.dtype(kind).newbyteorder("=")


def arrays_of(rows: StoredRows, element: Any) -> list[Any]:
    """Return the arrays of which an element is made."""
    return [element] if rows.encoding == "array" else [element[name] for name in ("data", "indices", "indptr")]


def chunk_bytes(rows: Rows) -> int:
    """Bytes of the chunks that are in memory whole when any row in them is read; 0 of what is there anyhow."""
    while isinstance(rows, _Derived):
        rows = rows.rows
    if not isinstance(rows, StoredRows):
        return 0
    store = open_store(rows.path)
    arrays = arrays_of(rows, store[rows.element] if rows.element else store)[:2]
    return sum(math.prod(array.chunks or (0,)) * array.dtype.itemsize for array in arrays)


def blocks_of(rows: StoredRows, element: Any, blocks: int | None = None) -> RowBlocks:
    """Cut the rows of a CSR or dense element, having seen that its indptr fits."""
    n_cells, n_genes = rows.shape
    if rows.encoding == "array":
        chunks = element.chunks or (1, 1)
        rows_in_chunk = chunks[1 if rows.transposed else 0]
        return RowBlocks.even(n_cells, blocks) if blocks else RowBlocks.by_width(n_cells, n_genes, rows_in_chunk)
    indptr = read_indptr(rows, element)
    return RowBlocks.by_nonzeros(indptr, blocks)


def read_indptr(rows: StoredRows, element: Any) -> NDArray[np.int64]:
    """Read where each row, or column, of a sparse element begins; raises `InputError` if it does not fit the sizes."""
    lines, what = (rows.shape[0], "cells") if rows.encoding == "csr_matrix" else (rows.shape[1], "genes")
    stored = element["data"].shape[0]
    fits = element["indptr"].shape == (lines + 1,) and element["indices"].shape == (stored,)  # before it takes memory
    indptr = np.asarray(element["indptr"][:] if fits else [1], dtype=np.int64)
    if indptr[0] != 0 or indptr[-1] != stored or np.any(np.diff(indptr) < 0):
        raise InputError(
            f"{rows.name}: indptr does not fit {lines} {what} and {stored} values; the store is damaged, write it again"
        )
    return indptr


def check_chunks(rows: StoredRows, element: Any, missing_are_zeros: bool) -> None:
    """Refuse an element of which chunks are gone, since Zarr and HDF5 would read them as zeros."""
    for array in arrays_of(rows, element):
        if missing_are_zeros and rows.encoding == "array":
            continue
        gone = missing_chunks(array)
        if gone and not _zeros_by_right(element, array, gone):
            count = f"{len(gone)}{'+' * (len(gone) == MOST_MISSING)}"
            name = array.name.rpartition("/")[2]
            first = f", first {gone[0]}" if isinstance(array, zarr.Array) else ""  # HDF5 does not say which
            what = f"{rows.name}: {count} of {n_chunks(array)} chunks of {name} are missing{first}"
            if rows.encoding == "array":
                raise InputError(
                    f"{what}; restore them, or if they were all zeros pass --missing-chunks-are-zeros, to `scialm-dask "
                    "convert` where there is no such option"
                )
            raise InputError(f"{what}; the store is damaged, write it again")


def _zeros_by_right(element: Any, array: Any, gone: list[tuple[int, ...]]) -> bool:
    """Tell whether the absent chunks of a sparse element may be chunks of zeros that Zarr chose not to write.

    So it is with `indptr` before the first value, and with `indices` where each row has gene 0 alone. Rows that
    lie over a lost chunk come out with repeated or falling indices.
    """
    if array is element or not isinstance(array, zarr.Array) or array.basename == "data" or is_checksummed(array):
        return False
    if len(gone) == MOST_MISSING:
        return False
    indptr = np.asarray(element["indptr"][:], dtype=np.int64)
    step = (array.shards or array.chunks)[0]
    for (position,) in gone:
        start, stop = position * step, min((position + 1) * step, array.shape[0])
        if array.basename == "indptr":
            first, last = min(stop, len(indptr) - 1) - 1, min(stop, len(indptr) - 1)
        else:
            first = int(np.searchsorted(indptr, start, side="right")) - 1
            last = int(np.searchsorted(indptr, stop - 1, side="right"))
        spans = [(int(indptr[r]), int(indptr[r + 1])) for r in range(max(first, 0), last)]
        if any(np.any(np.diff(element["indices"][a:b].astype(np.int64)) <= 0) for a, b in spans):
            return False
    return True


def sum_duplicates(csr: sp.csr_matrix, name: str) -> None:
    """Sort the indices and sum what is stored twice, in place."""
    if not csr.has_canonical_format:
        dtype, csr.data = csr.dtype, widened(csr.data)
        csr.sum_duplicates()
        csr.data = narrowed(csr.data, dtype, name)


def widened(values: NDArray[Any]) -> NDArray[Any]:
    """Give values a type in which sums do not overflow."""
    return values.astype(np.int64 if values.dtype.kind in "iu" else np.float64)


def narrowed(values: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """Give sums their type back; raises `InputError` if one is beyond what the type holds."""
    if dtype.kind in "iu" and len(values):
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise InputError(f"{name}: entries stored twice add up to more than {dtype} holds; store a wider type")
    return values.astype(dtype)


def fingerprint(rows: Rows) -> str | None:
    """Digest what rows are read from, see `Stamp`; None if that is in memory."""
    return _digest(rows.path, (rows.element,)) if isinstance(rows, StoredRows) else None


class Stamp(NamedTuple):
    """What some elements of a store were like: names, sizes and times of their files, and Zarr's metadata.

    Behind a URL, names, sizes and versions. The digest is None if it has no such things.
    """

    path: str
    elements: tuple[str, ...]
    digest: str | None

    @classmethod
    def of(cls, path: str, *elements: str) -> Stamp:
        """Look at these elements; at everything, if none is given."""
        elements = elements or ("",)
        return cls(path, elements, _digest(path, elements))

    def check(self) -> None:
        """Raise `InputError` if it is not like that any more."""
        if _digest(self.path, self.elements) != self.digest:
            raise InputError(
                f"{self.path}: was changed while it was read; begin again when nothing writes to it any more"
            )


def _digest(path: str, elements: tuple[str, ...]) -> str | None:
    if is_url(path):
        store = RemoteStore.at(path, read_only=True)
        found = [sync(store.stamps(element)) for element in elements]
        words = None if None in found else "\n".join(word for each in found for word in each or ())
        return None if words is None else hashlib.sha256(words.encode()).hexdigest()
    digest = hashlib.sha256()
    for file in (file for element in elements for file in _files(path, element)):
        try:
            status = os.stat(file)
        except FileNotFoundError:
            continue  # between the listing and now: a change as well
        digest.update(f"{os.path.relpath(file, path)} {status.st_size} {status.st_mtime_ns}\n".encode())
        if os.path.basename(file) in _METADATA:
            with open(file, "rb") as opened:
                digest.update(opened.read())
    return digest.hexdigest()


def _files(path: str, element: str) -> Iterator[str]:
    if os.path.isfile(path):
        yield path
        return
    for folder, below, names in os.walk(os.path.join(path, element)):
        below.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))
