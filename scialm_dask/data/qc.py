"""Quality control: cells and genes worth keeping, every cell normalised to the same total. Out of core."""

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
    """What to keep; None means no limit. All limits are inclusive.

    Symbols in ``var`` are looked at too for mitochondrial genes, in ``feature_name``, ``gene_symbols`` or
    ``gene_name``.
    """

    min_genes: Natural | None = None  # genes with counts, of a cell
    max_genes: Natural | None = None
    max_mito: Annotated[float, Interval(0, 100)] | None = None  # percent of the counts of a cell on mitochondrial genes
    mito_prefix: str = "MT-"  # how the names of these begin, in capitals or not
    min_cells: Natural | None = None  # with counts, of a gene, among the cells that are kept

    def __post_init__(self) -> None:
        check_fields(self)


class CellMeasures(NamedTuple):
    """Per cell: genes with counts, total counts, counts on mitochondrial genes."""

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
    """Drop poor cells and rare genes, then scale every cell to the median total. No logarithm is taken.

    First the cells are chosen, by all their genes, then the genes, by the cells chosen; then each cell is divided by
    its total over the chosen genes and multiplied by the median of these totals over cells that have any count.

    Parameters
    ----------
    source
        Counts: whatever `ExpressionMatrix.open` reads.
    destination
        AnnData Zarr store to write: X (float32), ``var``, and ``obs`` with ``total_counts`` (raw, over the chosen
        genes), ``n_genes`` and ``pct_mito`` (over all genes, as compared with the thresholds). The counts themselves
        are kept in ``layers["counts"]``, if they are whole numbers, as preset ``denoise`` needs. Other layers are
        left out.
    thresholds
        What to keep; all by default.
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
        raise InputError(
            f"{matrix.name}: max_mito is {thresholds.max_mito:g}, but no gene name or symbol begins with "
            f"{thresholds.mito_prefix!r} (the first are {', '.join(matrix.var.index[:3])}); give another prefix"
        )
    step, advance = 1 / _PASSES / len(matrix.blocks), begin(listen, "quality control")
    kept = _keep(matrix, is_mito, thresholds, lambda: advance(step))
    if not kept.whole:
        listen(Note(f"{matrix.name}: not whole numbers, so no layer counts is kept, which preset denoise would need"))
    with atomic_store(destination, overwrite=overwrite, sources=(source,)) as partial:
        n_observed = _write(partial, matrix, kept, lambda: advance(step))
        matrix.check_unchanged()
    return {
        "destination": os.fspath(destination),
        "n_cells": int(kept.cells.sum()),
        "n_genes": int(kept.genes.sum()),
        "n_observed": n_observed,
        "cells_dropped": int((~kept.cells).sum()),
        "genes_dropped": int((~kept.genes).sum()),
        "mito_genes": int(is_mito.sum()),
        "empty_cells": int((kept.totals == 0).sum()),
        "median_total": kept.median,
    }


class _Kept(NamedTuple):
    """What the thresholds leave: which cells and genes, and the total of each such cell over these genes."""

    measures: CellMeasures
    cells: NDArray[np.bool_]
    genes: NDArray[np.bool_]
    totals: NDArray[np.float64]
    whole: bool  # whether all values are whole numbers

    @property
    def median(self) -> float:
        """Median of the totals that are not zero."""
        return float(np.median(self.totals[self.totals > 0]))


def _keep(
    matrix: ExpressionMatrix, is_mito: NDArray[np.bool_], thresholds: Thresholds, tick: Callable[[], None]
) -> _Kept:
    """Choose cells, then genes, and add up what is left, in three passes."""
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
        totals[rows] = block @ genes.astype(np.float64)
        whole = whole and not np.any(block.data % 1)
    if not totals[cells].any():
        raise InputError(f"{matrix.name}: no counts are left after the thresholds ({thresholds}); loosen them")
    return _Kept(measures, cells, genes, totals[cells], whole)


def _blocks(matrix: ExpressionMatrix, tick: Callable[[], None]) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """Yield each block with its rows."""
    for span, block in zip(matrix.blocks, matrix.stream(), strict=True):
        yield slice(*span), block
        tick()


def mitochondrial(matrix: ExpressionMatrix, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Tell which genes are mitochondrial, by their names or symbols, shape ``(n,)``."""
    prefix = re.escape(thresholds.mito_prefix)
    mito: NDArray[np.bool_] = np.any([n.str.match(prefix, case=False) for n in symbols(matrix.var)], axis=0)
    return mito


def measure_cells(
    matrix: ExpressionMatrix, is_mito: NDArray[np.bool_], tick: Callable[[], None] = lambda: None
) -> CellMeasures:
    """Measure what the thresholds are about, in one pass; `tick` is called after each block."""
    n_cells = matrix.shape[0]
    cells = CellMeasures(np.zeros(n_cells, np.int64), np.zeros(n_cells), np.zeros(n_cells))
    for rows, block in _blocks(matrix, tick):
        cells.n_genes[rows] = np.diff(block.indptr)
        cells.totals[rows] = block.sum(axis=1, dtype=np.float64).A1
        cells.mito[rows] = block @ is_mito.astype(np.float64)
    return cells


def chosen_cells(cells: CellMeasures, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Tell which cells the thresholds keep, shape ``(m,)``."""
    keep = np.ones(len(cells.totals), bool)
    if thresholds.min_genes is not None:
        keep &= cells.n_genes >= thresholds.min_genes
    if thresholds.max_genes is not None:
        keep &= cells.n_genes <= thresholds.max_genes
    if thresholds.max_mito is not None:
        keep &= cells.pct_mito <= thresholds.max_mito
    return keep


def _write(path: Any, matrix: ExpressionMatrix, kept: _Kept, tick: Callable[[], None]) -> int:
    """Write the cells that are kept at the same total, and as they are if they are counts; return their entries."""
    totals, columns, n_observed = np.zeros(matrix.shape[0]), np.flatnonzero(kept.genes), 0
    totals[kept.cells] = kept.totals
    factors = np.divide(kept.median, totals, out=np.zeros_like(totals), where=totals > 0)
    obs = matrix.obs[kept.cells].assign(
        total_counts=kept.totals.astype(np.float32),
        n_genes=kept.measures.n_genes[kept.cells],
        pct_mito=kept.measures.pct_mito[kept.cells],
    )
    root = new_anndata(path, obs=obs, var=matrix.var[kept.genes])
    with ExitStack() as opened:
        names = ["X", "layers/counts"] if kept.whole else ["X"]
        scaled, *counts = (opened.enter_context(CSRWriter(root, name, n_columns=len(columns))) for name in names)
        for rows, block in _blocks(matrix, tick):
            some = kept.cells[rows]
            left = block[some][:, columns]
            scaled.append(scaled_rows(left, factors[rows][some]))
            for writer in counts:
                writer.append(left)
            n_observed += left.nnz
    zarr.consolidate_metadata(root.store)
    return n_observed
