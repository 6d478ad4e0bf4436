"""Impute cells that were not in the fit, from its gene factors: one pass, and a small problem for each cell."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
from numpy.typing import NDArray

from scialm_dask.data.annotated import as_matrix, refuse_logarithms
from scialm_dask.data.annotation import total_counts
from scialm_dask.data.csr import renumbered, row_of
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Note, silent
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.least_squares import RowProblems, leave_one_out, solve_rows
from scialm_dask.linalg.sparse_products import spmm
from scialm_dask.reduction import stacked
from scialm_dask.solve.scaling import CellModel

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp

    _Run = tuple[sp.csr_matrix, slice]  # consecutive cells, and their rows

_RUNS, _RUN_CELLS = 16, 64  # cells to estimate the noise from: about a thousand, from all over the matrix
_MOST_STEPS = 60  # of the search for the noise: from anywhere in float32's range


def transform(
    fit: Any,
    matrix: ExpressionMatrix | str | os.PathLike[str] | Any,
    *,
    layer: str | None = None,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Return the arguments of the `Imputation` of new cells that differ from those of `fit`, an `Imputation` too.

    *Completed*: the left factor of a cell minimises the squared error on its entries, on the scale with even noise,
    plus the distance from the cells of the fit: from their mean, by their covariance over the noise variance. The noise
    is the one for which the new cells, up to a thousand of them, best predict each of their entries from the others.
    The residual of the fit is too low, as the gene factors were fitted to it; the search only starts there.

    *Denoised*: with s the scaled counts of a cell and V orthonormal, u = (VᵀV + diag((1 − w)/w))⁻¹ Vᵀs over the
    measured genes. If all genes are measured this is diag(w) Vᵀs, as in the fit.

    Raises `InputError` if fewer genes match than the result has factors, names are ambiguous, or only one of the two is
    counts.
    """
    given, matrix = matrix, as_matrix(matrix, layer, observed=fit.observed).for_workers()
    refuse_logarithms(matrix, given, layer)
    obs, names, model = matrix.obs, None if matrix.annotation is None else matrix.var.index, fit.model
    if model is None:
        raise InputError("the result has no model of its cells, to impute others; give a result of `impute`")
    n_fitted, rank = fit.right.shape
    columns, few = _matching(fit, names, matrix)
    if few:
        listen(Note(f"{matrix.name}: {few}"))
    sample = _sample(matrix)
    sizes, note = _size_factors(model, sample, obs)
    right = fit.right * model.gene_scale[:, None]
    measured = np.isin(np.arange(n_fitted), columns)
    summary = {
        "n_cells": matrix.shape[0],
        "n_genes": n_fitted,
        "n_genes_matched": int(np.count_nonzero(columns >= 0)),
        "n_genes_not_in_fit": int(np.count_nonzero(columns < 0)),
        "rank": rank,
        "scaling": note,
        "source": matrix.name,
        "fitted_on": fit.summary.get("source"),
        **({"few_genes": few} if few else {}),
    }
    counts: ExpressionMatrix | None = None
    if model.weights is None:
        problems = [_problems(model, columns, csr, None if sizes is None else sizes[rows])[0] for csr, rows in sample]
        noise = summary["noise"] = _least_noise(model, problems, right, matrix.name)
        solver = functools.partial(solve_rows, right=right, precision=_precision(model, noise), mean=model.mean)
    else:
        solver = functools.partial(_project, onto=_projection(model.weights, right, measured))
        counts = matrix.of_genes(columns, n_fitted)
    solve, shared = dask.delayed(_solve_block), dask.delayed((solver, model, columns, matrix), traverse=False)
    spans = enumerate(matrix.blocks)
    lefts = [solve(shared, b, None if sizes is None else sizes[start:stop]) for b, (start, stop) in spans]
    return {
        "left": stacked(lefts, matrix.blocks.sizes, rank),
        "obs": obs,
        "summary": summary,
        "counts": counts,
        "residual_weight": None if fit.residual_weight is None else fit.residual_weight * measured,
    }


def _problems(
    model: CellModel, columns: NDArray[np.intp], csr: sp.csr_matrix, sizes: Doubles | None
) -> tuple[RowProblems, Doubles]:
    """Scale the entries of cells as in the fit, leaving out other genes; return the scales of the cells too.

    `columns` has the position in the fit of each gene, or −1. The size factors are the totals of the cells if None.
    """
    known = renumbered(csr, columns, len(model.gene_scale))
    rows, indices = row_of(known), known.indices.astype(np.int32, copy=False)
    if sizes is None:
        share = model.gene_share[columns[columns >= 0]].sum()
        sizes = np.bincount(rows, weights=known.data, minlength=csr.shape[0]) / (share or 1.0)
    scale = np.where(sizes > 0, sizes / model.centre, 1.0) ** -model.cell_exponent
    values = (known.data * model.gene_scale[indices] * scale[rows]).astype(np.float32)
    return RowProblems(known.indptr, indices, values), scale


def _project(problems: RowProblems, onto: Floats) -> Floats:
    """Multiply each row, zeros included, by the same matrix, of shape ``(n, r)``."""
    indptr, indices, values = problems
    left = np.zeros((len(indptr) - 1, onto.shape[1]), np.float32)
    spmm(indptr, indices, values, onto, left)
    return left


def _projection(weights: Doubles, right: Floats, measured: NDArray[np.bool_]) -> Floats:
    """Return V (VᵀV + diag((1 − w)/w))⁻¹, with V over the measured genes."""
    some = np.where(measured[:, None], right, np.float32(0)).astype(np.float64)
    inverted = some.T @ some + np.diag((1 - weights) / weights)
    inverted += np.finfo(np.float32).eps * np.eye(len(inverted))  # for w = 1 in directions without measured genes
    return np.linalg.solve(inverted, some.T).T.astype(np.float32)


def _precision(model: CellModel, noise: float) -> Doubles:
    """Return the noise times the inverse covariance, regularised against rounding."""
    assert model.covariance is not None
    floor = np.finfo(np.float32).eps * np.trace(model.covariance) + np.finfo(np.float64).tiny
    inverse: Doubles = np.linalg.inv(model.covariance + floor * np.eye(len(model.covariance)))
    return noise * inverse


def _least_noise(model: CellModel, problems: list[RowProblems], right: Floats, name: str) -> float:
    """Search, by factors of √2, for the noise variance with which sampled cells best predict their own entries."""
    values = np.concatenate([p.values for p in problems])
    if not values.any():
        raise InputError(f"{name}: no entry of the sampled cells is of a gene of the fit; check the matrix")

    def error(noise: float) -> float:
        precision = _precision(model, noise)
        assert model.mean is not None
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


def _matching(fit: Any, names: pd.Index | None, matrix: ExpressionMatrix) -> tuple[NDArray[np.intp], str]:
    """Return the position in the fit of each gene of the new cells, or −1, and a warning if few genes match."""
    genes, (n_fitted, rank), n_given = fit.var.index, fit.right.shape, matrix.shape[1]
    if names is None:
        if n_given != n_fitted:
            raise InputError(
                f"{matrix.name}: {n_given} genes without names, but the fit has {n_fitted}; give the same genes, "
                "or an AnnData with gene names"
            )
        return np.arange(n_fitted), ""
    for where, index in (("the fit", genes), (matrix.name, names)):
        if not index.is_unique:
            raise InputError(f"{where}: several genes are named {index[index.duplicated()][0]}; make names unique")
    columns: NDArray[np.intp] = genes.get_indexer(names)
    matched = int(np.count_nonzero(columns >= 0))
    if matched < rank:
        raise InputError(
            f"{matrix.name}: {matched} of {n_given} genes are in the fit, by names such as {names[0]} and there "
            f"{genes[0]}; {rank} at least, the rank of the fit, are needed"
        )
    few = (
        f"{matched:,} of the fit's {n_fitted:,} genes match ({matched / n_fitted:.1%}); all others are "
        "guessed from these, the worse the fewer: give more of them, or fit on the genes that both have"
    )
    return columns, few if 2 * matched < n_fitted else ""


def _sample(matrix: ExpressionMatrix) -> list[_Run]:
    """Read runs of cells from all over the matrix, always the same ones, and return them with their rows."""
    n, runs = matrix.shape[0], [slice(0, matrix.shape[0])]
    if n > _RUNS * _RUN_CELLS:
        starts = [n * run // _RUNS for run in range(_RUNS)]
        runs = [slice(start, start + _RUN_CELLS) for start in starts]
    return [(matrix.take(run), run) for run in runs]


def _size_factors(model: CellModel, sample: list[_Run], obs: pd.DataFrame) -> tuple[Doubles | None, str]:
    """Return the size factors of new cells, None for their totals, as in `scales_of`, and a note."""
    counts = not any(np.any(csr.data % 1) for csr, _ in sample)
    if model.cell_exponent == 0:
        return None, "cells not scaled, as in the fit"
    if counts != model.raw_counts:
        kinds = {True: "raw counts", False: "not raw counts"}
        raise InputError(
            f"the new cells are {kinds[counts]}, those of the fit were {kinds[model.raw_counts]}; give the same kind"
        )
    if counts:
        return None, "cells scaled by their totals"
    if (totals := total_counts(obs, "the new cells")) is None:
        return np.full(len(obs), model.centre), "cells not scaled, as obs has no total_counts"
    sizes = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
    return sizes, "cells scaled by obs['total_counts']"


def _solve_block(shared: tuple[Any, ...], block: int, sizes: Doubles | None) -> Floats:
    solver, model, columns, matrix = shared
    problems, scale = _problems(model, columns, matrix.read_block(block), sizes)
    left: Floats = (solver(problems) / scale[:, None]).astype(np.float32)
    left[np.diff(problems.indptr) == 0] = 0
    return left
