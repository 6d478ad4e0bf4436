"""Imputed cells from factors, residual weights and counts: low rank plus sparse, dense only where it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.csr import row_of
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.linalg.kernels import Block, Doubles, Floats, sampled_product


@dataclass(frozen=True)
class Estimate:
    """X̂ = A diag(1 − λ) + C diag(λ), with A = left @ right.T; negative entries are set to zero.

    Parameters
    ----------
    right
        Right factor, float32, shape ``(n, r)``.
    residual
        λ, float32, shape ``(n,)``: the share of what A misses of a gene's counts that is kept.
    counts
        C, the counts of the same cells and genes. None where there are none: X̂ is A then.
    clip
        Whether negative entries are set to zero.
    """

    right: Floats
    residual: Floats | None = None
    counts: ExpressionMatrix | None = None
    clip: bool = True

    def counts_of(self, cells: slice | NDArray[np.intp]) -> sp.csr_matrix | None:
        """Read the counts of some cells; None where they have no part in X̂."""
        if self.counts is None or self.residual is None or not self.residual.any():
            return None
        return self.counts.take(cells)

    def rows(self, left: Floats, counts: sp.csr_matrix | None, genes: Any = slice(None)) -> Floats:
        """Return X̂ of some cells and genes: float32, of shape ``(cells, genes)``.

        Parameters
        ----------
        left
            Left factors of the cells, float32, shape ``(cells, r)``.
        counts
            Of these cells and all genes, from `counts_of`.
        genes
            Whatever NumPy indexes with.
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
        """Return X̂ at the stored entries of some cells, in their order: float32, without a dense row.

        Parameters
        ----------
        entries
            Cells × genes, indices sorted.
        left, counts
            Of these cells; see `rows`.
        """
        block = Block(entries.indptr, entries.indices, entries.data, entries.shape[1])
        values: Floats = sampled_product(block, np.ascontiguousarray(left), self.right)
        if counts is not None and self.residual is not None and entries.nnz:
            weight = self.residual[entries.indices]
            known = np.asarray(counts[row_of(entries), entries.indices], np.float32).ravel()
            values = values * (1 - weight) + known * weight
        return np.maximum(values, 0) if self.clip else values

    def totals(self, left: Floats, counts: sp.csr_matrix | None) -> Doubles:
        """Return the sum over all genes of each of some cells, before clipping: float64, of shape ``(cells,)``."""
        if counts is None or self.residual is None:
            return left @ self.right.sum(axis=0, dtype=np.float64)  # type: ignore[no-any-return]
        residual = self.residual.astype(np.float64)
        return left @ ((1 - residual) @ self.right) + counts @ residual  # type: ignore[no-any-return]
