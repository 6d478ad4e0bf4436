"""Products of tall matrices in float64, some rows at a time: a copy of a whole one in float64 is too much."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["add_product", "gram", "product"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_ROWS = 1024


def gram(tall: Floats) -> Doubles:
    """Give TᵀT, float64, of T with shape ``(n, l)``."""
    total = np.zeros((tall.shape[1],) * 2)
    for rows in _panels(tall):
        panel = tall[rows].astype(np.float64)
        total += panel.T @ panel
    return total


def add_product(total: Doubles | Floats, tall: Floats, wide: Doubles) -> None:
    """Add T M to `total`, shape ``(n, k)``, in place."""
    for rows in _panels(tall):
        total[rows] += tall[rows].astype(np.float64) @ wide


def product(tall: Doubles, small: Doubles) -> Floats:
    """Give T M in float32."""
    result = np.empty((len(tall), small.shape[1]), np.float32)
    for rows in _panels(tall):
        result[rows] = tall[rows] @ small
    return result


def _panels(tall: Doubles | Floats) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, len(tall), _ROWS))
