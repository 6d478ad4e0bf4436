"""Trees of Dask tasks that add up what blocks give. Below all else that builds graphs, so that there is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import dask

__all__ = ["at", "tree_reduce"]

T = TypeVar("T")


def tree_reduce(parts: Sequence[Any], combine: Callable[[T, T], T], homes: Sequence[str | None] = ()) -> Any:
    """Combine delayed parts pairwise, neighbours first: a fixed order, and few parts alive at a time.

    Parameters
    ----------
    parts
        One at least.
    combine
        Called with two neighbours.
    homes
        For each part the address of the worker that has it; each pair is combined where its first part is.
    """
    merge = dask.delayed(combine)
    placed = list(zip(parts, homes or [None] * len(parts), strict=True))
    while len(placed) > 1:
        pairs = []
        for (one, home), (other, _) in zip(placed[::2], placed[1::2], strict=False):
            with at(home):
                pairs.append((merge(one, other), home))
        placed = pairs + placed[2 * len(pairs) :]
    return placed[0][0]


@contextmanager
def at(home: str | None) -> Iterator[None]:
    """Send tasks that are made meanwhile to this worker, or elsewhere if it is no more."""
    if home is None:
        yield
    else:
        with dask.annotate(workers=[home], allow_other_workers=True):
            yield
