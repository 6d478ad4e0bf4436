"""Which worker each row block is at home with."""

from __future__ import annotations

from scialm_dask.run.cluster import current_client

__all__ = ["Homes"]


class Homes:
    """Assigns blocks to workers: neighbours together, and for as long as their worker lives.

    What neighbours give to a sum is then added up before it travels. Blocks move only when a worker is lost, to those
    with the fewest blocks for each thread, or when one comes that has none.
    """

    def __init__(self) -> None:
        self._known: tuple[str, ...] = ()

    def __call__(self, n_blocks: int) -> tuple[str | None, ...]:
        """Give the address of a worker for each block; None where there are but threads of this process."""
        client = current_client()
        workers = {} if client is None else client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            return (None,) * n_blocks
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
