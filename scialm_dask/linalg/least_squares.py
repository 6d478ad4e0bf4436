"""Small least-squares problems, one for each row: regularised with its own matrix, or non-negative with a shared one.

A row with observed values d at columns Ω, prior mean μ and prior precision P (r × r) has the left factor

    u = argmin  Σ_Ω (d − u·v)² + (u − μ)ᵀ P (u − μ)  =  (V_ΩᵀV_Ω + P)⁻¹ (V_Ωᵀd + Pμ)

at a cost of O(|Ω| r² + r³). All is in float64 and releases the interpreter lock.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.sparse_products import compiled

_jit = compiled(boundscheck=False, fastmath={"reassoc", "contract", "arcp", "nsz"})

_ROUND_OFF = 1e-13  # added to the diagonal, relative to its mean, so that a singular Gram has one, small solution


class RowProblems(NamedTuple):
    """Rows of a block: a CSR pattern, and the values d in its order."""

    indptr: NDArray[np.integer]
    indices: NDArray[np.int32]
    values: Floats


def solve_rows(rows: RowProblems, right: Floats, precision: Doubles, mean: Doubles) -> Floats:
    """Return left factors, float32, of shape ``(m, r)``.

    `right` is V, of shape ``(n, r)``; `precision` is P, symmetric positive definite, and `mean` is μ.
    """
    left = np.empty((len(rows.indptr) - 1, right.shape[1]), np.float32)
    _solve_rows(*rows, right.astype(np.float64), precision, precision @ mean, left)
    return left


def leave_one_out(rows: RowProblems, right: Floats, precision: Doubles, mean: Doubles) -> float:
    """Return the sum of (d − u·v)² over the observed entries, each predicted from the others of its row.

    Takes the arguments of `solve_rows`. Without entry j, its error e becomes e / (1 − h), where
    h = vᵀ (V_ΩᵀV_Ω + P)⁻¹ v.
    """
    return float(_leave_one_out(*rows, right.astype(np.float64), precision, precision @ mean))


def nnls_gram(gram: Doubles, linear: Doubles) -> Doubles:
    """Minimise ½ uᵀGu − bᵀu over u ≥ 0, for every row b.

    Rows where the unconstrained minimum over {b > 0} is the answer take two matrix products. The others are solved
    one by one by block principal pivoting (Kim and Park 2011, SIAM J. Sci. Comput. 33). `gram` is G, r × r, symmetric
    positive semidefinite, and `linear` has the rows b, m × r. Returns the minimisers, m × r, float64.
    """
    r = len(gram)
    scale = float(np.trace(gram)) / r
    solution = np.zeros(linear.shape)
    if scale <= 0:
        return solution
    gram = np.ascontiguousarray(gram + _ROUND_OFF * scale * np.eye(r))
    # Where b is positive everywhere the passive set starts full: one factorisation serves all these rows.
    full = (linear > 0).all(axis=1)
    if full.any():
        solution[full] = scipy.linalg.cho_solve(scipy.linalg.cho_factor(gram, lower=True), linear[full].T).T
    todo = np.flatnonzero(np.where(full, (solution < 0).any(axis=1), (linear > 0).any(axis=1)))
    if len(todo):
        _pivot_rows(gram, np.ascontiguousarray(linear, dtype=np.float64), todo, solution)
    return solution


@_jit
def _normal_equations(indptr, indices, values, i, right, gram, linear):  # type: ignore[no-untyped-def]
    """Add V_ΩᵀV_Ω to the lower triangle of `gram`, and V_Ωᵀd to `linear`."""
    rank = right.shape[1]
    k, end = indptr[i], indptr[i + 1]
    while k + 4 <= end:  # four at a time, to load and store the triangle once for all four
        j0, j1, j2, j3 = indices[k], indices[k + 1], indices[k + 2], indices[k + 3]
        v0, v1, v2, v3 = right[j0], right[j1], right[j2], right[j3]
        d0, d1, d2, d3 = values[k], values[k + 1], values[k + 2], values[k + 3]
        for s in range(rank):
            linear[s] += v0[s] * d0 + v1[s] * d1 + v2[s] * d2 + v3[s] * d3
            x0, x1, x2, x3 = v0[s], v1[s], v2[s], v3[s]
            row = gram[s]
            for t in range(s + 1):
                row[t] += x0 * v0[t] + x1 * v1[t] + x2 * v2[t] + x3 * v3[t]
        k += 4
    while k < end:
        j0 = indices[k]
        v0 = right[j0]
        for s in range(rank):
            linear[s] += v0[s] * values[k]
            x0 = v0[s]
            row = gram[s]
            for t in range(s + 1):
                row[t] += x0 * v0[t]
        k += 1


@_jit
def _cholesky(gram):  # type: ignore[no-untyped-def]
    """Overwrite the lower triangle with L, where L Lᵀ is the matrix."""
    for s in range(len(gram)):
        for t in range(s + 1):
            total = gram[s, t]
            for q in range(t):
                total -= gram[s, q] * gram[t, q]
            gram[s, t] = np.sqrt(max(total, 1e-300)) if s == t else total / gram[t, t]


@_jit
def _forward(lower, x):  # type: ignore[no-untyped-def]
    """Overwrite x with L⁻¹x."""
    for s in range(len(x)):
        total = x[s]
        for t in range(s):
            total -= lower[s, t] * x[t]
        x[s] = total / lower[s, s]


@_jit
def _backward(lower, x):  # type: ignore[no-untyped-def]
    """Overwrite x with L⁻ᵀx."""
    for s in range(len(x) - 1, -1, -1):
        x[s] /= lower[s, s]
        for t in range(s):
            x[t] -= lower[s, t] * x[s]


@_jit
def _solve_rows(indptr, indices, values, right, precision, shift, left):  # type: ignore[no-untyped-def]
    for i in range(len(indptr) - 1):
        gram, x = precision.copy(), shift.copy()
        _normal_equations(indptr, indices, values, i, right, gram, x)
        _cholesky(gram)
        _forward(gram, x)
        _backward(gram, x)
        left[i] = x


@_jit
def _leave_one_out(indptr, indices, values, right, precision, shift):  # type: ignore[no-untyped-def]
    error = 0.0
    for i in range(len(indptr) - 1):
        gram, x = precision.copy(), shift.copy()
        _normal_equations(indptr, indices, values, i, right, gram, x)
        _cholesky(gram)
        _forward(gram, x)
        for k in range(indptr[i], indptr[i + 1]):
            v = right[indices[k]].copy()
            _forward(gram, v)
            predicted = leverage = 0.0
            for t in range(len(v)):
                predicted += x[t] * v[t]
                leverage += v[t] * v[t]
            gap = (values[k] - predicted) / (1 - leverage)
            error += gap * gap
    return error


@_jit
def _pivot_rows(gram, linear, rows, solution):  # type: ignore[no-untyped-def]
    r = len(gram)
    room, slope = np.empty(r * r), np.empty(r)
    passive, wrong = np.empty(r, np.bool_), np.empty(r, np.bool_)
    for row in rows:
        b, u = linear[row], solution[row]
        slack = 1e-12 * np.abs(b).max()
        passive[:] = b > 0
        fewest, patience = r + 1, 3
        for _ in range(20 * r + 100):
            index = np.flatnonzero(passive)
            p = len(index)
            lower, x = room[: p * p].reshape(p, p), b[index]
            for i in range(p):
                for j in range(i + 1):
                    lower[i, j] = gram[index[i], index[j]]
            _cholesky(lower)
            _forward(lower, x)
            _backward(lower, x)
            slope[:] = -b
            u[:] = 0.0
            for j in range(p):
                u[index[j]] = x[j]
                for i in range(r):
                    slope[i] += gram[index[j], i] * x[j]
            for i in range(r):
                wrong[i] = u[i] < 0 if passive[i] else slope[i] < -slack
            n_wrong = wrong.sum()
            if n_wrong == 0:
                break
            if n_wrong < fewest:
                fewest, patience = n_wrong, 3
            elif patience > 0:
                patience -= 1
            else:  # Murty's rule: one exchange at a time, which cannot cycle
                wrong[: np.flatnonzero(wrong)[-1]] = False
            passive[:] = passive != wrong
        u[:] = np.maximum(u, 0)
