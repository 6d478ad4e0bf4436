"""Passes on a cluster of four processes against one: what travels, what the scheduler is asked, and the time.

A pass takes a step to rank 48 and multiplies with 64 columns, as in `scaling`. Bytes are those that workers send, by
their own counters; tasks are those that the scheduler saw computed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from distributed.diagnostics.plugin import SchedulerPlugin
from harness import Record, in_child

WIDTH, RANK = 64, 48


class Made(SchedulerPlugin):
    """Counts tasks that were computed."""

    name = "made"
    count = 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Look at each change of a task."""
        self.count += (start, finish) == ("processing", "memory")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--scratch", choices=["memory", "zarr"], nargs="+", default=["memory", "zarr"])
    parser.add_argument("--passes", type=int, default=3, help="that are measured; the median is given")
    parser.add_argument("--folder", help="for the matrix and the state, on a local disk")


def run(choice: argparse.Namespace) -> Iterator[Record]:
    """Yield one record for each number of workers and kind of scratch."""
    if choice.small:
        choice.cells, choice.genes, choice.passes, choice.scratch = 800, 200, 1, ["memory"]
    with tempfile.TemporaryDirectory(dir=choice.folder) as folder:
        source = str(Path(folder) / "counts.zarr")
        simulation = {"destination": source, "n_cells": choice.cells, "n_genes": choice.genes}
        in_child("bench_dense_dask", "simulated", density=choice.density, **simulation)
        for scratch in choice.scratch:
            for workers in choice.workers:
                settings = {"source": source, "folder": folder, "scratch": scratch, "passes": choice.passes}
                yield {"benchmark": "workers", **in_child("bench_workers", "passes_of", workers=workers, **settings)}


def passes_of(source: str, folder: str, scratch: str, workers: int, passes: int) -> Record:
    """Measure passes over a matrix."""
    from distributed import Client, LocalCluster

    from scialm_dask import ExpressionMatrix
    from scialm_dask.config import preset
    from scialm_dask.data.scratch import MemoryScratch, ZarrScratch
    from scialm_dask.linalg.kernels import Update
    from scialm_dask.linalg.operator import LowRankPlusSparse
    from scialm_dask.linalg.svd import extended_basis, rayleigh_ritz
    from scialm_dask.reduction import Placement
    from scialm_dask.solve.scaling import prepare, survey

    place = {"threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    with (
        tempfile.TemporaryDirectory(dir=folder) as state,
        LocalCluster(n_workers=workers, **place) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(Made())
        matrix = ExpressionMatrix.open(source)
        blocks = prepare(matrix, survey(matrix), preset("paper", scaling=(0.5, 0.5)))
        store = MemoryScratch() if scratch == "memory" else ZarrScratch(state)
        operator = LowRankPlusSparse(blocks, store, placement=Placement(store))
        known = np.zeros((operator.shape[1], 0), np.float32)
        svd = rayleigh_ritz(operator.multiply(extended_basis(known, WIDTH, 0)))
        measured = []
        for _ in range(passes + 1):
            rotation = (svd.to_left[:, :RANK] * svd.values[:RANK]).astype(np.float32)
            right = np.ascontiguousarray(svd.right[:, :RANK])
            before, began = counters(client), time.perf_counter()
            product = operator.multiply(svd.right, Update(rotation, 0.8), right)
            seconds = time.perf_counter() - began
            measured.append((seconds, *np.subtract(counters(client), before)))
            svd = rayleigh_ritz(product)
        seconds, sent, tasks = (float(value) for value in np.median(measured[1:], axis=0))
    return {
        "workers": workers,
        "scratch": scratch,
        "n_observed": operator.observations.n_observed,
        "n_blocks": len(operator.bounds) - 1,
        "seconds_per_pass": round(seconds, 3),
        "tasks_per_pass": int(tasks),
        "megabytes_sent_per_pass": round(sent / 1e6, 2),
        "in_sums_of_n_by_l": round(sent / (4 * operator.shape[1] * WIDTH), 2),
    }


def counters(client: Any) -> tuple[int, int]:
    """Bytes that workers have sent and tasks that were computed, so far."""
    sent = client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total)
    made = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["made"].count)
    return sum(sent.values()), made
