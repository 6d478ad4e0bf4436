"""The dry run: what a run will take, for people, with the time told from one block."""

from __future__ import annotations

import os
import time
from typing import Any

import dask
import numpy as np

from scialm_dask.config import Settings
from scialm_dask.data.annotated import storable_annotation
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.events import silent
from scialm_dask.linalg.kernels import Block, BlockState, PassInputs, visit
from scialm_dask.run.cluster import workers_here
from scialm_dask.run.placing import place_scratch
from scialm_dask.solve.biological_zeros import PASSES as BIOLOGICAL_ZEROS_PASSES

__all__ = ["plan"]


def time_of_pass(matrix: ExpressionMatrix, width: int, threads: int) -> float:
    """Seconds that one pass will take on `threads` in all, from one block, on whatever scheduler Dask has."""
    seconds: float = dask.delayed(_time_of_block, pure=False)(matrix.for_workers(), width).compute()
    return seconds * len(matrix.blocks) / min(threads, len(matrix.blocks))


def _time_of_block(matrix: ExpressionMatrix, width: int) -> float:
    """Seconds for reading and multiplying one, the second time, when all is compiled."""
    rank = max(1, width // 2)
    right, basis = np.ones((matrix.shape[1], rank), np.float32), np.ones((matrix.shape[1], width), np.float32)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        csr = matrix.read_block(0)
        state = BlockState(csr.data, np.ones((csr.shape[0], rank), np.float32), np.zeros((0, 0), np.float32))
        visit(
            Block(csr.indptr, csr.indices, csr.data, csr.shape[1]),
            state,
            PassInputs(right, basis=basis, overlap=right.T @ basis),
        )
        seconds = time.perf_counter() - began
    return seconds


def plan(
    matrix: ExpressionMatrix,
    settings: Settings,
    *,
    scratch: str = "auto",
    memory_limit: int | None = None,
    scratch_folder: str | os.PathLike[str] | None = None,
    preserve_zeros: bool = False,
) -> dict[str, Any]:
    """Say what a run will take, for people: the forecast and an estimate of the time after timing one block.

    Parameters
    ----------
    matrix, settings, scratch, memory_limit, scratch_folder
        See `scialm_dask.run.checkpointing.Job`.
    preserve_zeros
        Whether biological zeros are looked for too, by another SVD.

    Returns
    -------
    dict
        Memory is that of each process, in bytes, but for ``memory_bytes_in_all``; ``refusal``, in words, is there
        only if the run does not fit, and then no time.
    """
    here, matrix = workers_here(), storable_annotation(matrix, silent)
    place = place_scratch(scratch, matrix, settings, here, folder=scratch_folder, memory_limit=memory_limit)
    need = place.forecast
    passes = need.passes + (BIOLOGICAL_ZEROS_PASSES if preserve_zeros else 0)
    times = {}
    if not place.refusal:  # timing a block takes the memory that there is not
        seconds = time_of_pass(matrix, need.basis_width, here.threads * here.workers)
        times = {"seconds_per_pass": seconds, "seconds": seconds * passes}
    return {
        "n_cells": matrix.shape[0],
        "n_genes": matrix.shape[1],
        "n_observed": matrix.n_stored,
        "n_blocks": len(matrix.blocks),
        "peak_memory_bytes": need.in_memory.memory,
        "peak_memory_bytes_with_zarr_scratch": need.on_disk.memory,
        "zarr_scratch_bytes": need.on_disk.disk,
        "scratch": place.scratch,
        "memory_bytes_in_all": place.memory_in_all,
        "memory_limit_bytes": place.limit,
        "fits": not place.refusal,
        **({"refusal": place.refusal} if place.refusal else {}),
        "workers": here.workers,
        "threads_per_worker": here.threads,
        "basis_width": need.basis_width,
        "iterations": need.iterations,
        "passes": passes,
        "tasks_per_iteration": need.tasks_per_pass * need.passes_per_iteration,
        "bytes_read_per_pass": need.bytes_per_pass,
        **times,
    }
