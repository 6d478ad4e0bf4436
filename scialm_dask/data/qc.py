"""Quality control: cells and genes worth keeping, every cell normalised to the same total. Out of core."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from scialm_dask.arguments import check_fields, checked
from scialm_dask.data.annotated import refuse_logarithms, storable_annotation
from scialm_dask.data.annotation import symbols
from scialm_dask.data.csr import scaled_rows
from scialm_dask.data.matrix import ExpressionMatrix, check_observed
from scialm_dask.data.store import atomic_store, check_output, new_anndata
from scialm_dask.data.writer import CSRWriter
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Note, begin, silent

__all__ = ["CellMeasures", "Thresholds", "chosen_cells", "measure_cells", "mitochondrial", "quality_control"]

_PASSES = 4


@dataclass(frozen=True)
class Thresholds:
    """What to keep; None means no limit. All limits are inclusive.

    Parameters
    ----------
    min_genes, max_genes
        Genes with counts, of a cell.
    max_mito
        Share of the counts of a cell that lies on mitochondrial genes, in percent.
    mito_prefix
        How the names of mitochondrial genes begin, in capitals or not; symbols in ``var`` are looked at too, in
        ``feature_name``, ``gene_symbols`` or ``gene_name``.
    min_cells
        Cells with counts, of a gene, among the cells that are kept.
    """

    min_genes: int | None = None
    max_genes: int | None = None
    max_mito: float | None = None
    mito_prefix: str = "MT-"
    min_cells: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("min_genes", "max_genes", "max_mito", "min_cells"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name} is {value}; give a number of 0 or more")
        if self.max_mito is not None and self.max_mito > 100:
            raise InputError(f"max_mito is {self.max_mito}; give percent, 0 to 100")


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
    step = 1 / _PASSES / len(matrix.blocks)
    advance = begin(listen, "quality control")

    cells = measure_cells(matrix, is_mito, lambda: advance(step))
    check_observed(int(cells.n_genes.sum()), matrix.name)
    keep_cells = chosen_cells(cells, thresholds)
    n_cells_of = _cells_of_genes(matrix, keep_cells, lambda: advance(step))
    keep_genes = n_cells_of >= (thresholds.min_cells or 0)
    if not keep_cells.any() or not keep_genes.any():
        what = "cell" if not keep_cells.any() else "gene"
        raise InputError(f"{matrix.name}: no {what} passes the thresholds ({thresholds}); loosen them")
    all_totals, whole = _totals(matrix, keep_genes, lambda: advance(step))
    totals = all_totals[keep_cells]
    if not totals.any():
        raise InputError(f"{matrix.name}: no counts are left after the thresholds ({thresholds}); loosen them")
    median = float(np.median(totals[totals > 0]))
    if not whole:
        listen(Note(f"{matrix.name}: not whole numbers, so no layer counts is kept, which preset denoise would need"))

    obs = matrix.obs[keep_cells].assign(
        total_counts=totals.astype(np.float32), n_genes=cells.n_genes[keep_cells], pct_mito=cells.pct_mito[keep_cells]
    )
    scale = np.zeros(len(keep_cells))
    scale[keep_cells] = np.divide(median, totals, out=np.zeros_like(totals), where=totals > 0)
    with atomic_store(destination, overwrite=overwrite, sources=(source,)) as partial:
        root = new_anndata(partial, obs=obs, var=matrix.var[keep_genes])
        kept = _kept(matrix, keep_cells, keep_genes, lambda: advance(step))
        n_observed = _write(root, kept, scale[keep_cells], n_genes=int(keep_genes.sum()), with_counts=whole)
        zarr.consolidate_metadata(root.store)
        matrix.check_unchanged()
    return {
        "destination": os.fspath(destination),
        "n_cells": int(keep_cells.sum()),
        "n_genes": int(keep_genes.sum()),
        "n_observed": n_observed,
        "cells_dropped": int((~keep_cells).sum()),
        "genes_dropped": int((~keep_genes).sum()),
        "mito_genes": int(is_mito.sum()),
        "empty_cells": int((totals == 0).sum()),
        "median_total": median,
    }


def mitochondrial(matrix: ExpressionMatrix, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Tell which genes are mitochondrial, by their names or symbols, shape ``(n,)``."""
    prefix = re.escape(thresholds.mito_prefix)
    mito: NDArray[np.bool_] = np.any([n.str.match(prefix, case=False) for n in symbols(matrix.var)], axis=0)
    return mito


def measure_cells(
    matrix: ExpressionMatrix, is_mito: NDArray[np.bool_], tick: Callable[[], None] = lambda: None
) -> CellMeasures:
    """Measure what the thresholds are about, in one pass.

    Parameters
    ----------
    matrix
        Counts, cells × genes.
    is_mito
        Which genes are mitochondrial, shape ``(n,)``.
    tick
        Called after each block.
    """
    n_cells = matrix.shape[0]
    cells = CellMeasures(np.zeros(n_cells, np.int64), np.zeros(n_cells), np.zeros(n_cells))
    for (start, stop), block in zip(matrix.blocks, matrix.stream(), strict=True):
        cells.n_genes[start:stop] = np.diff(block.indptr)
        cells.totals[start:stop] = block.sum(axis=1, dtype=np.float64).A1
        cells.mito[start:stop] = block @ is_mito.astype(np.float64)
        tick()
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


def _cells_of_genes(
    matrix: ExpressionMatrix, keep_cells: NDArray[np.bool_], tick: Callable[[], None]
) -> NDArray[np.int64]:
    """For each gene, the number of kept cells that have counts of it."""
    n_cells_of = np.zeros(matrix.shape[1], np.int64)
    for (start, stop), block in zip(matrix.blocks, matrix.stream(), strict=True):
        n_cells_of += np.bincount(block[keep_cells[start:stop]].indices, minlength=matrix.shape[1])
        tick()
    return n_cells_of


def _totals(
    matrix: ExpressionMatrix, keep_genes: NDArray[np.bool_], tick: Callable[[], None]
) -> tuple[NDArray[np.float64], bool]:
    """Give the total of each cell over the kept genes, and whether all values are whole numbers."""
    totals, whole = np.zeros(matrix.shape[0]), True
    weights = keep_genes.astype(np.float64)
    for (start, stop), block in zip(matrix.blocks, matrix.stream(), strict=True):
        totals[start:stop] = block @ weights
        whole = whole and not np.any(block.data % 1)
        tick()
    return totals, whole


def _kept(
    matrix: ExpressionMatrix, keep_cells: NDArray[np.bool_], keep_genes: NDArray[np.bool_], tick: Callable[[], None]
) -> Iterator[sp.csr_matrix]:
    """Stream what is left of each block."""
    columns = np.flatnonzero(keep_genes)
    for (start, stop), block in zip(matrix.blocks, matrix.stream(), strict=True):
        yield block[np.flatnonzero(keep_cells[start:stop])][:, columns]
        tick()


def _write(
    root: zarr.Group,
    blocks: Iterator[sp.csr_matrix],
    factors: NDArray[np.float64],
    *,
    n_genes: int,
    with_counts: bool,
) -> int:
    """Write cells multiplied by their factors, and as they are; return the number of entries."""
    first = n_observed = 0
    with ExitStack() as opened:
        scaled = opened.enter_context(CSRWriter(root, "X", n_columns=n_genes))
        layers = ["layers/counts"] if with_counts else []
        counts = [opened.enter_context(CSRWriter(root, name, n_columns=n_genes)) for name in layers]
        for block in blocks:
            scaled.append(scaled_rows(block, factors[first : first + block.shape[0]]))
            for writer in counts:
                writer.append(block)
            first += block.shape[0]
            n_observed += block.nnz
    return n_observed
