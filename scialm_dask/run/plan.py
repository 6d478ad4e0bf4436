"""Forecasts of memory, disk and passes from sizes alone, and whether they fit: go, or refuse and say what would."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import dask
import numpy as np
import psutil
from dask.utils import format_bytes

from scialm_dask.config import Settings
from scialm_dask.data.annotated import storable_annotation
from scialm_dask.data.annotation import Annotation
from scialm_dask.data.csr import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.rows import chunk_bytes
from scialm_dask.data.scratch import scratch_folder_for
from scialm_dask.errors import InputError
from scialm_dask.events import silent
from scialm_dask.linalg.kernels import PANEL_VALUES, Block, BlockState, PassInputs, visit
from scialm_dask.linalg.operator import PANEL_COLUMNS
from scialm_dask.linalg.sparse_products import are_compiled
from scialm_dask.run.checkpointing import Job
from scialm_dask.run.cluster import Workers, workers_here
from scialm_dask.solve.biological_zeros import PASSES as BIOLOGICAL_ZEROS_PASSES
from scialm_dask.solve.estimate import PASSES as EMBEDDING_PASSES
from scialm_dask.solve.ialm import basis_width, first_penalty, prefers_short_side, widest_basis, zero_iterations

_FLOAT, _DOUBLE = 4, 8  # bytes
_READ_VALUES = 10  # arrays as long as a block's entries while a task reads them: as stored, scaled, …
_TASK_VALUES = 6  # while it visits them: columns, values, old and new estimate, A there
_TASK_ROWS = 7  # arrays as large as a block's sketch
_DRIVER_PANELS = 5  # float64 arrays of n × l in the small algebra of an SVD
_FREED_PANELS = 3  # of these, kept by the allocator when iterations switch to the short side
_LIKELY_RANK = 0.65  # times √N; the paper's runs end at 0.55 to 0.64 on three data sets, and √2 is the maximum
_STARTED = 160 << 20  # added to a process that has imported everything by loading kernels, reading and scheduling
_COMPILING = 70 << 20  # added by compiling, once for an installation
_IMPORTED = 250 << 20  # of a worker that has imported everything
_STOP_AT = 0.03  # threshold, relative to σ₁, at which held-out stops were seen
_FIRST_PASSES = 4  # the survey, and the first SVD, which reads the blocks
_RELEASE_PASSES = 3
_READING_PASSES = 2  # of denoising: over the training part and over everything
_SURE = 0.99  # share of the limit to advise: the memory at the start varies a little
_MOST_BLOCKS = 256  # to advise, or _FINER times the present number; with more, adding up takes what they save
_FINER = 16
_LEAST_RANK = 16  # to advise

Change = tuple[int, int | None]  # number of blocks, and max_rank, None as it is


@dataclass(frozen=True)
class Forecast:
    """What a run will take. Memory is the peak of each process, in bytes, including imported libraries."""

    in_memory: int  # with the working state in memory
    on_disk: int  # with the working state in Zarr
    scratch: int  # bytes of that Zarr on disk
    basis_width: int  # most columns that the SVD is expected to compute
    iterations: int
    passes_per_iteration: int
    passes: int  # in all
    tasks_per_pass: int  # one for each thread of each worker, and those that add up
    bytes_per_pass: int  # read and written with the state on disk: matrix, estimate and sketch


def forecast(matrix: ExpressionMatrix, settings: Settings, here: Workers) -> Forecast:
    """Forecast a run on the workers `here`, without reading the matrix."""
    (m, n), n_observed = matrix.shape, matrix.n_stored
    n_blocks = len(matrix.blocks)
    threads, groups = min(here.threads, n_blocks), min(here.threads * here.workers, n_blocks)
    most = min(m, n, settings.max_rank or n)
    rank = most if settings.max_rank else min(most, max(1, int(_LIKELY_RANK * math.sqrt(n_observed))))
    completes = settings.method == "complete"
    wanted = basis_width(np.ones(rank), 0.5, rank) if completes else rank
    exact = completes and prefers_short_side(wanted, (m, n))
    width = widest_basis((m, n)) if exact else wanted
    rows = max(matrix.blocks.sizes)
    values = min(n_observed, int(1.3 * n_observed / n_blocks))  # rows differ in length
    panel, levels = n * width, math.ceil(math.log2(n_blocks) + 1)
    visit = _TASK_VALUES * values + _TASK_ROWS * rows * width + 2 * panel
    reading = _READ_VALUES * values + max(0, chunk_bytes(matrix.rows) // _FLOAT - 2 * values)
    task = _FLOAT * max(reading, visit)
    products = threads * task + _FLOAT * panel * levels + _DOUBLE * panel * _DRIVER_PANELS
    if exact:
        freed = _DOUBLE * panel * _FREED_PANELS
        products = max(products, freed + _short_side_memory((m, n), rows, rank, threads, levels))
    working = _base_memory(here.resident) + _to_write(matrix, here.resident) + products + _DOUBLE * n * n_blocks
    kept = completes and settings.stop == "held-out"  # the estimate of the best iteration
    state = _FLOAT * ((2 + kept) * n_observed + m * (2 * wanted + 2 * rank))
    blocks = 2 * _FLOAT * n_observed
    share = math.ceil(n_blocks / here.workers) / n_blocks  # of one process
    iterations, per_iteration, passes = _iterations_and_passes(settings, n_observed / (m * n))
    return Forecast(
        in_memory=int(working + share * (state + blocks)),
        on_disk=int(working),
        scratch=int(state + blocks + _FLOAT * m * rank),
        basis_width=wanted,
        iterations=iterations,
        passes_per_iteration=per_iteration,
        passes=passes,
        tasks_per_pass=2 * groups - 1,
        bytes_per_pass=_FLOAT * (4 * n_observed + m * (wanted + rank)),
    )


def _short_side_memory(shape: tuple[int, int], rows: int, rank: int, threads: int, levels: int) -> int:
    """Return the peak memory, in bytes, of exact triplets by the Gram of the short side."""
    m, n = shape
    gram = _DOUBLE * min(shape) ** 2
    if m > n:
        return gram * (threads + levels + 2)
    pairs = gram // 2 + threads * (2 * _FLOAT * PANEL_VALUES + 2 * _DOUBLE * rows**2)
    some = _FLOAT * n * min(rank, PANEL_COLUMNS) * max(threads + levels - 1, 4)  # of blocks, for some vectors
    projected = _FLOAT * n * rank + max(some, _FLOAT * n * rank)  # then with their signs
    return max(gram + pairs, 3 * gram, projected) + _FLOAT * (m + 2 * n) * rank


def _iterations_and_passes(settings: Settings, density: float) -> tuple[int, int, int]:
    """Return the expected number of iterations, of passes for each of them, and of passes in all."""
    per_iteration = settings.svd_passes if settings.svd_tolerance == 0 else min(settings.svd_passes, 3)
    if settings.method == "denoise":  # besides its SVDs, the survey and the weights take a pass
        return 0, per_iteration, 2 + 2 * settings.svd_passes + _READING_PASSES + EMBEDDING_PASSES
    penalty = first_penalty(1.0, density)
    idle, log_rho = len(zero_iterations(1.0, penalty, 0)[0]), math.log(penalty.rho)
    if settings.stop == "residual":
        working = round(math.log(2.5 / settings.epsilon) / log_rho) - idle
    else:
        working = round(-math.log(_STOP_AT) / log_rho)
    working = max(0, min(working, settings.max_iterations - idle))
    passes = _FIRST_PASSES + working * per_iteration + EMBEDDING_PASSES
    return idle + working, per_iteration, passes + (_RELEASE_PASSES if settings.stop == "held-out" else 0)


def _to_write(matrix: ExpressionMatrix, resident: int | None) -> int:
    """Return the bytes of obs and var, which this process holds twice while it writes them."""
    if resident is not None or not isinstance(matrix.annotation, Annotation):
        return 0
    n_bytes = 0
    for frame in matrix.annotation:
        texts = [frame.index, *(frame[name] for name in frame if frame[name].dtype.kind == "O")]
        each = sum(np.mean([sys.getsizeof(word) for word in text[:100]] or [0]) for text in texts)
        n_bytes += int(frame.memory_usage().sum() + len(frame) * each)
    return n_bytes


def _base_memory(resident: int | None) -> int:
    started = _STARTED + (0 if are_compiled() else _COMPILING)
    if resident is None:
        import dask.array  # noqa: F401 (results need it, so it counts)

        return int(psutil.Process().memory_info().rss) + started
    return max(resident, _IMPORTED) + started  # an idle worker has imported nothing yet


class Place(NamedTuple):
    """Where to keep the working state of a run, and whether it fits."""

    scratch: str  # "memory" or "zarr:PATH"
    forecast: Forecast
    memory: int  # bytes that each process will take
    limit: int  # bytes that it may take
    refusal: str  # why it does not fit and what would; empty if it fits


def place_scratch(job: Job, here: Workers) -> Place:
    """Choose where to keep the working state; raise `InputError` for an unknown `scratch`."""
    scratch = job.scratch
    named = scratch.startswith("zarr:")
    path = scratch.removeprefix("zarr:") if named else os.fspath(job.scratch_folder or scratch_folder_for(None))
    if scratch not in ("auto", "memory") and not (named and path):
        raise InputError(f"scratch is {scratch!r}; give auto, memory, or zarr:PATH with a folder on a local disk")
    limit, raised_by = limit_of(here, job.memory_limit)
    need = forecast(job.matrix, job.settings, here)
    on_disk = named or (scratch == "auto" and need.in_memory > limit)
    memory, refusal = need.on_disk if on_disk else need.in_memory, ""
    free = shutil.disk_usage(path).free if on_disk and os.path.isdir(path) else math.inf
    if memory > limit:
        remedy = _remedy(job, here, limit, raised_by)
        refusal = f"the forecast is {format_bytes(memory)} of memory and the limit {format_bytes(limit)}; {remedy}"
    elif on_disk and need.scratch > free:
        refusal = (
            f"the forecast is {format_bytes(need.scratch)} of scratch and {path} has {format_bytes(int(free))} free; "
            "pass --scratch zarr:PATH with a folder on another disk"
        )
    return Place(f"zarr:{path}" if on_disk else "memory", need, memory, limit, refusal)


def _remedy(job: Job, here: Workers, limit: int, raised_by: str) -> str:
    """Return the options with which the run would fit, or else the least that it needs."""
    now, forecasts = len(job.matrix.blocks), _forecasts(job, here)

    def take(change: Change) -> int:
        one = forecasts[change]
        return one.on_disk if job.scratch.startswith("zarr:") or one.in_memory > limit else one.in_memory

    def words(change: Change) -> str:
        blocks, rank = change
        options = ["--scratch auto"] * (job.scratch == "memory") + [f"--blocks {blocks}"] * (blocks != now)
        return " ".join(options + [f"--max-rank {rank}"] * (rank is not None))

    fit = [change for change in forecasts if take(change) <= _SURE * limit]
    more_blocks = [(blocks, rank) for blocks, rank in fit if rank is None][:1]
    lower_rank = [(blocks, rank) for blocks, rank in fit if rank is not None and blocks == now][:1]
    if chosen := more_blocks + lower_rank or fit[:1]:
        ways = [f"{words(change)} would take {format_bytes(take(change))}" for change in chosen]
        return f"{', '.join(ways)}, or raise {raised_by}"
    least = min(forecasts, key=take)
    by = words(least)
    return f"at least {format_bytes(take(least))} are needed{f', with {by}' if by else ''}; raise {raised_by}"


def _forecasts(job: Job, here: Workers) -> dict[Change, Forecast]:
    """Forecast the run as it is, with twice the blocks and so on, and with lower ranks; mildest changes first."""
    matrix, settings = job.matrix, job.settings

    def foresee(cut: RowBlocks, rank: int | None) -> Forecast:
        changed = settings if rank is None else replace(settings, max_rank=rank)
        return forecast(matrix.with_blocks(cut), changed, here)

    n_cells, blocks = matrix.shape[0], len(matrix.blocks)
    cuts, as_is = {blocks: matrix.blocks}, foresee(matrix.blocks, None)
    if job.resumed:
        return {(blocks, None): as_is}
    finest = min(n_cells, max(_MOST_BLOCKS, _FINER * blocks))
    while (blocks := 2 * blocks) <= finest:
        cuts[blocks] = RowBlocks.even(n_cells, blocks)
    highest = min(as_is.basis_width, settings.max_rank or as_is.basis_width)
    ranks = [2**power for power in range(highest.bit_length(), 0, -1) if _LEAST_RANK <= 2**power < highest]
    return {(number, rank): foresee(cut, rank) for rank in (None, *ranks) for number, cut in cuts.items()}


def limit_of(here: Workers, asked: int | None) -> tuple[int, str]:
    """Return the bytes for each process, `asked` or else those available, and the option that raises them."""
    if here.memory is not None and here.memory < (asked or math.inf):
        return here.memory, "--worker-memory"
    return asked or usable_memory(), "--memory-limit"


def usable_memory() -> int:
    """Return the bytes that this process may use, by its cgroup or the machine."""
    from distributed.system import MEMORY_LIMIT

    return int(min(MEMORY_LIMIT, psutil.virtual_memory().available + psutil.Process().memory_info().rss))


def plan(job: Job, *, preserve_zeros: bool = False) -> dict[str, Any]:
    """Return the forecast of a run as JSON values, with an estimate of the time from timing one block.

    `preserve_zeros` adds the search for biological zeros. Memory is in bytes for each process, except for
    ``memory_bytes_in_all``. If the run does not fit, ``refusal`` says why, and there are no times.
    """
    here, matrix = workers_here(), storable_annotation(job.matrix, silent)
    place = place_scratch(replace(job, matrix=matrix), here)
    need = place.forecast
    passes = need.passes + (BIOLOGICAL_ZEROS_PASSES if preserve_zeros else 0)
    # This process and the scheduler take no more than a worker without the state.
    in_all = here.workers * place.memory + (0 if here.resident is None else need.on_disk)
    times = {}
    if not place.refusal:  # otherwise there is no memory to time a block
        one: float = dask.delayed(_time_of_block, pure=False)(matrix.for_workers(), need.basis_width).compute()
        n_blocks = len(matrix.blocks)
        seconds = one * n_blocks / min(here.threads * here.workers, n_blocks)
        times = {"seconds_per_pass": seconds, "seconds": seconds * passes}
    return {
        "n_cells": matrix.shape[0],
        "n_genes": matrix.shape[1],
        "n_observed": matrix.n_stored,
        "n_blocks": len(matrix.blocks),
        "peak_memory_bytes": need.in_memory,
        "peak_memory_bytes_with_zarr_scratch": need.on_disk,
        "zarr_scratch_bytes": need.scratch,
        "scratch": place.scratch,
        "memory_bytes_in_all": in_all,
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


def _time_of_block(matrix: ExpressionMatrix, width: int) -> float:
    """Return the seconds to read and multiply a block, the second time, when kernels are compiled."""
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
