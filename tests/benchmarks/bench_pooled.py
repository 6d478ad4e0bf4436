"""Pooled measurements: a sweep beside the notebook's way, and the cost of a pass as cells grow.

Cells are simulated in the task that needs them, keyed by cell.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from harness import gigabytes, in_child, peak_memory

from scialm_dask.pooled.als import cell_factors, nearest_loadings, start_loadings, visit_cells
from scialm_dask.pooled.base import Measurements
from scialm_dask.pooled.design import measure, random_pools
from scialm_dask.pooled.nuclear import BlockIterate, admm, visit_gram

GENES, POOLS, RANK = 100, 25, 10
BLOCK = 25_000


def seed_simulation(seed: int, cells: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Give the notebook's M and P."""
    rng = np.random.default_rng(seed)
    U, V = rng.normal(10, 2, (cells, RANK)), rng.normal(15, 3, (GENES, RANK))
    return U @ V.T, random_pools(GENES, POOLS, random_state=seed)


def notebook_sweep(D: np.ndarray, P: np.ndarray, V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One sweep as the notebook does it."""
    import cvxpy
    from scipy.optimize import nnls

    A = P.T @ V
    U = np.apply_along_axis(lambda row: nnls(A, row)[0], axis=1, arr=D)
    unknown = cvxpy.Variable(V.shape)
    cost = cvxpy.norm(U @ unknown.T @ P - D, "fro")
    cvxpy.Problem(cvxpy.Minimize(cost), [cvxpy.min(unknown) >= 0]).solve(solver="CLARABEL")
    return U, unknown.value


def own_sweep(D: np.ndarray, P: np.ndarray, V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One sweep as the package does it."""
    U = cell_factors(D, 0, P.T @ V, 0.0)
    return U, nearest_loadings(U.T @ U, P @ (D.T @ U), np.linalg.eigh(P @ P.T), V)


def compare_sweeps(cells: int = 500) -> dict[str, Any]:
    """Time one sweep of each from the same start."""
    M, P = seed_simulation(0, cells)
    P = P.astype(float)
    D, V = M @ P, start_loadings(GENES, RANK, 0, 0)
    own_sweep(D, P, V)  # compiles
    seconds, misfit = {}, {}
    for name, sweep in (("own", own_sweep), ("notebook", notebook_sweep)):
        begin = time.perf_counter()
        U, new = sweep(D, P, V)
        seconds[name] = time.perf_counter() - begin
        misfit[name] = float(np.linalg.norm(U @ new.T @ P - D) / np.linalg.norm(D))
    ratio = seconds["own"] / seconds["notebook"]
    return {"what": "sweep", "cells": cells, "seconds": seconds, "misfit": misfit, "ratio": ratio}


def simulate_block(rows: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Draw sparse non-negative expression of some cells, keyed by cell."""
    keys = rows[:, None].astype(np.uint64) * np.uint64(RANK) + np.arange(RANK, dtype=np.uint64)
    keys = (keys + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((keys ^ (keys >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
    return np.asarray((uniform**3) @ V.T)


def simulated(cells: int, block: int = BLOCK) -> tuple[Any, np.ndarray]:
    """Give lazy measurements of simulated cells, in which non-negativity binds; and the design."""
    import dask.array as da

    V = np.random.default_rng(0).gamma(0.3, 1.0, (GENES, RANK))
    P = random_pools(GENES, POOLS)
    rows = da.arange(cells, chunks=block)
    M = rows.map_blocks(simulate_block, V, new_axis=1, chunks=(rows.chunks[0], (GENES,)), meta=np.empty((0, 0)))
    return measure(M, P), P


def one_pass(method: str, cells: int, block: int = BLOCK, passes: int = 4) -> dict[str, Any]:
    """Time each of a few passes, and take the peak memory of the process."""
    D, P = simulated(cells, block)
    P = P.astype(float)
    measured = Measurements.of(D, POOLS)
    seconds = []

    def timed(visit: Any) -> Any:
        def run(*settings: Any) -> Any:
            begin = time.perf_counter()
            sums = visit(*settings)
            seconds.append(time.perf_counter() - begin)
            return sums

        return run

    own_sweep(np.ones((2, POOLS)), P, start_loadings(GENES, RANK, 0, 0))  # compiles
    if method == "als":
        V, basis, visit = start_loadings(GENES, RANK, 0, 0), np.linalg.eigh(P @ P.T), timed(measured.total)
        for _ in range(passes):
            sums = visit(visit_cells, P.T @ V, 0.0)
            V = nearest_loadings(sums["UU"], P @ sums["UD"].T, basis, V)
    else:
        scale, inverse = float(np.sqrt(np.trace(measured.total(visit_gram)["DD"]))), np.linalg.pinv(P)
        iterate = BlockIterate(measured, P, 0.0, scale, inverse, None)
        admm(timed(iterate.advance), inverse.T @ (inverse / POOLS), P, 0.0, 1e-6, passes)
    return {
        "what": method,
        "cells": cells,
        "passes": len(seconds),
        "pass_seconds": [round(each, 3) for each in seconds],
        "peak_GB": gigabytes(peak_memory()),
    }


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--cells", type=int, nargs="*", default=[50_000, 200_000, 1_000_000])


def run(choice: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one record for the sweeps, and one for each method and size, which have processes of their own."""
    cells = [400] if choice.small else choice.cells
    yield {"benchmark": "pooled", **compare_sweeps(40 if choice.small else 500)}
    for method in ("als", "nuclear"):
        for count in cells:
            yield {"benchmark": "pooled", **in_child("bench_pooled", "one_pass", method=method, cells=count)}
