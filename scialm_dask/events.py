"""Typed events of long computations. Listeners decide how to show them; nothing else prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Base class of events. They have no timestamps; listeners have their own clock."""


@dataclass(frozen=True)
class Stage(Event):
    """A stage of the computation begins."""

    name: str  # such as "surveying" or "iterating"
    detail: str = ""
    iterations: int | None = None  # expected number, if known


@dataclass(frozen=True)
class Advanced(Event):
    """A share of the stage, from 0 to 1, is done."""

    done: float


@dataclass(frozen=True)
class Pass(Event):
    """Another pass over all blocks of the matrix is done; `passes` so far."""

    passes: int


@dataclass(frozen=True)
class Iteration(Event):
    """One iteration of Algorithm 3, a row of the history."""

    iteration: int  # from 1, as in the paper
    rank: int  # svp, the number of singular values kept, those above the threshold
    threshold: float  # 1/μ
    residual: float  # ‖P_Ω(D − A)‖ / ‖D‖ of the scaled matrix
    held_out: float  # the same on the held-out entries; NaN if there are none
    passes: int  # so far


@dataclass(frozen=True)
class Sweep(Event):
    """One iteration of a recovery from pooled measurements."""

    sweep: int
    objective: float


@dataclass(frozen=True)
class Note(Event):
    """A message to the user."""

    words: str


@dataclass(frozen=True)
class Scored(Event):
    """A method was run on an experiment of an evaluation. Scores without a value are NaN."""

    experiment: str  # its kind, the hidden share and the seed
    method: str  # with its settings
    status: str  # "ok", or the kind of failure
    mse: float  # over the scored entries
    relative_error: float
    seconds: float
    note: str  # of the method, or the error


Listener = Callable[[Event], None]
Advance = Callable[[float], None]  # called with the share of the stage done since the last call


def silent(_: Event) -> None:
    """Ignore an event."""


def begin(listen: Listener, name: str) -> Advance:
    """Begin a stage of known length. Return a function to call with the share done since its last call."""
    listen(Stage(name))
    done = 0.0

    def advance(share: float) -> None:
        nonlocal done
        done = min(done + share, 1.0)  # rounding must not exceed 1
        listen(Advanced(done))

    return advance
