"""What users call from Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scialm_dask.arguments import checked, validated
from scialm_dask.config import bytes_of, configured
from scialm_dask.config import preset as settings_of
from scialm_dask.data.annotated import as_matrix, counts_beside, is_anndata, looks_like_counts, refuse_logarithms
from scialm_dask.data.matrix import ExpressionMatrix, Observed
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Note, silent
from scialm_dask.imputation import Imputation

if TYPE_CHECKING:
    from scialm_dask.run.checkpointing import Checkpointing


@checked
def impute(
    matrix: ExpressionMatrix | str | os.PathLike[str] | Any,
    *,
    preset: str = "auto",
    layer: str | None = None,
    key_added: str | None = "scialm",
    observed: Observed | None = None,
    scratch: str | None = None,
    memory_limit: float | str | None = None,
    scratch_folder: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | Checkpointing | None = None,
    checkpoint_every: int | str | None = None,
    listen: Listener = silent,
    **settings: Any,
) -> Imputation:
    """Complete an expression matrix by low-rank matrix completion (scIALM).

    Parameters
    ----------
    matrix
        An AnnData, in memory, backed or lazy; a path to an AnnData store (.zarr or .h5ad) or a bare 2-D Zarr array;
        a data frame; a NumPy, SciPy sparse or Dask array; or an `ExpressionMatrix`. Cells × genes, counts or
        normalised counts, without logarithm.
    preset
        ``"auto"``, the default: ``"denoise"`` for raw counts, also those of layer counts where X holds none, else
        ``"complete"``; a `Note` says which and why.
        ``"denoise"``: expression levels, from raw counts; see `scialm_dask.solve.denoise`. ``"complete"``: entries that
        were lost, all zeros being unknown; stops before noise is fitted. ``"paper"``: the published method.
    layer
        Layer of the store or AnnData to read instead of X; ``"raw"`` for ``.raw.X``.
    key_added
        Of an AnnData only: what is found is put into it too, under names that begin with this; see
        `Imputation.add_to`. None leaves it as it is. The matrix itself stays.
    observed
        ``"nonzero"``, the default: zeros are unknown, as in the paper. ``"finite"``: NaN is unknown and zeros are
        observed, for general matrices. An `ExpressionMatrix` is taken as it was opened.
    scratch
        Where the working state is kept: ``"memory"``, ``"zarr:PATH"`` for a folder on a local disk, or ``"auto"``:
        in memory if the forecast fits there. Dask's configuration, ``scialm.scratch``, by default: ``"auto"``.
    memory_limit
        Bytes that each process may take in all, or words such as ``"8 GB"``; Dask's configuration,
        ``scialm.memory-limit``, by default: what is free.
    scratch_folder
        Folder for Zarr scratch that ``"auto"`` chooses; Dask's ``temporary-directory`` by default.
    checkpoint
        A new folder for checkpoints, on a disk that all workers see; `resume` goes on from the last one. They stay
        when the run is complete.
    checkpoint_every
        A number of iterations, or a time such as ``"30min"``; 10 minutes by default.
    listen
        Called with every event of the work, such as `scialm_dask.show_progress()`; see `scialm_dask.events`.
    **settings
        Fields of `Settings` that are to differ from the preset's, such as ``max_rank=50`` or ``seed=1``; None leaves
        the preset's, and ``max_rank="none"`` is no limit.

    Returns
    -------
    Imputation
        The factors of the completed matrix; entries are computed when asked for.

    Raises
    ------
    InputError
        If the matrix or a setting cannot be used, or a setting has no effect beside the others.
    DoesNotFitError
        If the forecast does not fit memory or disk.
    OutputError
        If checkpoints cannot be written, or the disk is full.
    ClusterError, StoppedError
        If the cluster was lost: the latter if there are checkpoints, from which `resume` goes on.
    """
    from scialm_dask.run.checkpointing import Checkpointing, Job
    from scialm_dask.run.job import run

    checkpoint = validated("checkpoint", checkpoint, str | os.PathLike | Checkpointing | None)
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = Checkpointing(checkpoint)
    if checkpoint_every is not None:
        if checkpoint is None:
            raise InputError(f"checkpoint_every is {checkpoint_every!r} without a checkpoint; give the folder for them")
        checkpoint = replace(checkpoint, every=checkpoint_every)
    source = as_matrix(matrix, layer, observed=observed)
    chosen_of, preset = resolve_preset(source, preset, matrix, listen)
    if chosen_of is source:
        refuse_logarithms(source, matrix, layer)
    source, chosen = chosen_of, settings_of(preset, **settings)
    n_genes = matrix.n_vars if key_added is not None and is_anndata(matrix) else source.shape[1]  # type: ignore[union-attr]
    if source.shape[1] != n_genes:  # as .raw may have
        raise InputError(
            f"{source.name}: has {source.shape[1]} genes, the AnnData {n_genes}; give adata.raw.to_adata(), or "
            "key_added=None"
        )
    job = Job(
        source,
        chosen,
        configured("scratch", scratch),
        parse_limit(configured("memory-limit", memory_limit)),
        None if scratch_folder is None else os.fspath(scratch_folder),
    )
    result = run(job, checkpoint, listen)
    if key_added is not None and is_anndata(matrix):
        result.add_to(matrix, key_added)
    return result


def resolve_preset(
    matrix: ExpressionMatrix, preset: str, given: Any = None, listen: Listener = silent
) -> tuple[ExpressionMatrix, str]:
    """Return what preset ``"auto"`` means for a matrix, and the matrix that it is about; say why.

    Raw counts are denoised: the matrix itself, or layer counts beside an X that holds none, as `qc` leaves it. Anything
    else is completed. Other presets are returned as they are.

    Parameters
    ----------
    matrix
        What is to be imputed; a few cells of it are read.
    preset
        Its name.
    given
        What the matrix was made of, if that was an AnnData.
    listen
        Called with a `Note` where the preset is ``"auto"``.
    """
    if preset != "auto":
        return matrix, preset
    if looks_like_counts(matrix):
        listen(Note(f"preset denoise, as {matrix.name} holds raw counts"))
        return matrix, "denoise"
    counts = counts_beside(matrix, given)
    if counts is not None and looks_like_counts(counts):
        listen(Note(f"preset denoise, of the raw counts in {counts.name}, as {matrix.name} holds none"))
        return counts, "denoise"
    listen(Note(f"preset complete, as {matrix.name} holds no raw counts, which denoising needs"))
    return matrix, "complete"


@checked
def resume(
    folder: str | os.PathLike[str],
    matrix: Any = None,
    *,
    scratch: str | None = None,
    memory_limit: float | str | None = None,
    stop: Callable[[], bool] = lambda: False,
    listen: Listener = silent,
) -> Imputation:
    """Go on with a run from its last whole checkpoint, on any scheduler and any number of workers.

    The factors are those of a run that was not interrupted.

    Parameters
    ----------
    folder
        The `checkpoint` of `impute`. Checkpoints are written there again.
    matrix
        What was imputed, if that was in memory (not an AnnData's X but a layer: that layer); a store is opened where
        it was. `Imputation.add_to` puts the result into an AnnData.
    scratch, memory_limit
        To differ from those of the run; see `impute`.
    stop
        Asked before every pass whether to stop there with a checkpoint.
    listen
        Called with every event of the work; those that are a `Note` tell of checkpoints that cannot be used.

    Returns
    -------
    Imputation
        As `impute` would have given it, its summary with ``resumed_after_iteration``.

    Raises
    ------
    InputError
        If no checkpoint can be used, the matrix is another, or it was in memory and is not given.
    DoesNotFitError
        If the forecast does not fit memory or disk.
    OutputError
        If checkpoints cannot be written, or the disk is full.
    StoppedError
        If the run was asked to stop, or the cluster was lost and did not come back.
    """
    from scialm_dask.run.job import resume_run

    source = None if matrix is None else as_matrix(matrix)
    limit = parse_limit(memory_limit)
    return resume_run(folder, source, scratch=scratch, memory_limit=limit, stop=stop, listen=listen)


def parse_limit(limit: float | str | None) -> int | None:
    """Turn words such as ``"8 GB"`` into bytes."""
    return bytes_of("memory limit", limit)
