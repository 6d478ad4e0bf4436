"""What happens in long work, as typed events. Who listens decides how they look; nothing else prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Base of all events. They carry facts of the work and no clock: whoever listens has one."""


@dataclass(frozen=True)
class Stage(Event):
    """Another part of the work begins."""

    name: str  # such as "surveying" or "iterating"
    detail: str = ""  # what is particular to it this time
    iterations: int | None = None  # expected; None if nobody knows


@dataclass(frozen=True)
class Advanced(Event):
    """A share of the stage is done, from 0 to 1."""

    done: float


@dataclass(frozen=True)
class Pass(Event):
    """All blocks of the matrix have been visited once more, `passes` times so far."""

    passes: int


@dataclass(frozen=True)
class Iteration(Event):
    """One iteration of Algorithm 3, a line of the history."""

    iteration: int  # from 1, as in the paper
    rank: int  # svp, the number of singular values over the threshold that were kept
    threshold: float  # 1/μ
    residual: float  # ‖P_Ω(D − A)‖ / ‖D‖, of the scaled matrix
    held_out: float  # the same over the held-out entries; NaN if there are none
    passes: int  # over the data so far


@dataclass(frozen=True)
class Sweep(Event):
    """One iteration of a recovery from pooled measurements."""

    sweep: int
    objective: float


@dataclass(frozen=True)
class Note(Event):
    """Something the user should know, in words."""

    words: str


@dataclass(frozen=True)
class Scored(Event):
    """A method has been tried on an experiment of an evaluation; numbers are NaN where there are none."""

    experiment: str  # what was asked, with the share hidden and the seed
    method: str  # with its setting
    status: str  # "ok", or what went wrong
    mse: float  # over the entries asked for
    relative_error: float  # over the same
    seconds: float
    note: str  # what it says of itself, or what went wrong


Listener = Callable[[Event], None]
Advance = Callable[[float], None]  # told what share of the stage has been done since the last time


def silent(_: Event) -> None:
    """Listen to nothing."""


def begin(listen: Listener, name: str) -> Advance:
    """Begin a stage of known length; what is returned is to be told the share of it done since the last call."""
    listen(Stage(name))
    done = 0.0

    def advance(share: float) -> None:
        nonlocal done
        done = min(done + share, 1.0)  # rounding must not overrun
        listen(Advanced(done))

    return advance
