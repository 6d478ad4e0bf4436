"""The imputed matrix on its way to disk, a block of cells at a time: its left factor, or all of it, dense or sparse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray

from scialm_dask.data.arrays import new_array
from scialm_dask.data.csr import row_of
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.writer import CSRWriter
from scialm_dask.events import Advance

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["CHUNK_BYTES", "Factors", "ZeroRule", "write_dense", "write_left", "write_sparse"]

CHUNK_BYTES = 8 << 20
_DENSE_CHUNK_ROWS = 1024


class Factors(Protocol):
    """What is written of a result; see `scialm_dask.imputation.Imputation`."""

    left: da.Array

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        ...

    def rows(self, cells: slice) -> NDArray[np.float32]:
        """Impute some cells."""
        ...


class ZeroRule(Protocol):
    """Tells which entries of a matrix may be other than zero; see `BiologicalZeros`."""

    @property
    def matrix(self) -> ExpressionMatrix:
        """Whose observed entries are never zero."""
        ...

    @property
    def rank(self) -> int:
        """Of the approximation that tells."""
        ...

    def expressed(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Of cells `start` to `stop`, shape ``(stop − start, n)``."""
        ...


def write_left(root: zarr.Group, name: str, left: da.Array, advance: Advance) -> None:
    """Write a left factor, shape ``(m, r)``, as element `name` of ``obsm``."""
    cells, rank = left.shape
    rows = max(1, min(cells, CHUNK_BYTES // (4 * max(1, rank))))
    array = new_array(root.require_group("obsm"), name, (cells, rank), (rows, max(1, rank)), np.float32)
    for start, block in _blocks_of(left):
        array[start : start + len(block)] = block
        advance(len(block) / cells)


def write_dense(root: zarr.Group, factors: Factors, keep_observed: ExpressionMatrix | None, advance: Advance) -> float:
    """Write the imputed matrix as dense X, with the observed entries of a matrix as they were if one is given.

    Returns the sum of X.
    """
    panels = _panels(factors.shape)
    rows, n_genes = panels.sizes[0], factors.shape[1]
    array = new_array(root, "X", factors.shape, (rows, n_genes), np.float32)
    observed = keep_observed.with_blocks(panels) if keep_observed else None
    total = 0.0
    for number, (start, stop) in enumerate(panels):
        values = factors.rows(slice(start, stop))
        if observed is not None:
            csr = observed.read_block(number)
            values[row_of(csr), csr.indices] = csr.data
        array[start:stop] = values
        total += float(values.sum(dtype=np.float64))
        advance(1 / len(panels))
    return total


def write_sparse(root: zarr.Group, factors: Factors, zeros: ZeroRule, keep_observed: bool, advance: Advance) -> float:
    """Write the imputed matrix as sparse X, without biological zeros; observed entries are never zero.

    Returns the sum of X.
    """
    import scipy.sparse as sp

    panels = _panels(factors.shape)
    observed = zeros.matrix.with_blocks(panels)
    total = 0.0
    with CSRWriter(root, "X", n_columns=factors.shape[1]) as writer:
        for number, (start, stop) in enumerate(panels):
            values = factors.rows(slice(start, stop))
            csr = observed.read_block(number)
            at = row_of(csr), csr.indices
            imputed = values[at]
            values *= zeros.expressed(start, stop)
            values[at] = csr.data if keep_observed else np.where(imputed > 0, imputed, csr.data)
            writer.append(sp.csr_matrix(values))
            total += float(values.sum(dtype=np.float64))
            advance(1 / len(panels))
    return total


def _panels(shape: tuple[int, int]) -> RowBlocks:
    """Rows of which the dense form is small."""
    n_cells, n_genes = shape
    return RowBlocks.panels(n_cells, n_genes, min(CHUNK_BYTES, 4 * n_genes * _DENSE_CHUNK_ROWS))


def _blocks_of(array: da.Array) -> Iterator[tuple[int, NDArray[np.float32]]]:
    start = 0
    for block in range(array.numblocks[0]):
        values = array.blocks[block].compute()
        yield start, values
        start += len(values)
