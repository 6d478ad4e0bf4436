"""Dense twins of the pooled methods, written another way, and the simulations of their tests."""

from __future__ import annotations

import numpy as np
import scipy.optimize


def seed_simulation(seed, cells=500, genes=100, pools=25, rank=10):
    """The notebook's simulation; designs with a gene in no pool, or an empty one, are drawn again."""
    rng = np.random.default_rng(seed)
    M = rng.normal(10, 2, (cells, rank)) @ rng.normal(15, 3, (genes, rank)).T
    while True:
        P = rng.choice([0, 1], size=(genes, pools), p=[0.75, 0.25])
        if P.any(axis=0).all() and P.any(axis=1).all():
            return M, P


def sparse_simulation(seed, cells=60, genes=30, pools=10, rank=4):
    """Expression with many entries near zero, for which D P⁺ has negative ones."""
    rng = np.random.default_rng(seed)
    M = rng.gamma(0.5, 1.0, (cells, rank)) @ rng.gamma(0.3, 1.0, (genes, rank)).T
    while True:
        P = (rng.random((genes, pools)) < 0.25).astype(int)
        if P.any(axis=0).all() and P.any(axis=1).all():
            return M, P


def pooled_als(D, P, V, sweeps, tau=1e-8):
    """Alternating NNLS by SciPy; V as one problem of genes × rank unknowns, with the same pull to the last V."""
    P = P.astype(float)
    genes, rank = V.shape
    history = []
    for _ in range(sweeps):
        last, basis = V, P.T @ V
        U = np.array([scipy.optimize.nnls(basis, d)[0] for d in D])
        history.append(np.sum((D - U @ basis.T) ** 2))
        values, vectors = np.linalg.eigh(U.T @ U)
        half = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        target = np.linalg.lstsq(half, U.T @ D, rcond=None)[0]  # ‖U B − D‖² = ‖half B − target‖² + a constant
        weight = np.sqrt(tau * values[-1] * np.linalg.eigvalsh(P @ P.T)[-1])
        A = np.vstack([np.kron(P.T, half), weight * np.eye(genes * rank)])
        b = np.concatenate([target.T.ravel(), weight * V.ravel()])
        V = scipy.optimize.nnls(A, b, maxiter=100_000)[0].reshape(genes, rank)
    return U @ last.T, np.array(history)


def pooled_nuclear_norm(D, P, delta):
    """CVXPY by an interior-point method; returns X and ‖X‖_*."""
    import cvxpy

    X = cvxpy.Variable((len(D), len(P)))
    misfit = cvxpy.norm(X @ P - D, "fro") <= delta if delta > 0 else X @ P == D
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.normNuc(X)), [misfit, X >= 0])
    problem.solve(solver="CLARABEL")
    assert problem.status == "optimal"
    return X.value, problem.value
