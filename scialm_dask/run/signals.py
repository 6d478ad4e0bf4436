"""What SIGTERM and SIGHUP do to a run: Slurm sends the one some time before it kills, a closed terminal the other."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; work ends as by Ctrl-C."""


@contextmanager
def on_sigterm(*, deferred: bool) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM or SIGHUP came. If the latter is ignored, as by ``nohup``, it stays.

    If `deferred`, the first signal is but noted. Else, and at the second one, `Terminated` is raised at once.
    """
    came = 0

    def handle(_: int, __: FrameType | None) -> None:
        nonlocal came
        came += 1
        if not deferred or came > 1:
            raise Terminated

    signals = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, handle) for each in signals}
    try:
        yield lambda: came > 0
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def ignored_by_children() -> Iterator[None]:
    """Start processes within the block that ignore SIGHUP: this one ends them when it comes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if _in_main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGHUP, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def dask_setup(_: object) -> None:
    """Leave signals that may reach all processes to that that started this worker (Dask calls this, as a preload)."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
