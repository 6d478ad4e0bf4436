"""One run: survey the matrix, complete it, hand out the result; from the beginning or from a checkpoint."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import dask

from scialm_dask.config import Settings
from scialm_dask.data.annotated import storable_annotation
from scialm_dask.data.checkpoint import Checkpoints
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.remote import is_url
from scialm_dask.data.remote_checkpoint import checkpoints_at
from scialm_dask.data.scratch import new_scratch
from scialm_dask.data.store import check_apart
from scialm_dask.errors import CheckpointError, ClusterError, DoesNotFitError, InputError, OutputError, StoppedError
from scialm_dask.events import Listener, Note, Pass, Stage, silent
from scialm_dask.imputation import Imputation
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.tasks import Store
from scialm_dask.run.checkpointing import Checkpointing, Job, Keeper, Saved, ended, under_way
from scialm_dask.run.cluster import ask_everyone, workers_here
from scialm_dask.run.cluster_errors import cluster_is_back, loss_of_cluster
from scialm_dask.run.placement import Placement
from scialm_dask.run.placing import place_scratch
from scialm_dask.run.plan import Forecast
from scialm_dask.run.result import completed, denoised, embed, peak_memory
from scialm_dask.solve.denoise import Denoised, DenoiseState, denoise
from scialm_dask.solve.embedding import PASSES as EMBEDDING_PASSES
from scialm_dask.solve.ialm import complete
from scialm_dask.solve.scaling import PreparedBlocks, Survey, prepare, survey

__all__ = ["complete_matrix", "finish", "notes_of", "resume_matrix"]

_RETRIES = 2  # of a task that raises
_MOST_LOSSES = 2  # of the cluster, without a checkpoint between


def complete_matrix(
    matrix: ExpressionMatrix,
    settings: Settings,
    *,
    scratch: str = "auto",
    memory_limit: int | None = None,
    scratch_folder: str | os.PathLike[str] | None = None,
    checkpoint: Checkpointing | None = None,
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
    checkpoint
        Where and when to write checkpoints; None for none.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Raises
    ------
    InputError
        If the matrix or the settings cannot be used, or the store changes meanwhile.
    DoesNotFitError
        If the forecast does not fit memory or disk.
    OutputError
        If checkpoints cannot be written.
    ClusterError
        If the cluster was lost, and there are no checkpoints.
    StoppedError
        If it was lost and there are, or the run was asked to stop.
    """
    folder = None if scratch_folder is None else os.fspath(scratch_folder)
    job = Job(matrix, settings, scratch, memory_limit, folder)
    if checkpoint is None:
        try:
            return _attempt(job, Keeper(job), listen)
        except Exception as error:
            if (loss := loss_of_cluster(error)) is None:
                raise
            raise ClusterError(f"{loss}; with --checkpoint DIR a run can go on after that") from error
    if matrix.origin is not None:
        check_apart(checkpoint.folder, (matrix.origin.path,))
    with checkpoints_at(checkpoint.folder) as checkpoints:
        if checkpoints.names():
            raise OutputError(
                f"{checkpoint.folder}: holds checkpoints already; go on from them by `scialm-dask resume "
                f"{checkpoint.folder}`, or choose another folder"
            )
        Keeper(job, checkpoints, checkpoint).write()
        try:
            return _persevere(checkpoints, checkpoint.stop, lambda _: job, listen)
        except (InputError, DoesNotFitError):
            with contextlib.suppress(InputError):
                if not under_way(checkpoints.notes()):  # so it cannot be done
                    checkpoints.clear()
            raise


def resume_matrix(
    folder: str | os.PathLike[str],
    matrix: ExpressionMatrix | None = None,
    *,
    scratch: str | None = None,
    memory_limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    listen: Listener = silent,
) -> Imputation:
    """Go on with a run from its last whole checkpoint, on whatever scheduler Dask has now.

    Parameters
    ----------
    folder
        Of the checkpoints, which are continued there.
    matrix
        Needed only if it was in memory.
    scratch, memory_limit
        Instead of what the run was begun with.
    stop
        See `Checkpointing`.
    listen
        See `complete_matrix`.

    Raises
    ------
    InputError
        If there is no checkpoint that can be used.
    DoesNotFitError, OutputError, StoppedError
        See `complete_matrix`.
    """
    notes_of(folder)
    changes = {"scratch": scratch, "memory_limit": memory_limit}
    with checkpoints_at(folder) as checkpoints:
        return _persevere(checkpoints, stop, lambda saved: saved.job(matrix, changes), listen)


def notes_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Give what the last checkpoint that can be read says of its run.

    Raises
    ------
    InputError
        If there is none.
    """
    if not is_url(folder) and not os.path.isdir(folder):
        raise InputError(f"{os.fspath(folder)}: no such folder of checkpoints; check the path")
    with checkpoints_at(folder) as checkpoints:
        return checkpoints.notes()


def finish(folder: str | os.PathLike[str], destination: str) -> None:
    """Note that a run is finished and its result written, and remove its checkpoints."""
    with checkpoints_at(folder) as checkpoints:
        older = checkpoints.names()
        notes = checkpoints.notes() | {"finished": destination}
        checkpoints.commit(checkpoints.begin(), notes, {})
        checkpoints.own(None)
        for name in set(older) & set(checkpoints.names()):
            checkpoints.remove(name)


def _persevere(
    checkpoints: Checkpoints, stop: Callable[[], bool], job_of: Callable[[Saved], Job], listen: Listener
) -> Imputation:
    """Go on from the last checkpoint that can be used; when the cluster is lost and back, again."""
    refusals: list[str] = []
    losses = 0
    while True:
        if not (names := checkpoints.names()):
            why = "; ".join(refusals) or "there is none"
            raise InputError(f"{checkpoints.folder}: no checkpoint can be used ({why}); begin anew in another folder")
        try:
            saved = Saved(checkpoints.read(names[0]))
            notes = saved.checkpoint.notes
            if words := ended(checkpoints.folder, notes):
                raise InputError(words)
            asked = Checkpointing(checkpoints.folder, notes["every"], notes["result"], stop)
            job = job_of(saved)
            return _attempt(job, Keeper(job, checkpoints, asked, saved), listen)
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


def _attempt(job: Job, keeper: Keeper, listen: Listener) -> Imputation:
    """Make the run once."""
    began = time.perf_counter()
    matrix, here = storable_annotation(job.matrix, listen).for_workers(), workers_here()
    place = place_scratch(
        job.scratch,
        matrix,
        job.settings,
        here,
        folder=job.scratch_folder,
        memory_limit=job.memory_limit,
        resumed=job.resumed,
    )
    if place.refusal:
        raise DoesNotFitError(place.refusal)
    in_memory = place.scratch == "memory"
    job = replace(job, matrix=matrix)
    with dask.annotate(retries=_RETRIES):
        listen(Stage("surveying"))
        found = survey(matrix)
        with new_scratch(None if in_memory else place.scratch.removeprefix("zarr:"), matrix.rows) as store:
            keeper.surveyed(found, store.path)
            result = _fit(job, keeper, found, store, place.forecast, listen)
    result.summary["seconds"] = time.perf_counter() - began
    peaks = ask_everyone(peak_memory)
    result.summary["peak_memory_bytes"] = max(peaks)
    result.summary["peak_memory_bytes_in_all"] = sum(peaks)
    result.summary["forecast_memory_bytes"] = place.need.memory
    result.summary["scratch"] = "memory" if in_memory else "zarr"
    return result


def _fit(job: Job, keeper: Keeper, found: Survey, store: Store, need: Forecast, listen: Listener) -> Imputation:
    homes, passes = Placement(), count(2)  # the survey is one

    def operator_of(blocks: PreparedBlocks) -> LowRankPlusSparse:
        operator = LowRankPlusSparse(
            blocks,
            store,
            on_pass=lambda _: listen(Pass(next(passes))),
            before_pass=keeper.before_pass,
            homes=homes,
        )
        _check_observed(operator, blocks)
        return operator

    if job.settings.method == "denoise":
        result = _denoise(job, keeper, found, operator_of, listen)
    else:
        result = _complete(job, keeper, found, operator_of, need.iterations, listen)
    if job.matrix.observed == "nonzero":
        listen(Stage("embedding"))
        embed(result)
        for _ in range(EMBEDDING_PASSES):
            listen(Pass(next(passes)))
    result.summary["passes"] = next(passes) - 1
    return result


def _denoise(
    job: Job,
    keeper: Keeper,
    found: Survey,
    operator_of: Callable[[PreparedBlocks], LowRankPlusSparse],
    listen: Listener,
) -> Imputation:
    listen(Stage("denoising"))
    for state in denoise(job.matrix, found, job.settings, operator_of, keeper.denoising):
        if isinstance(state, DenoiseState):
            keeper.after_pass(state)
    keeper.check_source()
    assert isinstance(state, Denoised)
    return denoised(found, prepare(job.matrix, found, job.settings), state, job.settings)


def _complete(
    job: Job,
    keeper: Keeper,
    found: Survey,
    operator_of: Callable[[PreparedBlocks], LowRankPlusSparse],
    iterations: int,
    listen: Listener,
) -> Imputation:
    listen(Stage("reading"))
    blocks = prepare(job.matrix, found, job.settings)
    operator = operator_of(blocks)
    _check_validation(operator, job.settings)
    state = keeper.watch(operator)
    listen(Stage("iterating", iterations=iterations))
    completion = complete(operator, job.settings, listen, state=state, after=keeper.after_iteration)
    keeper.check_source()
    keeper.let_go()
    result = completed(found, blocks, operator, completion, job.settings)
    if state is not None:
        result.summary["resumed_after_iteration"] = len(state.history)
    return result


def _check_observed(operator: LowRankPlusSparse, blocks: PreparedBlocks) -> None:
    if operator.observations.sum_squares + operator.observations.held_out_squares == 0:
        where = "" if blocks.molecules is None else " in the share of the molecules that is fitted"
        raise InputError(f"{blocks.matrix.name}: every observed entry is zero{where}; there is nothing to complete")


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
    if 0 in (seen.sum_squares, seen.held_out_squares):
        share = "all" if seen.sum_squares == 0 else "none"
        raise InputError(
            f"validation is {settings.validation}, which hides {share} of the observed entries other than zero; give "
            "another share, or stop by the residual"
        )
