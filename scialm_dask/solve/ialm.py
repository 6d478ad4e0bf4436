"""scIALM, the paper's Algorithm 3, on the low-rank-plus-sparse form of its matrices.

Off the observed entries Ω the multiplier stays zero, so with ``w`` the entries of W = D − E + Y/μ on Ω and ``d``,
``a`` those of D and A,

    W = A + P_Ω(w − a)            lines 5 and 8: what the SVD is taken of, never formed
    A = SVT(W, 1/μ)               line 6: singular value thresholding
    w = d + (w − a)/ρ             line 9: the multiplier update, on Ω alone; w = d at first
    μ = ρμ                        line 10

where the update of w takes place in the first pass of the next SVD.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from scialm_dask.config import Count, Settings, check_fields, validated
from scialm_dask.errors import InputError
from scialm_dask.events import Iteration, Listener, silent
from scialm_dask.linalg.kernels import Doubles, Floats, ReleaseHeldOut, Update
from scialm_dask.linalg.operator import LowRankPlusSparse, Product
from scialm_dask.linalg.svd import PartialSVD, extended_basis, leading_triplets, short_side_svd

_FIRST_PASSES = 20
_FIRST_TOLERANCE = 1e-6  # σ₁ sets every threshold that follows
_LANES = 16  # columns are computed this many at a time anyhow
_SHORT_SIDE_SHARE = 0.1  # a wider basis takes many passes to settle, as singular values lie close together there
_SHORT_SIDE_MOST = 6000  # rows of the Gram: 290 MB of float64, and as much again to work in
_GROWTH = 1.1  # of a singular value from one iteration to the next, near the threshold


@dataclass(frozen=True)
class Completion:
    """How the loop ended. The factors are in the operator."""

    history: tuple[Iteration, ...]  # one entry for each iteration
    chosen: int  # the iteration whose A was kept
    # what holds of its A; after giving back what was held out, whose error only the one before can tell, of that
    returned: Iteration
    values: tuple[float, ...]  # singular values of the A that is returned, after thresholding
    converged: bool  # whether the stop rule ended it, rather than max_iterations
    reason: str  # in words


@dataclass(frozen=True)
class Penalty:
    """μ, and the factor ρ by which it grows."""

    mu: float
    rho: float

    @property
    def threshold(self) -> float:
        """1/μ, under which singular values are dropped."""
        return 1 / self.mu

    def next(self) -> Penalty:
        """Line 10."""
        return replace(self, mu=self.rho * self.mu)


@dataclass(frozen=True)
class _LowRank:
    """A = U Vᵀ by way of the last sketch: U = sketch @ rotation."""

    rotation: Floats
    right: Floats
    values: tuple[float, ...]

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return len(self.values)


@dataclass(frozen=True)
class LoopState:
    """What the loop knows after an iteration. All else is held by the operator, or follows from the history."""

    history: tuple[Iteration, ...]
    penalty: Penalty  # of the next iteration
    chosen: int  # the iteration whose A is kept so far
    values: tuple[float, ...] = ()  # its singular values
    product: Product | None = None  # WᵀWQ from the pass that has updated W; None if the next SVD is by the short side
    growth: float = 1.0  # of W in iterations made in closed form, which the next step has to apply
    reason: str = ""  # why to stop here; empty if the loop is to go on

    @property
    def steps(self) -> int:
        """How many iterations were made."""
        return len(self.history)

    def is_last(self, settings: Settings) -> bool:
        """Whether no iteration is to follow."""
        return bool(self.reason) or self.steps >= settings.max_iterations

    def plain(self) -> tuple[dict[str, Any], dict[str, Doubles]]:
        """Return plain values, for JSON, and small arrays, of which `of_plain` makes it again; W has grown by then."""
        notes = {
            "history": [astuple(line) for line in self.history],
            "penalty": astuple(self.penalty),
            "chosen": self.chosen,
            "values": self.values,
            "reason": self.reason,
        }
        product = self.product
        return notes, {} if product is None else {"cross": product.cross, "gram": product.gram}

    @classmethod
    def of_plain(cls, notes: Mapping[str, Any], arrays: Mapping[str, Doubles]) -> LoopState:
        """Make it again; raises a `ValueError` for what no loop can have left."""
        history = tuple(Iteration(*line) for line in notes["history"])
        penalty, chosen = Penalty(*notes["penalty"]), validated("chosen", notes["chosen"], Count)
        for each in (*history, penalty):
            check_fields(each)
        values = validated("values", notes["values"], Sequence[float])
        if [line.iteration for line in history] != list(range(1, len(history) + 1)) or len(history) < chosen:
            raise ValueError(f"history has {len(history)} iterations, and number {chosen} is chosen")
        if len(values) != history[chosen - 1].rank or not penalty.mu > 0 or not penalty.rho > 1:
            raise ValueError(f"values are {len(values)}, mu is {penalty.mu}, rho is {penalty.rho}")
        product = None
        if arrays:
            cross, gram = arrays["cross"], arrays["gram"]
            if cross.ndim != 2 or gram.shape != (cross.shape[1],) * 2:
                raise ValueError(f"cross has shape {cross.shape}, gram {gram.shape}")
            product = Product(cross, gram, 0.0, 0.0)
        reason = validated("reason", notes["reason"], str)
        return cls(history, penalty, chosen, values, product, reason=reason)


def iterations(
    operator: LowRankPlusSparse,
    settings: Settings,
    listen: Listener = silent,
    stop: StopRule | None = None,
    state: LoopState | None = None,
) -> Iterator[LoopState]:
    """Yield the state after each iteration of Algorithm 3, until the stop rule ends it; then `complete` follows.

    The operator starts at W = D, or where it was at the `state` to go on from. `stop` replaces the rule that the
    settings name. Raises `InputError` if the most iterations allowed are too few for any singular value to come over
    the threshold.
    """
    rank, stop = RankRule(settings, min(operator.shape)), stop or stop_rule(settings)
    svd: PartialSVD | None = None
    if state is None:
        state, svd = first_state(operator, settings, listen)  # lines 1 to 3
    for iteration in state.history:
        rank.update(iteration.rank)
        if iteration.rank:  # else A is zero, and nobody asks
            stop.judge(iteration)
    while not state.is_last(settings):
        if svd is None:
            svd = next_svd(operator, state.product, rank.limit, state.penalty.threshold, settings)  # line 5
        state = iterate(operator, svd, state, rank, stop, settings, listen)  # lines 6 to 10
        yield state
        svd = None


def complete(operator: LowRankPlusSparse, state: LoopState, settings: Settings) -> Completion:
    """Return how the loop ended, after giving back what was held out; the operator holds the factors."""
    reason = state.reason or f"{settings.max_iterations} iterations made, the most allowed"
    best = state.history[state.chosen - 1]
    completion = Completion(state.history, state.chosen, best, state.values, bool(state.reason), reason)
    return give_back(operator, completion, settings) if operator.observations.n_held_out else completion


def first_state(operator: LowRankPlusSparse, settings: Settings, listen: Listener) -> tuple[LoopState, PartialSVD]:
    """Return the state after the iterations whose A is zero, and the first SVD after them."""
    svd = first_svd(operator, settings)
    largest = float(svd.values[0])
    penalty = first_penalty(largest, operator.observations.n_observed / operator.size)
    made, growth = zero_iterations(largest, penalty, operator.passes)
    if len(made) >= settings.max_iterations:
        last = made[settings.max_iterations - 1]
        raise InputError(
            f"max_iterations is {settings.max_iterations}, in which the threshold falls to {last.threshold:.4g} only, "
            f"over the largest singular value, {largest:.4g}, so that all would be imputed as zero; raise "
            f"--max-iterations, to more than {len(made)}"
        )
    if not operator.observations.n_held_out:
        made = [replace(iteration, held_out=math.nan) for iteration in made]
    for iteration in made:
        listen(iteration)
        penalty = penalty.next()
    state = LoopState(tuple(made), penalty, chosen=len(made), growth=growth)
    return state, replace(svd, values=svd.values * growth)


def iterate(
    operator: LowRankPlusSparse,
    svd: PartialSVD,
    state: LoopState,
    rank: RankRule,
    stop: StopRule,
    settings: Settings,
    listen: Listener,
) -> LoopState:
    """Make lines 6 to 10 from the SVD of W, and the first pass of the next SVD."""
    low_rank = singular_value_thresholding(svd, state.penalty.threshold, rank.limit)
    rank.update(low_rank.rank)
    following = state.penalty.next()
    width = basis_width(svd.values, following.threshold, rank.limit)
    short_side = prefers_short_side(width, operator.shape)
    basis = None if short_side else extended_basis(svd.right, width, settings.seed)
    step = Update(low_rank.rotation, 1 / state.penalty.rho, state.growth)
    product = operator.multiply(basis, step, low_rank.right)
    observations = operator.observations
    held_out = math.sqrt(product.held_out / observations.held_out_squares) if observations.n_held_out else math.nan
    residual = math.sqrt(product.misfit / observations.sum_squares)
    latest = Iteration(state.steps + 1, low_rank.rank, state.penalty.threshold, residual, held_out, operator.passes)
    listen(latest)
    verdict = stop.judge(latest)
    chosen, values = state.chosen, state.values
    if verdict.best_so_far:
        operator.keep()
        chosen, values = latest.iteration, low_rank.values
    history = (*state.history, latest)
    return LoopState(history, following, chosen, values, None if short_side else product, reason=verdict.reason)


def give_back(operator: LowRankPlusSparse, completion: Completion, settings: Settings) -> Completion:
    """Make one more iteration from the chosen A, with all of Ω, at its threshold and rank."""
    chosen = completion.returned
    if chosen.rank == 0:
        return completion
    operator.restore()
    penalty = Penalty(1 / chosen.threshold, first_penalty(1.0, operator.observations.n_observed / operator.size).rho)
    width = basis_width(np.array(completion.values) + chosen.threshold, chosen.threshold, chosen.rank)
    short_side = prefers_short_side(width, operator.shape)
    basis = None if short_side else extended_basis(operator.right, width, settings.seed)
    product = operator.multiply(basis, give_back=ReleaseHeldOut(1 / penalty.rho, chosen.iteration))
    svd = next_svd(operator, None if short_side else product, chosen.rank, chosen.threshold, settings)
    low_rank = singular_value_thresholding(svd, chosen.threshold, chosen.rank)
    product = operator.multiply(None, Update(low_rank.rotation, 1 / penalty.rho), low_rank.right)
    operator.keep()
    residual = math.sqrt(product.misfit / (operator.observations.sum_squares + operator.observations.held_out_squares))
    returned = replace(chosen, rank=low_rank.rank, residual=residual, passes=operator.passes)
    return replace(completion, returned=returned, values=low_rank.values)


def first_svd(operator: LowRankPlusSparse, settings: Settings) -> PartialSVD:
    """Leading triplets of D: σ₁ sets the penalty, and the vectors start the first SVD."""
    width = basis_width(np.zeros(settings.first_rank), 0.0, settings.first_rank)
    nothing = np.zeros((operator.shape[1], 0), np.float32)
    product = operator.multiply(extended_basis(nothing, min(width, *operator.shape), settings.seed))
    return leading_triplets(
        operator, product, limit=1, threshold=0.0, passes=_FIRST_PASSES, tolerance=_FIRST_TOLERANCE, seed=settings.seed
    )


def next_svd(
    operator: LowRankPlusSparse, product: Product | None, limit: int, threshold: float, settings: Settings
) -> PartialSVD:
    """Line 5, from the pass that has updated W; without its product, exactly, by the short side."""
    if product is None:
        return short_side_svd(operator, limit, threshold)
    return leading_triplets(
        operator,
        product,
        limit=limit,
        threshold=threshold,
        passes=settings.svd_passes,
        tolerance=settings.svd_tolerance,
        seed=settings.seed,
    )


def first_penalty(largest: float, density: float) -> Penalty:
    """μ₀ = 0.3/σ₁(D) and ρ = 1.1 + 2.5 |Ω|/(mn)."""
    return Penalty(mu=0.3 / largest, rho=1.1 + 2.5 * density)


def zero_iterations(largest: float, penalty: Penalty, passes: int) -> tuple[list[Iteration], float]:
    """Make the iterations whose threshold is over σ₁(W): A is zero and W only grows, by the returned factor."""
    iterations: list[Iteration] = []
    growth = 1.0
    while growth * largest <= penalty.threshold:
        iterations.append(Iteration(len(iterations) + 1, 0, penalty.threshold, 1.0, 1.0, passes))
        growth = 1 + growth / penalty.rho
        penalty = penalty.next()
    return iterations, growth


def singular_value_thresholding(svd: PartialSVD, threshold: float, limit: int) -> _LowRank:
    """Line 6: A = U max(Σ − 1/μ, 0) Vᵀ, of `limit` triplets at most."""
    rank = min(limit, int(np.count_nonzero(svd.values > threshold)))
    shrunk = svd.values[:rank] - threshold
    rotation = (svd.to_left[:, :rank] * shrunk).astype(np.float32)
    return _LowRank(rotation, np.ascontiguousarray(svd.right[:, :rank]), tuple(shrunk.tolist()))


class RankRule:
    """The most singular values to keep, `limit`: all there can be, or by equation 13 what the last rank allows."""

    def __init__(self, settings: Settings, short_side: int) -> None:
        self._most = min(short_side, settings.max_rank or short_side)
        self._increment = settings.increment if settings.rank_policy == "paper" else None
        self.limit = self._most if self._increment is None else min(settings.first_rank, self._most)

    def update(self, rank: int) -> None:
        """Learn how many values were over the threshold: sv ← svp + 1, or min(svp + R, d) if they met the limit."""
        if self._increment is not None:
            self.limit = rank + 1 if rank < self.limit else min(rank + self._increment, self._most)


def basis_width(values: Doubles, threshold: float, limit: int) -> int:
    """Columns to compute so that all values over the next threshold are found, and one under it.

    The next values are a little larger than those of the last SVD, which fall; where all of them may be over the
    threshold, the fall of the last half of them is taken to go on.
    """
    expected = int(np.count_nonzero(values > threshold / _GROWTH))
    if expected == len(values) > 1 and values[-1] > 0:
        half = len(values) // 2
        fall = np.log(values[half] / values[-1]) / (len(values) - 1 - half) if len(values) - 1 > half else 0.0
        missing = np.log(values[-1] * _GROWTH / threshold) / max(fall, 1e-3) if threshold > 0 else np.inf
        expected += int(min(missing, 2 * len(values)))
    wanted = min(expected, limit)
    return -(-(wanted + max(8, wanted // 8)) // _LANES) * _LANES


def prefers_short_side(width: int, shape: tuple[int, int]) -> bool:
    """Whether the exact eigenvectors of the short side are cheaper than iterating on `width` columns."""
    return min(shape) <= _SHORT_SIDE_MOST and width >= widest_basis(shape)


def widest_basis(shape: tuple[int, int]) -> int:
    """Columns from which on `prefers_short_side` holds, if the short side is not too long."""
    return math.ceil(_SHORT_SIDE_SHARE * min(shape))


@dataclass(frozen=True)
class Verdict:
    """Whether the latest A is the one to return so far, and why to stop, if so."""

    best_so_far: bool
    reason: str = ""


class ResidualStop:
    """The paper's: stop when the residual is below ε, and return the last A."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon

    def judge(self, latest: Iteration) -> Verdict:
        """Compare with ε."""
        done = latest.residual < self._epsilon
        return Verdict(True, f"residual {latest.residual:.3g} is below ε = {self._epsilon:g}" if done else "")


class HeldOutStop:
    """Stop when the held-out error has not fallen for some iterations, and return the A with the lowest."""

    def __init__(self, epsilon: float, patience: int) -> None:
        self._residual = ResidualStop(epsilon)
        self._patience = patience
        self._lowest = math.inf
        self._at = 0

    def judge(self, latest: Iteration) -> Verdict:
        """Compare with the lowest error so far."""
        best = latest.held_out < self._lowest
        if best:
            self._lowest, self._at = latest.held_out, latest.iteration
        if latest.iteration - self._at >= self._patience:
            return Verdict(best, f"held-out error lowest at iteration {self._at}, and not since")
        return Verdict(best, self._residual.judge(latest).reason)


StopRule = ResidualStop | HeldOutStop


def stop_rule(settings: Settings) -> StopRule:
    """Make the rule that the settings ask for."""
    if settings.stop == "residual":
        return ResidualStop(settings.epsilon)
    return HeldOutStop(settings.epsilon, settings.patience)
