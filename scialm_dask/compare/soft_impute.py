"""softImpute by alternating least squares (Hastie, Mazumder, Lee and Zadeh 2015), never dense: a peer to compare with.

Minimises ½ ‖P_Ω(D − A Bᵀ)‖² + λ/2 (‖A‖² + ‖B‖²). Each factor in turn is regressed on the filled-in matrix
P_Ω(D − A Bᵀ) + A Bᵀ, which is sparse plus low rank. λ falls along a path with warm starts, and the one kept is that
which predicts a hidden share of Ω best.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.csr import entries_where
from scialm_dask.linalg.kernels import Block, sampled_product
from scialm_dask.linalg.random import hidden_entries, n_to_hide

Floats = NDArray[np.float32]
_VALIDATION = 0.05
_STEP, _LOWEST = 0.75, 1e-3  # from one λ to the next, and the last one relative to the first
_PATIENCE = 2  # λs without a lower error on the hidden share
_SWEEPS, _SETTLED = 50, 1e-4  # at one λ: the most, and the relative fall of the objective that ends them
_SPARE = 10  # columns that a factor may grow by from one λ to the next


def soft_impute(D: sp.csr_matrix, *, max_rank: int = 100, seed: int = 0) -> tuple[Floats, Floats]:
    """Complete a sparse matrix whose zeros are unknown.

    Parameters
    ----------
    D
        Cells × genes, float32.
    max_rank
        Most columns of the factors.
    seed
        Of the entries hidden to choose λ, and of the first factors.

    Returns
    -------
    left, right
        Float32, shapes ``(m, r)`` and ``(n, r)``.
    """
    counts = np.bincount(D.indices, minlength=D.shape[1])
    hidden = hidden_entries(D.indices, np.zeros_like(counts), counts, n_to_hide(counts, _VALIDATION), seed)
    train, validation = entries_where(D, ~hidden), entries_where(D, hidden)
    lambdas = _path(train)
    errors: list[float] = []
    for left, right in _along(train, lambdas, max_rank, seed):
        errors.append(float(np.sum((validation.data - _at(validation, left, right)) ** 2, dtype=np.float64)))
        if len(errors) - 1 - int(np.argmin(errors)) >= _PATIENCE:
            break
    *_, kept = _along(D, lambdas[: int(np.argmin(errors)) + 1], max_rank, seed)
    return kept


def _path(D: sp.csr_matrix) -> NDArray[np.float64]:
    """λ from just below σ₁, where the answer is no longer zero."""
    from scipy.sparse.linalg import svds

    first = float(svds(D.astype(np.float64), k=1, return_singular_vectors=False, v0=np.ones(min(D.shape)))[0])
    powers = np.arange(1, 1 + int(np.log(_LOWEST) / np.log(_STEP)), dtype=np.float64)
    return first * _STEP**powers


def _along(D: sp.csr_matrix, lambdas: NDArray[np.float64], max_rank: int, seed: int) -> Iterator[tuple[Floats, Floats]]:
    """Minimise at each λ, beginning from the answer at the last."""
    rng = np.random.default_rng(seed)
    A, B = np.zeros((D.shape[0], 0), np.float32), np.zeros((D.shape[1], 0), np.float32)
    size = float(np.sqrt(np.mean(D.data**2, dtype=np.float64))) if D.nnz else 1.0
    for lam in lambdas:
        spare = min(_SPARE, max_rank - A.shape[1])
        A = np.hstack([A, rng.normal(0, 0.1 * size**0.5, (len(A), spare))]).astype(np.float32)
        B = np.hstack([B, np.zeros((len(B), spare), np.float32)])
        A, B = _balanced(*_minimise(D, A, B, lam))
        yield A, B


def _minimise(D: sp.csr_matrix, A: Floats, B: Floats, lam: float) -> tuple[Floats, Floats]:
    before = np.inf
    for _ in range(_SWEEPS):
        B = _regressed(_residual(D, A, B).T, A, B, lam)
        S = _residual(D, A, B)
        objective = 0.5 * float(np.sum(S.data**2, dtype=np.float64)) + lam / 2 * (_square(A) + _square(B))
        A = _regressed(S, B, A, lam)
        if before - objective <= _SETTLED * objective:
            break
        before = objective
    return A, B


def _regressed(S: sp.csr_matrix, other: Floats, own: Floats, lam: float) -> Floats:
    """Ridge regression of S + own·otherᵀ on `other`, row by row."""
    gram = other.T.astype(np.float64) @ other
    target = S @ other + own @ gram.astype(np.float32)
    solved = np.linalg.solve(gram + lam * np.eye(len(gram)), target.T.astype(np.float64))
    return np.ascontiguousarray(solved.T, dtype=np.float32)


def _balanced(A: Floats, B: Floats) -> tuple[Floats, Floats]:
    """Give the same product, its singular values shared evenly, without directions that have vanished."""
    (P, R), (Q, T) = np.linalg.qr(A), np.linalg.qr(B)
    U, d, Vt = np.linalg.svd(R @ T.T)
    r = int(np.count_nonzero(d > 1e-4 * d[0])) if len(d) and d[0] > 0 else 0
    root = np.sqrt(d[:r])
    return (P @ U[:, :r] * root).astype(np.float32), (Q @ Vt[:r].T * root).astype(np.float32)


def _residual(D: sp.csr_matrix, A: Floats, B: Floats) -> sp.csr_matrix:
    return sp.csr_matrix((D.data - _at(D, A, B), D.indices, D.indptr), shape=D.shape)


def _at(D: sp.csr_matrix, A: Floats, B: Floats) -> Floats:
    return sampled_product(Block(D.indptr, D.indices, D.data, D.shape[1]), A, B)


def _square(A: Floats) -> float:
    return float(np.sum(A**2, dtype=np.float64))
