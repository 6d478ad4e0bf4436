"""Assign row blocks to workers."""

from __future__ import annotations

import contextlib
import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scialm_dask.reduction import OURS, Group, current_client, stretches, threads_anywhere

if TYPE_CHECKING:
    from distributed import Client


class Placement:
    """Assigns blocks to the threads of workers, about the same weight to each, for as long as their worker lives.

    Blocks move only when a worker is lost, to those with the least to do, or when one comes that has none, from those
    with the most.

    Parameters
    ----------
    store
        Of the state of the blocks: as long as it is there, what was lost may have to be made again.
    """

    def __init__(self, store: object) -> None:
        self._known: tuple[Group, ...] = ()
        self._client: Client | None = None
        self._store = weakref.ref(store)

    def __call__(self, weights: Sequence[float]) -> tuple[Group, ...]:
        """Return the groups of blocks, one for each thread.

        Parameters
        ----------
        weights
            Of the blocks.
        """
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
