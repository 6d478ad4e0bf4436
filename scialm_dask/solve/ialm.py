"""scIALM, the paper's Algorithm 3, in a low-rank-plus-sparse form.

The multiplier stays zero off the observed entries Ω. So with w, d and a the entries of W = D − E + Y/μ, D and A on Ω,

    W = A + P_Ω(w − a)            lines 5 and 8: the matrix of the SVD, never formed
    A = SVT(W, 1/μ)               line 6: singular value thresholding
    w = d + (w − a)/ρ             line 9: the multiplier update, on Ω alone; w = d at first
    μ = ρμ                        line 10

where w is updated in the first pass of the next SVD.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from scialm_dask.config import Count, Settings, check_fields, validated
from scialm_dask.errors import InputError
from scialm_dask.events import Iteration, Listener, silent
from scialm_dask.linalg.kernels import Doubles, Floats, Update
from scialm_dask.linalg.operator import LowRankPlusSparse, Product
from scialm_dask.linalg.svd import PartialSVD, extended_basis, leading_triplets, short_side_svd

_FIRST_PASSES = 20
_FIRST_TOLERANCE = 1e-6  # of σ₁, which sets all thresholds
_LANES = 16  # kernels compute columns in multiples of this
_SHORT_SIDE_SHARE = 0.1  # of min(m, n); a wider basis takes many passes, as singular values lie close together there
_SHORT_SIDE_MOST = 6000  # rows of the Gram: 290 MB of float64, and as much again to work in
_GROWTH = 1.1  # of a singular value from one iteration to the next, near the threshold


@dataclass(frozen=True)
class Completion:
    """How the loop ended. The operator holds the factors."""

    history: tuple[Iteration, ...]
    chosen: int  # the iteration that gave A
    # that iteration, with the rank, residual and passes after held-out entries were released
    returned: Iteration
    values: tuple[float, ...]  # singular values of A
    converged: bool  # whether the stop rule ended the loop, rather than max_iterations
    reason: str  # in words


@dataclass(frozen=True)
class Penalty:
    """The penalty μ, and its growth factor ρ."""

    mu: float
    rho: float

    @property
    def threshold(self) -> float:
        """1/μ, below which singular values are dropped."""
        return 1 / self.mu

    def next(self) -> Penalty:
        """Line 10."""
        return replace(self, mu=self.rho * self.mu)


@dataclass(frozen=True)
class LoopState:
    """What the loop knows after an iteration, except for what the operator holds."""

    history: tuple[Iteration, ...]
    penalty: Penalty  # of the next iteration
    chosen: int  # the iteration with the best A so far
    values: tuple[float, ...] = ()  # singular values of that A
    product: Product | None = None  # WᵀWQ after the update of W; None if the next SVD is by the short side
    growth: float = 1.0  # of W in the zero iterations, for the next step to apply
    reason: str = ""  # why to stop here; empty to go on

    @property
    def steps(self) -> int:
        """Number of iterations made."""
        return len(self.history)

    def is_last(self, settings: Settings) -> bool:
        """Return whether no iteration follows."""
        return bool(self.reason) or self.steps >= settings.max_iterations

    def plain(self) -> tuple[dict[str, Any], dict[str, Doubles]]:
        """Return JSON values and small arrays for `of_plain`; the growth of W has been applied by then."""
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
        """Return the state from what `plain` returned; raise `ValueError` for values that no loop leaves."""
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
            product = Product(cross, gram)
        reason = validated("reason", notes["reason"], str)
        return cls(history, penalty, chosen, values, product, reason=reason)


def iterations(
    operator: LowRankPlusSparse,
    settings: Settings,
    listen: Listener = silent,
    stop: StopRule | None = None,
    state: LoopState | None = None,
) -> Iterator[LoopState]:
    """Yield the state after each iteration of Algorithm 3, until the stop rule ends it; then call `complete`.

    The operator starts at W = D, or as it was at `state`. `stop` replaces the rule of the settings. Raises `InputError`
    if max_iterations is too small for any singular value to exceed the threshold.
    """
    rank, stop = RankRule(settings, min(operator.shape)), stop or stop_rule(settings)
    svd: PartialSVD | None = None
    if state is None:
        state, svd = first_state(operator, settings, listen)  # lines 1 to 3
    for iteration in state.history:
        rank.update(iteration.rank)
        if iteration.rank:  # zero iterations are not judged
            stop.judge(iteration)
    seen = operator.observations
    while not state.is_last(settings):
        penalty, following = state.penalty, state.penalty.next()  # line 10
        if svd is None:
            svd = next_svd(operator, state.product, rank.limit, penalty.threshold, settings)  # line 5
        rotation, right, values = singular_value_thresholding(svd, penalty.threshold, rank.limit)  # line 6
        rank.update(len(values))
        basis = next_basis(operator, svd.values, svd.right, following.threshold, rank.limit, settings)
        product = operator.multiply(basis, Update(rotation, 1 / penalty.rho, state.growth), right)  # lines 8 and 9
        residual = math.sqrt(product.misfit / seen.sum_squares)
        held_out = math.sqrt(product.held_out / seen.held_out_squares) if seen.n_held_out else math.nan
        latest = Iteration(state.steps + 1, len(values), penalty.threshold, residual, held_out, operator.passes)
        listen(latest)
        verdict, chosen, kept = stop.judge(latest), state.chosen, state.values
        if verdict.best_so_far:
            operator.keep()
            chosen, kept = latest.iteration, values
        after, history = None if basis is None else product, (*state.history, latest)
        state = LoopState(history, following, chosen, kept, after, reason=verdict.reason)
        yield state
        svd = None


def complete(operator: LowRankPlusSparse, state: LoopState, settings: Settings) -> Completion:
    """Return how the loop ended; the operator holds the factors.

    If entries were held out, first make one more iteration from the chosen A, at its threshold and rank, with the
    estimates that these entries would have if A had always been the chosen one.
    """
    reason = state.reason or f"{settings.max_iterations} iterations made, the most allowed"
    chosen, seen = state.history[state.chosen - 1], operator.observations
    completion = Completion(state.history, state.chosen, chosen, state.values, bool(state.reason), reason)
    if not seen.n_held_out or chosen.rank == 0:
        return completion
    operator.restore()
    ratio = 1 / first_penalty(1.0, seen.n_observed / operator.size).rho
    before = np.array(completion.values) + chosen.threshold
    basis = next_basis(operator, before, operator.right, chosen.threshold, chosen.rank, settings)
    product = operator.multiply(basis, release=sum(ratio**k for k in range(chosen.iteration + 1)))
    svd = next_svd(operator, None if basis is None else product, chosen.rank, chosen.threshold, settings)
    rotation, right, values = singular_value_thresholding(svd, chosen.threshold, chosen.rank)
    product = operator.multiply(None, Update(rotation, ratio), right)
    operator.keep()
    residual = math.sqrt(product.misfit / (seen.sum_squares + seen.held_out_squares))
    returned = replace(chosen, rank=len(values), residual=residual, passes=operator.passes)
    return replace(completion, returned=returned, values=values)


def first_state(operator: LowRankPlusSparse, settings: Settings, listen: Listener) -> tuple[LoopState, PartialSVD]:
    """Return the state after the iterations with A = 0, and the SVD that follows them."""
    nothing = np.zeros((operator.shape[1], 0), np.float32)
    width = min(basis_width(np.zeros(settings.first_rank), 0.0, settings.first_rank), *operator.shape)
    product = operator.multiply(extended_basis(nothing, width, settings.seed))
    svd = leading_triplets(
        operator, product, limit=1, threshold=0.0, passes=_FIRST_PASSES, tolerance=_FIRST_TOLERANCE, seed=settings.seed
    )
    largest = float(svd.values[0])
    penalty = first_penalty(largest, operator.observations.n_observed / operator.size)
    made, growth = zero_iterations(largest, penalty, operator.passes)
    if len(made) >= settings.max_iterations:
        last = made[settings.max_iterations - 1]
        raise InputError(
            f"max_iterations is {settings.max_iterations}, in which the threshold falls to {last.threshold:.4g} only, "
            f"above the largest singular value, {largest:.4g}, so that all would be imputed as zero; raise "
            f"--max-iterations, to more than {len(made)}"
        )
    if not operator.observations.n_held_out:
        made = [replace(iteration, held_out=math.nan) for iteration in made]
    for iteration in made:
        listen(iteration)
        penalty = penalty.next()
    state = LoopState(tuple(made), penalty, chosen=len(made), growth=growth)
    return state, replace(svd, values=svd.values * growth)


def next_basis(
    operator: LowRankPlusSparse, values: Doubles, right: Floats, threshold: float, limit: int, settings: Settings
) -> Floats | None:
    """Return the basis of the next SVD, extending the right vectors of the last; None if the short side is cheaper."""
    width = basis_width(values, threshold, limit)
    return None if prefers_short_side(width, operator.shape) else extended_basis(right, width, settings.seed)


def next_svd(
    operator: LowRankPlusSparse, product: Product | None, limit: int, threshold: float, settings: Settings
) -> PartialSVD:
    """Line 5: refine the product of the pass that updated W; without it, use the short side."""
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
    """Return the iterations with 1/μ ≥ σ₁(W), where A is zero and W only grows, and the factor by which it grows."""
    iterations: list[Iteration] = []
    growth = 1.0
    while growth * largest <= penalty.threshold:
        iterations.append(Iteration(len(iterations) + 1, 0, penalty.threshold, 1.0, 1.0, passes))
        growth = 1 + growth / penalty.rho
        penalty = penalty.next()
    return iterations, growth


def singular_value_thresholding(
    svd: PartialSVD, threshold: float, limit: int
) -> tuple[Floats, Floats, tuple[float, ...]]:
    """Line 6: return A = U max(Σ − 1/μ, 0) Vᵀ with at most `limit` triplets.

    A is (sketch @ rotation) @ right.T. Returns the rotation, `right`, and the singular values of A.
    """
    rank = min(limit, int(np.count_nonzero(svd.values > threshold)))
    shrunk = svd.values[:rank] - threshold
    rotation = (svd.to_left[:, :rank] * shrunk).astype(np.float32)
    return rotation, np.ascontiguousarray(svd.right[:, :rank]), tuple(shrunk.tolist())


class RankRule:
    """The most singular values to keep, `limit`: min(m, n) or max_rank, or fewer by equation 13."""

    def __init__(self, settings: Settings, short_side: int) -> None:
        self._most = min(short_side, settings.max_rank or short_side)
        self._increment = settings.increment if settings.rank_policy == "paper" else None
        self.limit = self._most if self._increment is None else min(settings.first_rank, self._most)

    def update(self, rank: int) -> None:
        """Given svp, the values above the threshold, set sv to svp + 1, or min(svp + R, d) if svp = sv."""
        if self._increment is not None:
            self.limit = rank + 1 if rank < self.limit else min(rank + self._increment, self._most)


def basis_width(values: Doubles, threshold: float, limit: int) -> int:
    """Return how many columns to compute to find all values above the next threshold, and one below it.

    `values` are those of the last SVD, descending; the next are slightly larger. If all of them may exceed the
    threshold, extrapolate the decay of the last half.
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
    """Return whether exact eigenvectors of the short side are cheaper than iterating on `width` columns."""
    return min(shape) <= _SHORT_SIDE_MOST and width >= widest_basis(shape)


def widest_basis(shape: tuple[int, int]) -> int:
    """Return the width from which `prefers_short_side` holds, if the short side is not too long."""
    return math.ceil(_SHORT_SIDE_SHARE * min(shape))


class Verdict(NamedTuple):
    """The judgement of a stop rule on the latest A."""

    best_so_far: bool
    reason: str = ""  # why to stop; empty to go on


class ResidualStop:
    """The paper's rule: stop when the residual is below ε, and return the last A."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon

    def judge(self, latest: Iteration) -> Verdict:
        """Compare the residual with ε."""
        done = latest.residual < self._epsilon
        return Verdict(True, f"residual {latest.residual:.3g} is below ε = {self._epsilon:g}" if done else "")


class HeldOutStop:
    """Stop when the held-out error has not fallen for `patience` iterations, and return the A with the lowest."""

    def __init__(self, epsilon: float, patience: int) -> None:
        self._residual, self._patience = ResidualStop(epsilon), patience
        self._lowest, self._at = math.inf, 0

    def judge(self, latest: Iteration) -> Verdict:
        """Compare the held-out error with the lowest so far."""
        best = latest.held_out < self._lowest
        if best:
            self._lowest, self._at = latest.held_out, latest.iteration
        if latest.iteration - self._at >= self._patience:
            return Verdict(best, f"held-out error lowest at iteration {self._at}, and not since")
        return Verdict(best, self._residual.judge(latest).reason)


StopRule = ResidualStop | HeldOutStop


def stop_rule(settings: Settings) -> StopRule:
    """Return the rule of the settings."""
    epsilon = settings.epsilon
    return ResidualStop(epsilon) if settings.stop == "residual" else HeldOutStop(epsilon, settings.patience)
