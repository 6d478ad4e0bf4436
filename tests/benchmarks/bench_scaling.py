"""Seconds per pass per non-zero and peak memory as cells grow, with one thread and with two, state in Zarr.

A pass takes a step to rank 48 and multiplies with 64 columns. Each measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import Record, in_child

WIDTH, RANK = 64, 48


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--cells", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--passes", type=int, default=3, help="that are timed; the median is given")
    parser.add_argument("--folder", help="for the matrix and the state, on a local disk")


def run(choice: argparse.Namespace) -> Iterator[Record]:
    """Yield one record for each size and number of threads, then the ratios."""
    if choice.small:
        choice.cells, choice.genes, choice.passes = [400, 800], 200, 1
    records = []
    for cells in choice.cells:
        with tempfile.TemporaryDirectory(dir=choice.folder) as folder:
            source = str(Path(folder) / "counts.zarr")
            simulation = {"destination": source, "n_cells": cells, "n_genes": choice.genes, "density": choice.density}
            in_child("bench_dense_dask", "simulated", **simulation)
            for threads in choice.threads:
                settings = {"source": source, "folder": folder, "threads": threads, "passes": choice.passes}
                record = in_child("bench_scaling", "passes_of", **settings)
                records.append(record)
                yield {"benchmark": "scaling", "cells": cells, **record}
    speed = {(record["n_observed"], record["threads"]): record["ns_per_value"] for record in records}
    sizes, threads = sorted({size for size, _ in speed}), sorted({count for _, count in speed})
    yield {
        "benchmark": "scaling",
        "what": "ratios",
        "most_cells_over_fewest": {str(t): round(speed[sizes[-1], t] / speed[sizes[0], t], 2) for t in threads},
        "most_threads_over_one": {str(s): round(speed[s, threads[0]] / speed[s, threads[-1]], 2) for s in sizes},
    }


def passes_of(source: str, folder: str, threads: int, passes: int) -> Record:
    """Time passes over a matrix."""
    import dask

    from scialm_dask import ExpressionMatrix
    from scialm_dask.config import preset
    from scialm_dask.data.scratch import ZarrScratch
    from scialm_dask.linalg.kernels import Update
    from scialm_dask.linalg.operator import LowRankPlusSparse
    from scialm_dask.linalg.svd import extended_basis, rayleigh_ritz
    from scialm_dask.solve.scaling import prepare, survey

    with dask.config.set(scheduler="threads", num_workers=threads), tempfile.TemporaryDirectory(dir=folder) as state:
        matrix = ExpressionMatrix.open(source)
        blocks = prepare(matrix, survey(matrix), preset("paper", scaling=(0.5, 0.5)))
        operator = LowRankPlusSparse(blocks, ZarrScratch(state))
        known = np.zeros((operator.shape[1], 0), np.float32)
        svd = rayleigh_ritz(operator.multiply(extended_basis(known, WIDTH, 0)))
        seconds = []
        for _ in range(passes + 1):
            rotation = (svd.to_left[:, :RANK] * svd.values[:RANK]).astype(np.float32)
            right = np.ascontiguousarray(svd.right[:, :RANK])
            began = time.perf_counter()
            product = operator.multiply(svd.right, Update(rotation, 0.8), right)
            seconds.append(time.perf_counter() - began)
            svd = rayleigh_ritz(product)
    per_pass = float(np.median(seconds[1:]))
    n_observed = operator.observations.n_observed
    return {
        "threads": threads,
        "n_observed": n_observed,
        "n_blocks": len(operator.bounds) - 1,
        "seconds_per_pass": round(per_pass, 4),
        "ns_per_value": round(1e9 * per_pass / n_observed, 3),
    }
