"""Logarithms told from counts by their values, on a few cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.rows import Rows

__all__ = ["evidence_of_logarithms", "some_cells"]

_PLACES, _CELLS = 4, 32  # looked at: so many runs of so many cells
_SMALLEST, _LARGEST = 1e-9, 30  # logarithms; counts of deep cells are larger
_BASES: dict[str, Callable[[Any], Any]] = {
    "expm1(x)": np.expm1,
    "2**x - 1": lambda x: np.exp2(x) - 1,
    "10**x - 1": lambda x: 10**x - 1,
}


def some_cells(rows: Rows) -> sp.csr_matrix:
    """Read some cells, from all over the matrix."""
    n_cells = rows.shape[0]
    if n_cells <= _PLACES * _CELLS:
        return rows.read(0, n_cells)
    starts = np.linspace(0, n_cells - _CELLS, _PLACES).astype(int).tolist()
    return sp.vstack([rows.read(start, start + _CELLS) for start in starts], format="csr")


def evidence_of_logarithms(cells: sp.csr_matrix) -> str | None:
    """Tell in words what shows that values are logarithms of counts, normalised or not; None if nothing does.

    Once the logarithm is undone, the values of a cell are whole multiples of the smallest, or all cells have the same
    total; as they are, neither holds. Counts are whole numbers, and normalised counts are such multiples as they are.
    """
    values = cells.data.astype(np.float64)
    if not len(values) or not np.any(np.floor(values) != values) or not 0 <= values.min() <= values.max() <= _LARGEST:
        return None  # false for NaN too
    by_cell = [kept for row in np.split(values, cells.indptr[1:-1]) if len(kept := row[row > _SMALLEST])]
    for words, undo in _BASES.items():
        multiples = [
            bool(_multiples(undo(row))) > bool(_multiples(row)) for row in by_cell if _multiples(row) is not None
        ]
        if len(multiples) >= 5 and np.mean(multiples) >= 0.5:
            return f"{words} gives whole multiples in each cell"
        totals = np.array([(undo(row).sum(), row.sum()) for row in by_cell])
        if len(totals) < 10:
            continue
        spread, as_is = totals.std(axis=0) / totals.mean(axis=0)
        if spread < 0.01 and spread < as_is / 5:
            return f"{words} sums to {totals[:, 0].mean():.5g} in each cell"
    return None


def _multiples(row: NDArray[np.float64]) -> bool | None:
    """Tell whether values are whole multiples of the smallest; None if there are too few values to tell."""
    ratios = np.unique(row) / row.min()
    ratios = ratios[(ratios > 1) & (ratios < 100)]
    if len(ratios) < 2:
        return None
    return bool(np.all(np.abs(ratios - ratios.round()) < 0.01))
