"""Biological zeros by the rule of ALRA (Linderman et al. 2022), out of core.

The rule takes every zero as observed and approximates the matrix by one of rank k. Where a gene is not expressed, the
approximation scatters symmetrically about zero, and the most negative value of the gene tells how far. Zeros where the
approximation does not exceed that magnitude are taken to be biological.

Here the matrix is the pattern of detection (1 for a count, 0 elsewhere) rather than the logarithms of counts. Its
entries have a variance of at most a quarter, so that no widely expressed gene gets a component of its own, or a
threshold set by one zero that chance or masking has put among high counts. Totals and normalisation do not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from numpy.typing import NDArray

from scialm_dask.config import checked
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.scratch import new_scratch
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Pass, Stage, silent
from scialm_dask.linalg.kernels import Block, Doubles, Floats, Update, column_minima
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.svd import extended_basis, leading_triplets
from scialm_dask.reduction import stacked, tree_reduce
from scialm_dask.solve.scaling import PreparedBlocks

# As in ALRA: number of singular values, the share of them after which all are noise, and how many standard deviations
# above the mean gap of these a gap must be to be signal.
_VALUES, _NOISE_FROM, _DEVIATIONS = 100, 0.8, 6.0
_LEAST_VALUES = 6  # with fewer, the last fifth has less than two gaps
_LEAST_SIDE = 20
_SPARE = 12  # extra columns, so that the last values converge
PASSES = 10  # at most, besides the first


@dataclass(frozen=True)
class BiologicalZeros:
    """The entries of a completed matrix that may be non-zero.

    Parameters
    ----------
    matrix : ExpressionMatrix
        The matrix that is completed.
    left, right : dask.array.Array of shape (n_cells, k) and ndarray of shape (n_genes, k), float32
        Factors of the rank-k approximation of its detection pattern.
    thresholds : ndarray of shape (n_genes,), float32
        An entry may be non-zero if its approximation exceeds the threshold of the gene.
    """

    matrix: ExpressionMatrix
    left: Any
    right: Floats
    thresholds: Floats

    @property
    def rank(self) -> int:
        """Rank of the approximation, k."""
        return int(self.right.shape[1])

    def expressed(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return where cells `start` to `stop` may be non-zero: bool, of shape (stop − start, n_genes)."""
        return self.allowed()(self.left[start:stop].compute())

    def allowed(self) -> Callable[[Floats], NDArray[np.bool_]]:
        """Return a function from rows of `left` to a mask of the entries that may be non-zero."""
        return functools.partial(_over, self.right, self.thresholds)


def _over(right: Floats, thresholds: Floats, left: Floats) -> NDArray[np.bool_]:
    return left @ right.T > thresholds


class _Detected(PreparedBlocks):
    """The detection pattern of a matrix, for `LowRankPlusSparse`."""

    def load(self, block: int) -> Block:
        csr = self.matrix.read_block(block)
        return Block(csr.indptr, csr.indices, np.ones(csr.nnz, np.float32), csr.shape[1])


@checked
def biological_zeros(
    matrix: ExpressionMatrix, *, seed: int = 0, scratch_folder: str | None = None, listen: Listener = silent
) -> BiologicalZeros:
    """Find the biological zeros of a matrix by the rule of ALRA [1]_, in a dozen passes.

    Parameters
    ----------
    matrix : ExpressionMatrix
        The matrix that is completed.
    seed : int, default=0
        Seed of the random directions with which the singular value decomposition starts.
    scratch_folder : str, optional
        Folder for the working state; the matrix is then read in every pass. By default both are held in memory. Its
        contents are removed when nothing lazy needs them.
    listen : callable, optional
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    BiologicalZeros
        The rule to give to `Imputation.to_zarr`. Its left factor is lazy.

    Raises
    ------
    InputError
        If zeros of the matrix are observed values, the matrix is too small to tell signal from noise, or
        `scratch_folder` does not exist.
    OutputError
        If that folder is not writable, or the disk is full.

    References
    ----------
    .. [1] G. C. Linderman et al., "Zero-preserving imputation of single-cell RNA-seq data", Nature Communications,
       2022.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> matrix = scialm_dask.ExpressionMatrix.of(counts)
    >>> result = scialm_dask.impute(matrix, preset="complete")
    >>> zeros = scialm_dask.biological_zeros(matrix)
    >>> result.to_zarr("sparse.zarr", preserve_zeros=zeros)["X"]["written"]
    'preserve_zeros'
    """
    if matrix.observed != "nonzero":
        raise InputError(f"{matrix.name}: its zeros are observed values; only zeros that are unknown can be preserved")
    if min(matrix.shape) < _LEAST_SIDE:
        raise InputError(
            f"{matrix.name}: {matrix.shape[0]} cells × {matrix.shape[1]} genes; at least {_LEAST_SIDE} of both are "
            "needed to tell biological zeros"
        )
    listen(Stage("finding biological zeros"))
    shipped = matrix.for_workers()
    with new_scratch(scratch_folder, shipped.rows) as store:
        operator = LowRankPlusSparse(_Detected(shipped), store, on_pass=lambda n: listen(Pass(n)))
        most = min(operator.shape)
        count, width = min(_VALUES, most), min(_VALUES + _SPARE, most)
        product = operator.multiply(extended_basis(np.zeros((operator.shape[1], 0), np.float32), width, seed))
        svd = leading_triplets(operator, product, limit=count, threshold=0.0, passes=PASSES, tolerance=0.0, seed=seed)
        k = spectral_gap_rank(svd.values[:count])
        rotation = (svd.to_left[:, :k] * svd.values[:k]).astype(np.float32)
        operator.multiply(None, Update(rotation, ratio=0.0), np.ascontiguousarray(svd.right[:, :k]))
        lefts, right = operator.factors()
        lowest, carried = dask.delayed(column_minima), dask.delayed(right, traverse=False)
        minima: Floats = tree_reduce([lowest(left, carried) for left in lefts], np.minimum).compute()
        thresholds = np.maximum(-minima, 0)
    return BiologicalZeros(matrix, stacked(lefts, matrix.blocks.sizes, right.shape[1]), right, thresholds)


def spectral_gap_rank(values: Doubles) -> int:
    """Return ALRA's k: the position of the last gap between descending singular values that is an outlier.

    Gaps are compared with those of the last fifth of the values, which are noise. With fewer than six values, k is
    their number.
    """
    if len(values) < _LEAST_VALUES:
        return len(values)
    gaps = values[:-1] - values[1:]
    noise = gaps[int(_NOISE_FROM * len(values)) - 1 :]
    outstanding = np.flatnonzero(gaps > noise.mean() + _DEVIATIONS * noise.std(ddof=1))
    return int(outstanding[-1]) + 1 if len(outstanding) else 1
