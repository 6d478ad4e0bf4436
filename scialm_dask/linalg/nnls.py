"""Non-negative least squares in Gram form, many small problems that share one Gram."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from scialm_dask.linalg.sparse_products import compiled

Float = NDArray[np.float64]

ROUND_OFF = 1e-13  # added to the diagonal, relative to its mean: a singular Gram then has one answer, a small one


def nnls_gram(gram: Float, linear: Float) -> Float:
    """Minimise ½ uᵀGu − bᵀu over u ≥ 0, for every row b.

    Rows whose unconstrained minimum on {b > 0} is already the answer are settled by two matrix products; the
    rest one at a time by block principal pivoting (Kim and Park 2011, SIAM J. Sci. Comput. 33).

    Parameters
    ----------
    gram
        G, r × r, symmetric positive semidefinite.
    linear
        The vectors b, m × r.

    Returns
    -------
    numpy.ndarray
        The minimisers, m × r, float64. Releases the interpreter lock.
    """
    r = len(gram)
    scale = float(np.trace(gram)) / r
    solution = np.zeros(linear.shape)
    if scale <= 0:
        return solution
    gram = np.ascontiguousarray(gram + ROUND_OFF * scale * np.eye(r))
    # Where b is positive everywhere the passive set starts full: one factorisation serves all such rows.
    full = (linear > 0).all(axis=1)
    if full.any():
        inner = scipy.linalg.cho_solve(scipy.linalg.cho_factor(gram, lower=True), linear[full].T).T
        solution[full] = inner
    todo = np.flatnonzero(np.where(full, (solution < 0).any(axis=1), (linear > 0).any(axis=1)))
    if len(todo):
        _pivot_rows(gram, np.ascontiguousarray(linear, dtype=np.float64), todo, solution)
    return solution


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _cholesky_solve(gram: Float, index: NDArray[np.int64], p: int, lower: Float, x: Float) -> None:
    """Solve G[F, F] x = x in place, F = index[:p]."""
    for i in range(p):
        for j in range(i + 1):
            total = gram[index[i], index[j]]
            for k in range(j):
                total -= lower[i, k] * lower[j, k]
            lower[i, j] = np.sqrt(max(total, 1e-300)) if i == j else total / lower[j, j]
    for i in range(p):
        total = x[i]
        for k in range(i):
            total -= lower[i, k] * x[k]
        x[i] = total / lower[i, i]
    for i in range(p - 1, -1, -1):
        x[i] /= lower[i, i]
        for k in range(i):
            x[k] -= lower[i, k] * x[i]


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _pivot_rows(gram: Float, linear: Float, rows: NDArray[np.int64], solution: Float) -> None:
    r = len(gram)
    lower, x, slope = np.empty((r, r)), np.empty(r), np.empty(r)
    index, passive = np.empty(r, np.int64), np.empty(r, np.bool_)
    for row in rows:
        b, u = linear[row], solution[row]
        slack = 1e-12 * np.abs(b).max()
        passive[:] = b > 0
        fewest, patience = r + 1, 3
        for _ in range(20 * r + 100):
            p = 0
            for i in range(r):
                if passive[i]:
                    index[p] = i
                    x[p] = b[i]
                    p += 1
            _cholesky_solve(gram, index, p, lower, x)
            slope[:] = -b
            u[:] = 0.0
            for j in range(p):
                u[index[j]] = x[j]
                for i in range(r):
                    slope[i] += gram[index[j], i] * x[j]
            wrong, last = 0, -1
            for i in range(r):
                if (passive[i] and u[i] < 0) or (not passive[i] and slope[i] < -slack):
                    wrong += 1
                    last = i
            if wrong == 0:
                break
            if wrong < fewest:
                fewest, patience = wrong, 3
            elif patience > 0:
                patience -= 1
            else:  # Murty's rule: one exchange at a time, which cannot cycle
                passive[last] = not passive[last]
                continue
            for i in range(r):
                if (passive[i] and u[i] < 0) or (not passive[i] and slope[i] < -slack):
                    passive[i] = not passive[i]
        for i in range(r):
            u[i] = max(u[i], 0.0)
