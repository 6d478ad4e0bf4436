"""Rows of a matrix: read where they are needed, and checked for damage; and whether their store has changed."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from scialm_dask.data.arrays import MOST_MISSING, is_checksummed, missing_chunks, n_chunks, read_span
from scialm_dask.data.csr import RowBlocks, renumbered
from scialm_dask.data.remote import RemoteStore, is_url
from scialm_dask.data.store import open_store, readable
from scialm_dask.errors import InputError

_METADATA = {".zarray", ".zattrs", ".zgroup", "zarr.json"}


@dataclass(frozen=True)
class StoredRows:
    """Rows of one element of a store on disk, which is opened anew for every read."""

    path: str  # of the store, or its URL
    element: str  # name in the store, such as X; empty for a bare array
    encoding: str  # "csr_matrix", "csc_matrix" or "array"
    shape: tuple[int, int]  # cells × genes
    label: str | None = None  # only of a temporary copy: the name of the original, for messages
    features: bytes | None = None  # of a 10x file with other features too: a byte per feature, 1 for genes
    transposed: bool = False  # whether a dense element is stored as genes × cells

    @property
    def name(self) -> str:
        """Name in messages."""
        return self.label or (f"{self.path}:{self.element}" if self.element else self.path)

    @property
    def n_stored(self) -> int:
        """Number of stored values; all entries of a dense element."""
        if self.encoding == "array":
            return self.shape[0] * self.shape[1]
        return int(open_store(self.path)[self.element]["data"].shape[0])

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Return rows `start` to ``stop - 1`` with values as stored; raises `InputError` if they are damaged."""
        width = self.shape[1] if self.features is None else len(self.features)
        with readable(f"{self.name}: rows {start} to {stop}"):
            store = open_store(self.path)
            element = store[self.element] if self.element else store
            if self.encoding == "array":
                dense = np.asarray(element[:, start:stop].T if self.transposed else element[start:stop])
                return sp.csr_matrix(dense.astype(numeric(dense.dtype), copy=False))
            n_stored, indptr = element["data"].shape[0], np.asarray(element["indptr"][start : stop + 1], dtype=np.int64)
            if np.any(np.diff(indptr) < 0) or indptr.min(initial=0) < 0 or indptr.max(initial=0) > n_stored:
                raise InputError(f"{self.name}: indptr falls or exceeds {n_stored} values; write the store again")
            span = slice(int(indptr[0]), int(indptr[-1]))
            data, indices = read_span(element["data"], span), read_span(element["indices"], span)
        if len(indptr) < 2 or not len(data) == len(indices) == span.stop - span.start:
            raise InputError(f"{self.name}: indptr does not fit data from row {start}; write the store again")
        if len(indices) and (indices.min() < 0 or indices.max() >= width):
            bad = indices[(indices < 0) | (indices >= width)][0]
            raise InputError(f"{self.name}: gene index {bad} is outside 0 to {width - 1}; write the store again")
        data, indices = data.astype(numeric(data.dtype), copy=False), indices.astype(np.int32, copy=False)
        csr = sp.csr_matrix((data, indices, indptr - span.start), shape=(len(indptr) - 1, width))
        return csr if self.features is None else csr[:, np.flatnonzero(np.frombuffer(self.features, bool))]


@dataclass(frozen=True)
class MemoryRows:
    """Rows of a matrix in memory."""

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
        """Return rows `start` to ``stop - 1``."""
        return self.matrix[start:stop]


@dataclass(frozen=True)
class DerivedRows:
    """Rows of another matrix, with cells or genes in another order."""

    rows: Rows
    shape: tuple[int, int]  # cells × genes
    columns: NDArray[np.intp] | None = None  # new number of each gene, −1 for those left out
    cells: NDArray[np.intp] | None = None  # old number of each cell
    blocks: RowBlocks | None = None  # of the old rows; a whole block is read for each cell in it

    @property
    def name(self) -> str:
        """Name in messages."""
        return self.rows.name

    @property
    def n_stored(self) -> int:
        """Number of stored values of the other matrix, at least as many as here."""
        return self.rows.n_stored

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Return rows `start` to ``stop - 1`` of the new order."""
        if self.cells is None or self.blocks is None:
            csr = self.rows.read(start, stop)
        else:
            wanted = self.cells[start:stop]
            block = np.searchsorted(self.blocks.bounds, wanted, side="right") - 1
            first = np.asarray(self.blocks.bounds)[block]
            pieces = [self.rows.read(*self.blocks[b])[(wanted - first)[block == b]] for b in np.unique(block)]
            csr = sp.vstack(pieces, format="csr")[np.argsort(np.argsort(block, kind="stable"))]
        return csr if self.columns is None else renumbered(csr, self.columns, self.shape[1])


Rows = StoredRows | MemoryRows | DerivedRows  # small, or shared with tasks


def reordered(rows: Rows, blocks: RowBlocks, cells: NDArray[np.intp] | None, genes: NDArray[np.intp] | None) -> Rows:
    """Return the rows with cells and genes permuted; `blocks` are those in which the matrix is stored."""
    if isinstance(rows, MemoryRows):
        csr = rows.matrix if cells is None else rows.matrix[cells]
        return MemoryRows(csr if genes is None else csr[:, genes], rows.name)
    return DerivedRows(rows, rows.shape, None if genes is None else np.argsort(genes), cells, blocks)


def numeric(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type for values of `dtype` that SciPy can compute with, in this machine's byte order."""
    kind = {"b": np.uint8, "e": np.float32}.get(dtype.char if dtype.kind == "f" else dtype.kind, dtype)
    return np.dtype(kind).newbyteorder("=")


def arrays_of(rows: StoredRows, element: Any) -> list[Any]:
    """Return the arrays that an element consists of."""
    return [element] if rows.encoding == "array" else [element[name] for name in ("data", "indices", "indptr")]


def chunk_bytes(rows: Rows) -> int:
    """Return the bytes of the chunks that are in memory whole while a row is read; 0 for a matrix in memory."""
    while isinstance(rows, DerivedRows):
        rows = rows.rows
    if isinstance(rows, MemoryRows):
        return 0
    store = open_store(rows.path)
    arrays = arrays_of(rows, store[rows.element] if rows.element else store)[:2]
    return sum(math.prod(array.chunks or (0,)) * array.dtype.itemsize for array in arrays)


def blocks_of(rows: StoredRows, element: Any, blocks: int | None = None) -> RowBlocks:
    """Cut the rows of a CSR or dense element; raises `InputError` if its indptr does not fit."""
    if rows.encoding != "array":
        return RowBlocks.by_nonzeros(read_indptr(rows, element), blocks)
    if blocks:
        return RowBlocks.even(rows.shape[0], blocks)
    return RowBlocks.by_width(*rows.shape, (element.chunks or (1, 1))[1 if rows.transposed else 0])


def read_indptr(rows: StoredRows, element: Any) -> NDArray[np.int64]:
    """Return indptr of a CSR or CSC element; raises `InputError` if it does not fit the shape and the values."""
    lines, what = (rows.shape[0], "cells") if rows.encoding == "csr_matrix" else (rows.shape[1], "genes")
    stored = element["data"].shape[0]
    fits = element["indptr"].shape == (lines + 1,) and element["indices"].shape == (stored,)  # before it takes memory
    indptr = np.asarray(element["indptr"][:] if fits else [1], dtype=np.int64)
    if indptr[0] != 0 or indptr[-1] != stored or np.any(np.diff(indptr) < 0):
        shape = f"{lines} {what} and {stored} values"
        raise InputError(f"{rows.name}: indptr does not fit {shape}; the store is damaged, write it again")
    return indptr


def check_chunks(rows: StoredRows, element: Any, missing_are_zeros: bool) -> None:
    """Raise `InputError` if chunks of an element are missing, since Zarr and HDF5 would read them as zeros."""
    dense = rows.encoding == "array"
    for array in [] if dense and missing_are_zeros else arrays_of(rows, element):
        gone = missing_chunks(array)
        if gone and not _may_be_zeros(element, array, gone):
            count = f"{len(gone)}{'+' * (len(gone) == MOST_MISSING)}"
            first = f", first {gone[0]}" if isinstance(array, zarr.Array) else ""  # HDF5 does not say which
            remedy = "the store is damaged, write it again"
            if dense:
                remedy = (
                    "restore them, or if they were all zeros pass --missing-chunks-are-zeros, to `scialm-dask "
                    "convert` where there is no such option"
                )
            name = array.name.rpartition("/")[2]
            raise InputError(f"{rows.name}: {count} of {n_chunks(array)} chunks of {name} are missing{first}; {remedy}")


def _may_be_zeros(element: Any, array: Any, gone: list[tuple[int, ...]]) -> bool:
    """Return whether missing chunks of a sparse element may be chunks of zeros that Zarr did not write.

    These are chunks of `indptr` before the first value, and chunks of `indices` where each row has gene 0 alone. Rows
    with a lost chunk of `indices` would have repeated or falling indices.
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
    """Sort the indices and sum duplicate entries, in place; raises `InputError` if a sum overflows the type."""
    if not csr.has_canonical_format:
        dtype, csr.data = csr.dtype, widened(csr.data)
        csr.sum_duplicates()
        csr.data = narrowed(csr.data, dtype, name)


def widened(values: NDArray[Any]) -> NDArray[Any]:
    """Return values as int64 or float64, in which sums do not overflow."""
    return values.astype(np.int64 if values.dtype.kind in "iu" else np.float64)


def narrowed(values: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """Return sums as `dtype`; raises `InputError` if that type cannot hold one."""
    if dtype.kind in "iu" and len(values):
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise InputError(f"{name}: entries stored twice add up to more than {dtype} holds; store a wider type")
    return values.astype(dtype)


def fingerprint(rows: Rows) -> str | None:
    """Return the digest of the element that rows are read from, see `Stamp`; None for a matrix in memory."""
    return Stamp.of(rows.path, rows.element).digest if isinstance(rows, StoredRows) else None


class Stamp(NamedTuple):
    """State of some elements of a store, as a digest: names, sizes and times of their files, and Zarr's metadata.

    Behind a URL, names, sizes and versions of their keys; None where keys cannot be listed.
    """

    path: str
    elements: tuple[str, ...]
    digest: str | None

    @classmethod
    def of(cls, path: str, *elements: str) -> Stamp:
        """Return the state of these elements, or of the whole store if none is given."""
        elements = elements or ("",)
        if is_url(path):
            store = RemoteStore.at(path, read_only=True)
            found = [sync(store.stamps(element)) for element in elements]
            words = None if None in found else "\n".join(word for each in found for word in each or ())
            return cls(path, elements, None if words is None else hashlib.sha256(words.encode()).hexdigest())
        digest = hashlib.sha256()
        files = [path] if os.path.isfile(path) else []
        for element in elements if not files else ():
            for folder, below, names in os.walk(os.path.join(path, element)):
                below.sort()
                files += (os.path.join(folder, name) for name in sorted(names))
        for file in files:
            try:
                status = os.stat(file)
            except FileNotFoundError:
                continue  # deleted since the listing, which is a change too
            digest.update(f"{os.path.relpath(file, path)} {status.st_size} {status.st_mtime_ns}\n".encode())
            if os.path.basename(file) in _METADATA:
                with open(file, "rb") as opened:
                    digest.update(opened.read())
        return cls(path, elements, digest.hexdigest())

    def check(self) -> None:
        """Raise `InputError` if the elements have changed since."""
        if Stamp.of(self.path, *self.elements) != self:
            raise InputError(f"{self.path}: was changed while it was read; begin again when nothing writes to it")
