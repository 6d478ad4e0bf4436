"""The preset `paper` against the published program, restated with SciPy, on PBMC of donor A.

The program: W as a LinearOperator, sparse plus low rank, its SVD by ``svds(solver="propack")`` asked for
10 ε, the number of singular values by equation 13; float64, as published.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from harness import FOLDER, Record, in_child
from scipy.sparse.linalg import LinearOperator, svds

PBMC = "reference/pbmc_donor_a_mask10.h5ad"


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    folder = os.environ.get("SCIALM_DATA") or FOLDER.parents[1].parent / "shared"
    parser.add_argument("--source", default=str(Path(folder) / PBMC), help="masked matrix; $SCIALM_DATA by default")
    parser.add_argument("--iterations", type=int, default=1000, help="the most; ends earlier at ε = 1e-4")
    parser.add_argument("--only", choices=["own", "program"])


def run(choice: argparse.Namespace) -> Iterator[Record]:
    """Yield one record for each, with the seconds to each iteration, and the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"source": choice.source, "iterations": choice.iterations}
        if choice.small:
            settings = {"source": simulated(folder), "iterations": 8, "increment": 10}
        records = {}
        for name in [choice.only] if choice.only else ["own", "program"]:
            records[name] = in_child("bench_published", name, **settings)
            yield {"benchmark": "published", "what": name, **records[name]}
    if len(records) == 2 and all(record["survived"] for record in records.values()):
        yield compare(**records)


def compare(own: Record, program: Record) -> Record:
    """Time of the program over ours, at each iteration that both made."""
    ratios = [theirs / ours for theirs, ours in zip(program["seconds_to"], own["seconds_to"], strict=False)]
    return {
        "benchmark": "published",
        "what": "ratio",
        "iterations": len(ratios),
        "to_each_iteration": [round(ratio, 1) for ratio in ratios],
        "to_the_last": round(ratios[-1], 1),
        "of_processor_time": round(program["processor_seconds"] / own["processor_seconds"], 1),
        "reached_epsilon": own["residuals"][-1] < 1e-4 and program["residuals"][-1] < 1e-4,
        "largest_difference_of_residuals": max(
            abs(a / b - 1) for a, b in zip(own["residuals"], program["residuals"], strict=False)
        ),
    }


def simulated(folder: str, n_cells: int = 150, n_genes: int = 100) -> str:
    """Write a matrix that takes no time."""
    from scialm_dask.evaluate.simulate import simulate

    path = str(Path(folder) / "small.zarr")
    simulate(path, n_cells=n_cells, n_genes=n_genes, density=0.3, rank=5)
    return path


def own(source: str, iterations: int, increment: int = 200) -> Record:
    """Run this package. Compiling, on the first run after a change, is not counted."""
    from scialm_dask import impute
    from scialm_dask.events import Event, Iteration

    small = sp.random_array((80, 60), density=0.3, rng=np.random.default_rng(0), format="csr")
    impute(small, preset="paper", max_iterations=5)
    ticks: list[Any] = []
    clock = _clock()

    def note(event: Event) -> None:
        if isinstance(event, Iteration):
            ticks.append((*clock(), event.rank, event.residual))

    impute(
        source,
        preset="paper",
        max_iterations=iterations,
        increment=increment,
        listen=note,
    )
    return _record(ticks)


def program(source: str, iterations: int, increment: int = 200) -> Record:
    """Run the published program."""
    from scialm_dask import ExpressionMatrix

    D = sp.vstack(list(ExpressionMatrix.open(source).stream()), format="csr").astype(np.float64)
    clock = _clock()
    ticks = [(*clock(), *found) for found in published(D, iterations, increment)]
    return _record(ticks)


def published(
    D: sp.csr_matrix, iterations: int, increment: int, *, epsilon: float = 1e-4, first: int = 5
) -> Iterator[tuple[int, float]]:
    """Algorithm 3; yields rank and residual of each iteration."""
    (m, n), d = D.shape, D.data
    most = min(m, n) - 1  # that svds gives
    norm = np.linalg.norm(d)
    mu = 0.3 / svds(D, 1, solver="propack", return_singular_vectors=False)[0]
    rho, sv = 1.1 + 2.5 * D.nnz / (m * n), first
    U, V, a, w = np.zeros((m, 0)), np.zeros((n, 0)), np.zeros_like(d), d.copy()
    for _ in range(iterations):
        S = sp.csr_matrix((w - a, D.indices, D.indptr), shape=(m, n))
        left, values, right = svds(plus_low_rank(S, U, V), min(sv, most), solver="propack", tol=10 * epsilon)
        kept = np.argsort(-values)[: int(np.count_nonzero(values > 1 / mu))]
        U, V = left[:, kept] * (values[kept] - 1 / mu), right[kept].T
        sv = len(kept) + 1 if len(kept) < sv else min(len(kept) + increment, min(m, n))
        a = on_pattern(D, U, V)
        w = d + (w - a) / rho
        mu *= rho
        residual = float(np.linalg.norm(d - a) / norm)
        yield len(kept), residual
        if residual < epsilon:
            return


def plus_low_rank(S: sp.csr_matrix, U: np.ndarray, V: np.ndarray) -> LinearOperator:
    """S + U Vᵀ."""
    St = S.T.tocsr()
    return LinearOperator(
        S.shape,
        matvec=lambda x: S @ x + U @ (V.T @ x),
        rmatvec=lambda x: St @ x + V @ (U.T @ x),
        dtype=np.float64,
    )


def on_pattern(D: sp.csr_matrix, U: np.ndarray, V: np.ndarray, rows: int = 256) -> np.ndarray:
    """U Vᵀ at the entries of D: dense, some rows at a time, then picked."""
    entries = np.empty(D.nnz)
    for start in range(0, D.shape[0], rows):
        part = slice(D.indptr[start], D.indptr[min(start + rows, D.shape[0])])
        counts = np.diff(D.indptr[start : start + rows + 1])
        entries[part] = (U[start : start + rows] @ V.T)[np.repeat(np.arange(len(counts)), counts), D.indices[part]]
    return entries


def _clock() -> Callable[[], tuple[float, float]]:
    """Give a function that tells seconds since now, on the wall and of all threads on a processor."""
    began = time.perf_counter(), time.process_time()
    return lambda: (time.perf_counter() - began[0], time.process_time() - began[1])


def _record(ticks: list[Any]) -> Record:
    seconds, processor, ranks, residuals = zip(*ticks, strict=True)
    return {
        "seconds": round(seconds[-1], 3),
        "iterations": len(ticks),
        "seconds_to": [round(value, 3) for value in seconds],
        "processor_seconds": round(processor[-1], 3),
        "ranks": ranks,
        "residuals": [float(f"{value:.4g}") for value in residuals],
    }
