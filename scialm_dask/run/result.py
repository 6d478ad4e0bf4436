"""What comes out of a run: the factors on the scale of the input, and the summary."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import dask
import numpy as np
from dask.delayed import Delayed

from scialm_dask.config import Settings
from scialm_dask.events import Iteration
from scialm_dask.imputation import Imputation
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.tasks import add
from scialm_dask.reduction import stacked, tree_reduce
from scialm_dask.solve.denoise import Denoised, as_plain
from scialm_dask.solve.estimate import find_axes
from scialm_dask.solve.ialm import Completion
from scialm_dask.solve.scaling import PreparedBlocks, Survey
from scialm_dask.solve.transform import CompletionModel, DenoisingModel


def completed(
    found: Survey, blocks: PreparedBlocks, operator: LowRankPlusSparse, completion: Completion, settings: Settings
) -> Imputation:
    """Return the result of a completion: its factors on the scale of the input, and what was done and found."""
    lefts, right = operator.factors()
    model = _completion_model(lefts, blocks, found, residual=completion.returned.residual)
    last = completion.returned
    summary = _summary(found, blocks, settings) | {
        "n_blocks": operator.n_blocks,
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
    return _result(found, blocks, lefts, right, summary, history=history, model=model)


def denoised(found: Survey, blocks: PreparedBlocks, outcome: Denoised, settings: Settings) -> Imputation:
    """Return the result of denoising: low rank plus sparse, on the scale of the input, and what was found."""
    svd, weights = outcome.svd, outcome.weights
    lefts = outcome.operator.sketched(svd.to_left * (weights.component * svd.values))
    summary = _summary(found, blocks, settings) | {"n_blocks": outcome.operator.n_blocks} | as_plain(outcome)
    return _result(
        found,
        blocks,
        lefts,
        svd.right,
        summary,
        history={},
        model=_denoising_model(blocks, found, weights.component),
        residual_weight=weights.residual,
        counts=blocks.matrix,
    )


def _result(
    found: Survey, blocks: PreparedBlocks, lefts: list[Delayed], right: Floats, summary: dict[str, Any], **parts: Any
) -> Imputation:
    """Put factors back on the scale of the input, lazily."""
    matrix, scales = blocks.matrix, blocks.scales
    if scales.cell is not None:
        divide = dask.delayed(_divided)
        lefts = [divide(left, scales.cell[slice(*span)]) for left, span in zip(lefts, matrix.blocks, strict=True)]
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


def embed(result: Imputation, on_pass: Callable[[], None]) -> None:
    """Find the principal axes of the log-normalised result."""
    chunks = np.cumsum([0, *result.left.chunks[0]]).tolist()
    result.axes = find_axes(result.estimate, result.left.to_delayed().ravel().tolist(), chunks, on_pass)


def _completion_model(
    lefts: list[Delayed], blocks: PreparedBlocks, found: Survey, *, residual: float
) -> CompletionModel:
    """Sum up the rows of a fitted left factor, not yet scaled back, block by block."""
    moments = dask.delayed(_moments)
    total, squares = tree_reduce([moments(left) for left in lefts], add).compute()
    mean = total / blocks.shape[0]
    covariance = squares / blocks.shape[0] - np.outer(mean, mean)
    return CompletionModel(**_of_cells(blocks, found), mean=mean, covariance=covariance, residual=residual)


def _denoising_model(blocks: PreparedBlocks, found: Survey, weights: Doubles) -> DenoisingModel:
    """Return what completes other cells as these were denoised, with these weights of components."""
    return DenoisingModel(**_of_cells(blocks, found), weights=weights)


def _of_cells(blocks: PreparedBlocks, found: Survey) -> dict[str, Any]:
    scales = blocks.scales
    return {
        "gene_scale": np.ones(blocks.shape[1], np.float32) if scales.gene is None else scales.gene,
        "gene_share": found.gene_sums / (found.gene_sums.sum() or 1.0),
        "raw_counts": found.integer,
        "cell_exponent": scales.cell_exponent,
        "centre": scales.centre,
    }


def _moments(left: Floats) -> tuple[Doubles, Doubles]:
    wide = left.astype(np.float64)
    return wide.sum(axis=0), wide.T @ wide


def _summary(found: Survey, blocks: PreparedBlocks, settings: Settings) -> dict[str, Any]:
    matrix = blocks.matrix
    return {
        "n_cells": matrix.shape[0],
        "n_genes": matrix.shape[1],
        "n_observed": found.n_observed,
        "n_empty_cells": int(np.count_nonzero(found.cell_counts == 0)),
        "n_empty_genes": int(np.count_nonzero(found.gene_counts == 0)),
        "scaling": blocks.scales.note,
        "raw_counts": found.integer,
        "source": matrix.name,
        "settings": settings.as_dict(),
    }


def _divided(left: Floats, scale: Floats) -> Floats:
    return left / scale[:, None]


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
