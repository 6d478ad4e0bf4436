"""What comes out of a run: the factors on the scale of the input, and the summary."""

from __future__ import annotations

import resource
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import dask
import numpy as np

from scialm_dask.config import Settings
from scialm_dask.events import Iteration
from scialm_dask.imputation import Imputation
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.solve.ialm import Completion
from scialm_dask.solve.scaling import PreparedBlocks, Survey
from scialm_dask.solve.transform import cell_model

__all__ = ["make_result", "peak_memory"]


def make_result(
    found: Survey,
    blocks: PreparedBlocks,
    operator: LowRankPlusSparse,
    completion: Completion,
    settings: Settings,
    factors: Floats | None,
) -> Imputation:
    """Put the factors back on the scale of the input, lazily, and sum up what was done and found.

    Parameters
    ----------
    found, blocks, operator, completion, settings
        Of the run.
    factors
        What to multiply the columns of A with, ``(r,)``; None for nothing.
    """
    import dask.array as da

    matrix, scales = blocks.matrix, blocks.scales
    lefts, right = operator.factors()
    if factors is not None:
        right = right * factors
    unscaled, rank = dask.delayed(_unscaled), right.shape[1]
    pieces = [
        da.from_delayed(
            unscaled(left, None if scales.cell is None else scales.cell[start:stop]),
            shape=(stop - start, rank),
            dtype=np.float32,
        )
        for left, (start, stop) in zip(lefts, matrix.blocks, strict=True)
    ]
    model = None
    if not blocks.has_row_confidence:
        model = cell_model(
            lefts,
            blocks,
            residual=completion.returned.residual,
            raw_counts=found.integer,
            cell_exponent=settings.exponents[1],
        )
    result = Imputation(
        da.concatenate(pieces, axis=0),
        right if scales.gene is None else right / scales.gene[:, None],
        obs=matrix.obs,
        var=matrix.var,
        summary=_summary(found, blocks, operator, completion, settings),
        history={line.name: [getattr(i, line.name) for i in completion.history] for line in fields(Iteration)},
        clip=matrix.observed == "nonzero",
        model=model,
    )
    if matrix.observed == "nonzero":  # of values of either sign a ratio of means says nothing
        observed = float(found.gene_sums.sum())
        result.summary["mean_observed"] = observed / matrix.shape[0] / matrix.shape[1]
        result.summary["mean_imputed_over_observed"] = _sum(result) / observed
    return result


def _summary(
    found: Survey, blocks: PreparedBlocks, operator: LowRankPlusSparse, completion: Completion, settings: Settings
) -> dict[str, Any]:
    matrix, last = blocks.matrix, completion.returned
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
    }


def _unscaled(left: Floats, scale: Floats | None) -> Floats:
    return left if scale is None else left / scale[:, None]


def _sum(result: Imputation) -> float:
    """Sum of the imputed matrix before clipping, from sums of the factors."""
    sums: Doubles = result.left.sum(axis=0, dtype=np.float64).compute()
    return float(sums @ result.right.sum(axis=0, dtype=np.float64))


def peak_memory() -> int:
    """Most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells on Linux includes the process that started this one
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
