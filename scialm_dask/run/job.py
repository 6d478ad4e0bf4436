"""One run: survey the matrix, complete it, hand out the result."""

from __future__ import annotations

import atexit
import math
import os
import resource
import shutil
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dask
import numpy as np

from scialm_dask.config import Settings
from scialm_dask.data.factors import Imputation
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.rows import MemoryRows
from scialm_dask.data.scratch import MemoryScratch, Scratch, ZarrScratch
from scialm_dask.data.store import output_error
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Pass, Stage, silent
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.run.cluster import team
from scialm_dask.run.plan import forecast, place_scratch
from scialm_dask.solve.ialm import Completion, complete
from scialm_dask.solve.scaling import Confidence, PreparedBlocks, Survey, prepare, survey
from scialm_dask.solve.stopping import ThresholdStop
from scialm_dask.solve.transform import cell_model
from scialm_dask.solve.zeros import choose_zeros, refit

__all__ = ["complete_matrix"]


def complete_matrix(
    matrix: ExpressionMatrix,
    settings: Settings,
    *,
    scratch: str = "auto",
    memory_limit: int | None = None,
    scratch_folder: str | os.PathLike[str] | None = None,
    confidence: Confidence | None = None,
    listen: Listener = silent,
) -> Imputation:
    """Complete a matrix, on whatever scheduler Dask has.

    Parameters
    ----------
    matrix
        Cells × genes.
    settings
        How.
    scratch
        ``"memory"``: the working state, and the matrix, are held by the workers. ``"zarr:PATH"``: the state is kept
        in a new folder under PATH, on a disk that all workers see, and the matrix is read anew in every pass.
        ``"auto"``: in memory if the forecast fits `memory_limit`, else in Zarr under `scratch_folder`.
    memory_limit
        Bytes that each process may take in all; what is free by default.
    scratch_folder
        Dask's ``temporary-directory`` by default, else the system's.
    confidence
        In zeros, where it is not the same for all; see `Confidence`.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Raises
    ------
    InputError
        If the matrix or the settings cannot be used.
    DoesNotFitError
        If the forecast does not fit memory or disk.
    """
    began = time.perf_counter()
    matrix = matrix.for_workers()
    here = team()
    need = forecast(matrix, settings, here.threads, here.workers)
    folder_for_scratch = scratch_folder or dask.config.get("temporary-directory", None) or tempfile.gettempdir()
    of_workers = here.memory is not None and here.memory < (memory_limit or math.inf)
    scratch = place_scratch(
        scratch,
        need,
        memory_limit=here.memory if of_workers else memory_limit,
        folder=folder_for_scratch,
        raised_by="--worker-memory" if of_workers else "--memory-limit",
    )
    listen(Stage("surveying"))
    found = survey(matrix)
    store, folder = _open_scratch(scratch)

    def operator_of(blocks: PreparedBlocks) -> LowRankPlusSparse:
        return LowRankPlusSparse(blocks, store, resident=folder is None, on_pass=lambda n: listen(Pass(n)))

    try:
        stop = None
        if settings.stop == "count-split" or settings.zeros == "auto":
            choice = choose_zeros(matrix, found, settings, operator_of, listen)
            exponents = choice.gene_exponent, settings.exponents[1]
            settings = replace(settings, zeros=choice.omega, scaling=exponents)
            stop = ThresholdStop(choice.threshold) if settings.stop == "count-split" else None
        if confidence is None:
            confidence = Confidence.uniform(float(settings.zeros), matrix.shape[1])
        listen(Stage("reading"))
        blocks = prepare(matrix, found, settings, confidence=confidence)
        operator = operator_of(blocks)
        _check_validation(operator, settings)
        listen(Stage("iterating", iterations=need.iterations))
        completion = complete(operator, settings, listen, stop)
        report = _report(matrix, found, blocks, operator, completion, settings)
        result = _result(matrix, blocks, operator, report, None if confidence is None else refit_kept(operator))
        result.summary["seconds"] = time.perf_counter() - began
        result.summary["peak_memory_bytes"] = _peak_memory()
        result.summary["forecast_memory_bytes"] = (need.memory if folder is None else need.zarr).memory
        result.summary["scratch"] = "memory" if folder is None else "zarr"
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            # Tasks that were under way may write once more; no thread does when the process ends.
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise output_error(folder, error) from error
        raise
    if folder is not None:  # the result reads its left factor from there
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    # Blocks of a worker that is lost are made anew: a temporary copy of the matrix stays as long as the result.
    if not isinstance(matrix.rows, MemoryRows):
        weakref.finalize(result, _let_go, matrix.rows)
    return result


def _let_go(*held: object) -> None:
    """Hold something until called."""


def refit_kept(operator: LowRankPlusSparse) -> Floats:
    """Refit the singular values of the A that was kept."""
    operator.restore()
    return refit(operator).astype(np.float32)


def _open_scratch(scratch: str) -> tuple[Scratch, str | None]:
    if scratch == "memory":
        return MemoryScratch(), None
    path = scratch.removeprefix("zarr:")
    if not Path(path).is_dir():
        raise InputError(f"{path or scratch}: no such folder for scratch; create it first")
    folder = tempfile.mkdtemp(prefix="scialm-", dir=os.path.abspath(path))
    return ZarrScratch(folder), folder


def _check_validation(operator: LowRankPlusSparse, settings: Settings) -> None:
    if settings.stop != "held-out":
        return
    seen = operator.observations
    if seen.n_held_out == 0:
        raise InputError(
            f"validation is {settings.validation}, which hides none of {seen.n_observed} observed entries, gene by "
            "gene; give a larger share, or stop by the residual"
        )
    if seen.n_emptied:
        raise InputError(
            f"validation is {settings.validation}, which leaves {seen.n_emptied} cells without an observed entry; "
            "give a smaller share, or drop cells with few genes by `scialm-dask qc --min-genes`"
        )


def _report(
    matrix: ExpressionMatrix,
    found: Survey,
    blocks: PreparedBlocks,
    operator: LowRankPlusSparse,
    completion: Completion,
    settings: Settings,
) -> dict[str, Any]:
    last = completion.returned
    return {
        "n_cells": matrix.shape[0],
        "n_genes": matrix.shape[1],
        "n_observed": found.n_observed,
        "n_empty_cells": int(np.count_nonzero(found.cell_counts == 0)),
        "n_empty_genes": int(np.count_nonzero(found.gene_counts == 0)),
        "n_blocks": operator.n_blocks,
        "iterations": len(completion.history),
        "chosen_iteration": completion.chosen,
        "passes": operator.passes + 1,  # the survey is one
        "rank": last.rank,
        "residual": last.residual,
        "held_out_error": None if np.isnan(last.held_out) else last.held_out,
        "converged": completion.converged,
        "stop_reason": completion.reason,
        "scaling": blocks.scales.note,
        "raw_counts": found.integer,
        "zeros": settings.zeros,
        "source": matrix.name,
        "settings": settings.as_dict(),
        "singular_values": list(completion.values),
        "history": {name: [getattr(i, name) for i in completion.history] for name in asdict(completion.history[0])},
        "mean_observed": float(found.gene_sums.sum()) / (matrix.shape[0] * matrix.shape[1]),
    }


def _result(
    matrix: ExpressionMatrix,
    blocks: PreparedBlocks,
    operator: LowRankPlusSparse,
    report: dict[str, Any],
    factors: Floats | None,
) -> Imputation:
    """Put the factors back on the scale of the input, lazily."""
    import dask.array as da

    lefts, right = operator.factors()
    unscaled = dask.delayed(_unscaled)
    scale = blocks.scales
    if factors is not None:
        right = right * factors
    rank, bounds = right.shape[1], operator.bounds
    pieces = []
    for b, left in enumerate(lefts):
        rows = slice(bounds[b], bounds[b + 1])
        piece = unscaled(left, None if scale.cell is None else scale.cell[rows])
        pieces.append(da.from_delayed(piece, shape=(rows.stop - rows.start, rank), dtype=np.float32))
    history = report.pop("history")
    result = Imputation(
        da.concatenate(pieces, axis=0),
        right if scale.gene is None else right / scale.gene[:, None],
        obs=matrix.obs,
        var=matrix.var,
        summary=report,
        history=history,
        clip=matrix.observed == "nonzero",
        model=None if blocks.confidence is not None else cell_model(lefts, blocks, report),
    )
    result.summary["mean_imputed_over_observed"] = _mean(result) / report.pop("mean_observed")
    return result


def _unscaled(left: Floats, scale: Floats | None) -> Floats:
    return left if scale is None else left / scale[:, None]


def _mean(result: Imputation) -> float:
    """Mean of the imputed matrix before clipping, from sums of the factors."""
    sums: Doubles = result.left.sum(axis=0, dtype=np.float64).compute()
    return float(sums @ result.right.sum(axis=0, dtype=np.float64)) / (result.shape[0] * result.shape[1])


def _peak_memory() -> int:
    """Most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells on Linux includes the process that started this one
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
