"""How work ends early: by a signal, by Ctrl-C, or as workers cannot be started, or they or the scheduler are lost."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from scialm_dask.config import seconds_of
from scialm_dask.errors import ClusterError, InputError

if TYPE_CHECKING:
    from distributed import Client

_LOOK = 5.0  # seconds from one look at whether there are workers to the next
_PATIENCE = 60  # seconds for a lost connection or lost workers to come back


def loss_of_cluster(error: BaseException) -> str | None:
    """Say what was lost and what helps, if that is what the error is about; else None."""
    if "distributed" not in sys.modules:
        return None
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError, FuturesCancelledError
    from distributed.comm import CommClosedError
    from distributed.scheduler import NoWorkerError

    if isinstance(error, KilledWorker):
        return (
            f"workers died {error.allowed_failures + 1} times over the same task, most likely for want of memory"
            f"{_limit(error)}; give more --worker-memory, fewer --threads or --scratch zarr:FOLDER"
        )
    if isinstance(error, NoWorkerError):
        return f"no worker is left, and none came for {error.timeout:g} s; look at their logs"
    if isinstance(error, CommClosedError | FutureCancelledError | FuturesCancelledError):
        return "lost the scheduler, or all workers for longer than scialm.no-workers-timeout; look at their logs"
    return None


def _limit(error: object) -> str:
    from dask.utils import format_bytes

    limit = getattr(getattr(error, "last_worker", None), "memory_limit", 0)
    return f", of which each has {format_bytes(limit)}" if limit else ""


def cluster_is_back() -> bool:
    """Wait, for a bounded time, until the scheduler answers and has a worker."""
    from distributed import get_client

    try:
        get_client().wait_for_workers(1, timeout=min(_PATIENCE, seconds_of("no-workers-timeout")))
    except Exception:  # whatever it is, there is none
        return False
    return True


def check_processes() -> None:
    """Raise an error if worker processes could not be started here.

    Raises
    ------
    InputError
        If a script is under way that would begin anew in each of them, as multiprocessing imports it there.
    ClusterError
        If there is no room in /dev/shm, where multiprocessing keeps semaphores.
    """
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    with contextlib.suppress(OSError, UnicodeError):
        begun = any(at.filename == script and at.name == "<module>" for at in traceback.extract_stack())
        if begun and "__name__" not in Path(script).read_text():
            raise InputError(
                f"{script}: would start anew in every worker; put what it does below `if __name__ == '__main__':`"
            )
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        raise ClusterError(
            f"/dev/shm: worker processes need a little of it, and have none ({error.strerror}); free some space there, "
            "or compute in threads, without --cluster"
        ) from error


def count_workers(client: Client) -> int:
    """Return the number of workers just now."""
    return len(client.scheduler_info(n_workers=-1)["workers"])


@contextmanager
def losses_explained() -> Iterator[None]:
    """Say in one line that workers, or the scheduler, were lost."""
    try:
        yield
    except Exception as error:
        if (loss := loss_of_cluster(error)) is None:
            raise
        raise ClusterError(loss) from error


@contextmanager
def quiet_end(client: Client, *, ours: bool) -> Iterator[None]:
    """When work is interrupted, let no process say more of it than this one does."""
    level = logging.getLogger("distributed").level
    # Before anything can be interrupted: asyncio says it as soon as the first task ends.
    logging.getLogger("asyncio").addFilter(lambda record: "AllExit" not in record.getMessage())
    try:
        yield
    except KeyboardInterrupt:
        _hush()
        if ours:
            with contextlib.suppress(Exception):
                client.run(_hush, on_error="ignore", callback_timeout=2)
        raise
    finally:
        logging.getLogger("distributed").setLevel(level)


def _hush() -> None:
    for name in (
        "distributed",
        "tornado.application",
        *(name for name in logging.root.manager.loggerDict if name.startswith("distributed.")),
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def while_workers(client: Client | None) -> Iterator[None]:
    """End what waits for results within the block once there has been no worker for ``scialm.no-workers-timeout``."""
    if client is None:
        yield
        return
    limit, ended = seconds_of("no-workers-timeout"), threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, limit, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()


def _watch(client: Client, limit: float, ended: threading.Event) -> None:
    from distributed import Future

    last = time.monotonic()
    while not ended.wait(min(_LOOK, limit / 4)):
        with contextlib.suppress(Exception):  # a scheduler that is gone is told of elsewhere
            if client.scheduler_info(n_workers=1)["workers"] or not client.futures:
                last = time.monotonic()
            elif time.monotonic() - last > limit:
                client.cancel([Future(key, client) for key in list(client.futures)], force=True)


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
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if here else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGHUP, before)


def dask_setup(_: object) -> None:
    """Leave signals that may reach all processes to that that started this worker (Dask calls this, as a preload)."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
