"""Who listens: a live bar on a terminal or in a notebook, lines elsewhere, or JSON lines."""

from __future__ import annotations

import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from types import TracebackType
from typing import Any, Self, TextIO

from scialm_dask.events import Advanced, Event, Iteration, Note, Pass, Scored, Stage, Sweep

__all__ = ["Display", "duration", "show_progress"]

_SILENCE = 10.0  # seconds after which plain lines give a sign of life
_LAST = 3  # iterations whose mean time the next ones are expected to take
_UNKNOWN = "{desc} {elapsed}{postfix}"
_KNOWN = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
Clock = Callable[[], float]


def show_progress(*, json_lines: bool = False) -> Display:
    """Show the progress of long work on standard error: give it to whatever takes `listen`.

    Parameters
    ----------
    json_lines
        One JSON object on a line for each event: ``time`` (UTC), ``event`` (the name of its class in
        `scialm_dask.events`, in small letters), ``stage``, ``seconds_left`` (null as long as nothing is known of it)
        and the fields of the event. Otherwise a bar on a terminal, a widget in a notebook that has ipywidgets, and
        plain lines elsewhere.
    """
    if json_lines:
        return _JSONLines(sys.stderr)
    if _in_notebook():
        from tqdm.notebook import tqdm

        return _Bar(tqdm, leave=True)
    if sys.stderr.isatty():
        from tqdm import tqdm

        return _Bar(tqdm, leave=False)
    return _Lines(sys.stderr)


def _in_notebook() -> bool:
    """Tell whether a notebook's kernel runs this, and widgets are there to show a bar with."""
    from importlib.util import find_spec

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None and find_spec("ipywidgets") is not None


class _Pace:
    """How long the stage in progress will go on, by what it has taken so far."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.stage = Stage("")
        self._begin()

    def _begin(self) -> None:
        self._began = self._last = self._clock()
        self._durations: deque[float] = deque(maxlen=_LAST)
        self.done: float | None = None
        self.seconds_left: float | None = None

    def see(self, event: Event) -> None:
        """Take an event into account."""
        now = self._clock()
        if isinstance(event, Stage):
            self.stage = event
            self._begin()
        elif isinstance(event, Advanced):
            self.done = event.done
            self.seconds_left = (now - self._began) * (1 - event.done) / event.done if event.done else None
        elif isinstance(event, Iteration):
            if event.rank:  # those without are made at once and tell nothing
                self._durations.append(now - self._last)
            self._last = now
            self._expect(event.iteration)

    def _expect(self, made: int) -> None:
        expected = self.stage.iterations
        self.done = self.seconds_left = None
        if expected and made < expected:  # past that it is not known
            self.done = made / expected
            self.seconds_left = (expected - made) * fmean(self._durations) if self._durations else None


class Display(ABC):
    """A listener that shows events, until it is closed."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._pace = clock, _Pace(clock)

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._pace.see(event)
        self._show(event)

    @abstractmethod
    def _show(self, event: Event) -> None: ...

    def close(self) -> None:  # noqa: B027  most have nothing to do
        """Stop showing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""
        self.close()

    def _left(self) -> str:
        left = self._pace.seconds_left
        return "" if left is None else f", about {duration(left)} left"


class _JSONLines(Display):
    """One JSON object for each event."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream

    def _show(self, event: Event) -> None:
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": type(event).__name__.lower(),
            "stage": self._pace.stage.name,
            "seconds_left": self._pace.seconds_left,
            **{name: _finite(value) for name, value in asdict(event).items()},
        }
        print(json.dumps(record, default=float), file=self._stream, flush=True)


class _Lines(Display):
    """Plain lines: stages, iterations and notes; and a sign of life when none of them has come for a while."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._stream, self._last = stream, -math.inf

    def _show(self, event: Event) -> None:
        passing = isinstance(event, Advanced | Pass)
        if passing and self._clock() - self._last < _SILENCE:
            return
        self._last = self._clock()
        words = _words(event)
        if passing:
            words = f"{self._pace.stage.name}: {words}"
        print(words + ("" if isinstance(event, Note | Scored) else self._left()), file=self._stream, flush=True)


class _Bar(Display):
    """A bar for each stage."""

    def __init__(self, tqdm: Any, *, leave: bool) -> None:
        super().__init__()
        self._tqdm, self._leave = tqdm, leave
        self._bar: Any = None

    def _show(self, event: Event) -> None:
        if isinstance(event, Note | Scored):
            self._tqdm.write(_words(event), file=sys.stderr)
            return
        if isinstance(event, Stage) or self._bar is None:
            self.close()
            name = self._pace.stage.name
            self._bar = self._tqdm(total=1.0, desc=name, bar_format=_UNKNOWN, file=sys.stderr, leave=self._leave)
        bar, done = self._bar, self._pace.done
        bar.bar_format = _UNKNOWN if done is None else _KNOWN
        bar.n = done or 0.0
        if isinstance(event, Stage):
            bar.set_postfix_str(event.detail)
        elif isinstance(event, Advanced):
            bar.set_postfix_str(self._left().removeprefix(", "))
        elif isinstance(event, Pass):
            bar.refresh()
        else:
            bar.set_postfix_str(_words(event) + self._left())

    def close(self) -> None:
        """Take the bar away; in a notebook it stays."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _words(event: Event) -> str:
    """Say it on one line."""
    match event:
        case Stage(name, detail):
            return f"{name} ({detail})" if detail else name
        case Advanced(done):
            return f"{done:.0%}"
        case Pass(passes):
            return f"{passes} passes made" if passes > 1 else "1 pass made"
        case Iteration(iteration, rank, _, residual, held_out):
            words = f"iteration {iteration}: rank {rank}, residual {residual:.3g}"
            return words if math.isnan(held_out) or rank == 0 else f"{words}, held-out error {held_out:.4g}"
        case Sweep(sweep, objective):
            return f"sweep {sweep}: objective {objective:.6g}"
        case Scored():
            return _score(event)
        case Note(words):
            return f"scialm-dask: note: {words}"
        case _:
            fields = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(event).items())
            return f"{type(event).__name__.lower()}: {fields}"


def _score(event: Scored) -> str:
    numbers = {"MSE": event.mse, "relative error": event.relative_error, "seconds": event.seconds}
    told = [f"{name} {value:.4g}" for name, value in numbers.items() if math.isfinite(value)]
    words = [] if event.status == "ok" else [f"{event.status}: {event.note}"]
    return f"{event.experiment}, {event.method}: " + ", ".join([*words, *told])


def duration(seconds: float) -> str:
    """Put it in words, no more exactly than is known."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
