"""Which worker each row block is at home with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scialm_dask.run.cluster import current_client

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Placement"]


class Placement:
    """Assigns blocks to workers: neighbours together, and for as long as their worker lives.

    What neighbours give to a sum is then added up before it travels. Blocks move only when a worker is lost, to those
    with the fewest blocks for each thread, or when one comes that has none.
    """

    def __init__(self) -> None:
        self._known: tuple[str, ...] = ()
        self._client: Client | None = None

    def __call__(self, n_blocks: int) -> tuple[str | None, ...]:
        """Give the address of a worker for each block; None where there are but threads of this process."""
        client = current_client()
        workers = {} if client is None else client.scheduler_info(n_workers=-1)["workers"]
        if client is None or not workers:
            return (None,) * n_blocks
        if client is not self._client:
            _rehouse(client)
            self._client = client
        threads = {address: int(workers[address]["nthreads"]) for address in sorted(workers)}
        if len(self._known) == n_blocks and threads.keys() <= set(self._known):
            self._known = _without_the_lost(self._known, threads)
        else:
            self._known = _shares(n_blocks, threads)
        return self._known


def _shares(n_blocks: int, threads: dict[str, int]) -> tuple[str, ...]:
    """Cut the blocks into stretches, as long as workers have threads."""
    slots = [address for address, count in threads.items() for _ in range(count)]
    return tuple(slots[block * len(slots) // n_blocks] for block in range(n_blocks))


def _without_the_lost(known: tuple[str, ...], threads: dict[str, int]) -> tuple[str, ...]:
    load = {address: known.count(address) / count for address, count in threads.items()}
    homes = []
    for address in known:
        if address not in threads:
            address = min(load, key=load.__getitem__)
            load[address] += 1 / threads[address]
        homes.append(address)
    return tuple(homes)


def _rehouse(client: Client) -> None:
    """Let tasks whose home is lost run on a worker that comes later.

    The scheduler sends them elsewhere at once, if there is anywhere. If all workers are lost together they wait, and
    when another comes it asks only whether that is their home: they would wait for ever.
    """
    from distributed import SchedulerPlugin

    class Rehouse(SchedulerPlugin):  # type: ignore[misc]  # made here, so that it is sent as it is: the scheduler may know nothing of us
        name, idempotent = "scialm-rehouse", True

        def add_worker(self, scheduler: Any, worker: str) -> None:
            for task in scheduler.unrunnable:
                if task.loose_restrictions:
                    task.worker_restrictions = None

    client.register_plugin(Rehouse())
