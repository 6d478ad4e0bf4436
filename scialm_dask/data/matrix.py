"""Expression matrices: row blocks of CSR, read inside the tasks that need them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import dask
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.config import checked
from scialm_dask.data.annotation import Annotation, AnnotationHere, read_annotation
from scialm_dask.data.csr import Observed, RowBlocks, check_size, check_values, finite_entries, held_array, unmasked
from scialm_dask.data.formats import locate
from scialm_dask.data.rows import (
    DerivedRows,
    MemoryRows,
    Rows,
    Stamp,
    StoredRows,
    blocks_of,
    check_chunks,
    sum_duplicates,
)
from scialm_dask.data.store import lasting, open_store, readable
from scialm_dask.data.temporary import check_seen, computed, spill_to_csr, temporary_csr
from scialm_dask.errors import InputError
from scialm_dask.reduction import current_client, in_order, tree_reduce

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Arguments of `ExpressionMatrix.open`, to open a matrix again."""

    path: str
    layer: str | None
    missing_chunks_are_zeros: bool


@dataclass(frozen=True)
class ExpressionMatrix:
    """A cells × genes matrix in row blocks, which are read where they are needed.

    Use `open` or `of` to make one. It is small and can be sent to workers.

    Parameters
    ----------
    rows : Rows
        Reader of the rows.
    blocks : RowBlocks
        The partition of the cells.
    observed : {"nonzero", "finite"}, default="nonzero"
        The observed entries, Ω. ``"nonzero"``: the non-zeros, as in the paper. ``"finite"``: all that are not NaN,
        zeros included, for general matrices.
    annotation : Annotation, StoredAnnotation or None, default=None
        Data frames of cells and genes, or the store with them.
    origin, stamp : optional
        The store it was opened from, and the state of it then; None if it was in memory.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> matrix = scialm_dask.ExpressionMatrix.of(np.arange(12).reshape(4, 3), blocks=2)
    >>> matrix.shape, matrix.n_stored, len(matrix.blocks)
    ((4, 3), 11, 2)
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
        """Open X or a layer of an AnnData store, or another file that holds one matrix.

        Parameters
        ----------
        path : str or path-like
            An AnnData store (.zarr, format 2 or 3, or .h5ad), a bare 2-D Zarr array, a 10x .h5 (only genes are taken)
            or a loom file. Zarr may be at a URL. It is never written to.
        layer : str, optional
            The layer to read instead of X; ``"raw"`` for ``.raw.X`` with its own genes.
        blocks : int, optional
            Number of row blocks. By default it depends on the number of stored values.
        observed : {"nonzero", "finite"}, default="nonzero"
            See the class.
        missing_chunks_are_zeros : bool, default=False
            Read absent chunks of a dense store as zeros, since some programs do not write these, instead of raising.

        Returns
        -------
        ExpressionMatrix
            Values are not read yet, but a matrix stored by genes is copied to a temporary store, by cells.

        Raises
        ------
        InputError
            If the store or the layer is absent, damaged, or no matrix of numbers. `read_block` checks values.
        OutputError
            If the disk of the temporary store is full.

        Examples
        --------
        >>> import anndata
        >>> anndata.AnnData(np.eye(3, dtype="float32")).write_h5ad("cells.h5ad")
        >>> scialm_dask.ExpressionMatrix.open("cells.h5ad").n_stored
        9
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
        """Make one of a matrix in memory, or of a Dask array of dense or sparse chunks.

        A Dask array is computed once, a row of chunks at a time, into a temporary store.

        Parameters
        ----------
        matrix : array or data frame of shape (n_cells, n_genes)
            NumPy, SciPy sparse or Dask array, list of lists, or dense or sparse data frame. Masked entries are unknown.
        blocks, observed : optional
            As in `open`.
        name : str, default="matrix"
            Name in messages.

        Returns
        -------
        ExpressionMatrix
            Without names of cells and genes.

        Raises
        ------
        InputError
            If it is empty, or no matrix of numbers of known size. `read_block` checks values.
        OutputError
            If the disk of the temporary store is full.

        Examples
        --------
        >>> scialm_dask.ExpressionMatrix.of([[1, 0], [2, 3]]).shape
        (2, 2)
        """
        if dask.is_dask_collection(matrix):
            rows = computed(matrix, name, observed)
            return cls(rows, blocks_of(rows, open_store(rows.path)["X"], blocks), observed)
        csr = sp.csr_matrix(held_array(unmasked(matrix, observed), name))
        cuts = RowBlocks.by_nonzeros(csr.indptr, blocks)
        return cls(MemoryRows(csr, name), cuts, observed)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))  # without cached obs and var

    @property
    def name(self) -> str:
        """Name in messages."""
        return self.rows.name

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.rows.shape

    @property
    def n_stored(self) -> int:
        """Number of stored values, an upper bound of the observed ones; none is read for it."""
        return self.rows.n_stored if self.observed == "nonzero" else self.shape[0] * self.shape[1]

    @functools.cached_property
    def obs(self) -> pd.DataFrame:
        """Annotation of the cells, read when first used."""
        return read_annotation(self.annotation, "obs", self.shape[0])

    @functools.cached_property
    def var(self) -> pd.DataFrame:
        """Annotation of the genes, read when first used."""
        return read_annotation(self.annotation, "var", self.shape[1])

    def with_blocks(self, blocks: RowBlocks) -> ExpressionMatrix:
        """Return the matrix in other row blocks.

        Parameters
        ----------
        blocks : RowBlocks
            The partition of the cells.

        Returns
        -------
        ExpressionMatrix
            The same matrix.

        Examples
        --------
        >>> whole = matrix.with_blocks(scialm_dask.data.csr.RowBlocks((0, 4)))
        """
        return replace(self, blocks=blocks)

    def check_unchanged(self) -> None:
        """Check that the store has not changed since it was opened.

        Raises
        ------
        InputError
            If it has changed.

        Examples
        --------
        >>> matrix.check_unchanged()
        """
        if self.stamp is not None:
            self.stamp.check()

    def of_genes(self, columns: NDArray[np.intp], n_genes: int) -> ExpressionMatrix:
        """Return the same cells with other genes.

        Parameters
        ----------
        columns : ndarray of shape (n_genes of this matrix,), int
            Number of each gene among the other genes, or −1 if it is not there.
        n_genes : int
            Number of the other genes. Those that this matrix lacks are zero.

        Returns
        -------
        ExpressionMatrix
            Without annotation, unless the genes are those of this matrix.

        Examples
        --------
        >>> matrix.of_genes(np.array([1, -1, 0]), 2).take(slice(0, 2)).toarray()
        array([[2., 0.],
               [5., 3.]], dtype=float32)
        """
        if np.array_equal(columns, np.arange(n_genes)):
            return self
        return replace(self, rows=DerivedRows(self.rows, (self.shape[0], n_genes), columns), annotation=None)

    def for_workers(self) -> ExpressionMatrix:
        """Return the matrix in a form small enough for tasks.

        With a ``distributed.Client``, a matrix in memory is written to a temporary store that workers read. Names of
        cells and genes in memory stay in this process.

        Returns
        -------
        ExpressionMatrix
            This matrix if nothing has to change.

        Raises
        ------
        InputError
            If workers do not see the temporary store, or an earlier one.

        Examples
        --------
        >>> matrix.for_workers() is matrix  # threads of this process
        True
        """
        if current_client() is None:
            return self
        here = AnnotationHere(*self.annotation) if isinstance(self.annotation, Annotation) else self.annotation
        if not isinstance(self.rows, MemoryRows):
            if isinstance(self.rows, StoredRows) and self.rows.label is not None:
                check_seen(Path(self.rows.path).parent, self.name)
            return self if here is self.annotation else replace(self, annotation=here)
        csr = self.rows.matrix
        rows = temporary_csr((csr[a:b] for a, b in self.blocks), csr.shape[1], csr.dtype, self.name)
        return replace(self, rows=rows, annotation=here)

    def read_block(self, block: int, *, as_stored: bool = False) -> sp.csr_matrix:
        """Read one block.

        Parameters
        ----------
        block : int
            Number of the block.
        as_stored : bool, default=False
            Keep the type of the values instead of converting them to float32.

        Returns
        -------
        scipy.sparse.csr_matrix
            The observed entries, with sorted indices and summed duplicates: no zeros with ``"nonzero"``; explicit zeros
            and no NaN with ``"finite"``.

        Raises
        ------
        InputError
            If a value is infinite, above 1e15 or below 1e-15 in size, or, with ``"nonzero"``, negative or NaN.

        Examples
        --------
        >>> matrix.read_block(1).toarray()
        array([[ 9., 10., 11.]], dtype=float32)
        """
        return self._read(*self.blocks[block], as_stored=as_stored)

    def take(self, cells: slice | NDArray[np.intp]) -> sp.csr_matrix:
        """Read some cells; see `read_block`.

        Parameters
        ----------
        cells : slice or ndarray of int
            Numbers of the cells.

        Returns
        -------
        scipy.sparse.csr_matrix
            A row for each cell, float32.

        Examples
        --------
        >>> matrix.take(slice(0, 1)).toarray()
        array([[0., 1., 2.]], dtype=float32)
        """
        if isinstance(cells, slice):
            cells = np.arange(self.shape[0])[cells]
        ends = np.flatnonzero(np.diff(cells) != 1) + 1  # consecutive cells are read together
        runs = [run for run in np.split(cells, ends) if len(run)]
        parts = [self._read(int(run[0]), int(run[-1]) + 1) for run in runs]
        return sp.vstack(parts, format="csr") if parts else sp.csr_matrix((0, self.shape[1]), dtype=np.float32)

    def _read(self, start: int, stop: int, *, as_stored: bool = False) -> sp.csr_matrix:
        csr = self.rows.read(start, stop)
        if csr.dtype.kind not in "buif":
            raise InputError(f"{self.name}: values are of type {csr.dtype}, not numbers; convert them first")
        dtype = csr.dtype if as_stored else np.float32
        with np.errstate(over="ignore"):  # to infinity, an error below
            csr = sp.csr_matrix((csr.data.astype(dtype), csr.indices, csr.indptr), shape=csr.shape)
        sum_duplicates(csr, self.name)
        if self.observed == "finite":
            csr = finite_entries(csr, self.name)
        else:
            check_values(csr, self.name, start)
            if not csr.data.all():
                csr.eliminate_zeros()
        if not as_stored:
            check_size(csr, self.name, start)
        return csr

    def to_dask(self) -> da.Array:
        """Return the matrix as a lazy Dask array.

        Returns
        -------
        dask.array.Array of shape (n_cells, n_genes), float32
            Its chunks are CSR, one for each block.

        Examples
        --------
        >>> matrix.to_dask().chunks
        ((3, 1), (3,))
        """
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
        """Read all blocks in order, a few ahead; see `read_block`.

        Parameters
        ----------
        as_stored : bool, default=False
            Keep the type of the values.

        Returns
        -------
        iterator of scipy.sparse.csr_matrix
            The blocks.

        Examples
        --------
        >>> [block.nnz for block in matrix.stream()]
        [8, 3]
        """
        return in_order(functools.partial(self.read_block, as_stored=as_stored), range(len(self.blocks)))

    def reduce(self, visit: Callable[[sp.csr_matrix, int], T], combine: Callable[[T, T], T]) -> T:
        """Visit each block once and combine the results of neighbours, in a fixed order.

        Parameters
        ----------
        visit, combine : callable
            `visit` is called with a block and the number of its first row, `combine` with two results.

        Returns
        -------
        object
            The combined result.

        Examples
        --------
        >>> float(matrix.reduce(lambda block, first: block.sum(), lambda one, other: one + other))
        66.0
        """
        matrix = self.for_workers()

        def task(block: int) -> T:
            return visit(matrix.read_block(block), matrix.blocks[block][0])

        parts = [dask.delayed(task)(block) for block in range(len(self.blocks))]
        return tree_reduce(parts, combine).compute()  # type: ignore[no-any-return]
