"""Expression matrices: named row blocks of CSR, read inside the task that needs them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import dask
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.config import checked
from scialm_dask.data.annotation import Annotation, AnnotationHere, read_annotation
from scialm_dask.data.csr import Observed, RowBlocks, check_size, check_values, finite_entries, held_array, unmasked
from scialm_dask.data.formats import locate
from scialm_dask.data.rows import DerivedRows, MemoryRows, Rows, Stamp, blocks_of, check_chunks, sum_duplicates
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
    """What a matrix was opened from, so that it can be opened again: arguments of `ExpressionMatrix.open`."""

    path: str
    layer: str | None
    missing_chunks_are_zeros: bool


@dataclass(frozen=True)
class ExpressionMatrix:
    """A cells × genes matrix in row blocks that are read where they are needed.

    `open` and `of` make one. It is small and can be sent to workers.

    Parameters
    ----------
    rows : Rows
        What reads the rows.
    blocks : RowBlocks
        The partition of the cells.
    observed : {"nonzero", "finite"}, default="nonzero"
        The observed entries, Ω. ``"nonzero"``: the non-zeros, as in the paper. ``"finite"``: all that are not NaN,
        zeros included, for general matrices.
    annotation : Annotation, StoredAnnotation or None, default=None
        Data frames of cells and genes, or the store that has them.
    origin, stamp : optional
        What it was opened from, and the state of that then; None if it was in memory.

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
            An AnnData store (.zarr, format 2 or 3, or .h5ad), a bare 2-D Zarr array, a 10x .h5, of which only features
            that are genes are taken, or a loom file. It is only read. Zarr may be at a URL.
        layer : str, optional
            The layer to read instead of X; ``"raw"`` for ``.raw.X`` with its own genes.
        blocks : int, optional
            Number of row blocks. By default chosen by the number of stored values.
        observed : {"nonzero", "finite"}, default="nonzero"
            See the class.
        missing_chunks_are_zeros : bool, default=False
            Read absent chunks of a dense store as zeros, which some programs do not write, instead of refusing them.

        Returns
        -------
        ExpressionMatrix
            No values are read yet; a matrix stored by genes is copied to a temporary store, by cells.

        Raises
        ------
        InputError
            If the store or the layer is absent, damaged, or no matrix of numbers. Values are checked when they are
            read; see `read_block`.
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
        """Take a matrix in memory, or a Dask array of dense or sparse chunks.

        A Dask array is computed here, once, a row of chunks at a time, into a temporary store.

        Parameters
        ----------
        matrix : array or data frame of shape (n_cells, n_genes)
            NumPy, SciPy sparse or Dask, a list of lists, or a dense or sparse data frame. Masked entries are unknown.
        blocks, observed : optional
            As in `open`.
        name : str, default="matrix"
            Its name in messages.

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
        return type(self), tuple(getattr(self, each.name) for each in fields(self))  # not what was read of obs and var

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.rows.name

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.rows.shape

    @property
    def n_stored(self) -> int:
        """Number of stored values, the most that can be observed. No values are read for it."""
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
        """Check that the store has not changed since it was opened, as it may have been read in two states.

        Raises
        ------
        InputError
            If it has.

        Examples
        --------
        >>> matrix.check_unchanged()
        """
        if self.stamp is not None:
            self.stamp.check()

    def of_genes(self, columns: NDArray[np.intp], n_genes: int) -> ExpressionMatrix:
        """Return the same cells × other genes.

        Parameters
        ----------
        columns : ndarray of shape (n_genes of this matrix,), int
            For each gene its number among the others, or −1 if it is none of them.
        n_genes : int
            Number of the others. Those that this matrix lacks are zero.

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
        """Return the matrix in a form small enough to go into tasks.

        With a ``distributed.Client``, what is in memory is written to a temporary store from which workers read their
        blocks. Names of cells and genes that are in memory stay in this process.

        Returns
        -------
        ExpressionMatrix
            This one where nothing has to change.

        Raises
        ------
        InputError
            If workers do not see the temporary store, or one that was made before there was a cluster.

        Examples
        --------
        >>> matrix.for_workers() is matrix  # threads of this process
        True
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
        block : int
            Its number.
        as_stored : bool, default=False
            Keep the type of the values instead of turning them into float32.

        Returns
        -------
        scipy.sparse.csr_matrix
            Indices sorted, duplicates summed. It stores what is observed: no zeros under ``"nonzero"``; explicit zeros,
            and no NaN, under ``"finite"``.

        Raises
        ------
        InputError
            If a value is no number, infinite, beyond 1e15 or 1e-15 in size, or, under ``"nonzero"``, negative or NaN.

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
            Their numbers.

        Returns
        -------
        scipy.sparse.csr_matrix
            One row for each, float32.

        Examples
        --------
        >>> matrix.take(slice(0, 1)).toarray()
        array([[0., 1., 2.]], dtype=float32)
        """
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
            CSR chunks, one for each block.

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
        """Read all blocks in order, a few ahead of the one handed out; see `read_block`.

        Parameters
        ----------
        as_stored : bool, default=False
            Keep the type of the values.

        Returns
        -------
        iterator of scipy.sparse.csr_matrix
            One block after another.

        Examples
        --------
        >>> [block.nnz for block in matrix.stream()]
        [8, 3]
        """
        return in_order(functools.partial(self.read_block, as_stored=as_stored), range(len(self.blocks)))

    def reduce(self, visit: Callable[[sp.csr_matrix, int], T], combine: Callable[[T, T], T]) -> T:
        """Visit every block once and combine the results of neighbours, in a fixed order.

        Parameters
        ----------
        visit, combine : callable
            Called with a block and the number of its first row, and with two results.

        Returns
        -------
        object
            The last result.

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
