"""What a run will take, foreseen from sizes alone: memory, disk, passes, tasks and bytes."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import dask
import numpy as np
import psutil
from dask.system import CPU_COUNT

from scialm_dask.config import Settings
from scialm_dask.data.annotation import Annotation
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.rows import chunk_bytes
from scialm_dask.linalg.kernels import PANEL_VALUES
from scialm_dask.linalg.operator import PANEL_COLUMNS
from scialm_dask.linalg.sparse_products import are_compiled
from scialm_dask.solve.embedding import PASSES as EMBEDDING_PASSES
from scialm_dask.solve.ialm import first_penalty, zero_iterations
from scialm_dask.solve.rank import basis_width, prefers_short_side, widest_basis

__all__ = ["Forecast", "Need", "forecast"]

_FLOAT = 4
_READ_VALUES = 10  # arrays as long as a block's entries that a task holds while it reads them: as stored, scaled, …
_TASK_VALUES = 6  # while it visits them: columns, values, old and new estimate, A there
_TASK_ROWS = 7  # arrays as large as a block's sketch
_DRIVER_PANELS = 5  # float64 arrays of n × l that the small algebra of an SVD holds
_FREED_PANELS = 3  # of those, that the allocator keeps when iterations go over to the short side
_DOUBLE = 8
_LIKELY_RANK = (
    0.65  # times √N: where the paper's runs end (0.55 to 0.64 on three data sets; √2 is the most there can be)
)
_STARTED = 160 << 20  # what loading kernels, reading and scheduling add to a process that has imported everything
_COMPILING = 70 << 20  # and what compiling adds, once for an installation
_IMPORTED = 250 << 20  # what a worker holds once it has imported everything
_STOP_AT = 0.03  # threshold, relative to σ₁, at which stops that guard against noise were seen
_FIRST_PASSES = 4  # the survey, and the first SVD, which reads the blocks
_GIVE_BACK_PASSES = 3
_READING_PASSES = 2  # of denoising: of the training part and of everything


@dataclass(frozen=True)
class Need:
    """Bytes of one way to run.

    Parameters
    ----------
    memory
        Peak memory of each process, the imported libraries included.
    disk
        Of the scratch folder.
    """

    memory: int
    disk: int


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Parameters
    ----------
    in_memory, on_disk
        With the working state in memory, and in Zarr on disk.
    basis_width
        Columns that the SVD is expected to compute at most.
    iterations, passes_per_iteration
        Expected.
    passes
        Expected in all: the first ones, those of choosing zeros and those at the end included.
    tasks_per_pass
        One for each thread of each worker, and those that add up.
    bytes_per_pass
        That a pass reads and writes if the state is on disk: the matrix, the estimate and the sketch.
    """

    in_memory: Need
    on_disk: Need
    basis_width: int
    iterations: int
    passes_per_iteration: int
    passes: int
    tasks_per_pass: int
    bytes_per_pass: int


def forecast(
    matrix: ExpressionMatrix,
    settings: Settings,
    threads: int | None = None,
    workers: int = 1,
    resident: int | None = None,
) -> Forecast:
    """Foresee what a run will take; reads nothing.

    Parameters
    ----------
    matrix
        Cells × genes, cut into blocks.
    settings
        How it is to be completed.
    threads
        Tasks that one process runs at once.
    workers
        Number of processes, among which the blocks are shared out.
    resident
        Bytes that the largest of them holds already; None for this process.
    """
    threads = threads or int(dask.config.get("num_workers", None) or CPU_COUNT)
    (m, n), n_observed = matrix.shape, matrix.n_stored
    n_blocks = len(matrix.blocks)
    threads, groups = min(threads, n_blocks), min(threads * workers, n_blocks)
    rank = _likely_rank(settings, min(m, n), n_observed)
    wanted = basis_width(np.ones(rank), 0.5, rank)
    if settings.method == "denoise":
        wanted = rank
    exact = settings.method == "complete" and prefers_short_side(wanted, (m, n))
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
    working = _base_memory(resident) + _to_write(matrix, resident) + products + _DOUBLE * n * n_blocks
    kept = (
        1 if settings.method == "complete" and settings.stop == "held-out" else 0
    )  # the estimate of the best iteration
    state = _FLOAT * ((2 + kept) * n_observed + m * (2 * wanted + 2 * rank))
    blocks = 2 * _FLOAT * n_observed
    share = math.ceil(n_blocks / workers) / n_blocks  # what one process holds
    idle, busy = _iterations(settings, n_observed / (m * n))
    per_iteration = settings.svd_passes if settings.svd_tolerance == 0 else min(settings.svd_passes, 3)
    return Forecast(
        in_memory=Need(int(working + share * (state + blocks)), 0),
        on_disk=Need(int(working), int(state + blocks + _FLOAT * m * rank)),
        basis_width=wanted,
        iterations=idle + busy,
        passes_per_iteration=per_iteration,
        passes=_passes(settings, busy, per_iteration),
        tasks_per_pass=2 * groups - 1,
        bytes_per_pass=_FLOAT * (4 * n_observed + m * (wanted + rank)),
    )


def _short_side_memory(shape: tuple[int, int], rows: int, rank: int, threads: int, levels: int) -> int:
    """Bytes that the exact triplets by the Gram of the short side take, at their peak."""
    m, n = shape
    gram = _DOUBLE * min(shape) ** 2
    if m > n:
        return gram * (threads + levels + 2)
    pairs = gram // 2 + threads * (2 * _FLOAT * PANEL_VALUES + 2 * _DOUBLE * rows**2)
    some = _FLOAT * n * min(rank, PANEL_COLUMNS) * max(threads + levels - 1, 4)  # what blocks give for some vectors
    projected = _FLOAT * n * rank + max(some, _FLOAT * n * rank)  # then with their signs
    return max(gram + pairs, 3 * gram, projected) + _FLOAT * (m + 2 * n) * rank


def _iterations(settings: Settings, density: float) -> tuple[int, int]:
    """Expect iterations whose A is zero, which cost no pass, and others."""
    if settings.method == "denoise":
        return 0, 0
    penalty = first_penalty(1.0, density)
    nothing, _ = zero_iterations(1.0, penalty, 0)
    log_rho, idle = math.log(penalty.rho), len(nothing)
    if settings.stop == "residual":
        working = round(math.log(2.5 / settings.epsilon) / log_rho) - idle
    else:
        working = round(-math.log(_STOP_AT) / log_rho)
    return idle, max(0, min(working, settings.max_iterations - idle))


def _passes(settings: Settings, working: int, per_iteration: int) -> int:
    """Expect passes over the data in all, of so many iterations whose A is not zero."""
    if settings.method == "denoise":
        return 2 + 2 * settings.svd_passes + _READING_PASSES + EMBEDDING_PASSES  # the survey and that of the weights
    passes = _FIRST_PASSES + working * per_iteration + EMBEDDING_PASSES
    if settings.stop == "held-out":
        passes += _GIVE_BACK_PASSES
    return passes


def _likely_rank(settings: Settings, short_side: int, n_observed: int) -> int:
    most = min(short_side, settings.max_rank or short_side)
    return most if settings.max_rank else min(most, max(1, int(_LIKELY_RANK * math.sqrt(n_observed))))


def _to_write(matrix: ExpressionMatrix, resident: int | None) -> int:
    """Bytes of obs and var, which are held twice while they are written, by the process that others work for."""
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
        import dask.array  # noqa: F401 (what a result is made of is to count)

        return int(psutil.Process().memory_info().rss) + started
    return max(resident, _IMPORTED) + started  # a worker that has done nothing yet has imported nothing either
