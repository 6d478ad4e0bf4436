"""Which zeros are biological: the rule of ALRA (Linderman et al. 2022), out of core.

Take every zero as observed and approximate the matrix by one of rank k. Where a gene is not expressed, what the
approximation gives spreads about zero, to either side alike: its most negative value shows how far. Zeros at which
it does not rise over the size of that value are taken to be biological.

The rule is applied to the pattern of detection (1 where counts are, 0 elsewhere) rather than to logarithms of
counts. The variance of an entry is then a quarter at most, so that no widely expressed gene has a factor of its own,
nor a threshold set by a single zero that chance or masking has put between high counts; and neither totals nor the
normalisation matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from dask.delayed import Delayed
from numpy.typing import NDArray

from scialm_dask.config import checked
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.scratch import new_scratch
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Pass, Stage, silent
from scialm_dask.linalg.kernels import Block, Doubles, Floats, Update
from scialm_dask.linalg.least_squares import column_minima
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.svd import extended_basis, leading_triplets
from scialm_dask.reduction import stacked, tree_reduce

# ALRA's: singular values looked at, the share of them after which all is noise, and how many standard deviations
# over the gaps between those a gap is a signal.
_VALUES, _NOISE_FROM, _DEVIATIONS = 100, 0.8, 6.0
_LEAST_VALUES = 6  # of fewer the last fifth has no two gaps
_LEAST_SIDE = 20
_SPARE = 12  # columns that only help the last values to settle
PASSES = 10  # at most, besides reading


@dataclass(frozen=True)
class BiologicalZeros:
    """Tells which entries a completed matrix may fill.

    Parameters
    ----------
    matrix : ExpressionMatrix
        The matrix whose zeros they are.
    left, right : dask.array.Array of shape (n_cells, k) and ndarray of shape (n_genes, k), float32
        Factors of the rank-k approximation of its pattern.
    thresholds : ndarray of shape (n_genes,), float32
        What an entry must exceed to be filled.
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
        """Return where cells `start` to `stop` may be other than zero, bool, of shape (stop − start, n_genes)."""
        return self.allowed()(self.left[start:stop].compute())

    def allowed(self) -> Callable[[Floats], NDArray[np.bool_]]:
        """Return a function that tells, of rows of `left`, where their cells may be other than zero."""
        return functools.partial(_over, self.right, self.thresholds)


def _over(right: Floats, thresholds: Floats, left: Floats) -> NDArray[np.bool_]:
    return left @ right.T > thresholds


@dataclass(frozen=True)
class _Detected:
    """The pattern of a matrix, with ones for values, for `LowRankPlusSparse`."""

    matrix: ExpressionMatrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def bounds(self) -> tuple[int, ...]:
        return self.matrix.blocks.bounds

    def load(self, block: int) -> Block:
        csr = self.matrix.read_block(block)
        return Block(csr.indptr, csr.indices, np.ones(csr.nnz, np.float32), csr.shape[1])

    def held_out(self, block: int, loaded: Block) -> None:
        return None


@checked
def biological_zeros(
    matrix: ExpressionMatrix, *, seed: int = 0, scratch_folder: str | None = None, listen: Listener = silent
) -> BiologicalZeros:
    """Find the biological zeros of a matrix by ALRA's rule [1]_, with a dozen passes over it.

    Parameters
    ----------
    matrix : ExpressionMatrix
        The matrix that is completed.
    seed : int, default=0
        Fixes the directions that the singular value decomposition starts from.
    scratch_folder : str, optional
        Folder for the working state, while the matrix is read anew in every pass. By default both are held in memory.
        What is kept there goes when nothing lazy needs it any more.
    listen : callable, optional
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    BiologicalZeros
        The rule, for `Imputation.to_zarr`. Its left factor is lazy.

    Raises
    ------
    InputError
        If zeros of the matrix count as measured, it is too small to tell a signal from noise, or `scratch_folder` is
        absent.
    OutputError
        If that cannot be written, or the disk is full.

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
        lefts, right = _approximation(operator, seed)
        lowest, carried = dask.delayed(column_minima), dask.delayed(right, traverse=False)
        minima: Floats = tree_reduce([lowest(left, carried) for left in lefts], np.minimum).compute()
        thresholds = np.maximum(-minima, 0)
    return BiologicalZeros(matrix, stacked(lefts, matrix.blocks.sizes, right.shape[1]), right, thresholds)


def _approximation(operator: LowRankPlusSparse, seed: int) -> tuple[list[Delayed], Floats]:
    """Best approximation of rank k of what is observed, zeros being zero: left factor by block, and right factor."""
    most = min(operator.shape)
    count, width = min(_VALUES, most), min(_VALUES + _SPARE, most)
    basis = extended_basis(np.zeros((operator.shape[1], 0), np.float32), width, seed)
    product = operator.multiply(basis)
    svd = leading_triplets(operator, product, limit=count, threshold=0.0, passes=PASSES, tolerance=0.0, seed=seed)
    k = spectral_gap_rank(svd.values[:count])
    rotation = (svd.to_left[:, :k] * svd.values[:k]).astype(np.float32)
    right = np.ascontiguousarray(svd.right[:, :k])
    operator.multiply(None, Update(rotation, ratio=0.0), right)
    return operator.factors()


def spectral_gap_rank(values: Doubles) -> int:
    """Return ALRA's k: the last gap between singular values, falling, that stands out of those among the last fifth.

    That fifth is taken to be noise. All values are signal where they are too few to have any.
    """
    if len(values) < _LEAST_VALUES:
        return len(values)
    gaps = values[:-1] - values[1:]
    noise = gaps[int(_NOISE_FROM * len(values)) - 1 :]
    outstanding = np.flatnonzero(gaps > noise.mean() + _DEVIATIONS * noise.std(ddof=1))
    return int(outstanding[-1]) + 1 if len(outstanding) else 1
