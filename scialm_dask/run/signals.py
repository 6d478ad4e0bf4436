"""What SIGTERM does to a run: Slurm sends it some time before it kills."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Terminated", "on_sigterm"]


class Terminated(KeyboardInterrupt):
    """SIGTERM came; work ends as by Ctrl-C."""


@contextmanager
def on_sigterm(*, deferred: bool) -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether SIGTERM came.

    Parameters
    ----------
    deferred
        The first signal is but noted. Else, and at the second one, `Terminated` is raised at once.
    """
    came = 0

    def handle(_: int, __: FrameType | None) -> None:
        nonlocal came
        came += 1
        if not deferred or came > 1:
            raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield lambda: came > 0
    finally:
        signal.signal(signal.SIGTERM, before)
