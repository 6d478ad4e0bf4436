"""Graphs of block tasks: assigning blocks to workers, sending them arguments, and trees that add up results."""

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
from dask.system import CPU_COUNT
from threadpoolctl import threadpool_limits

from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import dask.array as da
    from distributed import Client

T = TypeVar("T")
_MOST_THREADS = 4  # one thread consumes their results, so more would only hold more memory
A = TypeVar("A")
B = TypeVar("B")
OURS = {"scialm": True}  # annotation of our tasks
_OF_PARENT: WeakSet[Any] = WeakSet()  # clients made before this process was forked
_SERVED = 8  # workers, at most, that get the arguments of a pass from the scheduler
_BUNCH = 16  # workers that otherwise get them from one of them


def _after_fork() -> None:
    """Drop Dask's thread pools, whose threads do not exist in a forked process."""
    dask.threaded.default_pool, dask.threaded.pools_lock = None, threading.Lock()
    dask.threaded.pools.clear()
    if "distributed" in sys.modules:
        _OF_PARENT.update(sys.modules["distributed"].Client._instances)


os.register_at_fork(after_in_child=_after_fork)


class Group(NamedTuple):
    """The blocks that one task visits, and the address of its worker; None for any worker."""

    home: str | None
    blocks: tuple[int, ...]


def stretches(weights: Sequence[float], homes: Sequence[str | None]) -> tuple[Group, ...]:
    """Cut blocks into consecutive groups of similar weight, at most one for each of `homes`."""
    ends = np.cumsum(weights)
    middles = (ends - np.asarray(weights) / 2) * len(homes) / max(ends[-1], 1)
    slots = np.minimum(middles.astype(int), len(homes) - 1)
    groups = ((home, np.flatnonzero(slots == slot).tolist()) for slot, home in enumerate(homes))
    return tuple(Group(home, tuple(blocks)) for home, blocks in groups if blocks)


def threads_anywhere(weights: Sequence[float]) -> tuple[Group, ...]:
    """Return a group for each thread of the present scheduler, on any worker."""
    return stretches(weights, [None] * n_threads())


def n_threads() -> int:
    """Return the number of threads of the present scheduler: of all workers, or of this process."""
    get = get_scheduler()
    workers: dict[str, int] = getattr(getattr(get, "__self__", None), "nthreads", dict)()
    here = 1 if get is dask.get else int(dask.config.get("num_workers", None) or CPU_COUNT)
    return sum(workers.values()) or here


def current_client() -> Client | None:
    """Return the `distributed.Client` that Dask would use now, or None if it would use threads."""
    if "distributed" not in sys.modules:  # so there is none
        return None
    from distributed import Client

    try:
        owner = getattr(get_scheduler(), "__self__", None)
    except RuntimeError as error:
        fault = "the current distributed.Client is asynchronous, but this call waits for results"
        if "no Client active" in str(error):  # as after Client.close() within its own block
            fault = "Dask's configuration asks for a distributed.Client, but none is open"
        remedy = "create one without asynchronous=True, or compute on threads: dask.config.set(scheduler='threads')"
        raise InputError(f"{fault}; {remedy}") from error
    if owner in _OF_PARENT:
        raise InputError(
            "the current distributed.Client belongs to the process that this one was forked from, and does not work "
            "here; create one here, or start processes by multiprocessing.get_context('spawn')"
        )
    return owner if isinstance(owner, Client) else None


def workers_of(client: Client | None) -> dict[str, Any]:
    """Return what the scheduler knows of each worker, by address; nothing without a client."""
    return {} if client is None else client.scheduler_info(n_workers=-1)["workers"]


def execute(values: Sequence[Any], how: Callable[..., Any] = dask.persist) -> tuple[Any, ...]:
    """Persist or compute values on the present scheduler, with one BLAS thread for each thread of this process."""
    # Every pass sends megabytes to the workers on purpose, so Dask should not warn. Importing distributed while its
    # configuration is changed would lose its defaults, so leave it alone where it is not imported.
    large = {"distributed.admin.large-graph-warning-threshold": "1GB"} if "distributed" in sys.modules else {}
    with threadpool_limits(1, user_api="blas"), dask.config.set(large):
        return how(*values)  # type: ignore[no-any-return]


def check_held(collection: Any) -> None:
    """Raise `InputError` if a collection has parts on workers that this process can no longer reach."""
    if "distributed" not in sys.modules:
        return
    from distributed.client import futures_of

    clients = {None if future.cancelled() else future.client for future in futures_of(collection)}
    if any(client is None or client.status == "closed" or client in _OF_PARENT for client in clients):
        raise InputError(
            "the factors of this result are on workers that this process can no longer reach: their cluster was closed "
            "or restarted, or the process was forked; impute again, and write the result (to_zarr) first"
        )


@contextmanager
def at(home: str | None) -> Iterator[None]:
    """Assign tasks made within the block to a worker, or to others once it is lost; see `Placement`."""
    if home is None:
        yield
    else:
        with dask.annotate(workers=[home], allow_other_workers=True, **OURS):
            yield


def at_home(groups: Sequence[Group], make: Callable[[int], T]) -> list[T]:
    """Return ``make(g)`` for each group number, with its tasks assigned to the worker of the group."""
    made = []
    for g, group in enumerate(groups):
        with at(group.home):
            made.append(make(g))
    return made


def spread(arguments: Any, groups: Sequence[Group]) -> list[Any]:
    """Return, for each group, the arguments to pass to its task: the value, or a task on a worker that relays it."""
    homes = list(dict.fromkeys(group.home for group in groups))
    if homes == [None] or len(homes) == len(groups) <= _SERVED:
        return [arguments] * len(groups)
    relay, sent = dask.delayed(lambda value: value, pure=False), {}
    for start in range(0, len(homes), _BUNCH):
        with at(homes[start]):
            sent.update(dict.fromkeys(homes[start : start + _BUNCH], relay(arguments)))
    return [sent[group.home] for group in groups]


def tree_reduce(parts: Sequence[Any], combine: Callable[[T, T], T], homes: Sequence[str | None] = ()) -> Any:
    """Combine delayed parts pairwise, neighbours first: in a fixed order, with few parts in memory at a time.

    `homes` has the worker of each part; a pair is combined where its first part is. There must be at least one part.
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
    """Return a Dask array with a chunk for each of the delayed blocks of rows, which have these sizes."""
    import dask.array as da

    chunks = [da.from_delayed(piece, (size, width), dtype) for piece, size in zip(pieces, sizes, strict=True)]
    return da.concatenate(chunks, axis=0)


def sum_of_groups(groups: Sequence[Group], add: Callable[[T, T], T], parts: Sequence[Any]) -> Any:
    """Add up the delayed parts of groups: first on each worker, then between workers."""
    of_homes: dict[str | None, list[Any]] = {}
    for group, part in zip(groups, parts, strict=True):
        of_homes.setdefault(group.home, []).append(part)
    sums = [tree_reduce(own, add, [home] * len(own)) for home, own in of_homes.items()]
    return tree_reduce(sums, add, list(of_homes))


def in_order(make: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Call `make` on every item in a few threads and yield the results in order.

    At most one result for each thread is in memory, besides the one yielded. After an exception, or when the consumer
    stops, calls that have not started are cancelled.
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
    """Assigns blocks to the threads of workers, with similar weights, for as long as the workers live.

    Blocks move only when a worker is lost, to threads with the least weight, or when a worker joins, from threads with
    the most. As long as `store`, which keeps the state of blocks, exists, lost blocks may have to be computed again.
    """

    def __init__(self, store: object) -> None:
        self._known: tuple[Group, ...] = ()
        self._client: Client | None = None
        self._store = weakref.ref(store)

    def __call__(self, weights: Sequence[float]) -> tuple[Group, ...]:
        """Return a group for each thread, given the weight of each block."""
        client = current_client()
        workers = workers_of(client)
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
    """Keep groups on live workers, assign the blocks of others, and move some to threads that have none."""
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
    """Let our tasks that wait for a lost worker run on a later one; return the name of the scheduler plugin.

    With another worker alive, the scheduler moves them itself. If all workers are lost at once the tasks wait, and
    would wait for ever, since the scheduler offers a new worker only the tasks assigned to it.
    """
    from distributed import SchedulerPlugin

    ours, own = dict(OURS), f"scialm-rehouse-{uuid.uuid4().hex[:12]}"

    class Rehouse(SchedulerPlugin):  # type: ignore[misc]  # local, so that it is pickled by value: the scheduler may lack this package
        name = own

        def add_worker(self, scheduler: Any, worker: str) -> None:
            for task in scheduler.unrunnable:
                if task.loose_restrictions and ours.items() <= (task.annotations or {}).items():
                    task.worker_restrictions = None

    client.register_plugin(Rehouse())
    return own


def _forget(client: Client, plugin: str) -> None:
    """Remove a plugin from the scheduler, without waiting, from whichever thread collects garbage."""

    async def unregister() -> None:
        with contextlib.suppress(Exception):  # the scheduler may be gone
            await client.scheduler.unregister_scheduler_plugin(name=plugin)

    if client.status == "running":
        client.loop.add_callback(unregister)
