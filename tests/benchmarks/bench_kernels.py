"""The fused visit of one row block against SciPy's products, on one thread.

SciPy computes S Q and Sᵀ Y, 4 N l operations. The visit computes A on the pattern first (2 N r), updates the
estimate, and makes the same two products of what comes out. Time is that of the thread, so that what else the machine
does counts little; calls take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from harness import Record, interleaved
from threadpoolctl import threadpool_limits

from scialm_dask.linalg import kernels
from scialm_dask.linalg.kernels import Block, BlockState, PassInputs, Update, visit

WIDTHS, DENSITIES = (32, 64, 128, 256), (0.01, 0.05, 0.1, 0.2, 0.4, 0.5, 0.6)
N_GENES, N_VALUES = 20_000, 4_000_000
LEAST_DENSE = 0.1  # below it the dense variant is hopeless, and slow to measure


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="l")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--repetitions", type=int, default=5)


def run(choice: argparse.Namespace) -> Iterator[Record]:
    """Yield one record for each width and density."""
    n_genes, n_values = (1000, 20_000) if choice.small else (N_GENES, N_VALUES)
    for density in choice.densities:
        block = block_of(n_genes, n_values, density)
        for width in choice.widths:
            yield compare(block, width, choice.repetitions)


def block_of(n_genes: int, n_values: int, density: float) -> Block:
    """Draw the pattern of a block with gene means as uneven as in real data, and about `n_values` entries."""
    rng = np.random.default_rng(0)
    means = np.exp(rng.normal(0, 2, n_genes))
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if -np.expm1(-np.exp(middle) * means).mean() > density else (middle, high)
    share = -np.expm1(-np.exp(high) * means)
    n_cells = max(8, int(n_values / share.sum()))
    rows = [np.flatnonzero(rng.random(n_genes) < share).astype(np.int32) for _ in range(n_cells)]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Block(indptr, np.concatenate(rows), rng.gamma(1, 2, indptr[-1]).astype(np.float32), n_genes)


def compare(block: Block, width: int, repetitions: int) -> Record:
    """Time SciPy's two products and the visit, by the sparse and by the dense variant."""
    rng = np.random.default_rng(1)
    rank = width * 3 // 4  # of A, when `width` columns are computed
    right, basis = (rng.standard_normal((block.n_columns, k), dtype=np.float32) for k in (rank, width))
    rotation = rng.standard_normal((width, rank), dtype=np.float32)
    sketch = rng.standard_normal((block.n_rows, width), dtype=np.float32)
    state = BlockState(block.observed, sketch[:, :0], sketch)
    view = PassInputs(right=right, basis=basis, overlap=right.T @ basis, step=Update(rotation, 0.8))
    csr = sp.csr_matrix((block.observed, block.indices, block.indptr), shape=(block.n_rows, block.n_columns))
    calls: dict[str, Any] = {
        "scipy": lambda: (csr @ basis, csr.T @ sketch),
        "sparse": lambda: _visit(block, state, view, density_from=2.0),
    }
    density = len(block.indices) / (block.n_rows * block.n_columns)
    if density >= LEAST_DENSE:
        calls["dense"] = lambda: _visit(block, state, view, density_from=0.0)
    with threadpool_limits(1):
        seconds = interleaved(calls, repetitions, time.thread_time)
    products, extra = 4 * len(block.indices) * width, 2 * len(block.indices) * rank
    work = {"scipy": products, "sparse": products + extra, "dense": products + extra}
    chosen = "dense" if block.is_dense else "sparse"
    speed = {name: 1e-9 * work[name] / np.median(each) for name, each in seconds.items()}
    best = {name: 1e-9 * work[name] / min(each) for name, each in seconds.items()}
    return {
        "benchmark": "kernels",
        "density": round(density, 4),
        "width": width,
        "rank": rank,
        "n_values": len(block.indices),
        "chosen": chosen,
        **{f"{name}_gflops": round(value, 2) for name, value in speed.items()},
        "ratio_of_medians": round(speed[chosen] / speed["scipy"], 2),
        "ratio_of_best": round(best[chosen] / best["scipy"], 2),
    }


def _visit(block: Block, state: BlockState, view: PassInputs, density_from: float) -> None:
    usual = kernels._DENSE_FROM
    kernels._DENSE_FROM = density_from
    try:
        visit(block, state, view)
    finally:
        kernels._DENSE_FROM = usual
