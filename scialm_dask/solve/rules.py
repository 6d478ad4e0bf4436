"""Rules of the loop: how many singular values to keep and to compute, when to stop, and which iterate to return."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from scialm_dask.config import Settings
from scialm_dask.events import Iteration
from scialm_dask.linalg.kernels import Doubles

_LANES = 16  # columns are computed this many at a time anyhow
_SHORT_SIDE_SHARE = 0.1  # a wider basis takes many passes to settle, as singular values lie close together there
_SHORT_SIDE_MOST = 6000  # rows of the Gram: 290 MB of float64, and as much again to work in
_GROWTH = 1.1  # of a singular value from one iteration to the next, near the threshold


class PaperRank:
    """Equation 13: one more than the last rank, or R more if the rank met the limit (sv)."""

    def __init__(self, settings: Settings, most: int) -> None:
        self.limit = min(settings.first_rank, most)
        self._increment, self._most = settings.increment, most

    def update(self, rank: int) -> None:
        """Learn how many values were over the threshold: sv ← svp + 1, or min(svp + R, d)."""
        self.limit = rank + 1 if rank < self.limit else min(rank + self._increment, self._most)


class AdaptiveRank:
    """Every singular value over the threshold, whatever their number, up to `limit`."""

    def __init__(self, most: int) -> None:
        self.limit = most

    def update(self, rank: int) -> None:
        """Nothing to learn."""


RankRule = PaperRank | AdaptiveRank


def rank_rule(settings: Settings, short_side: int) -> RankRule:
    """Make the rule that the settings ask for."""
    most = min(short_side, settings.max_rank or short_side)
    return PaperRank(settings, most) if settings.rank_policy == "paper" else AdaptiveRank(most)


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
