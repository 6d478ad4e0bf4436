"""Measurements by row blocks, and the result: common to both methods for pooled measurements.

Each cell is measured through pools of genes, D = M P, with P binary, genes × pools. A method visits the row blocks
of D, a few thousand cells at a time, and keeps only sums whose size depends on genes and pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
from numpy.typing import NDArray

from scialm_dask.data.annotated import as_dask
from scialm_dask.errors import InputError
from scialm_dask.reduction import stacked, tree_reduce

if TYPE_CHECKING:
    import pandas as pd

    from scialm_dask.imputation import Imputation

Float = NDArray[np.float64]
Sums = dict[str, Any]  # float64 scalars and arrays that add up over cells

BATCH = 4096  # cells worked on at a time, which bounds the memory of a task whatever the chunks of D


@dataclass(frozen=True)
class PooledResult:
    """Expression recovered from pools, M = max(left · rightᵀ, 0), computed lazily.

    Attributes
    ----------
    left : dask.array.Array of shape (n_cells, rank), float64
        Lazy, in the row blocks of D.
    right : ndarray of shape (n_genes, rank), float64
        Gene loadings.
    objective : float
        The minimised objective: ‖D − UVᵀP‖_F² plus the ridge (least squares), or ‖X‖_* (nuclear norm).
    feasibility : float
        ‖XP − D‖_F.
    certificate : float or None
        Nuclear norm: an upper bound, from a dual feasible point, on how far the objective is above its minimum. None
        for least squares, which is not convex.
    history : tuple of dict
        One record per iteration.
    converged : bool
        Whether the stopping rule was met.
    """

    left: da.Array
    right: Float
    objective: float
    feasibility: float
    certificate: float | None
    history: tuple[dict[str, float], ...]
    converged: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.left.shape[0], len(self.right)

    def to_dask(self) -> da.Array:
        """Return the recovered matrix, lazy: cells × genes, float64, non-negative, one chunk per row block."""
        left = self.left
        return left.map_blocks(_expand, self.right, chunks=(left.chunks[0], (len(self.right),)), meta=np.empty((0, 0)))

    def to_imputation(self, obs: pd.DataFrame | None = None, var: pd.DataFrame | None = None) -> Imputation:
        """Return the result as an `Imputation`, which can be saved and indexed by name.

        Its factors are float32, so the constraints hold to about 1e-7 of ‖D‖_F. Without `obs` and `var`, cells and
        genes are numbered.
        """
        import pandas as pd

        from scialm_dask.imputation import Imputation

        cells, genes = self.shape
        summary = {"cells": cells, "genes": genes, "rank": self.right.shape[1], "iterations": len(self.history)}
        summary |= {"converged": self.converged, "objective": self.objective, "feasibility": self.feasibility}
        if self.certificate is not None:
            summary["certificate"] = self.certificate
        return Imputation(
            self.left.astype(np.float32),
            self.right.astype(np.float32),
            obs=pd.DataFrame(index=pd.RangeIndex(cells).astype(str)) if obs is None else obs,
            var=pd.DataFrame(index=pd.RangeIndex(genes).astype(str)) if var is None else var,
            summary=summary,
            history={name: [record[name] for record in self.history] for name in (self.history or ({},))[0]},
        )


def _expand(left: Float, right: Float) -> Float:
    product = left @ right.T
    return np.maximum(product, 0.0, out=product)


@dataclass(frozen=True)
class Measurements:
    """D, cells × pools, by row blocks. Each visit reads its block again."""

    array: da.Array

    @classmethod
    def of(cls, source: Any, pools: int) -> Measurements:
        """Take anything that `as_dask` takes. Raises `InputError` unless it holds numbers in `pools` columns."""
        array = as_dask(source, "measurements")
        if array.shape[1] != pools:
            raise InputError(
                f"measurements: {array.shape[1]} columns, the design has {pools} pools; give D and P of one experiment"
            )
        return cls(array.rechunk({1: -1}))

    def visits(
        self, function: Callable[..., Any], *settings: Any, states: Sequence[Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Return delayed `function([state,] block, start, *settings)` for each block; `start` is its first cell."""
        blocks, starts = self.array.to_delayed()[:, 0], [0, *np.cumsum(self.array.chunks[0])[:-1].tolist()]
        rows = zip(*(() if states is None else (states,)), blocks, starts, strict=True)
        call, shared = dask.delayed(function, **kwargs), [dask.delayed(each, traverse=False) for each in settings]
        return [call(*row, *shared) for row in rows]

    def total(self, function: Callable[..., Sums], *settings: Any, states: Sequence[Any] | None = None) -> Sums:
        """Return the sum of the results of `visits`."""
        parts = self.visits(function, *settings, states=states, pure=False)
        return tree_reduce(parts, add_sums).compute()  # type: ignore[no-any-return]

    def map(
        self, function: Callable[..., Float], width: int, *settings: Any, states: Sequence[Any] | None = None
    ) -> da.Array:
        """Return the results of `visits` as one lazy array, cells × width."""
        pieces = self.visits(function, *settings, states=states, pure=True)
        return stacked(pieces, self.array.chunks[0], width, np.float64)


def dense_block(block: Any, start: int) -> Float:
    """Return a block of D as dense float64. Raises `InputError` if a value is negative, NaN or infinite."""
    values = np.ascontiguousarray(block.toarray() if hasattr(block, "toarray") else block, dtype=np.float64)
    if values.size and not (values.min() >= 0 and values.max() < np.inf):  # false for NaN too
        cell, pool = np.argwhere(~((values >= 0) & (values < np.inf)))[0]
        raise InputError(
            f"measurements: value {values[cell, pool]} at cell {start + cell}, pool {pool}; sums of expression must "
            "be finite and not negative: give counts or normalised counts"
        )
    return values


def batches(cells: int) -> Iterator[slice]:
    """Yield slices of at most `BATCH` cells."""
    return (slice(start, min(start + BATCH, cells)) for start in range(0, cells, BATCH))


def add_sums(left: Sums, right: Sums) -> Sums:
    """Add two sets of sums."""
    return {name: left[name] + right[name] for name in left}
