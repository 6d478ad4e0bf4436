"""ADMM for min ‖X‖_* subject to XP + wR = D, ‖wR‖_F ≤ δ, X ≥ 0.

Scaled form, with penalty 1/t and multipliers (L, M):

    X, R   = nearest point to (Z + L, T + M) with X ≥ 0, XP + wR = D       cell by cell
    Z, T   = SVT_t(X − L), nearest point of the ball to R − M              one matrix H, one number h
    L, M  += Z − X, T − R

With a = X − L and b = R − M, thresholding is Z = aH and T = hb, so a cell keeps only its rows of a and b.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from scialm_dask.pooled.base import Float, Sums

Single = NDArray[np.float32]
Update = Callable[[Single, Single, Float], tuple[Single, Single, Sums]]  # one iteration of some cells; see `updated`


class Projection:
    """Projection of cells onto {X ≥ 0, XP + wR = D}, or without X ≥ 0 if not `non_negative`."""

    def __init__(self, P: Float, weight: float, non_negative: bool = True) -> None:
        self.P, self.weight, self.non_negative = P, weight, non_negative
        self.inner = np.asarray(np.linalg.inv(P.T @ P + weight**2 * np.eye(P.shape[1])), np.float64)

    def nearest(self, Z: Float, T: Float, D: Float) -> tuple[Float, Float, Float, Float]:
        """Return the point X, R nearest to Z, T, and the multipliers Y of the equation and S ≥ 0 of X ≥ 0.

        X = Z − YPᵀ + S, R = T − wY. Eliminating Y leaves a least-squares problem in S ≥ 0 with the Gram
        K = I − P (PᵀP + w²I)⁻¹ Pᵀ. K is the same for all cells, and only the binding entries take part.
        """
        P, w, inner = self.P, self.weight, self.inner
        Y = (Z @ P + w * T - D) @ inner
        X = Z - Y @ P.T
        S = np.zeros_like(X)
        if self.non_negative and (X < 0).any():
            from scialm_dask.linalg.least_squares import nnls_gram

            S = nnls_gram(np.eye(len(P)) - P @ inner @ P.T, -X)
            Y += S @ P @ inner
            X = np.maximum(Z - Y @ P.T + S, 0.0)
            X[S > 0] = 0.0
        return X, T - w * Y, Y, S


def admm(
    visit: Callable[[Update], Sums],
    start: Float,
    P: Float,
    delta: float,
    tol: float,
    max_iterations: int,
    *,
    non_negative: bool = True,
    on_sweep: Callable[[int, float], None] = lambda *_: None,
) -> tuple[Float, float, float, tuple[dict[str, float], ...], bool]:
    """Iterate until the stopping rule is met, for D of norm 1.

    `visit` does one iteration on all cells and returns the sums over them, which is all the loop sees. `start` is the
    Gram of the first a, genes × genes. `on_sweep` is called after each iteration with its number and objective.

    Returns
    -------
    tuple
        H, h, a lower bound of the objective, the history, and whether the rule was met. X is close to aH.
    """
    shrink, slack, bound = np.eye(len(P)), 1.0, 0.0
    step, rescale = 0.1 * float(np.sqrt(np.linalg.eigvalsh(start)[-1])), 1.0
    projection = Projection(P, 1.0, non_negative)
    history: list[dict[str, float]] = []
    while True:
        sums = visit(functools.partial(updated, projection, shrink, slack, rescale, step))
        shrink = threshold(sums["aa"], step)
        slack = min(1.0, delta / (float(np.sqrt(sums["bb"])) + 1e-300))
        primal, dual = residuals(sums, shrink, slack)
        objective, size = float(np.trace(square_root(sums["XX"])[0])), float(np.sqrt(np.trace(sums["XX"])))
        # ⟨D, Y⟩ − δ‖Y‖_F of the multipliers, scaled to ‖Y Pᵀ + S‖₂ ≤ 1, is a lower bound of the objective
        norm = float(np.sqrt(max(np.linalg.eigvalsh(sums["ZZ"])[-1], 0.0)))
        bound = max(bound, float(sums["DY"] - delta * np.sqrt(sums["YY"])) / norm if norm > 0 else 0.0)
        history.append({"objective": objective, "primal": primal / size, "dual": dual / size, "step": step})
        on_sweep(len(history), objective)
        worst = max(primal, dual) / size
        converged = worst <= 0.1 * tol or (worst <= tol and abs(objective - bound) <= 0.5 * tol * objective)
        if converged or len(history) == max_iterations:
            return shrink, slack, bound, tuple(history), converged
        rescale = 1.0
        if len(history) % 10 == 0 and len(history) <= 200:  # later changes of t would keep it from converging
            factor = float(np.clip(np.sqrt(dual / max(primal, 1e-300)), 0.5, 2.0))  # brings the residuals together
            rescale = 1.0 if 0.75 < factor < 1.33 else factor
        step *= rescale


def threshold(gram: Float, step: float) -> Float:
    """Return H = Q max(1 − t/σ, 0) Qᵀ: aH is a with its singular values lowered by t."""
    values, vectors = np.linalg.eigh(gram)
    sigma = np.sqrt(np.maximum(values, 1e-300))
    return np.asarray((vectors * np.maximum(1 - step / sigma, 0.0)) @ vectors.T)


def square_root(gram: Float) -> tuple[Float, Float]:
    """Return G^½ and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(gram)
    sigma = np.sqrt(np.maximum(values, 0.0))
    keep = sigma > 1e-7 * max(sigma[-1], 1e-300)
    inverse = np.divide(1.0, sigma, out=np.zeros_like(sigma), where=keep)
    return (vectors * sigma) @ vectors.T, (vectors * inverse) @ vectors.T


def residuals(sums: Sums, H: Float, h: float) -> tuple[float, float]:
    """Return the norms of (Z, T) − (X, R) and of the last change of (Z, T), from sums alone."""
    ZZ = np.sum((H @ sums["aa"]) * H) + h**2 * sums["bb"]
    primal = ZZ - 2 * (np.sum(H * sums["aX"]) + h * sums["bR"]) + np.trace(sums["XX"]) + sums["RR"]
    dual = ZZ - 2 * (np.sum(H * sums["aZ"]) + h * sums["bT"]) + sums["ZZ_last"]
    return float(np.sqrt(max(primal, 0.0))), float(np.sqrt(max(dual, 0.0)))


def updated(
    projection: Projection, shrink: Float, slack: float, rescale: float, step: float, a: Single, b: Single, D: Float
) -> tuple[Single, Single, Sums]:
    """Return the next a and b of some cells, and the sums that the loop needs.

    `shrink` and `slack` are H and h of the last thresholding, `step` is t, and `rescale` the factor on the multipliers
    for a change of t.
    """
    last_a, last_b = a.astype(np.float64), b.astype(np.float64)
    Z, T = last_a @ shrink, slack * last_b
    L, M = rescale * (Z - last_a), rescale * (T - last_b)
    X, R, Y, S = projection.nearest(Z + L, T + M, D)
    a, b = (X - L).astype(np.float32), (R - M).astype(np.float32)
    next_a, next_b = a.astype(np.float64), b.astype(np.float64)
    Y *= -1 / step  # Y of the dual problem: max ⟨D, Y⟩ − δ‖Y‖_F, ‖Y Pᵀ + S‖₂ ≤ 1, S ≥ 0
    subgradient = Y @ projection.P.T + S / step
    sums: Sums = {"aa": next_a.T @ next_a, "aX": next_a.T @ X, "aZ": next_a.T @ Z, "XX": X.T @ X}
    sums |= {"bb": np.sum(next_b**2), "bR": np.sum(next_b * R), "bT": np.sum(next_b * T), "RR": np.sum(R**2)}
    sums |= {"ZZ_last": np.sum(Z**2) + np.sum(T**2), "DY": np.sum(D * Y), "YY": np.sum(Y**2)}
    return a, b, sums | {"ZZ": subgradient.T @ subgradient}
