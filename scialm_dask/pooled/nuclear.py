"""Nuclear-norm recovery from pools: min ‖X‖_* subject to ‖XP − D‖_F ≤ δ and X ≥ 0.

ADMM solves min ‖X‖_* subject to XP + wR = D, ‖wR‖_F ≤ δ, X ≥ 0. Scaled form, with penalty 1/t and multipliers (L, M):

    X, R   = nearest point to (Z + L, T + M) with X ≥ 0, XP + wR = D       cell by cell
    Z, T   = SVT_t(X − L), nearest point of the ball to R − M              one matrix H, one number h
    L, M  += Z − X, T − R

With a = X − L and b = R − M, thresholding is Z = aH and T = hb, so a cell keeps only its rows of a and b.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import dask
import numpy as np
from numpy.typing import ArrayLike, NDArray

from scialm_dask.config import Count, Share, Weight, checked, validated
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Stage, Sweep, silent
from scialm_dask.pooled.base import Float, Measurements, PooledResult, Sums, add_sums, batches, dense_block
from scialm_dask.pooled.design import check_pools
from scialm_dask.reduction import tree_reduce

EQUAL = 1e-10  # ‖XP − D‖ / ‖D‖ that counts as equality in float64
SLACK = 1e-5  # share of δ left free for rounding and for dropping negligible components
# Ways to move the last iterate into the feasible set, the gentlest first: the weight of the slack in the equation, and
# the share of its slack R that each cell keeps.
MOVES = (
    *((weight, 1 - SLACK) for weight in (1e-2, 1e-4, 1e-6)),
    *((1e-6, share) for share in (0.9999, 0.999, 0.99, 0.9, 0.0)),
)
Single = NDArray[np.float32]
State = tuple[Single, Single]  # a and b of a block: cells × genes, cells × pools
Update = Callable[[Single, Single, Float], tuple[Single, Single, Sums]]  # one iteration of some cells; see `updated`
Move = Callable[[Single, Single, Float], Float]  # from a, b and D of some cells to X; see `feasible`


class PooledNuclearNorm:
    """Recover expression from pools as the non-negative matrix of smallest nuclear norm that explains them.

    Solves min ‖X‖_* subject to ‖XP − D‖_F ≤ δ and X ≥ 0.

    Without X ≥ 0 only DᵀD matters: the solution is D P⁺ where δ is negligible, otherwise D times a pools × genes matrix
    found on the driver. If that solution is non-negative, it is returned after two passes over D. If not, the
    alternating direction method of multipliers starts from it. Each of its passes projects every cell onto {x ≥ 0,
    xP + r = d}, a small non-negative least-squares problem, and sums genes × genes Grams. One genes × genes matrix then
    thresholds the singular values of all cells.

    Parameters
    ----------
    delta : float
        The bound δ ≥ 0 on the misfit over all cells, in units of D. 0 means equality up to rounding (1e-10 ‖D‖_F).
    tol : float in (0, 1), default=1e-4
        Accuracy of the objective. Stop when the duality gap is below half this fraction of it, or the primal and dual
        residuals are below a tenth of it relative to ‖X‖_F.
    max_iterations : int, default=1000
        Maximum number of iterations; each is one pass over D.

    Notes
    -----
    Between passes each row block keeps one float32 for each cell and gene, and for each cell and pool. The chunks of D
    and the number of workers change the result by rounding only.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 5, [5, 1] * 5] * 10)  # two types of cells, 10 genes
    >>> P = scialm_dask.balanced_pools(10, 6, per_gene=2)
    >>> D = scialm_dask.measure(counts, P)
    >>> scialm_dask.PooledNuclearNorm(delta=20).fit(D, P).shape
    (20, 10)
    """

    @checked
    def __init__(self, delta: Weight, *, tol: Share = 1e-4, max_iterations: Count = 1000) -> None:
        self.delta, self.tol, self.max_iterations = delta, tol, max_iterations

    def fit(
        self, D: Any, P: ArrayLike, *, start: PooledResult | None = None, listen: Listener = silent
    ) -> PooledResult:
        """Recover expression.

        Parameters
        ----------
        D : matrix of shape (n_cells, n_pools)
            Measurements: a Dask or NumPy array, the path of a Zarr store, or anything with ``to_dask()``. D is read
            in every pass; persist it first if it is costly to compute.
        P : array-like of shape (n_genes, n_pools)
            The design, binary.
        start : PooledResult, optional
            Where to start when non-negativity binds, such as the result for another δ.
        listen : callable, optional
            Called with every event of the work; see `scialm_dask.events`.

        Returns
        -------
        PooledResult
            Its `certificate` bounds how far the objective is above the optimum.

        Raises
        ------
        InputError
            If D or P cannot be used, do not fit each other, or no non-negative X is within δ of D.

        Warns
        -----
        UserWarning
            If the iterations end before the stopping rule is met.

        Examples
        --------
        >>> recovered = scialm_dask.PooledNuclearNorm(delta=20).fit(D, P)
        >>> round(recovered.objective), recovered.converged
        (72, True)
        """
        P, start = check_pools(P), validated("start", start, PooledResult | None)
        measured = Measurements.of(D, P.shape[1])
        listen(Stage("solving"))
        gram = measured.total(visit_gram)["DD"]
        scale = float(np.sqrt(np.trace(gram)))
        if scale <= self.delta:  # X = 0 is within δ of D
            left = measured.map(linear_factors, 1, np.zeros((P.shape[1], 1)))
            return PooledResult(left, np.zeros((len(P), 1)), 0.0, scale, 0.0, (), True)
        delta = max(self.delta / scale, EQUAL)
        C, bound = self._unconstrained(gram / scale**2, P, delta)
        sums = measured.total(visit_linear, C, P, scale)
        if sums["negative"]:
            return BlockIterate(measured, P, delta, scale, C, start).solve(self.tol, self.max_iterations, listen)
        basis, *_ = np.linalg.svd(C.T, full_matrices=False)
        left = measured.map(linear_factors, basis.shape[1], C @ basis)
        objective, misfit = float(np.trace(square_root(sums["XX"])[0])), float(np.sqrt(sums["misfit"]))
        record = {"objective": objective * scale, "primal": 0.0, "dual": 0.0, "step": 0.0}
        gap = max(objective - bound, 0.0) * scale
        return PooledResult(left, basis, objective * scale, misfit * scale, gap, (record,), True)

    def _unconstrained(self, gram: Float, P: Float, delta: float) -> tuple[Float, float]:
        """Solve without X ≥ 0, from DᵀD alone. Return C, where X = D C, and a lower bound of the objective."""
        inverse = np.asarray(np.linalg.pinv(P), np.float64)
        root, inverse_root = square_root(inverse.T @ gram @ inverse)
        dual = inverse @ inverse_root @ inverse.T  # Y = D P⁺ (XᵀX)^−½ P⁺ᵀ is dual feasible
        objective = float(np.trace(root))
        slack = delta * float(np.sqrt(np.einsum("ij,ij->", gram @ dual, dual)))
        if slack <= 0.1 * self.tol * objective or delta <= EQUAL:
            return inverse, objective - slack
        values, basis = np.linalg.eigh(gram)
        keep = values > 1e-14 * values[-1]
        values, basis = np.sqrt(values[keep]), basis[:, keep]
        D = values[:, None] * basis.T  # any D with this DᵀD has the same C
        state = [(D @ inverse).astype(np.float32), np.zeros((len(D), P.shape[1]), np.float32)]

        def visit(update: Update) -> Sums:
            nonlocal state
            *state, sums = update(state[0], state[1], D)
            return sums

        first, tol = inverse.T @ gram @ inverse, 0.1 * self.tol
        shrink, h, bound, *_ = admm(visit, first, P, delta, tol, self.max_iterations, non_negative=False)
        X = feasible(Projection(P, 1e-6, non_negative=False), shrink, h, 1 - SLACK, state[0], state[1], D)
        return basis / values @ X, bound


class BlockIterate:
    """ADMM over row blocks: `states` holds a and b of each."""

    def __init__(
        self, measured: Measurements, P: Float, delta: float, scale: float, C: Float, start: PooledResult | None
    ) -> None:
        self.measured, self.P, self.delta, self.scale = measured, P, delta, scale
        if start is None:
            firsts, matrix = measured, C / scale
        else:
            firsts = Measurements(start.left.rechunk({0: measured.array.chunks[0], 1: -1}))
            matrix = start.right.T / scale
        self.states = list(dask.persist(*firsts.visits(start_block, matrix, P.shape[1], pure=False)))

    def advance(self, update: Update) -> Sums:
        """Do one iteration on all cells, in one pass over D, and return the sums over them."""
        visits = self.measured.visits(advance_block, self.scale, update, states=self.states, pure=False, nout=2)
        total = tree_reduce([sums for _, sums in visits], add_sums)
        *self.states, total = dask.persist(*(state for state, _ in visits), total)
        return total.compute()  # type: ignore[no-any-return]

    def solve(self, tol: float, max_iterations: int, listen: Listener) -> PooledResult:
        """Iterate, move the last iterate into the feasible set, and factor it."""
        P, delta, scale = self.P, self.delta, self.scale

        def judge(move: Move) -> tuple[Float, float]:
            sums = self.measured.total(judge_block, scale, move, P, states=self.states)
            return sums["XX"], float(np.sqrt(sums["misfit"]))

        gram, misfit = judge(partial(feasible, Projection(P, 1e-5), np.eye(len(P)), 1.0, 0.0))
        if misfit > delta * (1 + SLACK) + 1e-5:
            raise InputError(
                f"delta is {delta * scale:.6g}, but no non-negative expression comes nearer to D than about "
                f"{misfit * scale:.6g}; raise delta above that"
            )

        def on_sweep(sweep: int, value: float) -> None:
            listen(Sweep(sweep, value * scale))

        found = admm(self.advance, gram, P, delta, tol, max_iterations, on_sweep=on_sweep)
        shrink, slack, bound, history, converged = found
        for weight, share in MOVES:
            move = partial(feasible, Projection(P, weight), shrink, slack, share)
            gram, misfit = judge(move)
            if misfit <= delta * (1 - SLACK / 2):
                break
        values, vectors = np.linalg.eigh(gram)
        objective = float(np.sqrt(np.maximum(values, 0)).sum())
        # components that together fit into the slack left free are dropped
        rounding = len(values) * np.finfo(float).eps * values[-1]
        dropped = np.cumsum(np.maximum(values, 0) + rounding) * np.linalg.norm(P, 2) ** 2
        rank = len(values) - int(np.sum(dropped <= (0.4 * SLACK * delta) ** 2))
        right = np.ascontiguousarray(vectors[:, : -rank - 1 : -1])
        gap, converged = (objective - bound) * scale, converged and misfit <= delta
        if not converged:
            warnings.warn(
                f"not converged after {len(history)} iterations: objective {objective * scale:.6g}, at most {gap:.2g} "
                f"too large, ‖XP − D‖_F {misfit * scale:.6g}; raise max_iterations, tol or delta",
                stacklevel=3,
            )
        left = self.measured.map(final_factors, rank, scale, move, right, states=self.states)
        records = tuple(record | {"objective": record["objective"] * scale} for record in history)
        return PooledResult(left, right, objective * scale, misfit * scale, gap, records, converged)


def visit_gram(block: Any, start: int) -> Sums:
    """Return DᵀD of a block."""
    D = dense_block(block, start)
    return {"DD": D.T @ D}


def visit_linear(block: Any, start: int, C: Float, P: Float, scale: float) -> Sums:
    """Return the sums of `judged` for X = D C."""
    D = dense_block(block, start) / scale
    return judged(D, P, lambda rows: D[rows] @ C)


def judge_block(state: State, block: Any, start: int, scale: float, move: Move, P: Float) -> Sums:
    """Return the sums of `judged` for the X that `move` gives."""
    D = dense_block(block, start) / scale
    return judged(D, P, lambda rows: move(state[0][rows], state[1][rows], D[rows]))


def judged(D: Float, P: Float, X_of: Callable[[slice], Float]) -> Sums:
    """Return the Gram of X, its squared misfit and the number of its negative entries; X is made by batches of rows."""
    sums: Sums = {"XX": np.zeros((len(P), len(P))), "misfit": 0.0, "negative": 0}
    for rows in batches(len(D)):
        X = X_of(rows)
        sums["negative"] += int(np.sum(-1e-12 * np.abs(X).max(axis=1, keepdims=True) > X))
        sums["misfit"] += np.sum((X @ P - D[rows]) ** 2)
        sums["XX"] += X.T @ X
    return sums


def start_block(block: Any, _: int, matrix: Float, pools: int) -> State:
    """Return a, the non-negative part of block · matrix, and b = 0, cells × pools."""
    values = block.toarray() if hasattr(block, "toarray") else block
    return np.maximum(values @ matrix, 0.0).astype(np.float32), np.zeros((len(values), pools), np.float32)


def advance_block(state: State, block: Any, start: int, scale: float, update: Update) -> tuple[State, Sums]:
    """Do one iteration on a block; return the next a and b, and the sums that the loop needs."""
    D, a, b = dense_block(block, start) / scale, np.empty_like(state[0]), np.empty_like(state[1])
    total: Sums = {}
    for rows in batches(len(D)):
        a[rows], b[rows], sums = update(state[0][rows], state[1][rows], D[rows])
        total = {name: total.get(name, 0.0) + value for name, value in sums.items()}
    return (a, b), total


def feasible(
    projection: Projection, shrink: Float, slack: float, share: float, a: Single, b: Single, D: Float
) -> Float:
    """Return the projection of the thresholded iterate onto X ≥ 0 and XP + R = D, where a share of R is kept."""
    R = share * slack * b.astype(np.float64)
    return projection.nearest(a.astype(np.float64) @ shrink, np.zeros_like(R), D - R)[0]


def final_factors(state: State, block: Any, start: int, scale: float, move: Move, right: Float) -> Float:
    """Return the left factor of a block, in units of D."""
    D = dense_block(block, start) / scale
    lefts = [move(state[0][rows], state[1][rows], D[rows]) @ right for rows in batches(len(D))]
    return scale * np.concatenate([np.empty((0, right.shape[1])), *lefts])


def linear_factors(block: Any, start: int, matrix: Float) -> Float:
    """Return D · matrix, the left factor of a block of X = D C."""
    return dense_block(block, start) @ matrix


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
    Returns H, h, a lower bound of the objective, the history, and whether the rule was met. X is close to aH.
    """
    shrink, slack, bound = np.eye(len(P)), 1.0, 0.0
    step, rescale = 0.1 * float(np.sqrt(np.linalg.eigvalsh(start)[-1])), 1.0
    projection = Projection(P, 1.0, non_negative)
    history: list[dict[str, float]] = []
    while True:
        sums = visit(partial(updated, projection, shrink, slack, rescale, step))
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
