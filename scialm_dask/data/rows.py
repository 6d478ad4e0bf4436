"""Rows of one matrix of a store: found, checked for damage, and read where they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.store import missing_chunks, open_store
from scialm_dask.errors import InputError

__all__ = [
    "MemoryRows",
    "Rows",
    "StoredRows",
    "blocks_of",
    "check_chunks",
    "describe",
    "layers_of",
    "narrowed",
    "numeric",
    "reordered",
    "widened",
]


class Rows(Protocol):
    """Whatever can hand out consecutive rows as CSR; shipped to tasks, so small or shared."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        ...

    @property
    def n_stored(self) -> int:
        """Number of stored values."""
        ...

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop` as stored."""
        ...


@dataclass(frozen=True)
class StoredRows:
    """Rows of one element of a store on disk, opened anew wherever it is read.

    Parameters
    ----------
    path
        Of the store, or its URL.
    element
        Its name in the store, such as ``X``; empty for a bare array.
    encoding
        ``"csr_matrix"``, ``"csc_matrix"`` or ``"array"``.
    shape
        Cells × genes.
    label
        Of a temporary copy alone: what it is a copy of, to call it by.
    """

    path: str
    element: str
    encoding: str
    shape: tuple[int, int]
    label: str | None = None

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
        store = open_store(self.path)
        element = store[self.element] if self.element else store
        try:
            if self.encoding == "array":
                dense = np.asarray(element[start:stop])
                return sp.csr_matrix(dense.astype(numeric(dense.dtype), copy=False))
            indptr = np.asarray(element["indptr"][start : stop + 1], dtype=np.int64)
            span = slice(int(indptr[0]), int(indptr[-1]))
            data, indices = element["data"][span], element["indices"][span]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.name}: rows {start} to {stop} cannot be read ({error}); the store is damaged, write it again"
            ) from error
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
class _ReorderedRows:
    """Rows in another order: each that is asked for is read with the block that it lies in.

    Parameters
    ----------
    rows, blocks
        In the order in which they are stored.
    cells
        Number of each row there; None if these are in order.
    genes
        New position of each stored gene; None if these are in order.
    """

    rows: Rows
    blocks: RowBlocks
    cells: NDArray[np.intp] | None
    genes: NDArray[np.intp] | None

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
        """Number of stored values."""
        return self.rows.n_stored

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop` of the new order."""
        csr = self.rows.read(start, stop) if self.cells is None else self._gathered(self.cells[start:stop])
        genes = csr.indices if self.genes is None else self.genes[csr.indices]
        return sp.csr_matrix((csr.data, genes, csr.indptr), shape=csr.shape)

    def _gathered(self, wanted: NDArray[np.intp]) -> sp.csr_matrix:
        block = np.searchsorted(self.blocks.bounds, wanted, side="right") - 1
        first = np.asarray(self.blocks.bounds)[block]
        pieces = [self.rows.read(*self.blocks[b])[(wanted - first)[block == b]] for b in np.unique(block)]
        return sp.vstack(pieces, format="csr")[np.argsort(np.argsort(block, kind="stable"))]


def reordered(
    rows: Rows, blocks: RowBlocks, cells: NDArray[np.intp] | None, genes: NDArray[np.intp] | None
) -> MemoryRows | _ReorderedRows:
    """Return rows `cells`, columns `genes`, permutations both, of a matrix that is stored in these blocks."""
    if isinstance(rows, MemoryRows):
        csr = rows.matrix if cells is None else rows.matrix[cells]
        return MemoryRows(csr if genes is None else csr[:, genes], rows.name)
    return _ReorderedRows(rows, blocks, cells, None if genes is None else np.argsort(genes))


def _assemble(
    rows: StoredRows, data: NDArray[Any], indices: NDArray[Any], indptr: NDArray[np.int64], start: int
) -> sp.csr_matrix:
    if indptr[0] != 0 or np.any(np.diff(indptr) < 0) or len(data) != len(indices) or len(data) != indptr[-1]:
        raise InputError(f"{rows.name}: indptr does not fit data and indices from row {start}; write the store again")
    if len(indices) and (indices.min() < 0 or indices.max() >= rows.shape[1]):
        bad = indices[(indices < 0) | (indices >= rows.shape[1])][0]
        raise InputError(f"{rows.name}: gene index {bad} is outside 0 to {rows.shape[1] - 1}; write the store again")
    data, indices = data.astype(numeric(data.dtype), copy=False), indices.astype(np.int32, copy=False)
    return sp.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, rows.shape[1]))


def numeric(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Type that holds the values of `dtype` and that SciPy can compute with."""
    return np.dtype({"b": np.uint8, "e": np.float32}.get(dtype.char if dtype.kind == "f" else dtype.kind, dtype))


def describe(path: str, store: Any, layer: str | None) -> tuple[StoredRows, Any]:
    """Find the element and how it is stored."""
    element: Any
    if isinstance(store, zarr.Array):
        if layer is not None:
            raise InputError(f"{path}: a bare array has no layer {layer!r}; leave the layer out")
        element, name = store, ""
    else:
        name = f"layers/{layer}" if layer else "X"
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise InputError(f"{path}: a layer cannot be named {layer!r}; give a name without . and .. parts")
        if layer == "raw" and name not in store and "raw/X" in store:
            name = "raw/X"
        if name not in store:
            raise InputError(f"{path}: has no {name}; its layers are: {', '.join(layers_of(store)) or 'none'}")
        element = store[name]
    encoding = str(element.attrs.get("encoding-type", "array")).replace("-", "_")
    if encoding in ("csr_matrix", "csc_matrix"):
        shape, dtype = _described_sparse(f"{path}:{name}", element)
    elif encoding == "array" and hasattr(element, "shape"):
        shape, dtype = tuple(element.shape), element.dtype
    else:
        raise InputError(
            f"{path}:{name}: stored as {encoding}, not as numbers in CSR, CSC or a dense array; convert it"
        )
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}:{name}: shape {shape}; a matrix of at least one cell and one gene is needed")
    if dtype.kind not in "buif":
        raise InputError(f"{path}:{name}: values are of type {dtype}, not numbers; convert them first")
    return StoredRows(path, name, encoding, (shape[0], shape[1])), element


def layers_of(store: Any) -> list[str]:
    """Names of the layers of an open store, ``raw`` if there is a ``.raw``."""
    if isinstance(store, zarr.Array):
        return []
    return [*(sorted(store["layers"]) if "layers" in store else []), *(["raw"] if "raw/X" in store else [])]


def _described_sparse(name: str, element: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a CSR or CSC element of which all parts are there."""
    parts = set(element) if hasattr(element, "keys") else set()
    absent = [part for part in ("data", "indices", "indptr") if part not in parts]
    absent += [] if "shape" in element.attrs else ["shape"]
    if absent:
        raise InputError(f"{name}: has no {', '.join(absent)}; the store is damaged, write it again")
    return tuple(int(n) for n in np.ravel(element.attrs["shape"])), element["data"].dtype


def blocks_of(rows: StoredRows, element: Any, blocks: int | None = None) -> RowBlocks:
    """Cut the rows of a CSR or dense element, having seen that its indptr fits."""
    n_cells, n_genes = rows.shape
    if rows.encoding == "array":
        chunks = element.chunks or (1, 1)
        return RowBlocks.even(n_cells, blocks) if blocks else RowBlocks.by_width(n_cells, n_genes, chunks[0])
    indptr = np.asarray(element["indptr"][:], dtype=np.int64)
    stored, indexed = element["data"].shape[0], element["indices"].shape[0]
    fits = len(indptr) == n_cells + 1 and indptr[0] == 0 and indptr[-1] == stored == indexed
    if not fits or np.any(np.diff(indptr) < 0):
        raise InputError(
            f"{rows.name}: indptr does not fit {n_cells} cells and {stored} values; "
            "the store is damaged, write it again"
        )
    return RowBlocks.even(n_cells, blocks) if blocks else RowBlocks.by_nonzeros(indptr)


def check_chunks(rows: StoredRows, element: Any, missing_are_zeros: bool) -> None:
    """Refuse a Zarr element of which chunks are gone, since Zarr would read them as zeros."""
    arrays = [element] if rows.encoding == "array" else [element[name] for name in ("data", "indices", "indptr")]
    for array in arrays:
        if not isinstance(array, zarr.Array) or (missing_are_zeros and rows.encoding == "array"):
            continue
        gone = missing_chunks(array)
        if gone and not _zeros_by_right(rows, element, array, gone):
            what = (
                f"{rows.name}: {len(gone)} of {array.nchunks} chunks of {array.basename} are missing, first {gone[0]}"
            )
            if rows.encoding == "array":
                raise InputError(
                    f"{what}; restore them, or if they were all zeros pass --missing-chunks-are-zeros, to `scialm-dask "
                    "convert` where there is no such option"
                )
            raise InputError(f"{what}; the store is damaged, write it again")


def _zeros_by_right(rows: StoredRows, element: Any, array: zarr.Array[Any], gone: list[tuple[int, ...]]) -> bool:
    """Tell whether the absent chunks of a sparse element may be chunks of zeros that Zarr chose not to write.

    So it is with `indptr` before the first value, and with `indices` where each row has gene 0 alone. Rows that
    lie over a lost chunk come out with repeated or falling indices.
    """
    if array.basename == "data" or rows.encoding == "array":
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
    """Give sums their type back.

    Raises
    ------
    InputError
        If one is beyond what the type holds.
    """
    if dtype.kind in "iu" and len(values):
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise InputError(f"{name}: entries stored twice add up to more than {dtype} holds; store a wider type")
    return values.astype(dtype)
