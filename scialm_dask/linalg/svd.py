"""Randomized SVD of W, warm-started, one pass at a time; and an exact SVD by the short side.

Subspace iteration as in Halko, Martinsson and Tropp (2011), started from the right vectors of the iteration before. A
pass with basis Q gives both Y = WQ and Z = WᵀY, so W is projected on the range of Y, which is half an iteration better
than Q, for free. The triplets are those of QyᵀW = R⁻ᵀZᵀ, where Y = Qy R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from scialm_dask.linalg import kernels
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.operator import LowRankPlusSparse, Product

_DEPENDENT = 1e-11  # relative eigenvalue of the scaled Gram below which a column is linearly dependent


@dataclass(frozen=True)
class PartialSVD:
    """Leading singular triplets, in descending order."""

    values: Doubles  # singular values, float64, shape (l,)
    right: Floats  # right singular vectors, float32, shape (n, l)
    to_left: Doubles  # float64, shape (width of the sketch, l): left singular vectors are sketch @ to_left


def rayleigh_ritz(product: Product) -> PartialSVD:
    """Return the singular triplets of W projected on the range of WQ, without linearly dependent columns."""
    scale = np.sqrt(np.maximum(np.diag(product.gram), 0))
    used = scale > 0
    if not used.any():
        return PartialSVD(np.zeros(0), np.zeros((len(product.cross), 0), np.float32), np.zeros((len(used), 0)))
    scale = scale[used]
    correlation = product.gram[np.ix_(used, used)] / np.outer(scale, scale)
    spread, vectors = np.linalg.eigh(correlation)
    keep = spread > _DEPENDENT * spread[-1]
    whiten = np.zeros((len(used), np.count_nonzero(keep)))
    whiten[used] = vectors[:, keep] / np.sqrt(spread[keep]) / scale[:, None]  # WQ @ whiten is orthonormal
    projected = product.cross @ whiten
    squares, rotation = np.linalg.eigh(projected.T @ projected)
    order = np.argsort(squares)[::-1]
    order = order[squares[order] > np.finfo(np.float64).eps * max(squares[order[0]], 0.0)]
    values, rotation = np.sqrt(squares[order]), rotation[:, order]
    right = kernels.product(projected, rotation / values)
    return _with_signs(values, right, whiten @ rotation)


def _with_signs(values: Doubles, right: Floats, to_left: Doubles) -> PartialSVD:
    """Make the largest entry of each right vector positive, in place."""
    signs = np.where(-right.min(axis=0) > right.max(axis=0), np.float32(-1), np.float32(1))
    right *= signs
    return PartialSVD(values, right, to_left * signs)


def extended_basis(known: Floats, width: int, seed: int) -> Floats:
    """Return orthonormal columns, ``(n, min(width, n))``: the first columns of `known`, then random directions.

    The random numbers are keyed by seed, column and row, so that they depend neither on blocks nor on the width.
    """
    n, have = known.shape
    width = min(width, n)
    have = min(have, width)
    basis = np.empty((n, width), np.float32)
    basis[:, :have] = known[:, :have]
    for column in range(have, width):
        basis[:, column] = np.random.default_rng((seed, column)).standard_normal(n, dtype=np.float32)
    fresh = basis[:, have:].astype(np.float64)
    if fresh.shape[1]:
        old = basis[:, :have].astype(np.float64)
        for _ in range(2):  # twice is enough
            fresh -= old @ (old.T @ fresh)
            fresh = fresh @ np.linalg.inv(np.linalg.cholesky(fresh.T @ fresh)).T
        basis[:, have:] = fresh
    return basis


def leading_triplets(
    operator: LowRankPlusSparse,
    product: Product,
    *,
    limit: int,
    threshold: float,
    passes: int,
    tolerance: float,
    seed: int,
) -> PartialSVD:
    """Return the triplets above `threshold`, `limit` at most, widening the basis until a value falls below it.

    `product` is that of the first basis, from the pass before, which counts as one of the `passes` for each width. Stop
    earlier when the values above the threshold, minus the threshold, change by less than `tolerance` relative to their
    norm.
    """
    known, most = 0, min(operator.shape)
    while True:
        svd = rayleigh_ritz(product)
        for _ in range(passes - 1):
            before = np.maximum(svd.values[:limit] - threshold, 0)
            svd = rayleigh_ritz(operator.multiply(svd.right))
            after = np.maximum(svd.values[:limit] - threshold, 0)
            count = min(len(before), len(after))
            if np.linalg.norm(after[:count] - before[:count]) < tolerance * np.linalg.norm(after):
                break
        # A wider basis that finds no further value has found them all.
        if not known < len(svd.values) < min(limit, most) or svd.values[-1] <= threshold:
            return svd
        known = len(svd.values)
        product = operator.multiply(extended_basis(svd.right, min(2 * known, most), seed))


def short_side_svd(operator: LowRankPlusSparse, limit: int, threshold: float) -> PartialSVD:
    """Return the triplets above `threshold`, 1 to `limit`, by eigenvectors of the short side's Gram. Two passes."""
    m, n = operator.shape
    gram = operator.row_gram() if m <= n else operator.column_gram()
    empty = np.diagonal(gram) == 0  # rows of zeros, which rounding must not fill
    # All pairs, by divide and conquer: LAPACK takes longer to find a third of them, and so does iterating. It
    # overwrites the Gram, and needs twice its memory.
    squares, vectors = eigh(gram.T, overwrite_a=True, check_finite=False, driver="evd")
    count = min(limit, max(1, int(np.count_nonzero(squares > threshold**2))))
    values = np.sqrt(np.maximum(squares[::-1][:count], 0))
    leading = vectors[:, ::-1][:, :count].astype(np.float32)
    del gram, vectors
    leading[empty] = 0
    if m > n:
        operator.multiply(leading)  # the sketch is W V = U Σ; lost blocks would be made again from these vectors
        return _with_signs(values, leading.copy(), np.diag(1 / values))
    cross = operator.project(leading)
    cross /= values
    return _with_signs(values, cross, np.eye(len(values)))
