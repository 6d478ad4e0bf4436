"""What a fit knows of cells, by which others can be imputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CellModel:
    """What a fit has learnt of cells, on the scale on which it made their noise even.

    Parameters
    ----------
    gene_scale
        What genes were multiplied with, float32, shape ``(n,)``.
    gene_share
        Share of each gene in the sum of the matrix, float64, shape ``(n,)``: where genes are missing, the size of a
        cell is its total over the others, divided by their share.
    raw_counts
        Whether it was made from raw counts.
    cell_exponent
        Cells were multiplied with (size factor / `centre`)^−cell_exponent.
    centre
        Geometric mean of the size factors.
    """

    gene_scale: NDArray[np.float32]
    gene_share: NDArray[np.float64]
    raw_counts: bool
    cell_exponent: float
    centre: float


@dataclass(frozen=True)
class CompletionModel(CellModel):
    """Of a completion, where zeros are unknown.

    Parameters
    ----------
    mean, covariance
        Of the rows of the left factor, float64, shapes ``(r,)`` and ``(r, r)``.
    residual
        What the fit left of the observed entries, relative to their norm.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    residual: float


@dataclass(frozen=True)
class DenoisingModel(CellModel):
    """Of a denoised matrix.

    Parameters
    ----------
    weights
        Of the components, float64, shape ``(r,)``.
    """

    weights: NDArray[np.float64]


def model_of(stored: Mapping[str, Any]) -> CellModel:
    """Return the model that AnnData has read."""
    kind = DenoisingModel if "weights" in stored else CompletionModel
    plain: dict[str, Any] = {"raw_counts": bool, "cell_exponent": float, "centre": float, "residual": float}
    return kind(**{field.name: plain.get(field.name, np.asarray)(stored[field.name]) for field in fields(kind)})
