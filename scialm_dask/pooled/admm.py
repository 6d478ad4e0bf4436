"""ADMM for min ‖X‖_* subject to XP + wR = D, ‖wR‖_F ≤ δ, X ≥ 0: the loop, and one iteration of a block.

Scaled form, with penalty 1/t and multipliers (L, M):

    X, R   = nearest point to (Z + L, T + M) with X ≥ 0, XP + wR = D       cell by cell
    Z, T   = SVT_t(X − L), the ball's nearest point to R − M               one matrix H, one number h
    L, M  += Z − X, T − R

With a = X − L and b = R − M, thresholding is Z = aH and T = hb, so that a and b are all a cell has to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scialm_dask.pooled.base import Float, Sums, batches

State = tuple[NDArray[np.float32], NDArray[np.float32]]  # a, cells × genes, and b, cells × pools


@dataclass(frozen=True)
class Projection:
    """Projects cells onto {X ≥ 0, XP + wR = D}; X may be negative too if not `non_negative`."""

    P: Float
    weight: float  # w
    inner: Float  # (PᵀP + w²I)⁻¹
    non_negative: bool

    def nearest(self, Z: Float, T: Float, D: Float) -> tuple[Float, Float, Float, Float]:
        """Return the point X, R nearest to Z, T, and the multipliers Y of the equation and S ≥ 0 of X ≥ 0.

        X = Z − YPᵀ + S, R = T − wY. Eliminating Y leaves a least-squares problem in S ≥ 0 with the Gram
        K = I − P (PᵀP + w²I)⁻¹ Pᵀ, the same for all cells, in which only the entries that bind take part.
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


@dataclass(frozen=True)
class AdmmStep:
    """What an iteration of a block needs to know."""

    projection: Projection
    shrink: Float  # H of the last thresholding
    slack: float  # and its h
    rescale: float  # factor on the multipliers, where t was changed since
    step: float  # t


@dataclass(frozen=True)
class Solution:
    """Where the loop ended: X is close to aH, and the objective is at least `bound`."""

    shrink: Float
    slack: float
    bound: float
    history: tuple[dict[str, float], ...]
    converged: bool


class Admm:
    """The loop, for D of norm 1; see `PooledNuclearNorm`. It sees cells only through sums over them."""

    def __init__(self, P: Float, delta: float, tol: float, max_iterations: int, *, non_negative: bool = True) -> None:
        self.P, self.delta, self.tol = P, delta, tol
        self.max_iterations, self.non_negative = max_iterations, non_negative

    def projection(self, weight: float) -> Projection:
        """Return the projection of cells with weight w of the slack."""
        inner = np.asarray(np.linalg.inv(self.P.T @ self.P + weight**2 * np.eye(self.P.shape[1])), np.float64)
        return Projection(self.P, weight, inner, self.non_negative)

    def run(
        self,
        visit: Callable[[AdmmStep], Sums],
        start: Float,
        on_sweep: Callable[[int, float], None] = lambda *_: None,
    ) -> Solution:
        """Iterate until the stopping rule is met.

        `visit` does one iteration on all cells and returns the sums; `start` is the Gram of the first a, genes × genes;
        `on_sweep` is called after each iteration with its number and objective.
        """
        shrink, slack = np.eye(len(self.P)), 1.0
        step, rescale = 0.1 * float(np.sqrt(np.linalg.eigvalsh(start)[-1])), 1.0
        projection = self.projection(1.0)
        history: list[dict[str, float]] = []
        bound = 0.0
        while True:
            sums = visit(AdmmStep(projection, shrink, slack, rescale, step))
            shrink = threshold(sums["aa"], step)
            slack = min(1.0, self.delta / (float(np.sqrt(sums["bb"])) + 1e-300))
            primal, dual = residuals(sums, shrink, slack)
            objective = float(np.trace(square_root(sums["XX"])[0]))
            bound = max(bound, self.dual_value(sums))
            size = float(np.sqrt(np.trace(sums["XX"])))
            history.append({"objective": objective, "primal": primal / size, "dual": dual / size, "step": step})
            on_sweep(len(history), objective)
            converged = self._converged(history[-1], bound)
            if converged or len(history) == self.max_iterations:
                return Solution(shrink, slack, bound, tuple(history), converged)
            rescale = balance(len(history), primal, dual)
            step *= rescale

    def _converged(self, record: dict[str, float], bound: float) -> bool:
        worst = max(record["primal"], record["dual"])
        gap = record["objective"] - bound
        return worst <= 0.1 * self.tol or (worst <= self.tol and abs(gap) <= 0.5 * self.tol * record["objective"])

    def dual_value(self, sums: Sums) -> float:
        """Return ⟨D, Y⟩ − δ‖Y‖_F of the multipliers, scaled to ‖Y Pᵀ + S‖₂ ≤ 1: a lower bound of the objective."""
        norm = float(np.sqrt(max(np.linalg.eigvalsh(sums["ZZ"])[-1], 0.0)))
        return float(sums["DY"] - self.delta * np.sqrt(sums["YY"])) / norm if norm > 0 else 0.0


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
    """Return the norms of (Z, T) − (X, R), and of the step of (Z, T), from sums alone."""
    ZZ = np.sum((H @ sums["aa"]) * H) + h**2 * sums["bb"]
    primal = ZZ - 2 * (np.sum(H * sums["aX"]) + h * sums["bR"]) + np.trace(sums["XX"]) + sums["RR"]
    dual = ZZ - 2 * (np.sum(H * sums["aZ"]) + h * sums["bT"]) + sums["ZZ_last"]
    return float(np.sqrt(max(primal, 0.0))), float(np.sqrt(max(dual, 0.0)))


def balance(iteration: int, primal: float, dual: float) -> float:
    """Return the factor on t that brings the residuals together: 1 after a while, so that the method converges."""
    if iteration % 10 or iteration > 200:
        return 1.0
    factor = float(np.clip(np.sqrt(dual / max(primal, 1e-300)), 0.5, 2.0))
    return factor if not 0.75 < factor < 1.33 else 1.0


def start_state(X: Float, pools: int) -> State:
    """Begin at X, without multipliers."""
    return X.astype(np.float32), np.zeros((len(X), pools), np.float32)


def advance(state: State, D: Float, iteration: AdmmStep) -> tuple[State, Sums]:
    """Do one iteration on some cells, D scaled to norm 1; return the next a and b, and the sums the loop needs."""
    a, b = np.empty_like(state[0]), np.empty_like(state[1])
    total: Sums = {}
    for rows in batches(len(D)):
        a[rows], b[rows], sums = _advance(state[0][rows], state[1][rows], D[rows], iteration)
        total = {name: total.get(name, 0.0) + value for name, value in sums.items()}
    return (a, b), total


def _advance(
    a: NDArray[np.float32], b: NDArray[np.float32], D: Float, iteration: AdmmStep
) -> tuple[NDArray[np.float32], NDArray[np.float32], Sums]:
    last_a, last_b = a.astype(np.float64), b.astype(np.float64)
    Z, T = last_a @ iteration.shrink, iteration.slack * last_b
    L, M = iteration.rescale * (Z - last_a), iteration.rescale * (T - last_b)
    X, R, Y, S = iteration.projection.nearest(Z + L, T + M, D)
    a, b = (X - L).astype(np.float32), (R - M).astype(np.float32)
    next_a, next_b = a.astype(np.float64), b.astype(np.float64)
    Y *= -1 / iteration.step  # Y of the dual problem: max ⟨D, Y⟩ − δ‖Y‖_F, ‖Y Pᵀ + S‖₂ ≤ 1, S ≥ 0
    subgradient = Y @ iteration.projection.P.T + S / iteration.step
    sums: Sums = {"aa": next_a.T @ next_a, "aX": next_a.T @ X, "aZ": next_a.T @ Z, "XX": X.T @ X}
    sums |= {"bb": np.sum(next_b**2), "bR": np.sum(next_b * R), "bT": np.sum(next_b * T), "RR": np.sum(R**2)}
    sums |= {"ZZ_last": np.sum(Z**2) + np.sum(T**2), "DY": np.sum(D * Y), "YY": np.sum(Y**2)}
    return a, b, sums | {"ZZ": subgradient.T @ subgradient}
