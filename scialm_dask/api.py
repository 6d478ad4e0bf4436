"""What users call from Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scialm_dask.config import preset as settings_of
from scialm_dask.data.factors import Imputation
from scialm_dask.data.matrix import ExpressionMatrix, Observed
from scialm_dask.errors import InputError
from scialm_dask.solve.ialm import Iteration
from scialm_dask.solve.scaling import Confidence

if TYPE_CHECKING:
    from scialm_dask.run.keeper import Checkpointing

__all__ = ["impute", "resume"]


def impute(
    matrix: ExpressionMatrix | str | os.PathLike[str] | Any,
    *,
    preset: str = "auto",
    layer: str | None = None,
    observed: Observed = "nonzero",
    scratch: str = "auto",
    memory_limit: int | str | None = None,
    scratch_folder: str | os.PathLike[str] | None = None,
    confidence: Confidence | None = None,
    checkpoint: str | os.PathLike[str] | Checkpointing | None = None,
    checkpoint_every: int | str | None = None,
    on_iteration: Callable[[Iteration], None] = lambda _: None,
    **settings: Any,
) -> Imputation:
    """Complete an expression matrix by low-rank matrix completion (scIALM).

    Parameters
    ----------
    matrix
        An `ExpressionMatrix`; a path to an AnnData store (.zarr or .h5ad) or a bare 2-D Zarr array; or a NumPy or
        SciPy sparse matrix. Cells × genes, counts or normalised counts, without logarithm.
    preset
        ``"auto"`` stops before noise is fitted; ``"paper"`` is the published method.
    layer
        Layer of the store to read instead of X.
    observed
        ``"nonzero"``: zeros are unknown, as in the paper. ``"finite"``: NaN is unknown and zeros are observed, for
        general matrices.
    scratch
        Where the working state is kept: ``"memory"``, ``"zarr:PATH"`` for a folder on a local disk, or ``"auto"``:
        in memory if the forecast fits there.
    memory_limit
        Bytes that each process may take in all, or words such as ``"8 GB"``; what is free by default.
    scratch_folder
        Folder for Zarr scratch that ``"auto"`` chooses; Dask's ``temporary-directory`` by default.
    confidence
        In zeros, where it is not the same for all cells and genes; the setting ``zeros`` is for where it is.
    checkpoint
        A new folder for checkpoints, on a disk that all workers see; `resume` goes on from the last one. They stay
        when the run is complete.
    checkpoint_every
        A number of iterations, or a time such as ``"30min"``; 10 minutes by default.
    on_iteration
        Called with an `Iteration` after each iteration.
    **settings
        Fields of `Settings` that are to differ from the preset's, such as ``max_rank=50`` or ``seed=1``.

    Returns
    -------
    Imputation
        The factors of the completed matrix; entries are computed when asked for.

    Raises
    ------
    InputError
        If the matrix or a setting cannot be used.
    DoesNotFitError
        If the forecast does not fit memory or disk.
    StoppedError
        If the cluster was lost; `resume` goes on if there are checkpoints.
    """
    from scialm_dask.run.job import complete_matrix
    from scialm_dask.run.keeper import Checkpointing

    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = Checkpointing(checkpoint)
    if checkpoint is not None and checkpoint_every is not None:
        checkpoint = replace(checkpoint, every=checkpoint_every)
    chosen = settings_of(preset, **settings)
    if isinstance(matrix, str | os.PathLike):
        matrix = ExpressionMatrix.open(matrix, layer, observed=observed)
    elif not isinstance(matrix, ExpressionMatrix):
        matrix = ExpressionMatrix.of(matrix, observed=observed)
    return complete_matrix(
        matrix,
        chosen,
        scratch=scratch,
        memory_limit=parse_limit(memory_limit),
        scratch_folder=scratch_folder,
        confidence=confidence,
        checkpoint=checkpoint,
        on_iteration=on_iteration,
    )


def resume(
    folder: str | os.PathLike[str],
    matrix: Any = None,
    *,
    scratch: str | None = None,
    memory_limit: int | str | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_iteration: Callable[[Iteration], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Imputation:
    """Go on with a run from its last whole checkpoint, on any scheduler and any number of workers.

    The factors are those of a run that was not interrupted.

    Parameters
    ----------
    folder
        The `checkpoint` of `impute`. Checkpoints are written there again.
    matrix
        What was imputed, if that was in memory; a store is opened where it was.
    scratch, memory_limit
        To differ from those of the run; see `impute`.
    stop
        Asked before every pass whether to stop there with a checkpoint.
    on_iteration
        Called with an `Iteration` after each iteration.
    say
        Called with words on checkpoints that cannot be used, and on a cluster that was lost and is back.

    Raises
    ------
    InputError
        If no checkpoint can be used, or the matrix is another.
    """
    from scialm_dask.run.job import resume_matrix

    if matrix is not None and not isinstance(matrix, ExpressionMatrix):
        matrix = ExpressionMatrix.of(matrix)
    limit = parse_limit(memory_limit)
    return resume_matrix(
        folder, matrix, scratch=scratch, memory_limit=limit, stop=stop, on_iteration=on_iteration, say=say
    )


def parse_limit(limit: int | str | None) -> int | None:
    """Turn words such as ``"8 GB"`` into bytes."""
    from dask.utils import parse_bytes

    try:
        return None if limit is None else int(parse_bytes(limit))
    except ValueError:
        raise InputError(f"memory limit is {limit!r}; give bytes, or a number with a unit such as 8GB") from None
