"""What comes out of a run: the report and the factors on the scale of the input."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dask
import numpy as np

from scialm_dask.config import Settings
from scialm_dask.data.factors import Imputation
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.solve.ialm import Completion
from scialm_dask.solve.scaling import PreparedBlocks, Survey
from scialm_dask.solve.transform import cell_model

__all__ = ["make_report", "make_result", "peak_memory"]


def make_report(
    matrix: ExpressionMatrix,
    found: Survey,
    blocks: PreparedBlocks,
    operator: LowRankPlusSparse,
    completion: Completion,
    settings: Settings,
) -> dict[str, Any]:
    """Sum up what was done and found."""
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


def make_result(
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
        model=None if blocks.has_row_confidence else cell_model(lefts, blocks, report),
    )
    result.summary["mean_imputed_over_observed"] = _mean(result) / report.pop("mean_observed")
    return result


def _unscaled(left: Floats, scale: Floats | None) -> Floats:
    return left if scale is None else left / scale[:, None]


def _mean(result: Imputation) -> float:
    """Mean of the imputed matrix before clipping, from sums of the factors."""
    sums: Doubles = result.left.sum(axis=0, dtype=np.float64).compute()
    return float(sums @ result.right.sum(axis=0, dtype=np.float64)) / (result.shape[0] * result.shape[1])


def peak_memory() -> int:
    """Most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells on Linux includes the process that started this one
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
