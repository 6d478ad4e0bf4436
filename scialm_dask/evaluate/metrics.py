"""How well hidden entries were recovered: equations 9 to 12, block by block."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import dask
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.factors import Imputation
from scialm_dask.data.matrix import ExpressionMatrix, tree_reduce
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Stage, silent

__all__ = ["Scores", "score_held_out"]


@dataclass(frozen=True)
class Scores:
    """Equations 9 to 12 over n entries: mean squared and absolute error, Pearson correlation, cosine similarity."""

    n: int
    mse: float
    mae: float
    pearson: float
    cosine: float


class _Moments(NamedTuple):
    """Sums over entries of imputed x and true y, float64, of which every score is made."""

    n: float
    x: float
    y: float
    xx: float
    yy: float
    xy: float
    absolute: float

    @classmethod
    def of(cls, x: NDArray[np.floating], y: NDArray[np.floating]) -> _Moments:
        x, y = x.astype(np.float64), y.astype(np.float64)
        return cls(*(float(v) for v in (len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y, np.abs(x - y).sum())))

    def scores(self) -> Scores:
        n, x, y, xx, yy, xy, absolute = self
        spread = math.sqrt(max(xx - x * x / n, 0.0) * max(yy - y * y / n, 0.0))
        norms = math.sqrt(xx * yy)
        return Scores(
            int(n),
            (xx - 2 * xy + yy) / n,
            absolute / n,
            (xy - x * y / n) / spread if spread > 0 else math.nan,
            xy / norms if norms > 0 else math.nan,
        )


def score_held_out(
    result: Imputation, held_out: ExpressionMatrix, observed: ExpressionMatrix, listen: Listener = silent
) -> dict[str, float]:
    """Score a result on hidden entries, beside the prediction of each gene's mean over its observed entries.

    Parameters
    ----------
    result
        Completed from `observed`.
    held_out
        The entries that were hidden, with their true values.
    observed
        What was left, for the gene means.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    dict
        ``n``, ``mse``, ``mae``, ``pearson``, ``cosine``, and the last four again as ``gene_mean_…``.

    Raises
    ------
    InputError
        If the shapes differ or nothing was hidden.
    """
    for matrix in (held_out, observed):
        if matrix.shape != result.shape:
            raise InputError(
                f"{matrix.name}: {matrix.shape[0]} cells × {matrix.shape[1]} genes, but the result has "
                f"{result.shape[0]} × {result.shape[1]}; score a result with the matrix it was made from"
            )
    listen(Stage("scoring"))
    means = _gene_means(observed)
    left = result.left.rechunk((held_out.blocks.sizes, -1)).to_delayed().ravel()
    visit, right = dask.delayed(_block_moments), dask.delayed(result.right)
    parts = [visit(held_out, b, left[b], right, means) for b in range(len(held_out.blocks))]
    total = tree_reduce(parts, _add)
    ours, baseline = total.compute()
    if ours.n == 0:
        raise InputError(f"{held_out.name}: holds no entries; hide some with `scialm-dask mask`")
    scored = asdict(ours.scores())
    return scored | {f"gene_mean_{name}": value for name, value in asdict(baseline.scores()).items() if name != "n"}


def _gene_means(matrix: ExpressionMatrix) -> NDArray[np.float32]:
    def visit(csr: sp.csr_matrix, _: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        n = matrix.shape[1]
        sums = np.bincount(csr.indices, weights=csr.data, minlength=n).astype(np.float64)
        return sums, np.bincount(csr.indices, minlength=n)

    sums, counts = matrix.reduce(visit, lambda one, other: (one[0] + other[0], one[1] + other[1]))
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return means.astype(np.float32)


def _block_moments(
    held_out: ExpressionMatrix,
    block: int,
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    means: NDArray[np.float32],
) -> tuple[_Moments, _Moments]:
    from scialm_dask.linalg.kernels import Block, sampled_product

    csr = held_out.read_block(block)
    imputed = sampled_product(Block(csr.indptr, csr.indices, csr.data, csr.shape[1]), left, right)
    imputed = np.maximum(imputed, 0)
    return _Moments.of(imputed, csr.data), _Moments.of(means[csr.indices], csr.data)


def _add(one: tuple[_Moments, _Moments], other: tuple[_Moments, _Moments]) -> tuple[_Moments, _Moments]:
    return tuple(  # type: ignore[return-value]
        _Moments(*(a + b for a, b in zip(m, k, strict=True))) for m, k in zip(one, other, strict=True)
    )
