"""Nuclear-norm recovery from pools: min ‖X‖_* subject to ‖XP − D‖_F ≤ δ and X ≥ 0."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import dask
import numpy as np
from numpy.typing import ArrayLike

from scialm_dask.config import Count, Share, Weight, checked, validated
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Stage, Sweep, silent
from scialm_dask.pooled.admm import Admm, AdmmStep, Projection, Solution, State, advance, square_root, start_state
from scialm_dask.pooled.base import Float, Measurements, PooledResult, Sums, add_sums, batches, dense_block
from scialm_dask.pooled.design import check_pools
from scialm_dask.reduction import tree_reduce

EQUAL = 1e-10  # ‖XP − D‖ / ‖D‖ that counts as equality in float64
SLACK = 1e-5  # share of δ kept free for rounding and for dropping negligible components
# How to move the last iterate into the feasible set, from gently to surely: weight of the slack in the equation, and
# the share of the slack R that cells keep.
MOVES = (
    *((weight, 1 - SLACK) for weight in (1e-2, 1e-4, 1e-6)),
    *((1e-6, share) for share in (0.9999, 0.999, 0.99, 0.9, 0.0)),
)


class PooledNuclearNorm:
    """Recover expression from pools as the non-negative matrix of smallest nuclear norm that explains them.

    Solves min ‖X‖_* subject to ‖XP − D‖_F ≤ δ and X ≥ 0.

    Without X ≥ 0 only DᵀD matters: the answer is D P⁺ where δ is negligible, otherwise D times a pools × genes matrix
    found on the driver. If that is non-negative, it is the answer, after two passes over D. If not, the alternating
    direction method of multipliers goes on from it. Each of its passes projects every cell onto {x ≥ 0, xP + r = d}, a
    small non-negative least-squares problem, and sums genes × genes Grams; the singular values of all cells are then
    thresholded by one genes × genes matrix.

    Parameters
    ----------
    delta : float
        The bound δ ≥ 0, in units of D over all cells. 0 is equality to rounding (1e-10 ‖D‖_F).
    tol : float in (0, 1), default=1e-4
        Accuracy of the objective. Stop when the duality gap is below half this fraction of it, or the primal and dual
        residuals are below a tenth of it relative to ‖X‖_F.
    max_iterations : int, default=1000
        The most iterations; each is one pass over D.

    Notes
    -----
    Between passes a cell is kept as one float32 for each gene and pool, in its row block. Blocks of D and the number of
    workers change the answer by rounding only.

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
            Measurements: a Dask or NumPy array, the path of a Zarr store, or anything with ``to_dask()``. Read once a
            pass; persist it first if it is costly to make.
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
        if scale <= self.delta:
            return _zero(measured, P, scale)
        delta = max(self.delta / scale, EQUAL)
        closed, bound = self._unconstrained(gram / scale**2, P, delta)
        seen = measured.total(visit_linear, closed, P, scale)
        if not seen["negative"]:
            return _linear_result(measured, closed, bound, seen, scale)
        iterate = BlockIterate(measured, P, delta, scale, closed, start)
        return iterate.solve(self.tol, self.max_iterations, listen)

    def _unconstrained(self, gram: Float, P: Float, delta: float) -> tuple[Float, float]:
        """Solve without X ≥ 0, from DᵀD alone; return C of X = D C, and a lower bound of the objective."""
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
        D = values[:, None] * basis.T  # DᵀD is all that counts
        loop = Admm(P, delta, 0.1 * self.tol, self.max_iterations, non_negative=False)
        state = start_state(D @ inverse, P.shape[1])

        def visit(iteration: AdmmStep) -> Sums:
            nonlocal state
            state, sums = advance(state, D, iteration)
            return sums

        found = loop.run(visit, inverse.T @ gram @ inverse)
        X = move_in(state, D, found, loop.projection(1e-6), 1 - SLACK)
        return basis / values @ X, found.bound


Move = tuple[Solution, Projection, float]


class BlockIterate:
    """ADMM over the row blocks: `states` holds a and b of each."""

    def __init__(
        self, measured: Measurements, P: Float, delta: float, scale: float, C: Float, start: PooledResult | None
    ) -> None:
        self.measured, self.P, self.delta, self.scale = measured, P, delta, scale
        if start is None:
            firsts, matrix = measured, C / scale
        else:
            firsts = Measurements(start.left.rechunk({0: measured.array.chunks[0], 1: -1}))
            matrix = start.right.T / scale
        self.states = list(dask.persist(*firsts.visits(begin_block, matrix, P.shape[1], pure=False)))

    def solve(self, tol: float, max_iterations: int, listen: Listener) -> PooledResult:
        """Iterate, move the last iterate into the feasible set, and factor it."""
        loop = Admm(self.P, self.delta, tol, max_iterations)
        unmoved = Solution(np.eye(len(self.P)), 1.0, 0.0, (), False)
        first = self._judge((unmoved, loop.projection(1e-5), 0.0))
        if np.sqrt(first["misfit"]) > self.delta * (1 + SLACK) + 1e-5:
            raise InputError(
                f"delta {self.delta * self.scale:.6g}: no non-negative expression comes nearer to D than about "
                f"{np.sqrt(first['misfit']) * self.scale:.6g}; raise delta above that"
            )
        found = loop.run(self.advance, first["XX"], lambda sweep, value: listen(Sweep(sweep, value * self.scale)))
        for weight, share in MOVES:
            settings = found, loop.projection(weight), share
            sums = self._judge(settings)
            if np.sqrt(sums["misfit"]) <= self.delta * (1 - SLACK / 2):
                break
        return self._result(settings, sums)

    def advance(self, iteration: AdmmStep) -> Sums:
        """Do one iteration on all cells: one pass over D."""
        visits = self.measured.visits(advance_block, self.scale, iteration, states=self.states, pure=False, nout=2)
        total = tree_reduce([sums for _, sums in visits], add_sums)
        *self.states, total = dask.persist(*(state for state, _ in visits), total)
        return total.compute()  # type: ignore[no-any-return]

    def _judge(self, settings: Move) -> Sums:
        return self.measured.total(judge_block, self.scale, settings, states=self.states)

    def _result(self, settings: Move, sums: Sums) -> PooledResult:
        found, scale, misfit = settings[0], self.scale, float(np.sqrt(sums["misfit"]))
        values, vectors = np.linalg.eigh(sums["XX"])
        objective = float(np.sqrt(np.maximum(values, 0)).sum())
        right = np.ascontiguousarray(vectors[:, : -self._needed(values) - 1 : -1])
        converged = found.converged and misfit <= self.delta
        if not converged:
            warnings.warn(
                f"not converged after {len(found.history)} iterations: objective {objective * scale:.6g}, of which "
                f"{(objective - found.bound) * scale:.2g} may be too much, ‖XP − D‖_F {misfit * scale:.6g}; raise "
                "max_iterations, tol or delta",
                stacklevel=4,
            )
        left = self.measured.map(final_factors, right.shape[1], scale, settings, right, states=self.states)
        history = tuple(record | {"objective": record["objective"] * scale} for record in found.history)
        gap = (objective - found.bound) * scale
        return PooledResult(left, right, objective * scale, misfit * scale, gap, history, converged)

    def _needed(self, values: Float) -> int:
        """Rank that keeps ‖XP − D‖ within δ: what is dropped must fit into the slack that was left."""
        rounding = len(values) * np.finfo(float).eps * values[-1]
        dropped = np.cumsum(np.maximum(values, 0) + rounding) * np.linalg.norm(self.P, 2) ** 2
        return len(values) - int(np.sum(dropped <= (0.4 * SLACK * self.delta) ** 2))


def visit_gram(block: Any, start: int) -> Sums:
    """Return DᵀD of a block."""
    D = dense_block(block, start)
    return {"DD": D.T @ D}


def visit_linear(block: Any, start: int, C: Float, P: Float, scale: float) -> Sums:
    """Return what `judged` does of X = D C."""
    D = dense_block(block, start) / scale
    return judged(((rows, D[rows] @ C) for rows in batches(len(D))), D, P)


def judged(pieces: Iterable[tuple[slice, Float]], D: Float, P: Float) -> Sums:
    """Return the Gram of some rows of X, their misfit, and the number of negative entries."""
    sums: Sums = {"XX": np.zeros((len(P), len(P))), "misfit": 0.0, "negative": 0}
    for rows, X in pieces:
        sums["negative"] += int(np.sum(-1e-12 * np.abs(X).max(axis=1, keepdims=True) > X))
        sums["misfit"] += np.sum((X @ P - D[rows]) ** 2)
        sums["XX"] += X.T @ X
    return sums


def begin_block(block: Any, _: int, matrix: Float, pools: int) -> State:
    """Begin at the non-negative part of block · matrix."""
    values = block.toarray() if hasattr(block, "toarray") else block
    return start_state(np.maximum(values @ matrix, 0.0), pools)


def advance_block(state: State, block: Any, start: int, scale: float, iteration: AdmmStep) -> tuple[State, Sums]:
    """Do one iteration on a block."""
    return advance(state, dense_block(block, start) / scale, iteration)


def move_in(state: State, D: Float, found: Solution, projection: Projection, share: float) -> Float:
    """Project the thresholded iterate onto X ≥ 0 and XP + R = D, with a share of R."""
    Z = state[0].astype(np.float64) @ found.shrink
    R = share * found.slack * state[1].astype(np.float64)
    return projection.nearest(Z, np.zeros_like(R), D - R)[0]


def moved(state: State, D: Float, settings: Move) -> Iterator[tuple[slice, Float]]:
    """Yield the final X of a block, some rows at a time; see `move_in`."""
    for rows in batches(len(D)):
        yield rows, move_in((state[0][rows], state[1][rows]), D[rows], *settings)


def judge_block(state: State, block: Any, start: int, scale: float, settings: Move) -> Sums:
    """Return what `judged` does of the final X of a block."""
    D = dense_block(block, start) / scale
    return judged(moved(state, D, settings), D, settings[1].P)


def final_factors(state: State, block: Any, start: int, scale: float, settings: Move, right: Float) -> Float:
    """Return the left factor of a block, in units of D."""
    lefts = [X @ right for _, X in moved(state, dense_block(block, start) / scale, settings)]
    return scale * np.concatenate([np.empty((0, right.shape[1])), *lefts])


def linear_factors(block: Any, start: int, matrix: Float) -> Float:
    """Return the left factor of a block of X = D C."""
    return dense_block(block, start) @ matrix


def _linear_result(measured: Measurements, C: Float, bound: float, sums: Sums, scale: float) -> PooledResult:
    basis, *_ = np.linalg.svd(C.T, full_matrices=False)
    objective, misfit = float(np.trace(square_root(sums["XX"])[0])), float(np.sqrt(sums["misfit"]))
    left = measured.map(linear_factors, basis.shape[1], C @ basis)
    gap = max(objective - bound, 0.0) * scale
    record = {"objective": objective * scale, "primal": 0.0, "dual": 0.0, "step": 0.0}
    return PooledResult(left, basis, objective * scale, misfit * scale, gap, (record,), True)


def _zero(measured: Measurements, P: Float, norm: float) -> PooledResult:
    """Return X = 0, which is within δ of D."""
    left = measured.map(linear_factors, 1, np.zeros((P.shape[1], 1)))
    return PooledResult(left, np.zeros((len(P), 1)), 0.0, norm, 0.0, (), True)
