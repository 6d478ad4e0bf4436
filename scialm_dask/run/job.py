"""Run a job: survey the matrix, impute it, return the result; from the start or from a checkpoint."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import dask
import numpy as np
from dask.delayed import Delayed

from scialm_dask.data.annotated import storable_annotation
from scialm_dask.data.checkpoint import Checkpoint, Checkpoints
from scialm_dask.data.lease import tell_leftovers
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.remote import is_url
from scialm_dask.data.scratch import new_scratch
from scialm_dask.data.store import check_apart
from scialm_dask.data.temporary import is_seen
from scialm_dask.errors import CheckpointError, DoesNotFitError, InputError, OutputError, StoppedError
from scialm_dask.events import Iteration, Listener, Note, Pass, Stage, silent
from scialm_dask.imputation import Imputation
from scialm_dask.linalg.kernels import Floats
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.tasks import Observations, Store
from scialm_dask.reduction import Placement, current_client, stacked
from scialm_dask.run.checkpointing import Checkpointing, Job, RunState, as_written, ended, job_of
from scialm_dask.run.cluster import ask_everyone, workers_here
from scialm_dask.run.interruption import cluster_is_back, loss_of_cluster, losses_explained, while_workers
from scialm_dask.run.plan import place_scratch
from scialm_dask.solve.denoise import Denoised, DenoiseState, denoise
from scialm_dask.solve.estimate import find_axes
from scialm_dask.solve.ialm import LoopState, complete, iterations
from scialm_dask.solve.scaling import PreparedBlocks, Survey, cell_model, mean_and_covariance, prepare, survey

_RETRIES = 2  # of a task that raises
_MOST_LOSSES = 2  # of the cluster, without a new checkpoint in between


def run(job: Job, checkpoint: Checkpointing | None = None, listen: Listener = silent) -> Imputation:
    """Impute a matrix on the present scheduler of Dask, with checkpoints if asked for.

    Raises `InputError` if the matrix or the settings cannot be used, or the store changes while it is read,
    `DoesNotFitError` if the forecast does not fit memory or disk, `OutputError` if checkpoints cannot be written,
    `ClusterError` if the cluster is lost without checkpoints, and `StoppedError` if it is lost with checkpoints, or the
    run is asked to stop.
    """
    if checkpoint is None:
        with losses_explained("; with --checkpoint DIR a run can be resumed"):
            return fit(RunState(job), listen)
    with checkpoints_of(checkpoint.folder, new_for=job.matrix) as checkpoints:
        RunState(job, checkpoints, checkpoint).save()
        try:
            return _persevere(checkpoints, checkpoint.stop, lambda _: job, listen)
        except (InputError, DoesNotFitError):
            with contextlib.suppress(InputError):
                if checkpoints.notes()["state"] is None:  # so resuming would fail too
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
    """Continue a run from its last valid checkpoint, on the present scheduler; raises what `run` raises.

    Give the matrix if it was in memory. `scratch` and `memory_limit` replace the values that the run began with; `stop`
    is as in `Checkpointing`.
    """
    changes = {"scratch": scratch, "memory_limit": memory_limit}
    with checkpoints_of(folder) as checkpoints:
        checkpoints.notes()
        return _persevere(checkpoints, stop, lambda saved: job_of(saved, matrix, changes), listen)


@contextlib.contextmanager
def checkpoints_of(
    folder: str | os.PathLike[str] | Checkpoints, *, new_for: ExpressionMatrix | None = None
) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run, unless they are open already; `new_for` is the matrix of a new run.

    Raises `InputError` if there is no such folder, and `OutputError` if another run uses it or, for a new run, if it
    holds checkpoints.
    """
    if isinstance(folder, Checkpoints):
        opened: contextlib.AbstractContextManager[Checkpoints] = contextlib.nullcontext(folder)
    else:
        if new_for is None and not is_url(folder) and not os.path.isdir(folder):
            raise InputError(f"{os.fspath(folder)}: no such folder of checkpoints; check the path")
        if new_for is not None and new_for.origin is not None:
            check_apart(folder, (new_for.origin.path,))
        opened = Checkpoints(folder)
    with opened as checkpoints:
        if new_for is not None and checkpoints.names():
            raise OutputError(
                f"{checkpoints.folder}: holds checkpoints already; continue from them with `scialm-dask resume "
                f"{checkpoints.folder}`, or choose another folder"
            )
        yield checkpoints


def _persevere(
    checkpoints: Checkpoints, stop: Callable[[], bool], job_from: Callable[[Checkpoint], Job], listen: Listener
) -> Imputation:
    """Fit from the last usable checkpoint, and again each time the cluster was lost and is back."""
    refusals: list[str] = []
    losses = 0
    while True:
        if not (names := checkpoints.names()):
            why = "; ".join(refusals) or "there is none"
            raise InputError(f"{checkpoints.folder}: no checkpoint can be used ({why}); start again in another folder")
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
            raise OutputError(f"{error}; then continue with `scialm-dask resume {checkpoints.folder}`") from error
        except Exception as error:
            if (loss := loss_of_cluster(error)) is None:
                raise
            losses = losses + 1 if checkpoints.names()[0] == names[0] else 1
            if losses > _MOST_LOSSES or not cluster_is_back():
                again = f"continue with `scialm-dask resume {checkpoints.folder}` when there is a cluster again"
                raise StoppedError(f"{loss}; {again}") from error
            listen(Note(f"{loss}; going on from checkpoint {names[0]}"))


def fit(known: RunState, listen: Listener) -> Imputation:
    """Fit once, from the state that `known` has."""
    began, job, here = time.perf_counter(), known.job, workers_here()
    matrix = storable_annotation(job.matrix, listen).for_workers()
    place = place_scratch(replace(job, matrix=matrix), here)
    if place.refusal:
        raise DoesNotFitError(place.refusal)
    in_memory, folder = place.scratch == "memory", place.scratch.removeprefix("zarr:")
    if job.scratch.startswith("zarr:"):  # otherwise this was reported for the folder of the result
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
        result = fitting.denoise() if denoises else fitting.complete(place.forecast.iterations)
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
    """A run in progress."""

    job: Job
    known: RunState
    found: Survey
    store: Store
    listen: Listener

    def __post_init__(self) -> None:
        self.placement, self.passes = Placement(self.store), count(2)  # the survey was the first

    def tell_pass(self, _: int = 0) -> None:
        """Report a pass over the data."""
        self.listen(Pass(next(self.passes)))

    def operator(
        self, blocks: PreparedBlocks, check: Callable[[Observations], None] | None = None
    ) -> LowRankPlusSparse:
        """Return W over the blocks; `check` is called once they are read."""

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

    def denoise(self) -> Imputation:
        """Denoise, and save the state between passes."""
        job, known = self.job, self.known
        self.listen(Stage("denoising"))
        state = before = known.load(DenoiseState)
        try:
            for step in denoise(job.matrix, self.found, job.settings, self.operator, before):
                if not isinstance(step, Denoised):
                    state = step
                    known.save(state)
        except StoppedError:
            if state is not None:
                known.save(state, now=True)
            raise
        assert isinstance(step, Denoised)
        svd, weights = step.svd, step.weights
        summary = {
            "rank": len(weights.component),
            "singular_values": svd.values.tolist(),
            "weights": weights.component.tolist(),
            "residual_share": float(np.mean(weights.residual > 0)),
            "unseen": asdict(weights.unseen),
            "verdict": weights.unseen.verdict,
        }
        result = self.result(
            prepare(job.matrix, self.found, job.settings),
            (step.operator.sketched(svd.to_left * (weights.component * svd.values)), svd.right),
            summary,
            {"weights": weights.component},
            residual_weight=weights.residual,
            counts=job.matrix,
        )
        known.check_source(self.listen, read_once=False)
        return result

    def complete(self, n_iterations: int) -> Imputation:
        """Complete, and save the state between iterations."""
        known, settings, listen = self.known, self.job.settings, self.listen

        def check(seen: Observations) -> None:
            if settings.stop == "held-out":
                _check_validation(seen, settings.validation)
            known.check_observations(seen)

        listen(Stage("reading"))
        blocks = prepare(self.job.matrix, self.found, settings)
        operator = self.operator(blocks, check)
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
        factors, last, history = operator.factors(), completion.returned, completion.history
        mean, covariance = mean_and_covariance(factors[0], blocks.shape[0])
        summary = {
            "iterations": len(history),
            "chosen_iteration": completion.chosen,
            "rank": last.rank,
            "residual": last.residual,
            "held_out_error": None if np.isnan(last.held_out) else last.held_out,
            "converged": completion.converged,
            "stop_reason": completion.reason,
            "singular_values": list(completion.values),
            **({} if before is None else {"resumed_after_iteration": before.steps}),
        }
        model = {"mean": mean, "covariance": covariance, "residual": last.residual}
        columns = {line.name: [getattr(i, line.name) for i in history] for line in fields(Iteration)}
        return self.result(blocks, factors, summary, model, history=columns)

    def result(
        self,
        blocks: PreparedBlocks,
        factors: tuple[list[Delayed], Floats],
        of_method: dict[str, Any],
        model: dict[str, Any],
        **parts: Any,
    ) -> Imputation:
        """Return the result, with the factors scaled back lazily, and a summary."""
        found, matrix, scales, (lefts, right) = self.found, blocks.matrix, blocks.scales, factors
        summary: dict[str, Any] = {
            "n_cells": matrix.shape[0],
            "n_genes": matrix.shape[1],
            "n_observed": found.n_observed,
            "n_empty_cells": int(np.count_nonzero(found.cell_counts == 0)),
            "n_empty_genes": int(np.count_nonzero(found.gene_counts == 0)),
            "scaling": scales.note,
            "raw_counts": found.integer,
            "source": matrix.name,
            "settings": self.job.settings.as_dict(),
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
            model=cell_model(blocks, found, **model),
            **({"history": {}} | parts),
        )
        if matrix.observed == "nonzero":  # the ratio of means is meaningless for values of either sign
            observed, imputed = (
                float(found.gene_sums.sum()),
                result.right @ result.left.sum(axis=0, dtype="f8").compute(),
            )
            if result.residual_weight is not None:
                imputed += result.residual_weight * (found.gene_sums - imputed)
            summary["mean_observed"] = observed / matrix.shape[0] / matrix.shape[1]
            summary["mean_imputed_over_observed"] = float(imputed.sum()) / observed
        return result


def _check_validation(seen: Observations, share: float) -> None:
    """Raise `InputError` if too few or too many entries are held out to stop by their error."""
    if seen.n_held_out == 0:
        raise InputError(
            f"validation is {share}, which hides none of {seen.n_observed} observed entries, gene by gene; give a "
            "larger share, or stop by the residual"
        )
    if seen.n_emptied:
        raise InputError(
            f"validation is {share}, which leaves {seen.n_emptied} cells without an observed entry; give a smaller "
            "share, or drop cells with few genes by `scialm-dask qc --min-genes`"
        )
    if 0 in (seen.sum_squares, seen.held_out_squares):
        hidden = "all" if seen.sum_squares == 0 else "none"
        raise InputError(
            f"validation is {share}, which hides {hidden} of the observed entries other than zero; give another share, "
            "or stop by the residual"
        )


def peak_memory() -> int:
    """Return the most memory that this process has used, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage counts the parent process too
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
