"""Warm-started randomized SVD of W, a pass at a time, and the exact one by the short side.

Halko, Martinsson and Tropp (2011), with subspace iteration started from the last iteration's right vectors. After a
pass with basis Q both Y = WQ and Z = WᵀY are known, so W is projected on the range of Y: half an iteration better
than on Q, for free. The triplets are those of QyᵀW = R⁻ᵀZᵀ, where Y = Qy R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from scialm_dask.linalg import kernels
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.operator import LowRankPlusSparse, Product

_DEPENDENT = 1e-11  # eigenvalues of the scaled Gram under this are rounding: those columns carry nothing new


@dataclass(frozen=True)
class PartialSVD:
    """The leading singular triplets.

    Parameters
    ----------
    values
        Singular values, float64, falling, shape ``(l,)``.
    right
        Right singular vectors, float32, shape ``(n, l)``.
    to_left
        Float64, shape ``(width of the sketch, l)``: left singular vectors are ``sketch @ to_left``.
    """

    values: Doubles
    right: Floats
    to_left: Doubles


def rayleigh_ritz(product: Product) -> PartialSVD:
    """Singular triplets of W projected on the range of WQ; columns that depend on others are left out."""
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
    """Return orthonormal columns, ``(n, width)``, n at most: the first of `known`, then fresh random directions.

    The random numbers belong to (seed, column, row): they depend neither on blocks nor on the number of columns.
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


def refine(
    operator: LowRankPlusSparse, product: Product, *, limit: int, threshold: float, passes: int, tolerance: float
) -> PartialSVD:
    """Go on from a first pass until the values over `threshold`, `limit` at most, stand still.

    Parameters
    ----------
    product
        Of the first pass.
    limit, threshold
        Which singular values are needed.
    passes
        The most passes, the first included.
    tolerance
        Stop when the values over the threshold, less the threshold, have moved by less than this relative to their
        norm; 0 to make all the passes.
    """
    svd = rayleigh_ritz(product)
    for _ in range(passes - 1):
        before = np.maximum(svd.values[:limit] - threshold, 0)
        svd = rayleigh_ritz(operator.multiply(svd.right))
        after = np.maximum(svd.values[:limit] - threshold, 0)
        count = min(len(before), len(after))
        if np.linalg.norm(after[:count] - before[:count]) < tolerance * np.linalg.norm(after):
            break
    return svd


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
    """All triplets over `threshold`, `limit` at most: refine, and widen the basis until one falls under it.

    Fewer where W has no more: a wider basis that finds none has found them all.
    """
    svd = refine(operator, product, limit=limit, threshold=threshold, passes=passes, tolerance=tolerance)
    most = min(operator.shape)
    while (known := len(svd.values)) < min(limit, most) and svd.values[-1] > threshold:
        basis = extended_basis(svd.right, min(2 * known, most), seed)
        product = operator.multiply(basis)
        svd = refine(operator, product, limit=limit, threshold=threshold, passes=passes, tolerance=tolerance)
        if len(svd.values) <= known:
            break
    return svd


def short_side_svd(operator: LowRankPlusSparse, limit: int, threshold: float) -> PartialSVD:
    """All triplets over `threshold`, `limit` at most, by the eigenvectors of the short side's Gram. Two passes."""
    m, n = operator.shape
    gram = operator.row_gram() if m <= n else operator.column_gram()
    values, vectors = _leading_eigenpairs(gram, limit, threshold**2)
    if m > n:
        operator.multiply(vectors)  # the sketch is W V = U Σ; lost blocks would be made again of these vectors
        return _with_signs(values, vectors.copy(), np.diag(1 / values))
    cross = operator.project(vectors)
    cross /= values
    return _with_signs(values, cross, np.eye(len(values)))


def _leading_eigenpairs(gram: Doubles, limit: int, smallest: float) -> tuple[Doubles, Floats]:
    """Square roots of the eigenvalues over `smallest`, `limit` at most and one at least, falling, and the vectors.

    Overwrites `gram` by the vectors; LAPACK works in twice its room besides.
    """
    empty = np.diagonal(gram) == 0  # rows of zeros, which rounding must not fill
    # All of them, by divide and conquer: LAPACK takes longer to find a third, and so does iterating on a warm start.
    squares, vectors = eigh(gram.T, overwrite_a=True, check_finite=False, driver="evd")
    count = min(limit, max(1, int(np.count_nonzero(squares > smallest))))
    values = np.sqrt(np.maximum(squares[::-1][:count], 0))
    leading = vectors[:, ::-1][:, :count].astype(np.float32)
    leading[empty] = 0
    return values, leading
