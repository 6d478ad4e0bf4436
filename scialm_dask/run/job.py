"""One run: survey the matrix, complete it, hand out the result; from the beginning or from a checkpoint."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import dask
import numpy as np
from dask.delayed import Delayed

from scialm_dask.config import Settings
from scialm_dask.data.annotated import storable_annotation
from scialm_dask.data.checkpoint import Checkpoint, Checkpoints
from scialm_dask.data.lease import tell_leftovers
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.remote import is_url
from scialm_dask.data.scratch import new_scratch
from scialm_dask.data.store import check_apart
from scialm_dask.data.temporary import is_seen
from scialm_dask.errors import CheckpointError, ClusterError, DoesNotFitError, InputError, OutputError, StoppedError
from scialm_dask.events import Iteration, Listener, Note, Pass, Stage, silent
from scialm_dask.imputation import Imputation
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.tasks import Observations, Store
from scialm_dask.reduction import Placement, current_client, stacked
from scialm_dask.run.checkpointing import Checkpointing, Job, RunState, as_written, ended, job_of
from scialm_dask.run.cluster import ask_everyone, workers_here
from scialm_dask.run.interruption import cluster_is_back, loss_of_cluster, while_workers
from scialm_dask.run.plan import place_scratch
from scialm_dask.solve.denoise import Denoised, DenoiseState, as_plain, denoise
from scialm_dask.solve.estimate import find_axes
from scialm_dask.solve.ialm import Completion, LoopState, complete, iterations
from scialm_dask.solve.scaling import PreparedBlocks, Survey, completion_model, denoising_model, prepare, survey

_RETRIES = 2  # of a task that raises
_MOST_LOSSES = 2  # of the cluster, without a checkpoint between


def run(job: Job, checkpoint: Checkpointing | None = None, listen: Listener = silent) -> Imputation:
    """Complete a matrix, on whatever scheduler Dask has, with checkpoints if that is asked for.

    Raises
    ------
    InputError
        If the matrix or the settings cannot be used, or the store changes while it is read.
    DoesNotFitError
        If the forecast does not fit memory or disk.
    OutputError
        If checkpoints cannot be written.
    ClusterError
        If the cluster was lost, and there are no checkpoints.
    StoppedError
        If it was lost and there are, or the run was asked to stop.
    """
    if checkpoint is None:
        try:
            return fit(RunState(job), listen)
        except Exception as error:
            if (loss := loss_of_cluster(error)) is None:
                raise
            raise ClusterError(f"{loss}; with --checkpoint DIR a run can go on after that") from error
    with checkpoints_of(checkpoint.folder, new_for=job.matrix) as checkpoints:
        RunState(job, checkpoints, checkpoint).save()
        try:
            return _persevere(checkpoints, checkpoint.stop, lambda _: job, listen)
        except (InputError, DoesNotFitError):
            with contextlib.suppress(InputError):
                notes = checkpoints.notes()
                if notes["state"] is None:  # so it cannot be done
                    checkpoints.clear()
            raise


def resume_run(
    folder: str | os.PathLike[str] | Checkpoints,
    matrix: ExpressionMatrix | None = None,
    *,
    scratch: str | None = None,
    memory_limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    listen: Listener = silent,
) -> Imputation:
    """Go on with a run from its last whole checkpoint, on whatever scheduler Dask has now; raises what `run` does.

    The matrix is needed only if it was in memory. `scratch` and `memory_limit` replace what the run was begun with;
    `stop` is that of `Checkpointing`.
    """
    changes = {"scratch": scratch, "memory_limit": memory_limit}
    with checkpoints_of(folder) as checkpoints:
        checkpoints.notes()
        return _persevere(checkpoints, stop, lambda saved: job_of(saved, matrix, changes), listen)


def checkpoints_of(
    folder: str | os.PathLike[str] | Checkpoints, *, new_for: ExpressionMatrix | None = None
) -> AbstractContextManager[Checkpoints]:
    """Open the checkpoints of a run, unless they are open already: those that are there, or none yet, of a new run.

    Raises `InputError` if there is no such folder, `OutputError` if another run uses it, or a new run finds some there.
    """
    if not isinstance(folder, Checkpoints):
        if new_for is None and not is_url(folder) and not os.path.isdir(folder):
            raise InputError(f"{os.fspath(folder)}: no such folder of checkpoints; check the path")
        if new_for is not None and new_for.origin is not None:
            check_apart(folder, (new_for.origin.path,))
        opened: AbstractContextManager[Checkpoints] = Checkpoints(folder)
    else:
        opened = contextlib.nullcontext(folder)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(opened)
        if new_for is not None and checkpoints.names():
            raise OutputError(
                f"{checkpoints.folder}: holds checkpoints already; go on from them by `scialm-dask resume "
                f"{checkpoints.folder}`, or choose another folder"
            )
        stack.pop_all()
    return opened


def _persevere(
    checkpoints: Checkpoints, stop: Callable[[], bool], job_from: Callable[[Checkpoint], Job], listen: Listener
) -> Imputation:
    """Go on from the last checkpoint that can be used; when the cluster is lost and back, again."""
    refusals: list[str] = []
    losses = 0
    while True:
        if not (names := checkpoints.names()):
            why = "; ".join(refusals) or "there is none"
            raise InputError(f"{checkpoints.folder}: no checkpoint can be used ({why}); begin anew in another folder")
        try:
            saved = checkpoints.read(names[0])
            if words := ended(checkpoints.folder, saved.notes):
                raise InputError(words)
            with as_written(saved.path):
                asked = Checkpointing(checkpoints, saved.notes["every"], dict(saved.notes["result"]), stop)
            return fit(RunState(job_from(saved), checkpoints, asked, saved), listen)
        except CheckpointError as error:
            refusals.append(str(error))
            checkpoints.refuse(names[0])
            listen(Note(f"{error}; the one before it is used"))
        except OutputError as error:
            raise OutputError(f"{error}; then go on by `scialm-dask resume {checkpoints.folder}`") from error
        except Exception as error:
            if (loss := loss_of_cluster(error)) is None:
                raise
            losses = losses + 1 if checkpoints.names()[0] == names[0] else 1
            if losses > _MOST_LOSSES or not cluster_is_back():
                again = f"go on by `scialm-dask resume {checkpoints.folder}` when there is a cluster again"
                raise StoppedError(f"{loss}; {again}") from error
            listen(Note(f"{loss}; going on from checkpoint {names[0]}"))


def fit(known: RunState, listen: Listener) -> Imputation:
    """Make the run once, from what is known of it."""
    began, job, here = time.perf_counter(), known.job, workers_here()
    matrix = storable_annotation(job.matrix, listen).for_workers()
    place = place_scratch(replace(job, matrix=matrix), here)
    if place.refusal:
        raise DoesNotFitError(place.refusal)
    in_memory, folder = place.scratch == "memory", place.scratch.removeprefix("zarr:")
    if job.scratch.startswith("zarr:"):  # else it lies beside the result, of which that is told already
        tell_leftovers(folder, listen)
    with (
        dask.annotate(retries=_RETRIES),
        while_workers(current_client()),
        new_scratch(None if in_memory else folder, matrix.rows) as store,
    ):
        if store.path is not None and not is_seen(store.path):
            raise InputError(
                f"{folder}: workers do not see the scratch in it; give --scratch zarr:FOLDER on a disk that all share, "
                "or --scratch memory"
            )
        listen(Stage("surveying"))
        found = survey(matrix)
        known.surveyed(found, store.path)
        fitting = _Fitting(replace(job, matrix=matrix), known, found, store, listen)
        denoises = job.settings.method == "denoise"
        result = _denoise(fitting) if denoises else _complete(fitting, place.forecast.iterations)
        if matrix.observed == "nonzero":
            listen(Stage("embedding"))
            lefts = result.left.to_delayed().ravel().tolist()
            result.axes = find_axes(result.estimate, lefts, matrix.blocks.bounds, fitting.tell_pass)
        result.summary["passes"] = next(fitting.passes) - 1
    peaks = ask_everyone(peak_memory)
    result.summary |= {
        "date": datetime.now(UTC).isoformat(" ", "minutes").replace("+00:00", " UTC"),
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": max(peaks),
        "peak_memory_bytes_in_all": sum(peaks),
        "forecast_memory_bytes": place.memory,
        "scratch": "memory" if in_memory else "zarr",
    }
    return result


@dataclass
class _Fitting:
    """A run under way: what is to be done, what is known, and where its blocks are."""

    job: Job
    known: RunState
    found: Survey
    store: Store
    listen: Listener

    def __post_init__(self) -> None:
        self.placement, self.passes = Placement(self.store), count(2)  # the survey was the first

    def tell_pass(self, _: int = 0) -> None:
        """Tell that a pass over the data is made."""
        self.listen(Pass(next(self.passes)))

    def operator(
        self, blocks: PreparedBlocks, check: Callable[[Observations], None] | None = None
    ) -> LowRankPlusSparse:
        """Return W over these blocks; `check` judges what is observed once it is read."""

        def on_read(seen: Observations) -> None:
            if seen.sum_squares + seen.held_out_squares == 0:
                where = "" if blocks.molecules is None else " in the share of the molecules that is fitted"
                name = blocks.matrix.name
                raise InputError(f"{name}: every observed entry is zero{where}; there is nothing to complete")
            if check is not None:
                check(seen)
            self.known.check_source(self.listen, read_once=False)

        return LowRankPlusSparse(
            blocks,
            self.store,
            on_pass=self.tell_pass,
            before_pass=self.known.stop_if_asked,
            on_read=on_read,
            placement=self.placement,
        )


def _denoise(fitting: _Fitting) -> Imputation:
    job, known, found, listen = fitting.job, fitting.known, fitting.found, fitting.listen
    listen(Stage("denoising"))
    state = before = known.load(DenoiseState)
    try:
        for step in denoise(job.matrix, found, job.settings, fitting.operator, before):
            if isinstance(step, Denoised):
                result = denoised(found, prepare(job.matrix, found, job.settings), step, job.settings)
            else:
                state = step
                known.save(state)
    except StoppedError:
        if state is not None:
            known.save(state, now=True)
        raise
    known.check_source(listen, read_once=False)
    return result


def _complete(fitting: _Fitting, n_iterations: int) -> Imputation:
    known, found, settings, listen = fitting.known, fitting.found, fitting.job.settings, fitting.listen

    def check(seen: Observations) -> None:
        _check_validation(seen, settings)
        known.check_observations(seen)

    listen(Stage("reading"))
    blocks = prepare(fitting.job.matrix, found, settings)
    operator = fitting.operator(blocks, check)
    state = before = known.load(LoopState, operator)
    listen(Stage("iterating", iterations=n_iterations))
    try:
        for state in iterations(operator, settings, listen, state=before):
            known.save(state, operator)
        assert state is not None
        completion = complete(operator, state, settings)
    except StoppedError:
        if state is not None:
            known.save(state, operator, now=True)
        raise
    known.check_source(listen, read_once=not operator.depends_on_workers)
    result = completed(found, blocks, operator, completion, settings)
    if before is not None:
        result.summary["resumed_after_iteration"] = before.steps
    return result


def _check_validation(seen: Observations, settings: Settings) -> None:
    if settings.stop != "held-out":
        return
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
    if 0 in (seen.sum_squares, seen.held_out_squares):
        share = "all" if seen.sum_squares == 0 else "none"
        raise InputError(
            f"validation is {settings.validation}, which hides {share} of the observed entries other than zero; give "
            "another share, or stop by the residual"
        )


def completed(
    found: Survey, blocks: PreparedBlocks, operator: LowRankPlusSparse, completion: Completion, settings: Settings
) -> Imputation:
    """Return the result of a completion: its factors on the scale of the input, and what was done and found."""
    (lefts, right), last = operator.factors(), completion.returned
    model = completion_model(lefts, blocks, found, residual=last.residual)
    summary = {
        "iterations": len(completion.history),
        "chosen_iteration": completion.chosen,
        "rank": last.rank,
        "residual": last.residual,
        "held_out_error": None if np.isnan(last.held_out) else last.held_out,
        "converged": completion.converged,
        "stop_reason": completion.reason,
        "singular_values": list(completion.values),
    }
    history = {line.name: [getattr(i, line.name) for i in completion.history] for line in fields(Iteration)}
    return _result(found, blocks, settings, lefts, right, summary, history=history, model=model)


def denoised(found: Survey, blocks: PreparedBlocks, outcome: Denoised, settings: Settings) -> Imputation:
    """Return the result of denoising: low rank plus sparse, on the scale of the input, and what was found."""
    svd, weights = outcome.svd, outcome.weights
    lefts = outcome.operator.sketched(svd.to_left * (weights.component * svd.values))
    return _result(
        found,
        blocks,
        settings,
        lefts,
        svd.right,
        as_plain(outcome),
        history={},
        model=denoising_model(blocks, found, weights.component),
        residual_weight=weights.residual,
        counts=blocks.matrix,
    )


def _result(
    found: Survey,
    blocks: PreparedBlocks,
    settings: Settings,
    lefts: list[Delayed],
    right: Floats,
    of_method: dict[str, Any],
    **parts: Any,
) -> Imputation:
    """Put factors back on the scale of the input, lazily, and sum up what was found."""
    matrix, scales = blocks.matrix, blocks.scales
    summary: dict[str, Any] = {
        "n_cells": matrix.shape[0],
        "n_genes": matrix.shape[1],
        "n_observed": found.n_observed,
        "n_empty_cells": int(np.count_nonzero(found.cell_counts == 0)),
        "n_empty_genes": int(np.count_nonzero(found.gene_counts == 0)),
        "scaling": scales.note,
        "raw_counts": found.integer,
        "source": matrix.name,
        "settings": settings.as_dict(),
        "n_blocks": len(matrix.blocks),
        **of_method,
    }
    if scales.cell is not None:
        divide, cell = dask.delayed(np.divide), scales.cell[:, None]
        lefts = [divide(left, cell[slice(*span)]) for left, span in zip(lefts, matrix.blocks, strict=True)]
    result = Imputation(
        stacked(lefts, matrix.blocks.sizes, right.shape[1]),
        right if scales.gene is None else right / scales.gene[:, None],
        obs=matrix.obs,
        var=matrix.var,
        summary=summary,
        clip=matrix.observed == "nonzero",
        **parts,
    )
    if matrix.observed == "nonzero":  # of values of either sign a ratio of means says nothing
        observed = float(found.gene_sums.sum())
        summary["mean_observed"] = observed / matrix.shape[0] / matrix.shape[1]
        summary["mean_imputed_over_observed"] = _sum(result, found) / observed
    return result


def _sum(result: Imputation, found: Survey) -> float:
    """Sum of the imputed matrix before clipping, from sums of the factors and of the counts."""
    sums: Doubles = result.left.sum(axis=0, dtype=np.float64).compute()
    of_genes = result.right @ sums
    if result.residual_weight is not None:
        of_genes += result.residual_weight * (found.gene_sums - of_genes)
    return float(of_genes.sum())


def peak_memory() -> int:
    """Most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells on Linux includes the process that started this one
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
