"""What a fit knows of cells, by which others can be completed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CellModel"]


@dataclass(frozen=True)
class CellModel:
    """What a fit has learnt of cells, on the scale on which it made their noise even.

    Parameters
    ----------
    gene_scale
        What genes were multiplied with, float32, shape ``(n,)``.
    mean, covariance
        Of the rows of the left factor there, float64, shapes ``(r,)`` and ``(r, r)``.
    residual
        What the fit left of the observed entries, relative to their norm.
    raw_counts
        Whether it was made from raw counts.
    cell_exponent
        Cells were multiplied with (size factor / `centre`)^−cell_exponent.
    centre
        Geometric mean of the size factors.
    confidence
        In zeros, float32, shape ``(n,)``.
    """

    gene_scale: NDArray[np.float32]
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    residual: float
    raw_counts: bool
    cell_exponent: float
    centre: float
    confidence: NDArray[np.float32]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> CellModel:
        """Make one from what AnnData has read; nothing said of zeros means that they were unknown."""
        gene_scale = np.asarray(stored["gene_scale"])
        return cls(
            gene_scale,
            np.asarray(stored["mean"]),
            np.asarray(stored["covariance"]),
            residual=float(stored["residual"]),
            raw_counts=bool(stored["raw_counts"]),
            cell_exponent=float(stored["cell_exponent"]),
            centre=float(stored["centre"]),
            confidence=np.asarray(stored.get("confidence", np.zeros_like(gene_scale))),
        )
