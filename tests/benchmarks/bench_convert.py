"""`convert` of a large .h5ad against AnnData's own ways: in memory, and by its experimental reading out of core."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Record, gigabytes, in_child, peak_memory

WAYS = ("own", "in_memory", "out_of_core")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--compression", nargs="+", choices=["none", "gzip"], default=["none", "gzip"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3, help="in turns; the fastest of each is given")
    parser.add_argument("--folder", help="for the files, on a local disk")


def run(choice: argparse.Namespace) -> Iterator[Record]:
    """Yield one record for each way and compression."""
    if choice.small:
        choice.cells, choice.genes, choice.rounds = 300, 200, 1
    with tempfile.TemporaryDirectory(dir=choice.folder) as folder:
        simulation = {"n_cells": choice.cells, "n_genes": choice.genes, "density": choice.density}
        in_child("bench_convert", "written", folder=folder, **simulation)
        for compression in choice.compression:
            source = str(Path(folder) / f"{compression}.h5ad")
            best: dict[str, Record] = {}
            for _ in range(choice.rounds):
                for way in choice.ways:
                    record = in_child("bench_convert", "converted", way=way, source=source, folder=folder)
                    best[way] = min(best.get(way, record), record, key=lambda found: float(found["seconds"]))
            for way, record in best.items():
                yield {"benchmark": "convert", "compression": compression, "way": way, **record}


def written(folder: str, **simulation: Any) -> Record:
    """Write the same simulated counts to .h5ad files, as AnnData does by default and with gzip."""
    import anndata

    from scialm_dask.evaluate.simulate import simulate

    made = Path(folder) / "made.zarr"
    simulate(made, rank=10, seed=0, **simulation)
    counts = anndata.read_zarr(made)
    counts.layers.clear()
    counts.write_h5ad(Path(folder) / "none.h5ad")
    counts.write_h5ad(Path(folder) / "gzip.h5ad", compression="gzip")
    return {}


def converted(way: str, source: str, folder: str) -> Record:
    """Convert in one of the ways."""
    import anndata
    import h5py

    from scialm_dask.data.ingest import convert

    with h5py.File(source) as file:
        megabytes = sum(file["X"][name].size * file["X"][name].dtype.itemsize for name in ("data", "indices")) / 1e6
    with tempfile.TemporaryDirectory(dir=folder) as place:
        target = os.path.join(place, "out.zarr")
        began, processor = time.perf_counter(), time.process_time()
        if way == "own":
            convert(source, target)
        elif way == "in_memory":
            anndata.read_h5ad(source).write_zarr(target)
        else:
            with h5py.File(source) as file:
                lazy = anndata.AnnData(anndata.experimental.read_elem_lazy(file["X"]))
                lazy.write_zarr(target)
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        size = sum(path.stat().st_size for path in Path(target).rglob("*") if path.is_file())
    return {
        "seconds": round(seconds, 3),
        "processor_seconds": round(processor, 3),
        "MB_per_second": round(megabytes / seconds, 1),
        "MB_per_processor_second": round(megabytes / processor, 1),
        "written_MB": round(size / 1e6, 1),
        "peak_GB": gigabytes(peak_memory()),
    }
