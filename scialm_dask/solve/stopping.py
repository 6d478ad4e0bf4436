"""When to stop, and which iterate to return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from scialm_dask.config import Settings
from scialm_dask.events import Iteration

__all__ = ["StopRule", "Verdict", "stop_rule"]


@dataclass(frozen=True)
class Verdict:
    """Whether the latest A is the one to return so far, and why to stop, if so."""

    best_so_far: bool
    reason: str = ""


class StopRule(Protocol):
    """Looks at each iteration."""

    def judge(self, latest: Iteration) -> Verdict:
        """Say whether to keep it and whether to stop."""
        ...


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


def stop_rule(settings: Settings) -> StopRule:
    """Make the rule that the settings ask for."""
    if settings.stop == "residual":
        return ResidualStop(settings.epsilon)
    return HeldOutStop(settings.epsilon, settings.patience)
