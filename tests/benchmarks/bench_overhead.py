"""What a pass costs beside its products: blocks with next to no non-zeros, on threads and on worker processes.

A pass takes a step to rank 48 and multiplies with 64 columns, as in `scaling`; the state is in memory. Bytes are those
that workers send, tasks those that were computed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from bench_workers import Made, counters
from harness import Record, in_child

WIDTH, RANK, ROWS, VALUES = 64, 48, 4, 40


class AlmostEmpty:
    """Row blocks of four rows and forty non-zeros each, for `LowRankPlusSparse`."""

    def __init__(self, n_blocks: int, n_columns: int) -> None:
        self.shape = n_blocks * ROWS, n_columns
        self.bounds = tuple(range(0, self.shape[0] + 1, ROWS))

    def load(self, block: int) -> Any:
        """Make a block."""
        from scialm_dask.linalg.kernels import Block

        indices = np.sort(np.random.default_rng(block).choice(self.shape[1], VALUES, replace=False)).astype(np.int32)
        indptr = np.arange(0, VALUES + 1, VALUES // ROWS)
        return Block(indptr, indices, np.ones(VALUES, np.float32), self.shape[1])

    def held_out(self, block: int, loaded: Any) -> None:
        """Hold nothing out."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--columns", type=int, default=20_000)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 25, 64], help="for each worker or thread")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 16])
    parser.add_argument("--scratch", choices=["memory", "zarr"], nargs="+", default=["memory"])
    parser.add_argument("--passes", type=int, default=7, help="that are measured; the median is given")


def run(choice: argparse.Namespace) -> Iterator[Record]:
    """Yield one record for each number of workers or threads, and of blocks for each of them."""
    if choice.small:
        choice.columns, choice.blocks, choice.passes, choice.workers, choice.threads = 200, [2], 1, [2], [2]
    for processes, counts in ((True, choice.workers), (False, choice.threads)):
        for count in counts:
            for scratch in choice.scratch:
                settings = {"processes": processes, "scratch": scratch, "columns": choice.columns}
                settings |= {"count": count, "blocks": choice.blocks, "passes": choice.passes}
                for record in in_child("bench_overhead", "passes_of", **settings)["records"]:
                    yield {"benchmark": "overhead", **record}


def passes_of(processes: bool, scratch: str, columns: int, count: int, blocks: list[int], passes: int) -> Record:
    """Measure passes with so many workers, or threads, for each number of blocks."""
    import dask
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        client = None
        if processes:
            place = {"threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1", "memory_limit": None}
            cluster = stack.enter_context(LocalCluster(n_workers=count, **place))
            client = stack.enter_context(Client(cluster))
            client.register_plugin(Made())
        else:
            stack.enter_context(dask.config.set(scheduler="threads", num_workers=count))
        return {"records": [_measured(client, scratch, columns, count, each, passes) for each in blocks]}


def _measured(client: Any, scratch: str, columns: int, count: int, blocks: int, passes: int) -> Record:
    from dask.callbacks import Callback

    from scialm_dask.data.scratch import MemoryScratch, ZarrScratch
    from scialm_dask.linalg.kernels import Update
    from scialm_dask.linalg.operator import LowRankPlusSparse
    from scialm_dask.reduction import Placement

    rng, made = np.random.default_rng(0), []
    basis, right = (np.linalg.qr(rng.standard_normal((columns, n), dtype=np.float32))[0] for n in (WIDTH, RANK))
    rotation = np.eye(WIDTH, RANK, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder, Callback(pretask=lambda *_: made.append(1)):
        store = MemoryScratch() if scratch == "memory" else ZarrScratch(folder)
        operator = LowRankPlusSparse(AlmostEmpty(count * blocks, columns), store, placement=Placement(store))
        operator.multiply(basis)
        measured = []
        for _ in range(passes + 1):
            before, began = (*(counters(client) if client else (0, len(made))), _processor(client)), time.perf_counter()
            operator.multiply(basis, Update(rotation, 0.8), right)
            seconds = time.perf_counter() - began
            after = *(counters(client) if client else (0, len(made))), _processor(client)
            measured.append((seconds, *np.subtract(after, before)))
        operator.release()
    seconds, sent, tasks, processor = (float(value) for value in np.median(measured[1:], axis=0))
    return {
        "workers" if client else "threads": count,
        "scratch": scratch,
        "blocks": count * blocks,
        "milliseconds_per_pass": round(1000 * seconds, 1),
        "processor_milliseconds_per_pass": round(1000 * processor, 1),
        "tasks_per_pass": int(tasks),
        "in_sums_of_n_by_l": round(sent / (4 * columns * WIDTH), 2),
    }


def _processor(client: Any) -> float:
    """Seconds of processor time that this process and the workers have used."""
    return time.process_time() + (sum(client.run(time.process_time).values()) if client else 0.0)
