"""Progress displays: a bar on a terminal or in a notebook, plain lines elsewhere, or JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, Self, TextIO

from scialm_dask.events import Advanced, Event, Iteration, Note, Pass, Scored, Stage, Sweep

_SILENCE = 10.0  # seconds without a plain line after which a pass or a share is shown too
_LAST = 3  # iterations; their mean time predicts that of the next ones
_UNKNOWN = "{desc} {elapsed}{postfix}"
_KNOWN = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


def show_progress(*, json_lines: bool = False) -> Display:
    """Return a listener that shows progress on standard error.

    Pass it as `listen`. If standard error cannot be written any more, the display stops and the computation goes on.

    Parameters
    ----------
    json_lines : bool, default=False
        Write each event as one JSON object per line: ``time`` (UTC), ``event`` (its class in `scialm_dask.events`, in
        lower case), ``stage``, ``seconds_left`` (null while unknown) and the fields of the event. By default there is a
        bar on a terminal, a widget in a notebook with ipywidgets, and plain lines elsewhere.

    Returns
    -------
    Display
        A callable and context manager.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)
    >>> with scialm_dask.show_progress() as listen:
    ...     result = scialm_dask.impute(counts, listen=listen)
    """
    if json_lines or sys.stderr is None:
        return _JSONLines(sys.stderr)
    in_notebook = "ipykernel" in sys.modules and "ipykernel" in str(type(sys.stderr))
    return (_Bar if in_notebook or sys.stderr.isatty() else _Lines)(sys.stderr)


class Display:
    """A listener that shows events on `stream` until it is closed or the stream cannot be written."""

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._shown = stream, clock, -math.inf
        self._begin(Stage(""))

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._see(event)
        if self._stream is not None:
            try:
                self._show(event, self._stream)
            except (OSError, ValueError):  # a closed stream is a ValueError
                self._stream = None

    def _show(self, event: Event, stream: TextIO) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Stop showing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.close()

    def _begin(self, stage: Stage) -> None:
        self._stage = stage
        self._done: float | None = None
        self._seconds_left: float | None = None
        self._began = self._last = self._clock()
        self._durations: deque[float] = deque(maxlen=_LAST)

    def _see(self, event: Event) -> None:
        """Update the share of the stage done and the estimate of the time left."""
        now, expected = self._clock(), self._stage.iterations
        if isinstance(event, Stage):
            self._begin(event)
        elif isinstance(event, Advanced):
            self._done = event.done
            self._seconds_left = (now - self._began) * (1 - event.done) / event.done if event.done else None
        elif isinstance(event, Iteration):
            if event.rank:  # iterations of rank 0 take no time
                self._durations.append(now - self._last)
            self._last, self._done, self._seconds_left = now, None, None
            if expected and event.iteration < expected:  # after that the time left is unknown
                self._done = event.iteration / expected
                if self._durations:
                    self._seconds_left = (expected - event.iteration) * fmean(self._durations)

    def _left(self) -> str:
        return "" if self._seconds_left is None else f", about {duration(self._seconds_left)} left"


class _JSONLines(Display):
    """One JSON object per event."""

    def _show(self, event: Event, stream: TextIO) -> None:
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": type(event).__name__.lower(),
            "stage": self._stage.name,
            "seconds_left": self._seconds_left,
            # JSON has neither NaN nor infinity
            **{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(event).items()},
        }
        print(json.dumps(record, default=float), file=stream, flush=True)


class _Lines(Display):
    """Plain lines for stages, iterations and notes, and after a silence for passes and shares."""

    def _show(self, event: Event, stream: TextIO) -> None:
        passing = isinstance(event, Advanced | Pass)
        if passing and self._clock() - self._shown < _SILENCE:
            return
        self._shown = self._clock()
        words = f"{self._stage.name}: {_words(event)}" if passing else _words(event)
        print(words + ("" if isinstance(event, Note | Scored) else self._left()), file=stream, flush=True)


class _Bar(Display):
    """A bar for each stage, which stays in a notebook."""

    _bar: Any = None

    def _show(self, event: Event, stream: TextIO) -> None:
        from tqdm.auto import tqdm

        if isinstance(event, Note | Scored):
            tqdm.write(_words(event), file=stream)
            return
        if isinstance(event, Stage) or self._bar is None:
            self.close()
            terminal = stream.isatty()
            self._bar = tqdm(total=1.0, desc=self._stage.name, bar_format=_UNKNOWN, file=stream, leave=not terminal)
        self._bar.bar_format = _UNKNOWN if self._done is None else _KNOWN
        self._bar.n = self._done or 0.0
        if isinstance(event, Pass):
            self._bar.refresh()
        else:
            words = {Stage: self._stage.detail, Advanced: ""}.get(type(event), _words(event))
            self._bar.set_postfix_str((words + self._left()).removeprefix(", "))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _words(event: Event) -> str:
    """Return an event as one line of text."""
    match event:
        case Stage(name, detail):
            words = f"{name} ({detail})" if detail else name
        case Advanced(done):
            words = f"{done:.0%}"
        case Pass(passes):
            words = f"{passes} passes made" if passes > 1 else "1 pass made"
        case Iteration(iteration, rank, _, residual, held_out):
            words = f"iteration {iteration}: rank {rank}, residual {residual:.3g}"
            words += "" if math.isnan(held_out) or rank == 0 else f", held-out error {held_out:.4g}"
        case Sweep(sweep, objective):
            words = f"sweep {sweep}: objective {objective:.6g}"
        case Scored(experiment, method, status, mse, relative_error, seconds, note):
            numbers = {"MSE": mse, "relative error": relative_error, "seconds": seconds}
            told = [f"{name} {value:.4g}" for name, value in numbers.items() if math.isfinite(value)]
            words = f"{experiment}, {method}: {', '.join([f'{status}: {note}'] * (status != 'ok') + told)}"
        case Note(said):
            words = f"scialm-dask: note: {said}"
        case _:
            fields = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(event).items())
            words = f"{type(event).__name__.lower()}: {fields}"
    return printable(words)


def printable(words: str) -> str:
    """Return text in which characters that could control a terminal are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def duration(seconds: float) -> str:
    """Return a duration in rounded words, such as "5 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def label(key: str) -> str:
    """Return a key of a summary in words."""
    return "time" if key == "seconds" else key.removeprefix("n_").replace("_bytes", "").replace("_", " ")


def in_words(value: Any, key: str = "") -> str:
    """Return a value of a summary in words; its key says whether it is in bytes or seconds."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        if "bytes" in key:
            from dask.utils import format_bytes

            return str(format_bytes(int(value)))
        return duration(value) if key == "seconds" else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{label(name)} {in_words(each, name)}" for name, each in value.items())
    return (", ".join(map(in_words, value)) or "none") if isinstance(value, list | tuple) else str(value)
