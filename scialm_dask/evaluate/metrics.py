"""How well entries were recovered: equations 9 to 12, of all entries and of each gene, block by block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import dask
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.annotated import aligned
from scialm_dask.data.csr import row_of
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.evaluate.predictions import Factors, Prediction, Sparse, panels
from scialm_dask.events import Listener, Stage, silent
from scialm_dask.imputation import Imputation
from scialm_dask.reduction import tree_reduce

__all__ = ["Moments", "Scores", "compare_all", "compare_stored", "gene_means", "score_held_out"]

_ROUNDING = 1e-12  # what sums may leave of the variance of a constant, relative to its square


@dataclass(frozen=True)
class Scores:
    """Equations 9 to 12 over n entries: mean squared and absolute error, Pearson correlation, cosine similarity.

    Of single genes, these are arrays, NaN where there is nothing to tell.
    """

    n: Any
    mse: Any
    mae: Any
    pearson: Any
    cosine: Any


@dataclass(frozen=True)
class Moments:
    """Sums, gene by gene, of which every score is made.

    Parameters
    ----------
    sums
        Over entries of imputed x and true y: number, x, y, x², y², xy and |x − y|; float64, shape ``(7, n)``.
    """

    sums: NDArray[np.float64]

    @classmethod
    def of_entries(cls, x: Any, y: Any, genes: NDArray[np.integer], n_genes: int) -> Moments:
        """Of single entries and the genes that they are of."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        terms = (None, x, y, x * x, y * y, x * y, np.abs(x - y))
        return cls(np.stack([np.bincount(genes, weights=term, minlength=n_genes) for term in terms]).astype(float))

    @classmethod
    def of_rows(cls, X: Any, Y: Any) -> Moments:
        """Of whole cells, cells × genes."""
        X, Y = X.astype(np.float64), Y.astype(np.float64)
        number = np.full(X.shape[1], float(len(X)))
        products = (np.einsum("ij,ij->j", one, other) for one, other in ((X, X), (Y, Y), (X, Y)))
        return cls(np.stack([number, X.sum(axis=0), Y.sum(axis=0), *products, np.abs(X - Y).sum(axis=0)]))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.sums + other.sums)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.sums - other.sums)

    @property
    def overall(self) -> Scores:
        """Over the entries of all genes together, plain numbers."""
        scores = _scores(self.sums.sum(axis=1))
        return Scores(int(scores.n), *(float(v) for v in (scores.mse, scores.mae, scores.pearson, scores.cosine)))

    @property
    def by_gene(self) -> Scores:
        """Of each gene, arrays of shape ``(n,)``."""
        return _scores(self.sums)

    @property
    def relative_error(self) -> float:
        """‖X − Y‖_F / ‖Y‖_F."""
        _, _, _, xx, yy, xy, _ = self.sums.sum(axis=1)
        return float(np.sqrt(max(xx - 2 * xy + yy, 0.0) / yy)) if yy > 0 else float("nan")

    @property
    def mean_ratio(self) -> float:
        """Mean imputed over mean true."""
        _, x, y, *_ = self.sums.sum(axis=1)
        return float(x / y) if y > 0 else float("nan")


def _scores(sums: NDArray[np.float64]) -> Scores:
    n, x, y, xx, yy, xy, absolute = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        vx, vy = xx - x * x / n, yy - y * y / n
        varies = (vx > _ROUNDING * xx) & (vy > _ROUNDING * yy)
        pearson = np.where(varies, (xy - x * y / n) / np.sqrt(vx * vy), np.nan)
        return Scores(n, np.maximum(xx - 2 * xy + yy, 0) / n, absolute / n, pearson, xy / np.sqrt(xx * yy))


def compare_stored(prediction: Prediction, target: ExpressionMatrix) -> Moments:
    """Compare a prediction with the stored entries of a matrix, in one pass."""

    def visit(csr: sp.csr_matrix, start: int) -> Moments:
        return Moments.of_entries(prediction.at(csr, start), csr.data, csr.indices, csr.shape[1])

    return target.reduce(visit, Moments.__add__)


def compare_all(prediction: Prediction, target: ExpressionMatrix, given: ExpressionMatrix) -> tuple[Moments, Moments]:
    """Compare a prediction with all entries of a matrix, zeros too.

    Returns
    -------
    Moments, Moments
        Of all entries, and of those that were zero in `given`.
    """
    target = target.with_blocks(panels(target.shape))
    observed = given.with_blocks(target.blocks)

    def visit(number: int) -> tuple[Moments, Moments]:
        start, stop = target.blocks[number]
        X, Y = prediction.rows(start, stop), target.read_block(number).toarray()
        csr = observed.read_block(number)
        everything, at = Moments.of_rows(X, Y), (row_of(csr), csr.indices)
        x, y = X[at], Y[at]
        return everything, everything - Moments.of_entries(x, y, csr.indices, csr.shape[1])

    parts = [dask.delayed(visit)(number) for number in range(len(target.blocks))]
    total: tuple[Moments, Moments] = tree_reduce(parts, _add).compute()
    return total


def _add(one: tuple[Moments, Moments], other: tuple[Moments, Moments]) -> tuple[Moments, Moments]:
    return one[0] + other[0], one[1] + other[1]


def score_held_out(
    result: Imputation, held_out: ExpressionMatrix, observed: ExpressionMatrix, listen: Listener = silent
) -> dict[str, float]:
    """Score a result on hidden entries, beside the prediction of each gene's mean over its observed entries.

    Parameters
    ----------
    result
        Completed from `observed`. Its X is scored where it was written with one, its factors where not.
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
        If the cells or genes are not the same, or nothing was hidden.
    """
    held_out, observed = aligned(held_out, result), aligned(observed, result)
    listen(Stage("scoring"))
    if result.X is not None:
        held_out = held_out.with_blocks(result.X.blocks)
    visit, hidden = dask.delayed(_block_moments), dask.delayed(held_out, traverse=False)
    means = dask.delayed(gene_means(observed))
    parts = [visit(hidden, b, piece, means) for b, piece in enumerate(_pieces(result, held_out.blocks))]
    ours, baseline = (moments.overall for moments in tree_reduce(parts, _add).compute())
    if ours.n == 0:
        raise InputError(f"{held_out.name}: holds no entries; hide some with `scialm-dask mask`")
    return asdict(ours) | {f"gene_mean_{name}": value for name, value in asdict(baseline).items() if name != "n"}


def _pieces(result: Imputation, blocks: RowBlocks) -> list[Any]:
    """Give the result of each block, as a prediction of its cells: X, which is cut so, or else the factors."""
    if result.X is not None:
        read, stored = dask.delayed(ExpressionMatrix.read_block), dask.delayed(result.X, traverse=False)
        return [dask.delayed(Sparse)(read(stored, b)) for b in range(len(blocks))]
    piece, right = dask.delayed(Factors), dask.delayed(result.right)
    return [piece(left, right) for left in result.left.rechunk((blocks.sizes, -1)).to_delayed().ravel()]


def gene_means(matrix: ExpressionMatrix) -> NDArray[np.float32]:
    """Mean of each gene over its observed entries, shape ``(n,)``; 0 where there are none."""

    def visit(csr: sp.csr_matrix, _: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        n = matrix.shape[1]
        sums = np.bincount(csr.indices, weights=csr.data, minlength=n).astype(np.float64)
        return sums, np.bincount(csr.indices, minlength=n)

    sums, counts = matrix.reduce(visit, lambda one, other: (one[0] + other[0], one[1] + other[1]))
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return means.astype(np.float32)


def _block_moments(
    held_out: ExpressionMatrix, block: int, piece: Prediction, means: NDArray[np.float32]
) -> tuple[Moments, Moments]:
    csr = held_out.read_block(block)
    imputed, n = piece.at(csr, 0), csr.shape[1]
    baseline = Moments.of_entries(means[csr.indices], csr.data, csr.indices, n)
    return Moments.of_entries(imputed, csr.data, csr.indices, n), baseline
