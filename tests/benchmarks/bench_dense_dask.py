"""The same loop on dense Dask arrays with ``da.linalg.svd_compressed``, at the largest size that it survives.

Simulated counts. Both make the same number of iterations with the same penalties and the same rank policy (equation
13, R = 20, for `svd_compressed` has to be told how many values to compute), so that accuracy is matched by the
residual and the rank that they end with, which the record gives. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import Record, in_child

FIRST, INCREMENT, BLOCK_ROWS = 5, 20, 1000


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--cells", type=int, nargs="+", default=[2500, 5000, 10_000, 20_000, 40_000], help="ascending")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--power", type=int, default=2, help="power iterations of svd_compressed")
    parser.add_argument("--memory-cap", type=float, default=12.0, help="GB; the dense loop is ended above it")
    parser.add_argument("--folder", help="where to put the simulated matrix")


def run(choice: argparse.Namespace) -> Iterator[Record]:
    """Yield one record for each size, until the dense loop dies."""
    if choice.small:
        choice.cells, choice.genes, choice.density, choice.iterations = [300], 200, 0.2, 8
    for cells in choice.cells:
        with tempfile.TemporaryDirectory(dir=choice.folder) as folder:
            source = str(Path(folder) / "counts.zarr")
            simulation = {"destination": source, "n_cells": cells, "n_genes": choice.genes, "density": choice.density}
            in_child("bench_dense_dask", "simulated", **simulation)
            settings = {"source": source, "iterations": choice.iterations}
            dense = in_child("bench_dense_dask", "dense", choice.memory_cap, power=choice.power, **settings)
            own = in_child("bench_dense_dask", "own", **settings)
        record = {"benchmark": "dense_dask", "cells": cells, "genes": choice.genes, "dense": dense, "own": own}
        if dense["survived"]:
            over = {name: each["peak_GB"] - each["imports_GB"] for name, each in (("dense", dense), ("own", own))}
            record["time_ratio"] = round(dense["seconds"] / own["seconds"], 1)
            record["memory_ratio"] = round(over["dense"] / over["own"], 1)
        yield record
        if not dense["survived"]:
            return


def simulated(**settings: object) -> Record:
    """Write the matrix."""
    from scialm_dask.evaluate.simulate import simulate

    return simulate(**settings)  # type: ignore[arg-type]


def own(source: str, iterations: int) -> Record:
    """Run this package."""
    from scialm_dask import impute

    began = time.perf_counter()
    paper = {"first_rank": FIRST, "increment": INCREMENT, "svd_passes": 2}
    summary = impute(source, preset="paper", max_iterations=iterations, **paper).summary
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "rank": summary["rank"],
        "residual": summary["residual"],
    }


def dense(source: str, iterations: int, power: int) -> Record:
    """Algorithm 3 as written, on dense arrays."""
    import dask
    import dask.array as da

    from scialm_dask import ExpressionMatrix

    began = time.perf_counter()
    stored = ExpressionMatrix.open(source)
    read = dask.delayed(lambda start, stop: stored.rows.read(start, stop).toarray().astype(np.float32))
    (m, n), step = stored.shape, BLOCK_ROWS
    spans = [(start, min(start + step, m)) for start in range(0, m, step)]
    D = da.concatenate([da.from_delayed(read(a, b), (b - a, n), np.float32) for a, b in spans]).persist()
    observed = (D > 0).persist()
    density = float(observed.mean().compute())
    _, values, _ = da.linalg.svd_compressed(D, FIRST, iterator="QR", n_power_iter=20, seed=0)
    mu, rho, sv = 0.3 / float(values[0].compute()), 1.1 + 2.5 * density, FIRST
    norm = float(da.linalg.norm(D).compute())
    E, Y = da.zeros_like(D), da.zeros_like(D)
    rank, residual = 0, 1.0
    for _ in range(iterations):
        W = (D - E + Y * np.float32(1 / mu)).persist()
        U, values, Vt = dask.persist(*da.linalg.svd_compressed(W, sv, iterator="QR", n_power_iter=power, seed=0))
        shrunk = np.maximum(values.compute() - np.float32(1 / mu), 0)
        rank = int(np.count_nonzero(shrunk))
        sv = rank + 1 if rank < sv else min(rank + INCREMENT, m, n)
        A = ((U * shrunk) @ Vt).rechunk(D.chunks)
        E = da.where(observed, np.float32(0), D - A + Y * np.float32(1 / mu))
        Y = Y + np.float32(mu) * (D - A - E)
        A, E, Y = dask.persist(A, E, Y)
        del W
        mu *= rho
        residual = float(da.linalg.norm(D - A - E).compute()) / norm
    return {"seconds": round(time.perf_counter() - began, 2), "rank": rank, "residual": residual}
