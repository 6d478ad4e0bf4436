"""Early ends of work: signals, Ctrl-C, and workers or schedulers that cannot be started or are lost."""

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

_LOOK = 5.0  # seconds between checks that there are workers
_PATIENCE = 60  # seconds to wait for a lost scheduler or lost workers to come back


def loss_of_cluster(error: BaseException) -> str | None:
    """Return what was lost and what helps, if the error is about that; otherwise None."""
    if "distributed" not in sys.modules:
        return None
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError, FuturesCancelledError
    from distributed.comm import CommClosedError
    from distributed.scheduler import NoWorkerError

    if isinstance(error, KilledWorker):
        from dask.utils import format_bytes

        limit = getattr(error.last_worker, "memory_limit", 0)
        return (
            f"workers died {error.allowed_failures + 1} times on the same task, most likely for lack of memory"
            f"{f', as each has {format_bytes(limit)}' if limit else ''}; give more --worker-memory, fewer --threads or "
            "--scratch zarr:FOLDER"
        )
    if isinstance(error, NoWorkerError):
        return f"no worker is left, and none came for {error.timeout:g} s; look at their logs"
    if isinstance(error, CommClosedError | FutureCancelledError | FuturesCancelledError):
        return "lost the scheduler, or all workers for longer than scialm.no-workers-timeout; look at their logs"
    return None


def cluster_is_back() -> bool:
    """Wait for the scheduler to have a worker again; return whether it does, within a minute."""
    from distributed import get_client

    try:
        get_client().wait_for_workers(1, timeout=min(_PATIENCE, seconds_of("no-workers-timeout")))
    except Exception:  # of any kind: there is none
        return False
    return True


def check_processes() -> None:
    """Check that worker processes can be started here.

    Raises `InputError` if multiprocessing would run the present script again in each of them, and `ClusterError` if
    /dev/shm has no room for its semaphores.
    """
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    with contextlib.suppress(OSError, UnicodeError):
        begun = any(at.filename == script and at.name == "<module>" for at in traceback.extract_stack())
        if begun and "__name__" not in Path(script).read_text():
            raise InputError(
                f"{script}: would run again in every worker; put what it does below `if __name__ == '__main__':`"
            )
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        raise ClusterError(
            f"/dev/shm: no room for semaphores of worker processes ({error.strerror}); free some space there, or "
            "compute in threads, without --cluster"
        ) from error


@contextmanager
def losses_explained(remedy: str = "") -> Iterator[None]:
    """Raise `ClusterError`, with a line that ends with `remedy`, when workers or the scheduler are lost."""
    try:
        yield
    except Exception as error:
        if (loss := loss_of_cluster(error)) is None:
            raise
        raise ClusterError(f"{loss}{remedy}") from error


@contextmanager
def quiet_end(client: Client, *, ours: bool) -> Iterator[None]:
    """Silence the logs of all processes when work is interrupted."""
    level = logging.getLogger("distributed").level
    # Now, as asyncio logs this as soon as the first task is interrupted.
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
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("distributed", "tornado.application")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def while_workers(client: Client | None) -> Iterator[None]:
    """Cancel what waits for results within the block after ``scialm.no-workers-timeout`` without any worker."""
    if client is None:
        yield
        return
    from distributed import Future

    limit, ended = seconds_of("no-workers-timeout"), threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not ended.wait(min(_LOOK, limit / 4)):
            with contextlib.suppress(Exception):  # a lost scheduler is reported elsewhere
                if client.scheduler_info(n_workers=1)["workers"] or not client.futures:
                    last = time.monotonic()
                elif time.monotonic() - last > limit:
                    client.cancel([Future(key, client) for key in list(client.futures)], force=True)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; work ends as after Ctrl-C."""


@contextmanager
def on_sigterm(*, deferred: bool) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or SIGHUP came. Ignored signals, as by ``nohup``, stay ignored.

    The signal raises `Terminated`; if `deferred`, only the second signal does.
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
    """Let processes started within the block ignore SIGHUP, as this one ends them when it comes."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if here else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGHUP, before)


def dask_setup(_: object) -> None:
    """Ignore signals in a worker, as its parent handles them; Dask calls this preload function."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
