"""Scores of recovered expression, gene by gene, against expression that is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from numpy.typing import NDArray

from scialm_dask.data.annotated import as_dask
from scialm_dask.errors import InputError
from scialm_dask.reduction import tree_reduce

__all__ = ["GeneScores", "gene_scores"]


@dataclass(frozen=True)
class GeneScores:
    """How well expression is recovered.

    Attributes
    ----------
    pearson
        Correlation across cells for each gene; NaN where either side is constant.
    relative_error
        ‖X − M‖_F / ‖M‖_F.
    """

    pearson: NDArray[np.float64]
    relative_error: float


def gene_scores(truth: Any, recovered: Any) -> GeneScores:
    """Compare recovered expression to the truth, block by block.

    Parameters
    ----------
    truth, recovered
        Cells × genes: NumPy, SciPy sparse or Dask arrays (of dense or sparse chunks), data frames, AnnData, paths to
        stores, or anything with `to_dask()`.

    Returns
    -------
    GeneScores
        Over all cells.

    Raises
    ------
    InputError
        If one is no matrix of numbers, or the shapes differ.
    """
    M, X = as_dask(truth, "truth"), as_dask(recovered, "recovered")
    if M.shape != X.shape:
        raise InputError(f"truth has shape {M.shape}, recovered {X.shape}; give the same cells and genes")
    M = M.rechunk({0: X.chunks[0], 1: -1})
    visit = dask.delayed(_moments)
    pairs = zip(M.to_delayed()[:, 0], X.rechunk({1: -1}).to_delayed()[:, 0], strict=True)
    total = tree_reduce([visit(m, x) for m, x in pairs], _merge).compute()
    truths, recoveries, products = total["comoments"]
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = products / np.sqrt(truths * recoveries)
        return GeneScores(pearson, float(np.sqrt(total["error"] / total["squares"])))


def _moments(M: Any, X: Any) -> dict[str, Any]:
    M, X = (np.asarray(a.toarray() if hasattr(a, "toarray") else a, dtype=np.float64) for a in (M, X))
    means = np.stack([M.mean(axis=0), X.mean(axis=0)])
    m, x = M - means[0], X - means[1]
    comoments = np.stack([(m * m).sum(axis=0), (x * x).sum(axis=0), (m * x).sum(axis=0)])
    return {
        "cells": len(M),
        "means": means,
        "comoments": comoments,
        "error": np.sum((X - M) ** 2),
        "squares": np.sum(M**2),
    }


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Pool means and co-moments of two sets of cells (Chan, Golub and LeVeque 1983)."""
    cells = left["cells"] + right["cells"]
    apart = right["means"] - left["means"]
    products = np.stack([apart[0] ** 2, apart[1] ** 2, apart[0] * apart[1]])
    return {
        "cells": cells,
        "means": left["means"] + apart * (right["cells"] / cells),
        "comoments": left["comoments"] + right["comoments"] + products * (left["cells"] * right["cells"] / cells),
        "error": left["error"] + right["error"],
        "squares": left["squares"] + right["squares"],
    }
