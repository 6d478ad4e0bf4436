"""Cells that were not in the fit, completed with its gene factors: one pass over them, a small problem for each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
import numpy as np
from numpy.typing import NDArray

from scialm_dask.data.annotated import as_matrix, refuse_logarithms
from scialm_dask.data.annotation import total_counts
from scialm_dask.data.csr import Observed, RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Note, silent
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.least_squares import RowProblems, leave_one_out, solve_rows
from scialm_dask.linalg.sparse_products import spmm
from scialm_dask.reduction import stacked
from scialm_dask.solve.scaling import CellModel, CompletionModel, DenoisingModel

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd
    import scipy.sparse as sp

    _Run = tuple[sp.csr_matrix, slice]  # consecutive cells: their entries, and where they are

_RUNS, _RUN_CELLS = 16, 64  # cells to learn the noise from: a thousand, all over the matrix
_MOST_STEPS = 60  # of the search: from anywhere in float32's range


class Fit(NamedTuple):
    """What of a result completes other cells."""

    right: Floats  # right factor, float32, shape (n, r), on the scale of the input
    genes: pd.Index  # their names
    model: CellModel | None  # what the fit has learnt of cells
    observed: Observed  # which entries were; see ExpressionMatrix
    source: str | None  # what the matrix of the fit is called


class Transformed(NamedTuple):
    """Cells that were imputed."""

    left: da.Array  # left factor, float32, shape (cells, r), lazy
    counts: ExpressionMatrix | None  # × genes of the fit; None where they have no part in what is imputed
    measured: NDArray[np.bool_]  # which of these genes the cells had
    obs: pd.DataFrame
    summary: dict[str, Any]


def transform(
    fit: Fit,
    matrix: ExpressionMatrix | str | os.PathLike[str] | Any,
    *,
    layer: str | None = None,
    listen: Listener = silent,
) -> Transformed:
    """Impute cells that were not in the fit, with its gene factors; see `Imputation.transform`.

    *Completed*: the left factor of a cell minimises the squares of what its entries miss, on the scale on which the
    noise of genes is even, plus the distance from the cells of the fit: their mean, and their covariance over the
    noise. The noise is the one at which the new cells themselves predict each of their entries best from the others,
    on a thousand of them at most. The residual of the fit, which the gene factors were made to lower, is only where
    the search begins.

    *Denoised*: with s the scaled counts of a cell and V orthonormal, u = (VᵀV + diag((1 − w)/w))⁻¹ Vᵀs over the genes
    that were measured. Where all were, that is diag(w)Vᵀs, what the fit itself makes of its cells.

    Raises
    ------
    InputError
        If fewer genes match than the result has factors, names are ambiguous, or one is of counts and the other not.
    """
    given, matrix = matrix, as_matrix(matrix, layer, observed=fit.observed).for_workers()
    refuse_logarithms(matrix, given, layer)
    obs, names = matrix.obs, None if matrix.annotation is None else matrix.var.index
    if fit.model is None:
        raise InputError("the result says nothing of other cells; give one of `impute`")
    columns = _matching(fit, names, matrix)
    matched = int(np.count_nonzero(columns >= 0))
    few = ""
    if 2 * matched < len(fit.right):
        few = (
            f"{matched:,} of the fit's {len(fit.right):,} genes match ({matched / len(fit.right):.1%}); all others are "
            "guessed from these, the worse the fewer: give more of them, or fit on the genes that both have"
        )
        listen(Note(f"{matrix.name}: {few}"))
    sample = _sample(matrix)
    sizes, note = _size_factors(fit.model, sample, obs)
    scaled = _Scaled(fit.model, columns)
    right = fit.right * fit.model.gene_scale[:, None]
    summary = {
        "n_cells": matrix.shape[0],
        "n_genes": len(fit.right),
        "n_genes_matched": matched,
        "n_genes_not_in_fit": len(columns) - matched,
        "rank": fit.right.shape[1],
        "scaling": note,
        "source": matrix.name,
        "fitted_on": fit.source,
        **({"few_genes": few} if few else {}),
    }
    counts: ExpressionMatrix | None = None
    if isinstance(fit.model, CompletionModel):
        noise = _least_noise(fit.model, scaled, right, sample, sizes, matrix.name)
        solver = functools.partial(solve_rows, right=right, precision=_precision(fit.model, noise), mean=fit.model.mean)
        summary["noise"] = noise
    else:
        assert isinstance(fit.model, DenoisingModel)
        solver = functools.partial(_project, onto=_projection(fit.model, right, scaled.measured))
        counts = matrix.of_genes(columns, len(fit.right))
    solve, shared = dask.delayed(_solve_block), dask.delayed((solver, scaled, matrix), traverse=False)
    spans = enumerate(matrix.blocks)
    lefts = [solve(shared, b, None if sizes is None else sizes[start:stop]) for b, (start, stop) in spans]
    left = stacked(lefts, matrix.blocks.sizes, fit.right.shape[1])
    return Transformed(left, counts, scaled.measured, obs, summary)


@dataclass(frozen=True)
class _Scaled:
    """Cells on the scale of the fit; ``columns`` gives for each of their genes its place in the fit, or −1."""

    model: CellModel
    columns: NDArray[np.intp]

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which genes of the fit they have, shape ``(n,)``."""
        return np.isin(np.arange(len(self.model.gene_scale)), self.columns)

    def problems(self, csr: sp.csr_matrix, sizes: Doubles | None) -> tuple[RowProblems, Doubles]:
        """Scale what is observed of the genes of the fit; return the scales of the cells too.

        The size factors are the totals of what is read if they are None.
        """
        at = self.columns[csr.indices]
        known = at >= 0
        indptr = np.concatenate([[0], np.cumsum(known)])[csr.indptr]
        indices = at[known].astype(np.int32)
        values = csr.data[known]
        rows = np.repeat(np.arange(csr.shape[0]), np.diff(indptr))
        if sizes is None:
            share = self.model.gene_share[self.measured].sum()
            sizes = np.bincount(rows, weights=values, minlength=csr.shape[0]) / (share or 1.0)
        scale = np.where(sizes > 0, sizes / self.model.centre, 1.0) ** -self.model.cell_exponent
        values = (values * self.model.gene_scale[indices] * scale[rows]).astype(np.float32)
        return RowProblems(indptr, indices, values), scale


def _project(problems: RowProblems, onto: Floats) -> Floats:
    """Multiply each row, zeros and all, with the same matrix, shape ``(n, r)``."""
    indptr, indices, values = problems
    left = np.zeros((len(indptr) - 1, onto.shape[1]), np.float32)
    spmm(indptr, indices, values, onto, left)
    return left


def _projection(model: DenoisingModel, right: Floats, measured: NDArray[np.bool_]) -> Floats:
    """Return V (VᵀV + diag((1 − w)/w))⁻¹, with V over the measured genes."""
    some = np.where(measured[:, None], right, np.float32(0)).astype(np.float64)
    inverted = some.T @ some + np.diag((1 - model.weights) / model.weights)
    inverted += np.finfo(np.float32).eps * np.eye(len(inverted))  # directions that no measured gene shows, at w = 1
    return np.linalg.solve(inverted, some.T).T.astype(np.float32)


def _precision(model: CompletionModel, noise: float) -> Doubles:
    """Noise over covariance, where rounding is not mistaken for spread."""
    floor = np.finfo(np.float32).eps * np.trace(model.covariance) + np.finfo(np.float64).tiny
    inverse: Doubles = np.linalg.inv(model.covariance + floor * np.eye(len(model.covariance)))
    return noise * inverse


def _least_noise(
    model: CompletionModel, scaled: _Scaled, right: Floats, sample: list[_Run], sizes: Doubles | None, name: str
) -> float:
    """Search, by factors of √2, for the noise at which the sample predicts its own entries best."""
    problems = [scaled.problems(csr, None if sizes is None else sizes[cells])[0] for csr, cells in sample]
    values = np.concatenate([p.values for p in problems])
    if not values.any():
        raise InputError(f"{name}: no entry of the sampled cells is of a gene of the fit; check the matrix")

    def error(noise: float) -> float:
        precision = _precision(model, noise)
        return sum(leave_one_out(p, right, precision, model.mean) for p in problems)

    noise = (model.residual or 1.0) ** 2 * float(np.square(values, dtype=np.float64).mean())
    least = error(noise)
    for step in (np.sqrt(2), np.sqrt(0.5)):
        for _ in range(_MOST_STEPS):
            latest = error(noise * step)
            if not latest < least:
                break
            noise, least = noise * step, latest
    return noise


def _matching(fit: Fit, names: pd.Index | None, matrix: ExpressionMatrix) -> NDArray[np.intp]:
    """For each gene of the new cells, its place in the fit, or −1."""
    n_fitted, n_given = len(fit.right), matrix.shape[1]
    if names is None:
        if n_given != n_fitted:
            raise InputError(
                f"{matrix.name}: {n_given} genes without names, but the fit has {n_fitted}; give the same genes, "
                "or an AnnData with gene names"
            )
        return np.arange(n_fitted)
    for where, index in (("the fit", fit.genes), (matrix.name, names)):
        if not index.is_unique:
            raise InputError(f"{where}: several genes are named {index[index.duplicated()][0]}; make names unique")
    columns: NDArray[np.intp] = fit.genes.get_indexer(names)
    matched = int(np.count_nonzero(columns >= 0))
    if matched < fit.right.shape[1]:
        raise InputError(
            f"{matrix.name}: {matched} of {n_given} genes are in the fit, by names such as {names[0]} and there "
            f"{fit.genes[0]}; {fit.right.shape[1]} at least, the rank of the fit, are needed"
        )
    return columns


def _sample(matrix: ExpressionMatrix) -> list[_Run]:
    """Read runs of cells, with their places, from all over the matrix; which ones only the number of cells decides."""
    n = matrix.shape[0]
    if n <= _RUNS * _RUN_CELLS:
        bounds, runs = [0, n], [0]
    else:
        starts = [n * run // _RUNS for run in range(_RUNS)]
        bounds = sorted({*starts, *(start + _RUN_CELLS for start in starts), n})
        runs = [bounds.index(start) for start in starts]
    cut = matrix.with_blocks(RowBlocks(tuple(bounds)))
    return [(cut.read_block(run), slice(*cut.blocks[run])) for run in runs]


def _size_factors(model: CellModel, sample: list[_Run], obs: pd.DataFrame) -> tuple[Doubles | None, str]:
    """Scale cells as the fit did; see `scialm_dask.solve.scaling.scales_of`."""
    counts = not any(np.any(csr.data % 1) for csr, _ in sample)
    if model.cell_exponent == 0:
        return None, "cells not scaled, as in the fit"
    if counts != model.raw_counts:
        kinds = {True: "raw counts", False: "no raw counts"}
        raise InputError(
            f"the new cells are {kinds[counts]}, those of the fit were {kinds[model.raw_counts]}; give the same kind"
        )
    if counts:
        return None, "cells scaled by their totals"
    if (totals := total_counts(obs, "the new cells")) is None:
        return np.full(len(obs), model.centre), "cells not scaled, as obs has no total_counts"
    sizes = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
    return sizes, "cells scaled by obs['total_counts']"


def _solve_block(
    shared: tuple[Callable[[RowProblems], Floats], _Scaled, ExpressionMatrix], block: int, sizes: Doubles | None
) -> Floats:
    solver, scaled, matrix = shared
    problems, scale = scaled.problems(matrix.read_block(block), sizes)
    left = solver(problems) / scale[:, None]
    left[np.diff(problems.indptr) == 0] = 0
    return left.astype(np.float32)
