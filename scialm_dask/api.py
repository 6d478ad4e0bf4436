"""What users call from Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scialm_dask.config import bytes_of, checked, configured, validated
from scialm_dask.config import preset as settings_of
from scialm_dask.data.annotated import as_matrix, counts_beside, is_anndata, looks_like_counts, refuse_logarithms
from scialm_dask.data.csr import Observed
from scialm_dask.data.matrix import ExpressionMatrix
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
    """Denoise or complete an expression matrix.

    Parameters
    ----------
    matrix : AnnData, path, array, data frame or ExpressionMatrix of shape (n_cells, n_genes)
        Counts or normalised counts, without logarithm. An AnnData may be in memory, backed or lazy. A path leads to an
        AnnData store (.zarr or .h5ad), another file that `ExpressionMatrix.open` reads, or a bare 2-D Zarr array. An
        array may be NumPy, SciPy sparse or Dask.
    preset : {"auto", "denoise", "complete", "paper"}, default="auto"
        ``"denoise"``: expression levels, from raw counts. ``"complete"``: entries that were lost, with all zeros
        unknown; stops before noise is fitted. ``"paper"``: the published method [1]_. ``"auto"``: ``"denoise"`` for raw
        counts, in X or else in layer counts, and ``"complete"`` without them; a `Note` says which and why.
    layer : str, optional
        The layer to read instead of X; ``"raw"`` for ``.raw.X``.
    key_added : str or None, default="scialm"
        The result is added to an AnnData under names that begin with this; see `Imputation.add_to`. None adds nothing.
        The matrix itself stays.
    observed : {"nonzero", "finite"}, default="nonzero"
        ``"nonzero"``: zeros are unknown, as in the paper. ``"finite"``: NaN is unknown and zeros are observed, for
        general matrices. An `ExpressionMatrix` keeps its own.
    scratch : str, default="auto"
        Where the working state is kept: ``"memory"``, ``"zarr:PATH"`` for a folder on a local disk, or ``"auto"``: in
        memory if the forecast fits there. Dask's configuration, ``scialm.scratch``, can change the default.
    memory_limit : float or str, optional
        Bytes that each process may take in all, or words such as ``"8 GB"``. By default Dask's configuration,
        ``scialm.memory-limit``, else what is free.
    scratch_folder : str or path-like, optional
        Folder for the scratch that ``"auto"`` puts on disk. By default Dask's ``temporary-directory``.
    checkpoint : str or path-like, optional
        A new folder for checkpoints, on a disk that all workers see. `resume` continues from the last one. They are
        kept when the run is complete.
    checkpoint_every : int or str, default="10min"
        Iterations between checkpoints, or time.
    listen : callable, optional
        Called with every event of the work; see `show_progress`.
    **settings
        Fields of `Settings` that differ from the preset's, such as ``max_rank=50`` or ``seed=1``. None keeps the
        preset's; ``max_rank="none"`` is no limit.

    Returns
    -------
    Imputation
        The imputed matrix as factors. Entries are computed when they are used.

    Raises
    ------
    InputError
        If the matrix or a setting cannot be used, or a setting has no effect beside the others.
    DoesNotFitError
        If the forecast does not fit memory or disk.
    OutputError
        If checkpoints cannot be written, or the disk is full.
    ClusterError
        If the cluster was lost and there is no checkpoint.
    StoppedError
        If the cluster was lost and `resume` can go on.

    References
    ----------
    .. [1] X. Liu, H. Wang, J. Gao, "scIALM: A method for sparse scRNA-seq expression matrix imputation using the
       Inexact Augmented Lagrange Multiplier with low error", Computational and Structural Biotechnology Journal, 2024.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> result = scialm_dask.impute(counts)
    >>> print(result.summary["verdict"])
    Yes: molecules not seen are predicted with 8.3% less error than by the counts as they are,
    and 8.1% less than by the means of genes.
    >>> result[0, :3].round(1)
    array([0.9, 4.1, 1.4], dtype=float32)
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
        bytes_of("memory limit", configured("memory-limit", memory_limit)),
        None if scratch_folder is None else os.fspath(scratch_folder),
    )
    result = run(job, checkpoint, listen)
    if key_added is not None and is_anndata(matrix):
        result.add_to(matrix, key_added)
    return result


def resolve_preset(
    matrix: ExpressionMatrix, preset: str, given: Any = None, listen: Listener = silent
) -> tuple[ExpressionMatrix, str]:
    """Return the matrix to impute and the preset that ``"auto"`` means for it; a `Note` says why.

    Raw counts are denoised: the matrix itself, or layer counts beside an X that holds none, as `qc` leaves it. Anything
    else is completed. `given` is the AnnData that the matrix was made of, if any.
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
    """Continue a run from its last whole checkpoint, on any scheduler and any number of workers.

    The result is that of a run without interruption.

    Parameters
    ----------
    folder : str or path-like
        The `checkpoint` of `impute`. Further checkpoints are written there.
    matrix : matrix, optional
        What was imputed, if that was in memory; of an AnnData the layer, if one was read. A store is opened where it
        was. `Imputation.add_to` puts the result into an AnnData.
    scratch, memory_limit : optional
        As in `impute`; by default those of the run.
    stop : callable, optional
        Asked before every pass whether to stop there with a checkpoint.
    listen : callable, optional
        Called with every event of the work. A `Note` tells of each checkpoint that cannot be used.

    Returns
    -------
    Imputation
        Its summary has ``resumed_after_iteration``.

    Raises
    ------
    InputError
        If no checkpoint can be used, or the matrix is another, or was in memory and is not given.
    DoesNotFitError
        If the forecast does not fit memory or disk.
    OutputError
        If checkpoints cannot be written, or the disk is full.
    StoppedError
        If the run was asked to stop, or the cluster was lost and did not come back.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> _ = scialm_dask.impute(counts, preset="complete", max_rank=2, checkpoint="run1", checkpoint_every=1)
    >>> scialm_dask.resume("run1", counts)
    Imputation of 60 cells × 40 genes, rank 2
    """
    from scialm_dask.run.job import resume_run

    source = None if matrix is None else as_matrix(matrix)
    limit = bytes_of("memory limit", memory_limit)
    return resume_run(folder, source, scratch=scratch, memory_limit=limit, stop=stop, listen=listen)
