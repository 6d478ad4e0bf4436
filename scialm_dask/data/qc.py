"""Quality control, out of core: drops poor cells and rare genes, and scales each cell to the same total."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from scialm_dask.config import Interval, Natural, check_fields, checked
from scialm_dask.data.annotated import refuse_logarithms, storable_annotation
from scialm_dask.data.annotation import new_anndata, symbols
from scialm_dask.data.csr import CSRWriter, check_observed, scaled_rows
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import atomic_store, check_output
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Note, begin, silent

_PASSES = 4


@dataclass(frozen=True)
class Thresholds:
    """Limits for cells and genes, inclusive; None means no limit.

    Mitochondrial genes are found by name, and by symbols in ``var``: ``feature_name``, ``gene_symbols`` or
    ``gene_name``.
    """

    min_genes: Natural | None = None  # genes with counts in a cell
    max_genes: Natural | None = None
    max_mito: Annotated[float, Interval(0, 100)] | None = None  # percent of a cell's counts on mitochondrial genes
    mito_prefix: str = "MT-"  # of the names of mitochondrial genes, in any case
    min_cells: Natural | None = None  # cells with counts of a gene, among the cells kept

    def __post_init__(self) -> None:
        check_fields(self)


class CellMeasures(NamedTuple):
    """Measures of each cell: genes with counts, total counts, and counts on mitochondrial genes."""

    n_genes: NDArray[np.int64]
    totals: NDArray[np.float64]
    mito: NDArray[np.float64]

    @property
    def pct_mito(self) -> NDArray[np.float64]:
        """Share of the counts on mitochondrial genes, in percent."""
        return 100 * np.divide(self.mito, self.totals, out=np.zeros_like(self.mito), where=self.totals > 0)


@checked
def quality_control(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    thresholds: Thresholds | None = None,
    *,
    layer: str | None = None,
    missing_chunks_are_zeros: bool = False,
    overwrite: bool = False,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Drop poor cells and rare genes, then scale each cell to the median total. No logarithm is taken.

    Cells are chosen by all their genes, then genes by the chosen cells. Each cell is divided by its total over the
    chosen genes, and multiplied by the median of these totals over cells with any count.

    Parameters
    ----------
    source
        Counts: whatever `ExpressionMatrix.open` reads.
    destination
        AnnData Zarr store to write: X (float32), ``var``, and ``obs`` with ``total_counts`` (raw, over the chosen
        genes), ``n_genes`` and ``pct_mito`` (over all genes, as compared with the thresholds). Counts that are whole
        numbers are kept in ``layers["counts"]``, which preset ``denoise`` needs. Other layers are left out.
    thresholds
        Limits for cells and genes; none by default.
    layer
        Read this layer instead of X.
    missing_chunks_are_zeros
        See `ExpressionMatrix.open`.
    overwrite
        Replace `destination` if it exists.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    dict
        ``destination``, ``n_cells``, ``n_genes``, ``n_observed``, ``cells_dropped``, ``genes_dropped``,
        ``mito_genes``, ``empty_cells`` (kept without any count left) and ``median_total``.

    Raises
    ------
    InputError
        If the source cannot be used, holds logarithms, or nothing would be left.
    OutputError
        If the destination cannot be written.
    """
    thresholds = thresholds or Thresholds()
    check_output(destination, overwrite=overwrite, sources=(source,))
    matrix = ExpressionMatrix.open(source, layer, missing_chunks_are_zeros=missing_chunks_are_zeros)
    refuse_logarithms(matrix, source, layer)
    matrix = storable_annotation(matrix, listen)
    is_mito = mitochondrial(matrix, thresholds)
    if thresholds.max_mito is not None and not is_mito.any():
        what = f"max_mito is {thresholds.max_mito:g}, but no gene name or symbol begins with {thresholds.mito_prefix!r}"
        raise InputError(
            f"{matrix.name}: {what} (the first are {', '.join(matrix.var.index[:3])}); give another prefix"
        )
    step, advance = 1 / _PASSES / len(matrix.blocks), begin(listen, "quality control")
    measures, cells, genes, totals, whole = _choose(matrix, is_mito, thresholds, lambda: advance(step))
    if not whole:
        listen(Note(f"{matrix.name}: not whole numbers, so no layer counts is kept, which preset denoise would need"))
    median = float(np.median(totals[totals > 0]))
    obs = matrix.obs[cells].assign(
        total_counts=totals[cells].astype(np.float32),
        n_genes=measures.n_genes[cells],
        pct_mito=measures.pct_mito[cells],
    )
    with atomic_store(destination, overwrite=overwrite, sources=(source,)) as partial:
        root = new_anndata(partial, obs=obs, var=matrix.var[genes])
        factors = np.divide(median, totals, out=np.zeros_like(totals), where=totals > 0)
        n_observed = _write(root, matrix, cells, np.flatnonzero(genes), factors, whole, lambda: advance(step))
        matrix.check_unchanged()
    return {
        "destination": os.fspath(destination),
        "n_cells": int(cells.sum()),
        "n_genes": int(genes.sum()),
        "n_observed": n_observed,
        "cells_dropped": int((~cells).sum()),
        "genes_dropped": int((~genes).sum()),
        "mito_genes": int(is_mito.sum()),
        "empty_cells": int((totals[cells] == 0).sum()),
        "median_total": median,
    }


def _choose(
    matrix: ExpressionMatrix, is_mito: NDArray[np.bool_], thresholds: Thresholds, tick: Callable[[], None]
) -> tuple[CellMeasures, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64], bool]:
    """Choose cells and genes in three passes.

    Returns the measures, which cells and genes are kept, the total of each cell over these genes, 0 if it is dropped,
    and whether all values are whole numbers.
    """
    measures = measure_cells(matrix, is_mito, tick)
    check_observed(int(measures.n_genes.sum()), matrix.name)
    cells = chosen_cells(measures, thresholds)
    n_cells_of = np.zeros(matrix.shape[1], np.int64)
    for rows, block in _blocks(matrix, tick):
        n_cells_of += np.bincount(block[cells[rows]].indices, minlength=matrix.shape[1])
    genes = n_cells_of >= (thresholds.min_cells or 0)
    if not cells.any() or not genes.any():
        what = "cell" if not cells.any() else "gene"
        raise InputError(f"{matrix.name}: no {what} passes the thresholds ({thresholds}); loosen them")
    totals, whole = np.zeros(matrix.shape[0]), True
    for rows, block in _blocks(matrix, tick):
        totals[rows] = cells[rows] * (block @ genes.astype(np.float64))
        whole = whole and not np.any(block.data % 1)
    if not totals.any():
        raise InputError(f"{matrix.name}: no counts are left after the thresholds ({thresholds}); loosen them")
    return measures, cells, genes, totals, whole


def _blocks(matrix: ExpressionMatrix, tick: Callable[[], None]) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """Yield the rows of each block, and the block."""
    for span, block in zip(matrix.blocks, matrix.stream(), strict=True):
        yield slice(*span), block
        tick()


def mitochondrial(matrix: ExpressionMatrix, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Return which genes are mitochondrial by name or symbol, bool of shape (n_genes,)."""
    prefix = re.escape(thresholds.mito_prefix)
    mito: NDArray[np.bool_] = np.any([n.str.match(prefix, case=False) for n in symbols(matrix.var)], axis=0)
    return mito


def measure_cells(
    matrix: ExpressionMatrix, is_mito: NDArray[np.bool_], tick: Callable[[], None] = lambda: None
) -> CellMeasures:
    """Measure each cell, in one pass; `tick` is called after each block."""
    n_cells = matrix.shape[0]
    cells = CellMeasures(np.zeros(n_cells, np.int64), np.zeros(n_cells), np.zeros(n_cells))
    for rows, block in _blocks(matrix, tick):
        cells.n_genes[rows] = np.diff(block.indptr)
        cells.totals[rows] = block.sum(axis=1, dtype=np.float64).A1
        cells.mito[rows] = block @ is_mito.astype(np.float64)
    return cells


def chosen_cells(cells: CellMeasures, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Return which cells are within the thresholds, bool of shape (n_cells,)."""
    most_genes = np.inf if thresholds.max_genes is None else thresholds.max_genes
    most_mito = np.inf if thresholds.max_mito is None else thresholds.max_mito
    in_range = (cells.n_genes >= (thresholds.min_genes or 0)) & (cells.n_genes <= most_genes)
    return in_range & (cells.pct_mito <= most_mito)


def _write(
    root: zarr.Group,
    matrix: ExpressionMatrix,
    cells: NDArray[np.bool_],
    genes: NDArray[np.intp],
    factors: NDArray[np.float64],
    whole: bool,
    tick: Callable[[], None],
) -> int:
    """Write the chosen cells × genes, scaled, and as they are too if they are whole; returns the number of entries."""
    n_observed = 0
    with ExitStack() as opened:
        names = ["X", "layers/counts"] if whole else ["X"]
        scaled, *counts = (opened.enter_context(CSRWriter(root, name, n_columns=len(genes))) for name in names)
        for rows, block in _blocks(matrix, tick):
            left = block[cells[rows]][:, genes]
            scaled.append(scaled_rows(left, factors[rows][cells[rows]]))
            for writer in counts:
                writer.append(left)
            n_observed += left.nnz
    zarr.consolidate_metadata(root.store)
    return n_observed
