"""Cells that were not in the fit, completed with its gene factors: one pass over them, a small problem for each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
import numpy as np
from numpy.typing import NDArray

from scialm_dask.data.factors import Imputation
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix, tree_reduce
from scialm_dask.errors import InputError
from scialm_dask.linalg.cellwise import RowProblems, leave_one_out, solve_rows
from scialm_dask.linalg.kernels import Doubles, Floats

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp

__all__ = ["transform"]

_RUNS, _RUN_CELLS = 16, 64  # cells to learn the noise from: a thousand, all over the matrix
_MOST_STEPS = 60  # of the search: from anywhere in float32's range


def transform(
    result: Imputation, matrix: ExpressionMatrix | str | os.PathLike[str] | Any, *, layer: str | None = None
) -> Imputation:
    """Complete cells that were not in the fit, with its gene factors.

    The left factor of a cell minimises the weighted squares of what its observed entries miss, on the scale on which
    the noise of genes is even, plus the distance from the cells of the fit: their mean, and their covariance over
    the noise. The noise is the one at which the new cells themselves predict each of their observed entries best
    from the others (leave-one-out, in closed form, on a thousand of them at most); the residual of the fit, which
    the gene factors were made to lower, is only where the search begins.

    Parameters
    ----------
    result
        Of `impute`.
    matrix
        New cells × genes, on the scale of the matrix of the fit: raw counts if those were, else normalised to the
        same total. An `ExpressionMatrix`, an AnnData, a path to a store, or an array, which has no names and must
        have the genes of the fit in their order.
    layer
        Layer of the store to read instead of X.

    Returns
    -------
    Imputation
        Of the new cells × the genes of the fit. Its left factor is lazy: a cell is read when it is asked for. A cell
        without an observed entry is zero.

    Raises
    ------
    InputError
        If fewer genes match than the result has factors, names are ambiguous, or one is of counts and the other not.
    """
    matrix, obs, names = _cells_of(matrix, layer)
    columns = _matching(result, names, matrix)
    sample = _sample(matrix)
    rule, note = _noise_rule(result, sample, obs)
    model = _model(result, columns, rule)
    noise = model.least_noise(sample, matrix.name)

    import dask.array as da

    solve, shared = dask.delayed(_solve_block), dask.delayed(model, traverse=False)
    precision = model.precision(noise)
    pieces = [
        da.from_delayed(
            solve(shared, matrix, b, rule.totals_of(slice(start, stop)), precision),
            shape=(stop - start, result.rank),
            dtype=np.float32,
        )
        for b, (start, stop) in enumerate(matrix.blocks)
    ]
    matched = int(np.count_nonzero(columns >= 0))
    summary = {
        "n_cells": matrix.shape[0],
        "n_genes": result.shape[1],
        "n_genes_matched": matched,
        "n_genes_not_in_fit": len(columns) - matched,
        "rank": result.rank,
        "noise": noise,
        "scaling": note,
        "source": matrix.name,
        "fitted_on": result.summary.get("source"),
    }
    summary |= {key: result.summary[key] for key in ("settings", "raw_counts", "residual") if key in result.summary}
    return result.of_cells(da.concatenate(pieces, axis=0), obs, summary)


@dataclass(frozen=True)
class _NoiseRule:
    """How the noise of cells differs: its variance is total^exponent, of the cell's counts or of their inverse.

    ``totals`` are those before normalisation, None for raw counts, whose totals are taken as they are read.
    """

    exponent: float
    totals: Doubles | None

    def totals_of(self, cells: slice) -> Doubles | None:
        """Totals of some cells, where they are known beforehand."""
        return None if self.totals is None else self.totals[cells]

    def weights(self, csr: sp.csr_matrix, totals: Doubles | None) -> Doubles:
        """One over the variance, of each cell of a block; ones for cells without counts."""
        size = (
            np.asarray(csr.sum(axis=1, dtype=np.float64)).ravel() if totals is None else 1 / np.maximum(totals, 1e-300)
        )
        return np.where(size > 0, size, 1.0) ** -self.exponent


class _Run(NamedTuple):
    """Consecutive cells: their entries, and where they are in the matrix."""

    csr: sp.csr_matrix
    cells: slice


@dataclass(frozen=True)
class _Model:
    """What the fit knows of cells: gene factors and scales, and mean and covariance of the left factor's rows.

    ``columns`` gives for each gene of the new cells its place in the fit, or −1.
    """

    columns: NDArray[np.intp]
    right: Floats
    gene_scale: Floats
    mean: Doubles
    covariance: Doubles
    residual: float
    rule: _NoiseRule

    def problems(self, csr: sp.csr_matrix, totals: Doubles | None) -> RowProblems:
        """Scale what is observed of the genes of the fit."""
        at = self.columns[csr.indices]
        known = at >= 0
        indptr = np.concatenate([[0], np.cumsum(known)])[csr.indptr]
        indices = at[known].astype(np.int32)
        return RowProblems(indptr, indices, csr.data[known] * self.gene_scale[indices], self.rule.weights(csr, totals))

    def precision(self, noise: float) -> Doubles:
        """Noise over covariance; what rounding has left of a direction without spread is not taken for spread."""
        floor = np.finfo(np.float32).eps * np.trace(self.covariance) + np.finfo(np.float64).tiny
        return noise * np.linalg.inv(self.covariance + floor * np.eye(len(self.mean)))

    def least_noise(self, sample: list[_Run], name: str) -> float:
        """Search, by factors of two, for the noise at which the leave-one-out error of the sample is least."""
        problems = [self.problems(csr, self.rule.totals_of(cells)) for csr, cells in sample]
        squares = np.concatenate([np.repeat(p.weights, np.diff(p.indptr)) * np.square(p.values) for p in problems])
        if not squares.any():
            raise InputError(f"{name}: no entry of the sampled cells is of a gene of the fit; check the matrix")

        def error(noise: float) -> float:
            return sum(leave_one_out(p, self.right, self.precision(noise), self.mean) for p in problems)

        noise = self.residual**2 * float(squares.mean())
        least = error(noise)
        for factor in (2.0, 0.5):
            for _ in range(_MOST_STEPS):
                latest = error(noise * factor)
                if not latest < least:
                    break
                noise, least = noise * factor, latest
        return noise


def _cells_of(matrix: Any, layer: str | None) -> tuple[ExpressionMatrix, pd.DataFrame, pd.Index | None]:
    """Give the matrix, the annotation of its cells, and the names of its genes, None if it has none."""
    if isinstance(matrix, str | os.PathLike):
        matrix = ExpressionMatrix.open(matrix, layer)
    if isinstance(matrix, ExpressionMatrix):
        return matrix, matrix.obs, None if matrix.annotation is None else matrix.var.index
    if hasattr(matrix, "var_names"):
        values = matrix.layers[layer] if layer else matrix.X
        return ExpressionMatrix.of(values), matrix.obs, matrix.var_names
    plain = ExpressionMatrix.of(matrix)
    return plain, plain.obs, None


def _matching(result: Imputation, names: pd.Index | None, matrix: ExpressionMatrix) -> NDArray[np.intp]:
    """For each gene of the new cells, its place in the fit, or −1."""
    n_fitted, n_given = result.shape[1], matrix.shape[1]
    if names is None:
        if n_given != n_fitted:
            raise InputError(
                f"{matrix.name}: {n_given} genes without names, but the fit has {n_fitted}; give the same genes, "
                "or an AnnData with gene names"
            )
        return np.arange(n_fitted)
    for where, index in (("the fit", result.var.index), (matrix.name, names)):
        if not index.is_unique:
            raise InputError(f"{where}: several genes are named {index[index.duplicated()][0]!r}; make names unique")
    columns: NDArray[np.intp] = result.var.index.get_indexer(names)
    matched = int(np.count_nonzero(columns >= 0))
    if matched <= result.rank:
        raise InputError(
            f"{matrix.name}: {matched} of {n_given} genes are in the fit, by names such as {names[0]!r} and there "
            f"{result.var.index[0]!r}; more than {result.rank}, the rank of the fit, are needed"
        )
    return columns


def _sample(matrix: ExpressionMatrix) -> list[_Run]:
    """Read runs of cells from all over the matrix; which ones depends on the number of cells alone."""
    n = matrix.shape[0]
    if n <= _RUNS * _RUN_CELLS:
        bounds, runs = [0, n], [0]
    else:
        starts = [n * run // _RUNS for run in range(_RUNS)]
        bounds = sorted({*starts, *(start + _RUN_CELLS for start in starts), n})
        runs = [bounds.index(start) for start in starts]
    cut = matrix.with_blocks(RowBlocks(tuple(bounds)))
    return [_Run(cut.read_block(run), slice(*cut.blocks[run])) for run in runs]


def _noise_rule(result: Imputation, sample: list[_Run], obs: pd.DataFrame) -> tuple[_NoiseRule, str]:
    """Treat cells as the fit did: see `scialm_dask.solve.scaling`."""
    counts = not any(np.any(csr.data % 1) for csr, _ in sample)
    of_counts = result.summary.get("raw_counts", counts)
    if counts != of_counts:
        kinds = {True: "raw counts", False: "not raw counts"}
        raise InputError(
            f"new cells are {kinds[counts]}, the cells of the fit were {kinds[of_counts]}; give the same kind"
        )
    exponent = 2 * result.summary.get("settings", {}).get("scaling", (0.0, 0.0))[1]
    if exponent == 0 or result.gene_scale is None:
        return _NoiseRule(0.0, None), "cells weighed alike, as in the fit"
    if counts:
        return _NoiseRule(exponent, None), "cells weighed by their totals"
    if "total_counts" not in obs:
        return _NoiseRule(0.0, None), "cells weighed alike, as obs has no total_counts"
    return _NoiseRule(exponent, obs["total_counts"].to_numpy(np.float64)), "cells weighed by obs['total_counts']"


def _model(result: Imputation, columns: NDArray[np.intp], rule: _NoiseRule) -> _Model:
    """Sum up the left factor of the fit, block by block, and put the right one on the scale of even noise."""
    parts = [dask.delayed(_moments)(block) for block in result.left.to_delayed().ravel()]
    total, squares = tree_reduce(parts, _add).compute()
    n_cells, n_genes = result.shape
    mean = total / n_cells
    gene_scale = np.ones(n_genes, np.float32) if result.gene_scale is None else result.gene_scale
    return _Model(
        columns,
        result.right * gene_scale[:, None],
        gene_scale,
        mean,
        squares / n_cells - np.outer(mean, mean),
        float(result.summary.get("residual") or 1.0),
        rule,
    )


def _moments(left: Floats) -> tuple[Doubles, Doubles]:
    wide = left.astype(np.float64)
    return wide.sum(axis=0), wide.T @ wide


def _add(one: tuple[Doubles, Doubles], other: tuple[Doubles, Doubles]) -> tuple[Doubles, Doubles]:
    return one[0] + other[0], one[1] + other[1]


def _solve_block(
    model: _Model, matrix: ExpressionMatrix, block: int, totals: Doubles | None, precision: Doubles
) -> Floats:
    problems = model.problems(matrix.read_block(block), totals)
    left = solve_rows(problems, model.right, precision, model.mean)
    left[np.diff(problems.indptr) == 0] = 0
    return left
