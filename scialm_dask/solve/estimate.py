"""Imputed cells from factors, residual weights and counts; and their embedding.

The embedding has the principal components of the log-normalised imputed matrix, which is never formed: cells are scaled
to the same total, x becomes log(1 + x), and genes are centred, as by scanpy's ``normalize_total``, ``log1p`` and
``pca``. The left factor nearly spans these components, so two passes of subspace iteration from it are enough. Genes
that hardly vary are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
import scipy.sparse as sp
from dask.delayed import Delayed
from numpy.typing import NDArray

from scialm_dask.data.csr import RowBlocks, row_of
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.linalg.kernels import PANEL_VALUES, Block, Doubles, Floats, sampled_product
from scialm_dask.linalg.operator import Product
from scialm_dask.linalg.svd import rayleigh_ritz
from scialm_dask.linalg.tasks import add
from scialm_dask.reduction import tree_reduce

PASSES = 2

TOTAL = 1e4  # of each cell before the logarithm
_COMPONENTS = 50  # as in scanpy
_WIDTH = 64  # columns of the left factor to start from
_GENES = 2000  # most variable genes: they have four fifths of the variance of real cells, and give the same clusters
_ROUNDING = 1e-6  # relative, of float32 sums
_RUNS, _RUN_CELLS = 32, 64  # cells to estimate the variance of genes from, all over the matrix


@dataclass(frozen=True)
class Estimate:
    """X̂ = A diag(1 − λ) + C diag(λ), with A = left @ right.T."""

    right: Floats  # right factor, float32, shape (n, r)
    residual: Floats | None = None  # λ, float32, shape (n,): the share of C − A that is kept
    counts: ExpressionMatrix | None = None  # C, of the same cells and genes; None if X̂ = A
    clip: bool = True  # whether negative entries become zero

    def counts_of(self, cells: slice | NDArray[np.intp]) -> sp.csr_matrix | None:
        """Read the counts of some cells; return None if X̂ does not depend on them."""
        if self.counts is None or self.residual is None or not self.residual.any():
            return None
        return self.counts.take(cells)

    def rows(self, left: Floats, counts: sp.csr_matrix | None, genes: Any = slice(None)) -> Floats:
        """Return X̂ of some cells and genes, float32, of shape ``(cells, genes)``.

        `left` has the left factors of the cells, and `counts` their counts of all genes, from `counts_of`.
        """
        right = self.right[genes]
        dense: Floats = left @ right.T
        if counts is not None and self.residual is not None:
            dense *= 1 - self.residual[genes]
            position = np.full(len(self.right), -1, np.intp)
            position[genes] = np.arange(len(right))
            column = position[counts.indices]
            some = column >= 0
            dense[row_of(counts)[some], column[some]] += (counts.data * self.residual[counts.indices])[some]
        return np.maximum(dense, 0, out=dense) if self.clip else dense

    def at(self, entries: sp.csr_matrix, left: Floats, counts: sp.csr_matrix | None) -> Floats:
        """Return X̂ at the stored entries of some cells, in CSR order with sorted indices: float32."""
        block = Block(entries.indptr, entries.indices, entries.data, entries.shape[1])
        values: Floats = sampled_product(block, np.ascontiguousarray(left), self.right)
        if counts is not None and self.residual is not None and entries.nnz:
            weight = self.residual[entries.indices]
            known = np.asarray(counts[row_of(entries), entries.indices], np.float32).ravel()
            values = values * (1 - weight) + known * weight
        return np.maximum(values, 0) if self.clip else values

    def totals(self, left: Floats, counts: sp.csr_matrix | None) -> Doubles:
        """Return the sum over genes of each cell, before clipping: float64, of shape ``(cells,)``."""
        if counts is None or self.residual is None:
            return left @ self.right.sum(axis=0, dtype=np.float64)  # type: ignore[no-any-return]
        residual = self.residual.astype(np.float64)
        return left @ ((1 - residual) @ self.right) + counts @ residual  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Axes:
    """Principal axes of the log-normalised imputed matrix."""

    genes: NDArray[np.intp]  # indices of genes with loadings, ascending, shape (g,)
    loadings: Floats  # orthonormal, float32, shape (g, k)
    mean: Floats  # of the log-normalised values of these genes, float32, shape (g,)

    def place(self, estimate: Estimate, left: Floats, first: int) -> Floats:
        """Return the coordinates of consecutive cells, starting at cell `first`: float32, of shape ``(cells, k)``."""
        panels = [values @ self.loadings for _, values in _panels(estimate, left, first, self.genes)]
        coordinates: Floats = np.concatenate(panels) - self.mean @ self.loadings
        return coordinates


def find_axes(
    estimate: Estimate, lefts: Sequence[Delayed], bounds: Sequence[int], on_pass: Callable[[], None] = lambda: None
) -> Axes:
    """Find the principal axes in two passes over the cells, after each of which `on_pass` is called.

    `lefts` has the delayed left factor of each block, and `bounds` the first row of each block and the number of rows.
    """
    shared, m = dask.delayed(estimate, traverse=False), bounds[-1]

    def visit(kernel: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
        carried, task = [dask.delayed(each, traverse=False) for each in args], dask.delayed(kernel)
        parts = [task(shared, left, first, *carried) for left, first in zip(lefts, bounds, strict=False)]
        return tree_reduce(parts, add).compute()  # type: ignore[no-any-return]

    count, sums, squares = visit(_sampled_moments, m)
    variance = squares / count - (sums / count) ** 2
    genes = np.sort(np.argsort(-variance, kind="stable")[:_GENES])
    cross, sums, left_sums = visit(_from_left, genes)
    on_pass()
    mean = sums / m
    basis, _ = np.linalg.qr(cross - np.outer(mean, left_sums))
    cross, gram, along = visit(_multiply, genes, basis.astype(np.float32))
    on_pass()
    gram_of_mean = np.outer(along, along) / m
    varies = np.diag(gram) > (1 + _ROUNDING) * np.diag(gram_of_mean)
    cross, gram = (cross - np.outer(mean, along))[:, varies], (gram - gram_of_mean)[np.ix_(varies, varies)]
    loadings = rayleigh_ritz(Product(cross, gram)).right[:, :_COMPONENTS]
    return Axes(genes, np.ascontiguousarray(loadings), mean.astype(np.float32))


def _sampled_moments(estimate: Estimate, left: Floats, first: int, n_cells: int) -> tuple[int, Doubles, Doubles]:
    """Return number, sums and sums of squares of the log-normalised values of a block's sampled cells."""
    count, sums, squares = 0, np.zeros(len(estimate.right)), np.zeros(len(estimate.right))
    for start in sorted({n_cells * run // _RUNS for run in range(_RUNS)}):
        begin, end = max(start - first, 0), min(start + _RUN_CELLS - first, len(left))
        if begin < end:
            for _, values in _panels(estimate, left[begin:end], first + begin, slice(None)):
                count += len(values)
                sums += values.sum(axis=0, dtype=np.float64)
                squares += np.square(values, dtype=np.float64).sum(axis=0)
    return count, sums, squares


def _from_left(estimate: Estimate, left: Floats, first: int, genes: NDArray[np.intp]) -> tuple[Doubles, ...]:
    """Return XᵀL and the sums of X and L over the cells of a block; L has the first columns of the left factor."""
    start = left[:, :_WIDTH]
    cross, sums = np.zeros((len(genes), start.shape[1])), np.zeros(len(genes))
    for rows, values in _panels(estimate, left, first, genes):
        cross += values.T @ start[rows]
        sums += values.sum(axis=0, dtype=np.float64)
    return cross, sums, start.sum(axis=0, dtype=np.float64)


def _multiply(
    estimate: Estimate, left: Floats, first: int, genes: NDArray[np.intp], basis: Floats
) -> tuple[Doubles, ...]:
    """Return XᵀY, YᵀY and the sums of Y = XQ over the cells of a block."""
    cross, gram, along = np.zeros(basis.shape), np.zeros((basis.shape[1],) * 2), np.zeros(basis.shape[1])
    for _, values in _panels(estimate, left, first, genes):
        sketch = values @ basis
        wide = sketch.astype(np.float64)
        cross += values.T @ sketch
        gram += wide.T @ wide
        along += wide.sum(axis=0)
    return cross, gram, along


def _panels(estimate: Estimate, left: Floats, first: int, genes: Any) -> Any:
    """Yield slices of the rows of `left`, with the log-normalised values of these cells."""
    counts = estimate.counts_of(slice(first, first + len(left)))
    totals = estimate.totals(left, counts)
    scale = np.divide(TOTAL, totals, out=np.zeros_like(totals), where=totals > 0).astype(np.float32)
    for start, stop in RowBlocks.panels(len(left), len(estimate.right[genes]), 4 * PANEL_VALUES):
        rows = slice(start, stop)
        values = estimate.rows(left[rows], None if counts is None else counts[rows], genes)
        values *= scale[rows, None]
        yield rows, np.log1p(values, out=values)
