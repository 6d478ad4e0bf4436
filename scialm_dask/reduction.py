"""Graphs of block tasks: which worker visits which blocks, what it is sent, and trees that add up what blocks give."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakSet

import dask.threaded
import numpy as np
from dask.base import get_scheduler
from dask.delayed import Delayed
from dask.system import CPU_COUNT
from threadpoolctl import threadpool_limits

from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import dask.array as da
    from distributed import Client

T = TypeVar("T")
_MOST_THREADS = 4  # one thread takes what they make, so more would only hold more memory
A = TypeVar("A")
B = TypeVar("B")
OURS = {"scialm": True}  # the annotation by which a scheduler knows our tasks from others
_OF_PARENT: WeakSet[Any] = WeakSet()  # clients made before this process was forked
_SERVED = 8  # workers to which the scheduler sends the inputs of a pass itself
_BUNCH = 16  # workers that otherwise get them from the first of them


def _after_fork() -> None:
    """Forget what threads do that are not in a forked process: Dask is to make its own anew."""
    dask.threaded.default_pool, dask.threaded.pools_lock = None, threading.Lock()
    dask.threaded.pools.clear()
    if "distributed" in sys.modules:
        _OF_PARENT.update(sys.modules["distributed"].Client._instances)


os.register_at_fork(after_in_child=_after_fork)


class Group(NamedTuple):
    """Blocks that one task visits, and the address of the worker that is to run it; None for any."""

    home: str | None
    blocks: tuple[int, ...]


def stretches(weights: Sequence[float], homes: Sequence[str | None]) -> tuple[Group, ...]:
    """Cut blocks into consecutive groups of about the same weight, one for each of `homes`, or each block."""
    ends = np.cumsum(weights)
    middles = (ends - np.asarray(weights) / 2) * len(homes) / max(ends[-1], 1)
    slots = np.minimum(middles.astype(int), len(homes) - 1)
    groups = ((home, np.flatnonzero(slots == slot).tolist()) for slot, home in enumerate(homes))
    return tuple(Group(home, tuple(blocks)) for home, blocks in groups if blocks)


def threads_anywhere(weights: Sequence[float]) -> tuple[Group, ...]:
    """Make a group for each thread of the scheduler in force, wherever that is."""
    return stretches(weights, [None] * n_threads())


def n_threads() -> int:
    """Count the threads of the scheduler in force: of all workers, or of this process."""
    get = get_scheduler()
    workers: dict[str, int] = getattr(getattr(get, "__self__", None), "nthreads", dict)()
    here = 1 if get is dask.get else int(dask.config.get("num_workers", None) or CPU_COUNT)
    return sum(workers.values()) or here


def current_client() -> Client | None:
    """Return the `distributed.Client` that Dask would compute with just now; None if it would use threads."""
    if "distributed" not in sys.modules:  # then nobody has made one
        return None
    from distributed import Client

    try:
        owner = getattr(get_scheduler(), "__self__", None)
    except RuntimeError as error:
        raise InputError(
            "the distributed.Client in force is asynchronous, and this waits for results; give Client(…) without "
            "asynchronous=True, or compute on threads: dask.config.set(scheduler='threads')"
        ) from error
    if owner in _OF_PARENT:
        raise InputError(
            "the distributed.Client in force is of the process that this one was forked from, and does not work here; "
            "make one here, or start processes by multiprocessing.get_context('spawn')"
        )
    return owner if isinstance(owner, Client) else None


def execute(values: Sequence[Any], how: Callable[..., Any] = dask.persist) -> tuple[Any, ...]:
    """Persist, or compute, on the scheduler in force, where threads of this process leave BLAS one thread each."""
    # Inputs of some megabytes go to the workers with every pass: that is meant, and no cause for a warning. Without
    # distributed there are none; were it imported while its configuration is changed, its defaults would go with that.
    large = {"distributed.admin.large-graph-warning-threshold": "1GB"} if "distributed" in sys.modules else {}
    with threadpool_limits(1, user_api="blas"), dask.config.set(large):
        return how(*values)  # type: ignore[no-any-return]


def check_held(collection: Any) -> None:
    """Raise `InputError` if workers hold parts of a collection, and this process does not reach them any more."""
    if "distributed" not in sys.modules:
        return
    from distributed.client import futures_of

    clients = {None if future.cancelled() else future.client for future in futures_of(collection)}
    if any(client is None or client.status == "closed" or client in _OF_PARENT for client in clients):
        raise InputError(
            "the factors of this result are held by workers that this process does not reach any more: their cluster "
            "was closed or started anew, or the process forked; impute again, and write the result (to_zarr) before"
        )


@contextmanager
def at(home: str | None) -> Iterator[None]:
    """Send tasks that are made meanwhile to this worker, or elsewhere if it is no more; see `Placement`."""
    if home is None:
        yield
    else:
        with dask.annotate(workers=[home], allow_other_workers=True, **OURS):
            yield


def at_home(groups: Sequence[Group], make: Callable[[int], T]) -> list[T]:
    """Make tasks for each group, given by its number, to run where the group is at home."""
    made = []
    for g, group in enumerate(groups):
        with at(group.home):
            made.append(make(g))
    return made


def spread(arguments: Any, groups: Sequence[Group]) -> list[Any]:
    """Return what all tasks need, for the task of each group: with it, or by way of one worker of each bunch."""
    homes = list(dict.fromkeys(group.home for group in groups))
    if homes == [None] or len(homes) == len(groups) <= _SERVED:
        return [arguments] * len(groups)
    relay, sent = dask.delayed(_relayed, pure=False), {}
    for start in range(0, len(homes), _BUNCH):
        with at(homes[start]):
            sent.update(dict.fromkeys(homes[start : start + _BUNCH], relay(arguments)))
    return [sent[group.home] for group in groups]


def _relayed(arguments: Any) -> Any:
    return arguments


def tree_reduce(parts: Sequence[Any], combine: Callable[[T, T], T], homes: Sequence[str | None] = ()) -> Any:
    """Combine delayed parts, one at least, pairwise, neighbours first: a fixed order, and few parts alive at a time.

    `homes` has for each part the address of the worker that has it; each pair is combined where its first part is.
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


def stacked(pieces: Iterable[Any], sizes: Iterable[int], width: int, dtype: Any = np.float32) -> da.Array:
    """Put delayed blocks of rows, of these sizes, on top of each other: a Dask array with a chunk for each."""
    import dask.array as da

    chunks = [da.from_delayed(piece, (size, width), dtype) for piece, size in zip(pieces, sizes, strict=True)]
    return da.concatenate(chunks, axis=0)


def sum_of_groups(groups: Sequence[Group], add: Callable[[T, T], T], parts: Sequence[Any]) -> Any:
    """Add up what groups give: at each home what is there, then what homes have."""
    of_homes: dict[str | None, list[Any]] = {}
    for group, part in zip(groups, parts, strict=True):
        of_homes.setdefault(group.home, []).append(part)
    sums = [tree_reduce(own, add, [home] * len(own)) for home, own in of_homes.items()]
    return tree_reduce(sums, add, list(of_homes))


def moved(
    held: Sequence[Any],
    before: Sequence[Group],
    after: Sequence[Group],
    pick: Callable[..., Any],
    join: Callable[..., Any],
) -> list[Delayed]:
    """Share out anew what is held of each group of `before`, delayed, among those of `after`.

    ``pick(part, blocks)`` takes what is held of some blocks out of a part, ``join(*parts)`` puts such together.
    """
    whole = {group.blocks: part for group, part in zip(before, held, strict=True)}
    pick, join = dask.delayed(pick), dask.delayed(join)

    def collected(g: int) -> Any:
        if after[g].blocks in whole:
            return whole[after[g].blocks]
        pieces = []
        for group, part in zip(before, held, strict=True):
            if common := set(after[g].blocks).intersection(group.blocks):
                with at(group.home):
                    pieces.append(pick(part, common))
        return join(*pieces)

    return at_home(after, collected)


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


class Placement:
    """Assigns blocks to the threads of workers, about the same weight to each, for as long as their worker lives.

    Blocks move only when a worker is lost, to those with the least to do, or when one comes that has none, from those
    with the most. As long as the store of their state is there, what was lost may have to be made again.
    """

    def __init__(self, store: object) -> None:
        self._known: tuple[Group, ...] = ()
        self._client: Client | None = None
        self._store = weakref.ref(store)

    def __call__(self, weights: Sequence[float]) -> tuple[Group, ...]:
        """Return the groups of blocks of these weights, one for each thread."""
        client = current_client()
        workers = {} if client is None else client.scheduler_info(n_workers=-1)["workers"]
        if client is None or not workers:
            return threads_anywhere(weights)
        if client is not self._client:
            if (store := self._store()) is not None:
                weakref.finalize(store, _forget, client, _rehouse(client))
            self._client = client
        threads = {address: int(workers[address]["nthreads"]) for address in sorted(workers)}
        if sum(len(group.blocks) for group in self._known) != len(weights):
            self._known = stretches(weights, [home for home, count in threads.items() for _ in range(count)])
        else:
            self._known = balanced(self._known, weights, threads)
        return self._known


def balanced(known: Sequence[Group], weights: Sequence[float], threads: Mapping[str, int]) -> tuple[Group, ...]:
    """Keep groups whose worker is there; share out the blocks of the others, and give some to workers without any."""
    mine = [group for group in known if group.home in threads]
    homes, blocks = [str(group.home) for group in mine], [list(group.blocks) for group in mine]
    idle = [home for home, count in threads.items() for _ in range(count - homes.count(home))]
    if len(mine) == len(known) and (not idle or len(known) == len(weights)):
        return tuple(known)
    homes, blocks = homes + idle, blocks + [[] for _ in idle]
    load = [sum(weights[b] for b in own) for own in blocks]

    def give(block: int) -> None:
        to = load.index(min(load))
        blocks[to].append(block)
        load[to] += weights[block]

    for group in known:
        if group.home not in threads:
            for block in group.blocks:
                give(block)
    while True:
        most = load.index(max(load))
        block = blocks[most][-1]
        if load[most] - min(load) <= weights[block]:
            break
        load[most] -= weights[blocks[most].pop()]
        give(block)
    return tuple(Group(home, tuple(sorted(own))) for home, own in zip(homes, blocks, strict=True) if own)


def _rehouse(client: Client) -> str:
    """Let our tasks whose home is lost run on a worker that comes later; returns the name of the plugin that does so.

    The scheduler sends them elsewhere at once, if there is anywhere. If all workers are lost together they wait, and
    when another comes it asks only whether that is their home: they would wait for ever.
    """
    from distributed import SchedulerPlugin

    ours, own = dict(OURS), f"scialm-rehouse-{uuid.uuid4().hex[:12]}"

    class Rehouse(SchedulerPlugin):  # type: ignore[misc]  # made here, so that it is sent as it is: the scheduler may know nothing of us
        name = own

        def add_worker(self, scheduler: Any, worker: str) -> None:
            for task in scheduler.unrunnable:
                if task.loose_restrictions and ours.items() <= (task.annotations or {}).items():
                    task.worker_restrictions = None

    client.register_plugin(Rehouse())
    return own


def _forget(client: Client, plugin: str) -> None:
    """Take a plugin off the scheduler, from whichever thread collects garbage, without waiting for it."""

    async def unregister() -> None:
        with contextlib.suppress(Exception):  # a scheduler that is gone has none
            await client.scheduler.unregister_scheduler_plugin(name=plugin)

    if client.status == "running":
        client.loop.add_callback(unregister)
