"""One whole imputation of an atlas: 1M cells × 20k genes, state in Zarr on a local disk, result written."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness import Record, gigabytes, in_child


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--source", help="AnnData store with counts, instead of simulating one")
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.04)
    parser.add_argument("--iterations", type=int, default=15, help="exactly so many")
    parser.add_argument("--memory-limit", default="4GB")
    parser.add_argument("--folder", help="for the matrix, the state and the result, on a local disk")


def run(choice: argparse.Namespace) -> Iterator[Record]:
    """Yield the record of the simulation, if one is made, and of the imputation."""
    if choice.small:
        choice.cells, choice.genes, choice.density, choice.iterations = 2000, 300, 0.2, 4
    with tempfile.TemporaryDirectory(dir=choice.folder) as folder:
        source = choice.source
        if source is None:
            source = str(Path(folder) / "counts.zarr")
            simulation = {"destination": source, "n_cells": choice.cells, "n_genes": choice.genes}
            record = in_child("bench_dense_dask", "simulated", **simulation, density=choice.density)
            yield {"benchmark": "atlas", "what": "simulate", **record}
        settings = {"iterations": choice.iterations, "memory_limit": choice.memory_limit}
        yield {
            "benchmark": "atlas",
            "what": "impute",
            "memory_limit": choice.memory_limit,
            **in_child("bench_atlas", "imputation", source=source, folder=folder, **settings),
        }


def imputation(source: str, folder: str, iterations: int, memory_limit: str) -> Record:
    """Impute and write the factors."""
    from scialm_dask import impute

    result = impute(
        source,
        preset="complete",
        scratch=f"zarr:{folder}",
        memory_limit=memory_limit,
        max_iterations=iterations,
        patience=iterations,  # so that none is left out
    )
    result.to_zarr(str(Path(folder) / "imputed.zarr"))
    told = {name: result.summary[name] for name in ("n_cells", "n_genes", "n_observed", "n_blocks", "rank")}
    return {
        **told,
        **{name: result.summary[name] for name in ("iterations", "passes", "residual", "held_out_error")},
        "forecast_GB": gigabytes(result.summary["forecast_memory_bytes"]),
    }
