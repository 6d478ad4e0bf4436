"""Which errors mean that workers or the scheduler were lost, and whether there is a cluster again."""

from __future__ import annotations

import sys

__all__ = ["cluster_is_back", "loss_of_cluster"]

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
        return "lost the scheduler, or all workers with their data; look at their logs"
    return None


def _limit(error: object) -> str:
    from dask.utils import format_bytes

    limit = getattr(getattr(error, "last_worker", None), "memory_limit", 0)
    return f", of which each has {format_bytes(limit)}" if limit else ""


def cluster_is_back() -> bool:
    """Wait, for a bounded time, until the scheduler answers and has a worker."""
    from distributed import get_client

    try:
        get_client().wait_for_workers(1, timeout=_PATIENCE)
    except Exception:  # whatever it is, there is none
        return False
    return True
