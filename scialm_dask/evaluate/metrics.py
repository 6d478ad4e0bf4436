"""Scores of recovered expression, equations 9 to 12: over all entries, per gene and per cell, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.annotated import aligned, as_dask, axes_of, match_names
from scialm_dask.data.csr import RowBlocks, row_of
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Stage, silent
from scialm_dask.imputation import Imputation
from scialm_dask.linalg.tasks import add
from scialm_dask.reduction import tree_reduce

METRICS = ("mse", "mae", "pearson", "cosine")
_ROUNDING = 1e-12  # variance that rounding may give to a constant, relative to its square
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Scores of recovered x against true y, by gene or another grouping of entries.

    ``n``, ``mse``, ``mae``, ``pearson`` and ``cosine`` are arrays of shape (n_groups,), NaN where undefined: without
    entries, or for a constant. Scores of disjoint sets of entries can be added.

    Parameters
    ----------
    moments : ndarray of shape (8, n_groups), float64
        Number of entries, means of x and y, sums of squares of their deviations, sum of the products of deviations,
        and sums of ``|x - y|`` and its square.
    """

    moments: Doubles

    @classmethod
    def of_entries(cls, x: Any, y: Any, groups: NDArray[np.integer], n: int) -> Scores:
        """Score single entries, each in one of n groups."""

        def sums(values: Any = None) -> Doubles:
            return np.bincount(groups, weights=values, minlength=n).astype(np.float64)

        x, y, count = x.astype(np.float64), y.astype(np.float64), sums()
        means = np.stack([sums(x), sums(y)]) / np.maximum(count, 1)
        dx, dy = x - means[0][groups], y - means[1][groups]
        terms = (dx * dx, dy * dy, dx * dy, np.abs(x - y), (x - y) ** 2)
        return cls(np.stack([count, *means, *map(sums, terms)]))

    @classmethod
    def of_columns(cls, X: Any, Y: Any) -> Scores:
        """Score whole columns."""
        X, Y = X.astype(np.float64), Y.astype(np.float64)
        count, x, y, apart = np.full(X.shape[1], float(len(X))), X.mean(axis=0), Y.mean(axis=0), X - Y
        products = ((X - x, X - x), (Y - y, Y - y), (X - x, Y - y))
        xx, yy, xy = (np.einsum("ij,ij->j", *pair) for pair in products)
        return cls(np.stack([count, x, y, xx, yy, xy, np.abs(apart).sum(axis=0), (apart**2).sum(axis=0)]))

    def __add__(self, other: Scores) -> Scores:
        return Scores(_pooled(np.stack([self.moments, other.moments])))

    @property
    def overall(self) -> Scores:
        """Scores of all groups together."""
        return Scores(_pooled(self.moments.T[:, :, None]))

    @property
    def n(self) -> Doubles:
        """Number of entries."""
        return self.moments[0]  # type: ignore[no-any-return]

    @property
    def mse(self) -> Doubles:
        """Mean squared error, equation 9."""
        return self._over(self.moments[7], self.n)

    @property
    def mae(self) -> Doubles:
        """Mean absolute error, equation 10."""
        return self._over(self.moments[6], self.n)

    @property
    def pearson(self) -> Doubles:
        """Pearson's correlation, equation 11."""
        n, x, y, xx, yy, xy, *_ = self.moments
        varies = (xx > _ROUNDING * n * x**2) & (yy > _ROUNDING * n * y**2)
        return self._over(xy, np.sqrt(xx * yy) * varies)

    @property
    def cosine(self) -> Doubles:
        """Cosine similarity, equation 12."""
        n, x, y, xx, yy, xy, *_ = self.moments
        return self._over(xy + n * x * y, np.sqrt((xx + n * x**2) * (yy + n * y**2)))

    @property
    def relative_error(self) -> float:
        """‖X − Y‖_F / ‖Y‖_F over all entries."""
        n, _, y, _, yy, *_ = self.moments
        return float(np.sqrt(self._over(self.moments[7].sum(), (yy + n * y**2).sum())))

    @property
    def mean_ratio(self) -> float:
        """Mean recovered over mean true."""
        n, x, y, *_ = self.moments
        return float(self._over((n * x).sum(), (n * y).sum()))

    @property
    def correlation(self) -> Doubles:
        """`pearson`, but 0 where x is constant and y is not."""
        n, _, y, _, yy, *_ = self.moments
        return np.where(yy > _ROUNDING * n * y**2, np.nan_to_num(self.pearson), np.nan)

    def as_dict(self) -> dict[str, float]:
        """Return ``n``, ``mse``, ``mae``, ``pearson`` and ``cosine`` over all entries."""
        whole = self.overall
        return {"n": int(whole.n[0]), **{name: float(getattr(whole, name)[0]) for name in METRICS}}

    @staticmethod
    def _over(above: Any, below: Any) -> Doubles:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(below > 0, above / below, np.nan)


def _pooled(parts: Doubles) -> Doubles:
    """Pool moments, shape ``(parts, 8, n)``, over the parts (Chan, Golub and LeVeque 1983)."""
    n, means = parts[:, :1], parts[:, 1:3]
    total = n.sum(axis=0)
    centre = (n * means).sum(axis=0) / np.maximum(total, 1)
    x, y = (means - centre).transpose(1, 0, 2)
    sums = parts[:, 3:].sum(axis=0)
    sums[:3] += np.stack([(n[:, 0] * product).sum(axis=0) for product in (x * x, y * y, x * y)])
    return np.concatenate([total, centre, sums])


def gene_scores(truth: Any, recovered: Any) -> Scores:
    """Score recovered expression against the truth, gene by gene.

    Parameters
    ----------
    truth, recovered : matrix of shape (n_cells, n_genes)
        Arrays, data frames, AnnData, paths to stores, or anything with ``to_dask()``. Cells and genes are matched by
        name if both have names.

    Returns
    -------
    Scores
        ``pearson``, float64 of shape (n_genes,), is the correlation across cells, NaN where either side is constant.
        ``mse``, ``mae`` and ``cosine`` have the same shape. ``relative_error`` is ‖X − M‖_F / ‖M‖_F, and
        ``mean_ratio`` the mean of X over that of M.

    Raises
    ------
    InputError
        If one is not a matrix of numbers, or the cells or genes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from scialm_dask import gene_scores
    >>> truth = np.array([[1.0, 0.0], [2.0, 4.0], [3.0, 2.0]])
    >>> gene_scores(truth, 2 * truth).pearson
    array([1., 1.])
    """
    M, X = as_dask(truth, "truth"), as_dask(recovered, "recovered")
    if M.shape != X.shape:
        raise InputError(f"truth has shape {M.shape}, recovered {X.shape}; give the same cells and genes")
    for axis, (wanted, names) in enumerate(zip(axes_of(truth), axes_of(recovered), strict=True)):
        if wanted is not None and names is not None:
            order = match_names(names, wanted, ("cell", "gene")[axis], "recovered")
            X = X if order is None else da.take(X, order, axis=axis)
    M = M.rechunk({0: X.chunks[0], 1: -1})
    score = dask.delayed(lambda x, m: Scores.of_columns(_dense(x), _dense(m)))
    pairs = zip(X.rechunk({1: -1}).to_delayed()[:, 0], M.to_delayed()[:, 0], strict=True)
    scores: Scores = tree_reduce([score(x, m) for x, m in pairs], Scores.__add__).compute()
    return scores


class Comparison(NamedTuple):
    """A recovered matrix against all entries of a target.

    Correlations are NaN for genes and cells that are constant in the target or empty in the input, whatever the method,
    and 0 for a constant estimate.
    """

    genes: Scores
    zeros: Scores  # of the entries that were zero in the input, as one group
    gene_correlation: Doubles  # across cells, (n_genes,)
    cell_correlation: Doubles  # across genes, (n_cells,)


def compare(recovered: da.Array, target: ExpressionMatrix, given: ExpressionMatrix) -> Comparison:
    """Compare the matrix recovered from `given` with all entries of `target`, including zeros, in one pass.

    `recovered` is cells × genes, in dense chunks of whole rows.
    """
    target = target.with_blocks(_blocks_of(recovered))
    given = given.with_blocks(target.blocks)

    def visit(X: Any, block: int) -> tuple[Scores, Scores, Doubles, NDArray[np.intp]]:
        Y, seen = target.read_block(block).toarray(), given.read_block(block).toarray()
        zero = seen == 0
        zeros = Scores.of_entries(X[zero], Y[zero], np.zeros(int(zero.sum()), np.intp), 1)
        cells = Scores.of_columns(X.T, Y.T).correlation
        cells[zero.all(axis=1)] = np.nan
        return Scores.of_columns(X, Y), zeros, cells, (~zero).sum(axis=0)

    def combine(one: Any, other: Any) -> Any:
        return one[0] + other[0], one[1] + other[1], np.concatenate([one[2], other[2]]), one[3] + other[3]

    genes, zeros, cells, counts = _reduced(recovered, visit, combine)
    return Comparison(genes, zeros, np.where(counts > 0, genes.correlation, np.nan), cells)


def compare_stored(recovered: da.Array, target: ExpressionMatrix) -> Scores:
    """Return the scores on the stored entries of `target` only; see `compare`."""
    target = target.with_blocks(_blocks_of(recovered))

    def visit(X: Any, block: int) -> Scores:
        csr = target.read_block(block)
        return Scores.of_entries(X[row_of(csr), csr.indices], csr.data, csr.indices, csr.shape[1])

    scores: Scores = _reduced(recovered, visit, Scores.__add__)
    return scores


def _reduced(array: da.Array, visit: Callable[[Any, int], Any], combine: Callable[[Any, Any], Any]) -> Any:
    """Return the results of ``visit(rows, number)`` for all chunks of whole rows, combined."""
    parts = [dask.delayed(visit, traverse=False)(rows, block) for block, rows in enumerate(array.to_delayed()[:, 0])]
    return tree_reduce(parts, combine).compute()


def _blocks_of(array: da.Array) -> RowBlocks:
    return RowBlocks((0, *np.cumsum(array.chunks[0]).tolist()))


def _dense(array: Any) -> Any:
    return np.asarray(array.toarray() if sp.issparse(array) else array)


def score_held_out(
    result: Imputation, held_out: ExpressionMatrix, observed: ExpressionMatrix, listen: Listener = silent
) -> dict[str, float]:
    """Score a result on hidden entries, next to predictions by each gene's mean over its observed entries.

    X is scored if the result was written with one, otherwise its factors. `held_out` has the true values of the hidden
    entries, `observed` the entries from which the result was imputed.

    Returns ``n``, ``mse``, ``mae``, ``pearson``, ``cosine``, and the last four again as ``gene_mean_…``. Raises
    `InputError` if the cells or genes differ, or nothing was hidden.
    """
    held_out, observed = aligned(held_out, result), aligned(observed, result)
    listen(Stage("scoring"))
    if result.X is not None:  # imputed entries of a block come from X,
        held_out = held_out.with_blocks(result.X.blocks)
        read, stored = dask.delayed(ExpressionMatrix.read_block), dask.delayed(result.X, traverse=False)
        pieces: list[Any] = [read(stored, block) for block in range(len(held_out.blocks))]
    else:  # or from the estimate, left factors and range of cells
        estimate, blocks = dask.delayed(result.estimate, traverse=False), held_out.blocks
        lefts = result.left.rechunk((blocks.sizes, -1)).to_delayed().ravel()
        pieces = [(estimate, left, slice(*cells)) for left, cells in zip(lefts, blocks, strict=True)]
    visit, hidden = dask.delayed(_scores_of_block), dask.delayed(held_out, traverse=False)
    means = dask.delayed(gene_means(observed))
    parts = [visit(hidden, block, piece, means) for block, piece in enumerate(pieces)]
    ours, baseline = (scores.as_dict() for scores in tree_reduce(parts, add).compute())
    if ours["n"] == 0:
        raise InputError(f"{held_out.name}: holds no entries; hide some with `scialm-dask mask`")
    return {**ours, **{f"gene_mean_{name}": baseline[name] for name in METRICS}}


def _scores_of_block(
    held_out: ExpressionMatrix, block: int, piece: Any, means: NDArray[np.float32]
) -> tuple[Scores, Scores]:
    """Return scores of the imputed entries and of gene means on the hidden entries of a block."""
    csr = held_out.read_block(block)
    if isinstance(piece, tuple):
        estimate, left, cells = piece
        imputed = estimate.at(csr, left, estimate.counts_of(cells))
    else:
        imputed = np.asarray(piece[row_of(csr), csr.indices] if csr.nnz else (), np.float32).ravel()
    pairs = ((x, csr.data, csr.indices, csr.shape[1]) for x in (imputed, means[csr.indices]))
    ours, baseline = (Scores.of_entries(*pair) for pair in pairs)
    return ours, baseline


def gene_means(matrix: ExpressionMatrix) -> NDArray[np.float32]:
    """Return the mean of each gene over its observed entries, float32 of shape (n_genes,); 0 if it has none."""

    def visit(csr: sp.csr_matrix, _: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        n = matrix.shape[1]
        sums = np.bincount(csr.indices, weights=csr.data, minlength=n).astype(np.float64)
        return sums, np.bincount(csr.indices, minlength=n)

    return ratio(*matrix.reduce(visit, add)).astype(np.float32)


def ratio(above: Any, below: NDArray[Any]) -> Doubles:
    """Return the quotient, 0 where the divisor is not positive."""
    divided: Doubles = np.divide(above, below, out=np.zeros(below.shape), where=below > 0)
    return divided
