"""Blocks made ahead of time by a few threads and handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from dask.system import CPU_COUNT

__all__ = ["in_order"]

_MOST_THREADS = 4  # one thread takes what they make, so more would only hold more memory
A = TypeVar("A")
B = TypeVar("B")


def in_order(make: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Call `make` on every item in a few threads and yield the results in order.

    No more results than threads, and the one handed out, are alive at a time. After an exception, or when the
    consumer leaves, what has not been begun is not made.
    """
    n_threads = min(CPU_COUNT, _MOST_THREADS)
    pool = ThreadPoolExecutor(n_threads)
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) == n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
