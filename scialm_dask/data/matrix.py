"""Expression matrices: named row blocks of CSR, read inside the task that needs them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import dask
import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.store import missing_chunks, open_store
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

__all__ = ["ExpressionMatrix", "Observed", "StoredRows", "narrowed", "numeric", "tree_reduce", "widened"]

Observed = Literal["nonzero", "finite"]
T = TypeVar("T")


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

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop` as stored."""
        ...


@dataclass(frozen=True)
class StoredRows:
    """Rows of one element of a store on disk, opened anew wherever it is read."""

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

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop`."""
        return self.matrix[start:stop]


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


@dataclass(frozen=True)
class ExpressionMatrix:
    """A cells × genes matrix, cut into row blocks that are read where they are needed.

    Parameters
    ----------
    rows
        What reads the rows.
    blocks
        The partition of the cells.
    observed
        Which entries are observed (Ω). ``"nonzero"``: the non-zeros, as in the paper. ``"finite"``: all that
        are not NaN, zeros included, for general matrices.

    Notes
    -----
    Create one by `ExpressionMatrix.open` or `ExpressionMatrix.of`. It is small and can be sent to workers.
    """

    rows: Rows
    blocks: RowBlocks
    observed: Observed = "nonzero"
    annotation: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        layer: str | None = None,
        *,
        blocks: int | None = None,
        observed: Observed = "nonzero",
        missing_chunks_are_zeros: bool = False,
    ) -> ExpressionMatrix:
        """Open X, or a layer, of an AnnData store (.zarr, format 2 or 3, or .h5ad), or a bare 2-D Zarr array.

        Parameters
        ----------
        path
            The store. It is only read.
        layer
            Name of the layer; X by default.
        blocks
            Number of row blocks; chosen by the number of stored values if None.
        observed
            See the class.
        missing_chunks_are_zeros
            Read the absent chunks of a dense store as zeros, which some programs do not write, instead of
            refusing them.

        Raises
        ------
        InputError
            If the store, the layer or the numbers cannot be used.
        """
        path = os.fspath(path)
        store = open_store(path)
        rows, element = _describe(path, store, layer)
        if rows.encoding == "csc_matrix":
            from scialm_dask.data.transpose import spill_to_csr

            rows = spill_to_csr(rows)
            element = open_store(rows.path)[rows.element]
        cuts = _blocks_of(rows, element, blocks)
        _check_chunks(rows, element, missing_chunks_are_zeros)
        return cls(rows, cuts, observed, path if not isinstance(store, zarr.Array) else None)

    @classmethod
    def of(
        cls, matrix: Any, *, blocks: int | None = None, observed: Observed = "nonzero", name: str = "matrix"
    ) -> ExpressionMatrix:
        """Take a NumPy array or SciPy sparse matrix that is in memory."""
        csr = sp.csr_matrix(matrix)
        if csr.shape[0] == 0 or csr.shape[1] == 0:
            raise InputError(f"{name}: empty, {csr.shape[0]} cells × {csr.shape[1]} genes; nothing to do")
        cuts = RowBlocks.even(csr.shape[0], blocks) if blocks else RowBlocks.by_nonzeros(csr.indptr)
        return cls(MemoryRows(csr, name), cuts, observed)

    def __reduce__(self) -> tuple[Any, ...]:
        # Annotation that has been read stays here; workers need only the rows.
        return type(self), (self.rows, self.blocks, self.observed, self.annotation)

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.rows.name

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.rows.shape

    @functools.cached_property
    def obs(self) -> pd.DataFrame:
        """Annotation of the cells, read when first asked for."""
        return self._frame("obs", self.shape[0])

    @functools.cached_property
    def var(self) -> pd.DataFrame:
        """Annotation of the genes, read when first asked for."""
        return self._frame("var", self.shape[1])

    def _frame(self, axis: str, length: int) -> pd.DataFrame:
        import pandas as pd

        if self.annotation is None:
            return pd.DataFrame(index=pd.RangeIndex(length).astype(str))
        import anndata

        try:
            frame = anndata.io.read_elem(open_store(self.annotation)[axis])
        except Exception as error:
            raise InputError(f"{self.annotation}: {axis} cannot be read ({error}); write the store again") from error
        if len(frame) != length:
            raise InputError(
                f"{self.annotation}: {axis} has {len(frame)} rows, the matrix {length}; write the store again"
            )
        return frame

    def with_blocks(self, blocks: RowBlocks) -> ExpressionMatrix:
        """Return the same matrix, cut otherwise."""
        return replace(self, blocks=blocks)

    def read_block(self, block: int, *, as_stored: bool = False) -> sp.csr_matrix:
        """Read one block.

        Parameters
        ----------
        block
            Its number.
        as_stored
            Keep the type of the values instead of turning them into float32.

        Returns
        -------
        scipy.sparse.csr_matrix
            Indices sorted and unique (duplicates summed). What it stores is what is observed: no zeros if
            ``observed == "nonzero"``; explicit zeros, and no NaN, if ``"finite"``.

        Raises
        ------
        InputError
            If a value is negative, NaN (under ``"nonzero"``) or infinite, or is not a number.
        """
        start, stop = self.blocks[block]
        csr = self.rows.read(start, stop)
        if csr.dtype.kind not in "buif":
            raise InputError(f"{self.name}: values are of type {csr.dtype}, not numbers; convert them first")
        dtype = csr.dtype if as_stored else np.float32
        csr = sp.csr_matrix((csr.data.astype(dtype), csr.indices, csr.indptr), shape=csr.shape)
        _sum_duplicates(csr, self.name)
        if self.observed == "finite":
            return _finite_entries(csr, self.name)
        self._check_values(csr, start)
        if not csr.data.all():
            csr.eliminate_zeros()
        return csr

    def _check_values(self, csr: sp.csr_matrix, start: int) -> None:
        smallest, largest = (csr.data.min(), csr.data.max()) if csr.nnz else (0.0, 0.0)
        if smallest >= 0 and largest < np.inf:  # false for NaN too
            return
        at = int(np.flatnonzero(~((csr.data >= 0) & (csr.data < np.inf)))[0])
        row = int(np.searchsorted(csr.indptr, at, side="right")) - 1
        raise InputError(
            f"{self.name}: value {csr.data[at]} at cell {start + row}, gene {csr.indices[at]}; expression must be "
            "finite and not negative: give counts or normalised counts, not scaled or centred data"
        )

    def to_dask(self) -> da.Array:
        """Give the matrix as a Dask array of float32 CSR chunks, one for each block."""
        import dask.array as da

        read = dask.delayed(ExpressionMatrix.read_block, pure=True)
        meta = sp.csr_matrix((0, 0), dtype=np.float32)
        chunks = [
            da.from_delayed(read(self, block), shape=(stop - start, self.shape[1]), meta=meta)
            for block, (start, stop) in enumerate(self.blocks)
        ]
        return da.concatenate(chunks, axis=0)

    def reduce(self, visit: Callable[[sp.csr_matrix, int], T], combine: Callable[[T, T], T]) -> T:
        """Visit every block once and combine what the visits return, pairwise, in a fixed order.

        Parameters
        ----------
        visit
            Called with a block and the number of its first row.
        combine
            Called with two results of neighbouring blocks.
        """

        def task(block: int) -> T:
            return visit(self.read_block(block), self.blocks[block][0])

        parts = [dask.delayed(task)(block) for block in range(len(self.blocks))]
        return tree_reduce(parts, combine).compute()  # type: ignore[no-any-return]


def tree_reduce(parts: list[Any], combine: Callable[[T, T], T]) -> Any:
    """Combine delayed parts pairwise, neighbours first: a fixed order, and few parts alive at a time."""
    merge = dask.delayed(combine)
    while len(parts) > 1:
        pairs = [merge(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _describe(path: str, store: Any, layer: str | None) -> tuple[StoredRows, Any]:
    """Find the element and how it is stored."""
    element: Any
    if isinstance(store, zarr.Array):
        if layer is not None:
            raise InputError(f"{path}: a bare array has no layer {layer!r}; leave the layer out")
        element, name = store, ""
    else:
        name = f"layers/{layer}" if layer else "X"
        if name not in store:
            layers = sorted(store["layers"]) if "layers" in store else []
            raise InputError(f"{path}: has no {name}; its layers are: {', '.join(layers) or 'none'}")
        element = store[name]
    encoding = str(element.attrs.get("encoding-type", "array")).replace("-", "_")
    if encoding in ("csr_matrix", "csc_matrix"):
        shape = tuple(int(n) for n in element.attrs["shape"])
        dtype = element["data"].dtype
    elif encoding == "array" and hasattr(element, "shape"):
        shape, dtype = tuple(element.shape), element.dtype
    else:
        raise InputError(f"{path}:{name}: stored as {encoding}; convert it to CSR, CSC or a dense array")
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}:{name}: shape {shape}; a matrix of at least one cell and one gene is needed")
    if dtype.kind not in "buif":
        raise InputError(f"{path}:{name}: values are of type {dtype}, not numbers; convert them first")
    return StoredRows(path, name, encoding, (shape[0], shape[1])), element


def _blocks_of(rows: StoredRows, element: Any, blocks: int | None) -> RowBlocks:
    n_cells, n_genes = rows.shape
    if rows.encoding == "array":
        return RowBlocks.even(n_cells, blocks) if blocks else RowBlocks.by_width(n_cells, n_genes)
    indptr = np.asarray(element["indptr"][:], dtype=np.int64)
    stored, indexed = element["data"].shape[0], element["indices"].shape[0]
    fits = len(indptr) == n_cells + 1 and indptr[0] == 0 and indptr[-1] == stored == indexed
    if not fits or np.any(np.diff(indptr) < 0):
        raise InputError(
            f"{rows.name}: indptr does not fit {n_cells} cells and {stored} values; "
            "the store is damaged, write it again"
        )
    return RowBlocks.even(n_cells, blocks) if blocks else RowBlocks.by_nonzeros(indptr)


def _check_chunks(rows: StoredRows, element: Any, missing_are_zeros: bool) -> None:
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
                raise InputError(f"{what}; restore them, or pass --missing-chunks-are-zeros if they were all zeros")
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
            first, last = min(stop - 1, rows.shape[0] - 1), min(stop, rows.shape[0])
        else:
            first = int(np.searchsorted(indptr, start, side="right")) - 1
            last = int(np.searchsorted(indptr, stop - 1, side="right"))
        spans = [(int(indptr[r]), int(indptr[r + 1])) for r in range(max(first, 0), last)]
        if any(np.any(np.diff(element["indices"][a:b].astype(np.int64)) <= 0) for a, b in spans):
            return False
    return True


def _sum_duplicates(csr: sp.csr_matrix, name: str) -> None:
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


def _finite_entries(csr: sp.csr_matrix, name: str) -> sp.csr_matrix:
    """All entries that are not NaN, zeros stored explicitly."""
    dense = csr.toarray()
    if np.isinf(dense).any():
        raise InputError(f"{name}: holds an infinite value; mark missing entries as NaN")
    keep = ~np.isnan(dense)
    indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return sp.csr_matrix((dense[keep], np.nonzero(keep)[1].astype(np.int32), indptr), shape=csr.shape)
