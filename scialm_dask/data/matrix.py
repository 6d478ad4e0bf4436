"""Expression matrices: named row blocks of CSR, read inside the task that needs them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import dask
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.arguments import checked, short_repr
from scialm_dask.data.annotation import Annotation, AnnotationHere, read_annotation
from scialm_dask.data.fingerprint import Stamp
from scialm_dask.data.formats import locate
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.rows import MemoryRows, RenamedRows, Rows, StoredRows, blocks_of, check_chunks, sum_duplicates
from scialm_dask.data.store import lasting, open_store, readable
from scialm_dask.data.temporary import check_seen, temporary_csr
from scialm_dask.data.transpose import Entries, rows_in_order, spill_to_csr
from scialm_dask.errors import InputError
from scialm_dask.reduction import current_client, in_order, tree_reduce

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

Observed = Literal["nonzero", "finite"]
T = TypeVar("T")

_LARGEST = 1e15  # value; of larger ones, and of smaller than its inverse, products leave what float32 holds


@dataclass(frozen=True)
class Origin:
    """What a matrix was opened from, so that it can be opened again: arguments of `ExpressionMatrix.open`."""

    path: str
    layer: str | None
    missing_chunks_are_zeros: bool


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
    annotation
        Of cells and genes: data frames (`Annotation`), where a store has them (`StoredAnnotation`), or None for none.
    origin
        What it was opened from; None if that was in memory.
    stamp
        What that was like then; see `check_unchanged`.

    Notes
    -----
    Create one by `ExpressionMatrix.open` or `ExpressionMatrix.of`. It is small and can be sent to workers.
    """

    rows: Rows
    blocks: RowBlocks
    observed: Observed = "nonzero"
    annotation: Any = field(default=None, compare=False, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)
    stamp: Stamp | None = field(default=None, compare=False, repr=False)

    @classmethod
    @checked
    def open(
        cls,
        path: str | os.PathLike[str],
        layer: str | None = None,
        *,
        blocks: int | None = None,
        observed: Observed = "nonzero",
        missing_chunks_are_zeros: bool = False,
    ) -> ExpressionMatrix:
        """Open X, or a layer, of an AnnData store (.zarr, format 2 or 3, or .h5ad), or whatever else holds one matrix.

        That is a bare 2-D Zarr array, a 10x .h5, of which features other than genes are left out, or a loom file.

        Parameters
        ----------
        path
            The store, or its URL, if it is Zarr. It is only read.
        layer
            Name of the layer, or ``"raw"`` for ``.raw.X`` with its own genes; X by default.
        blocks
            Number of row blocks; chosen by the number of stored values if None.
        observed
            See the class.
        missing_chunks_are_zeros
            Read the absent chunks of a dense store as zeros, which some programs do not write, instead of
            refusing them.

        Returns
        -------
        ExpressionMatrix
            Nothing of it is read yet, but a matrix stored by genes is copied to a temporary store, by cells.

        Raises
        ------
        InputError
            If the store or the layer cannot be used: not there, damaged, or no matrix of numbers. Values are checked
            when they are read; see `read_block`.
        OutputError
            If the disk of the temporary store is full.
        """
        store = open_store(path)
        path = lasting(path)
        with readable(path):
            rows, element, annotation, _ = locate(path, store, layer)
            stamp = Stamp.of(path, *((rows.element, "obs", "var", "raw/var") if rows.element else ()))
            check_chunks(rows, element, missing_chunks_are_zeros)
        if rows.encoding == "csc_matrix":
            rows = spill_to_csr(rows)
            element = open_store(rows.path)[rows.element]
        with readable(rows.name):
            cuts = blocks_of(rows, element, blocks)
        origin = Origin(path, layer, missing_chunks_are_zeros)
        return cls(rows, cuts, observed, annotation, origin, stamp)

    @classmethod
    @checked
    def of(
        cls, matrix: Any, *, blocks: int | None = None, observed: Observed = "nonzero", name: str = "matrix"
    ) -> ExpressionMatrix:
        """Take a NumPy array or SciPy sparse matrix that is in memory, or a Dask array with chunks of either kind.

        A Dask array is computed here, once, a row of chunks at a time, into a temporary store; see `temporary_csr`.

        Parameters
        ----------
        matrix
            Cells × genes; a list of lists or a data frame, dense or sparse, will do as well. Masked entries are
            unknown: zeros, or NaN where zeros are observed.
        blocks
            Number of row blocks; chosen by the number of stored values if None.
        observed
            See the class.
        name
            What to call it in messages.

        Returns
        -------
        ExpressionMatrix
            Without names of cells and genes.

        Raises
        ------
        InputError
            If it is empty, or no matrix of numbers of known size. Values are checked when they are read; see
            `read_block`.
        OutputError
            If the disk of the temporary store is full.
        """
        if dask.is_dask_collection(matrix):
            rows = _computed(matrix, name, observed)
            return cls(rows, blocks_of(rows, open_store(rows.path)["X"], blocks), observed)
        csr = sp.csr_matrix(held_array(_unmasked(matrix, observed), name))
        cuts = RowBlocks.by_nonzeros(csr.indptr, blocks)
        return cls(MemoryRows(csr, name), cuts, observed)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))  # not what was read of obs and var

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
        """Number of stored values, the most that can be observed; reads no values."""
        return self.rows.n_stored if self.observed == "nonzero" else self.shape[0] * self.shape[1]

    @functools.cached_property
    def obs(self) -> pd.DataFrame:
        """Annotation of the cells, read when first asked for."""
        return read_annotation(self.annotation, "obs", self.shape[0])

    @functools.cached_property
    def var(self) -> pd.DataFrame:
        """Annotation of the genes, read when first asked for."""
        return read_annotation(self.annotation, "var", self.shape[1])

    def with_blocks(self, blocks: RowBlocks) -> ExpressionMatrix:
        """Return the same matrix, cut otherwise."""
        return replace(self, blocks=blocks)

    def check_unchanged(self) -> None:
        """Raise `InputError` if the store that this was opened from has changed since, and may have been read mixed."""
        if self.stamp is not None:
            self.stamp.check()

    def annotated(self, annotation: Annotation) -> ExpressionMatrix:
        """Return the same matrix with this annotation of cells and genes."""
        return replace(self, annotation=annotation)

    def of_genes(self, columns: NDArray[np.intp], n_genes: int) -> ExpressionMatrix:
        """Return the same cells × other genes.

        Parameters
        ----------
        columns
            For each gene of this matrix its number among the others, or −1 if it is none of them.
        n_genes
            Number of the others; those that none here is are zero.
        """
        if np.array_equal(columns, np.arange(n_genes)):
            return self
        return replace(self, rows=RenamedRows(self.rows, columns, n_genes), annotation=None)

    def for_workers(self) -> ExpressionMatrix:
        """Return the same matrix, small enough to go into tasks.

        If a `distributed.Client` is in force, what is in memory is written to a temporary store, from which workers
        read their blocks; see `temporary_csr`. Names of cells and genes that are in memory stay in this process.

        Raises
        ------
        InputError
            If workers of the Dask cluster do not see that store, or one that was made before there was a cluster.
        """
        if current_client() is None:
            return self
        here = AnnotationHere(*self.annotation) if isinstance(self.annotation, Annotation) else self.annotation
        if not isinstance(self.rows, MemoryRows):
            check_seen(self.rows)
            return self if here is self.annotation else replace(self, annotation=here)
        csr = self.rows.matrix
        rows = temporary_csr((csr[a:b] for a, b in self.blocks), csr.shape[1], csr.dtype, self.name)
        return replace(self, rows=rows, annotation=here)

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
            If a value is negative, NaN (under ``"nonzero"``) or infinite, or is not a number; or if the values are so
            large or small, beyond 1e15 or 1e-15, that they cannot be computed with.
        """
        return self._read(*self.blocks[block], as_stored=as_stored)

    def take(self, cells: slice | NDArray[np.intp]) -> sp.csr_matrix:
        """Read some cells, given by a slice or by their numbers; see `read_block`."""
        if isinstance(cells, slice):
            cells = np.arange(self.shape[0])[cells]
        ends = np.flatnonzero(np.diff(cells) != 1) + 1  # consecutive ones are read together
        runs = [run for run in np.split(cells, ends) if len(run)]
        parts = [self._read(int(run[0]), int(run[-1]) + 1) for run in runs]
        return sp.vstack(parts, format="csr") if parts else sp.csr_matrix((0, self.shape[1]), dtype=np.float32)

    def _read(self, start: int, stop: int, *, as_stored: bool = False) -> sp.csr_matrix:
        csr = self.rows.read(start, stop)
        if csr.dtype.kind not in "buif":
            raise InputError(f"{self.name}: values are of type {csr.dtype}, not numbers; convert them first")
        dtype = csr.dtype if as_stored else np.float32
        with np.errstate(over="ignore"):  # to infinity, which is refused below
            csr = sp.csr_matrix((csr.data.astype(dtype), csr.indices, csr.indptr), shape=csr.shape)
        sum_duplicates(csr, self.name)
        if self.observed == "finite":
            csr = _finite_entries(csr, self.name)
        else:
            check_values(csr, self.name, start)
            if not csr.data.all():
                csr.eliminate_zeros()
        largest = np.abs(csr.data).max(initial=0)
        if largest and not as_stored and not 1 / _LARGEST <= largest <= _LARGEST:
            raise InputError(
                f"{self.name}: cells {start} to {stop - 1} have values up to {largest:g}, whose squares are beyond "
                f"float32; multiply the matrix so that they lie between {1 / _LARGEST:g} and {_LARGEST:g}"
            )
        return csr

    def to_dask(self) -> da.Array:
        """Give the matrix as a Dask array of float32 CSR chunks, one for each block."""
        import dask.array as da

        read = dask.delayed(ExpressionMatrix.read_block, pure=True)
        matrix = dask.delayed(self.for_workers(), pure=True, traverse=False)  # hashed once, not for every block
        meta = sp.csr_matrix((0, 0), dtype=np.float32)
        chunks = [
            da.from_delayed(read(matrix, block), shape=(stop - start, self.shape[1]), meta=meta)
            for block, (start, stop) in enumerate(self.blocks)
        ]
        return da.concatenate(chunks, axis=0)

    def stream(self, *, as_stored: bool = False) -> Iterator[sp.csr_matrix]:
        """Read all blocks in order, a few ahead of the one handed out; see `read_block`."""
        return in_order(functools.partial(self.read_block, as_stored=as_stored), range(len(self.blocks)))

    def reduce(self, visit: Callable[[sp.csr_matrix, int], T], combine: Callable[[T, T], T]) -> T:
        """Visit every block once and combine what the visits return, pairwise, in a fixed order.

        Parameters
        ----------
        visit
            Called with a block and the number of its first row.
        combine
            Called with two results of neighbouring blocks.
        """
        matrix = self.for_workers()

        def task(block: int) -> T:
            return visit(matrix.read_block(block), matrix.blocks[block][0])

        parts = [dask.delayed(task)(block) for block in range(len(self.blocks))]
        return tree_reduce(parts, combine).compute()  # type: ignore[no-any-return]


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


def _unmasked(matrix: Any, observed: Observed) -> Any:
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


def _computed(array: Any, name: str, observed: Observed) -> StoredRows:
    if hasattr(array, "to_dask_array"):
        raise InputError(f"{name}: a Dask data frame, of unknown length; give frame.to_dask_array(lengths=True)")
    check_array(array, name)

    def chunk(*place: int) -> sp.csr_matrix:
        return sp.csr_matrix(_unmasked(array.blocks[place].compute(), observed))

    dtype = np.dtype(np.float64) if observed == "finite" else array.dtype.newbyteorder("=")
    if array.numblocks[0] > 1 or array.numblocks[1] == 1:
        array = array.rechunk({1: -1})
        return temporary_csr((chunk(i) for i in range(array.numblocks[0])), array.shape[1], dtype, name)
    starts = np.cumsum([0, *array.chunks[1]])  # stored by genes, as CSC is

    def pieces() -> Iterator[Entries]:
        for number, start in enumerate(starts[:-1]):
            entries = chunk(0, number).tocoo()
            yield Entries(entries.row, (entries.col + start).astype(np.int32), entries.data)

    n_values = array.shape[0] * array.shape[1] // 10  # nobody knows before they are read
    return temporary_csr(rows_in_order(pieces(), array.shape, dtype, n_values, name), array.shape[1], dtype, name)


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


def _finite_entries(csr: sp.csr_matrix, name: str) -> sp.csr_matrix:
    """All entries that are not NaN, zeros stored explicitly."""
    dense = csr.toarray()
    if np.isinf(dense).any():
        raise InputError(f"{name}: holds an infinite value; mark missing entries as NaN")
    keep = ~np.isnan(dense)
    indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return sp.csr_matrix((dense[keep], np.nonzero(keep)[1].astype(np.int32), indptr), shape=csr.shape)
