"""Which errors mean that workers or the scheduler were lost, and whether a cluster is there again."""

from __future__ import annotations

import sys

__all__ = ["cluster_failure", "cluster_is_back"]

_PATIENCE = 60  # seconds for a lost connection or lost workers to come back


def cluster_failure(error: BaseException) -> str | None:
    """Say what happened to the cluster and what helps, if that is what the error is about; else None."""
    if "distributed" not in sys.modules:
        return None
    import concurrent.futures

    from distributed import CancelledError
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        limit = _memory_limit(error)
        return (
            f"task {str(error.task)[:40]} was on {error.allowed_failures + 1} workers that died, as they do when they "
            f"go over their memory limit{limit}; give workers more memory or fewer threads, or more --blocks"
        )
    if isinstance(error, CancelledError | concurrent.futures.CancelledError):
        return "the connection to the scheduler was lost, and all that workers held with it"
    if isinstance(error, CommClosedError | TimeoutError):
        return f"the cluster does not answer ({error})"
    return None


def _memory_limit(error: object) -> str:
    from dask.utils import format_bytes

    limit = getattr(getattr(error, "last_worker", None), "memory_limit", 0)
    return f" of {format_bytes(limit)}" if limit else ""


def cluster_is_back() -> bool:
    """Wait, for a bounded time, until the scheduler answers and has a worker."""
    from distributed import get_client

    try:
        get_client().wait_for_workers(1, timeout=_PATIENCE)
    except Exception:  # whatever it is, there is none
        return False
    return True
