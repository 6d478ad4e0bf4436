"""Diagnostics of a result: comparison with the observed matrix on a sample of cells, and warnings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.annotated import aligned
from scialm_dask.data.csr import RowBlocks, row_of
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.events import Advance, Listener, begin, silent
from scialm_dask.imputation import Imputation
from scialm_dask.reduction import in_order
from scialm_dask.report.plotting import known_curves

if TYPE_CHECKING:
    import pandas as pd

MOST_CELLS = 2000
GENES_OF_PLANE = 1000  # most variable genes, used for the principal components of cells
_PANEL_BYTES = 32 << 20
_INFLATED = 2.0  # mean imputed over mean observed
_FILLED = 0.05  # share of zeros imputed as large as observed values
_MUCH = 0.5  # weight of the last component above which more components would help
_EMPTY = 0.001  # share of cells or genes without an observed entry

Warnings = Iterator[tuple[str, str]]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The observed and the imputed matrix on a sample of k cells.

    `genes` has a row per gene, over these cells: ``detected`` (share of cells with an observed value),
    ``mean_observed`` (including zeros), ``mean_imputed``, ``change`` (root mean square of imputed − observed) and
    ``filled`` (share of its zeros imputed at least as high as the mean of its non-zeros).
    """

    cells: NDArray[np.intp]  # sorted numbers of the cells
    genes_seen: NDArray[np.intp]  # number of genes with an observed value, per cell
    genes: pd.DataFrame
    filled: float  # over all genes
    before: Doubles  # first two principal components of the cells, (k, 2)
    after: Doubles
    shares: tuple[tuple[float, float], tuple[float, float]]  # of the variance, before and after
    gene_before: Doubles | None = None  # values of the selected gene
    gene_after: Doubles | None = None


def compare(
    result: Imputation,
    source: ExpressionMatrix,
    *,
    gene: int | None = None,
    most_cells: int = MOST_CELLS,
    listen: Listener = silent,
) -> Comparison:
    """Compare a result, or its X if it was written with one, with the imputed matrix, in one pass over it.

    The sample depends only on the numbers of the cells. The values of gene number `gene` are returned too. Raises
    `InputError` if the cells or genes differ.
    """
    from sklearn.utils.sparsefuncs import mean_variance_axis

    source = aligned(source, result)
    cells = sample(result.shape[0], most_cells)
    observed = _rows_of(source, cells, begin(listen, "comparing"))
    totals_before, even = observed.sum(axis=1, dtype=np.float64).A1, observed.astype(np.float64)
    even.data = _evened(even.data[:, None], totals_before[row_of(observed)])[:, 0]
    _, variance = mean_variance_axis(even, axis=0)
    plane = np.sort(np.argsort(-variance, kind="stable")[:GENES_OF_PLANE])  # the most variable genes
    wanted = plane if gene is None else np.append(plane, gene)
    genes, filled, totals, imputed = _by_gene(result, cells, observed, wanted)
    before, first = _components(_evened(observed[:, plane].toarray(), totals_before))
    after, second = _components(_evened(imputed[:, : len(plane)], totals))
    turn = np.where((before * after).sum(axis=0) < 0, -1.0, 1.0)  # the same orientation as before
    of_gene = () if gene is None else (observed[:, gene].toarray().ravel().astype(np.float64), imputed[:, -1])
    seen = np.diff(observed.indptr).astype(np.intp)
    return Comparison(cells, seen, genes, filled, before, after * turn, (first, second), *of_gene)


def sample(n_cells: int, most: int) -> NDArray[np.intp]:
    """Return the sorted numbers of the cells with the lowest draws, which do not depend on the number of cells."""
    draws = np.random.default_rng(0).random(n_cells)
    return np.sort(np.argsort(draws, kind="stable")[:most])


def _rows_of(source: ExpressionMatrix, cells: NDArray[np.intp], advance: Advance = lambda _: None) -> sp.csr_matrix:
    """Return the sampled rows, read block by block."""
    cuts = np.searchsorted(cells, source.blocks.bounds)
    needed = [block for block in range(len(source.blocks)) if cuts[block] < cuts[block + 1]]
    pieces = []
    for block, csr in zip(needed, in_order(source.read_block, needed), strict=True):
        pieces.append(csr[cells[cuts[block] : cuts[block + 1]] - source.blocks.bounds[block]])
        advance(1 / len(needed))
    return sp.vstack(pieces, format="csr")


def _evened(values: NDArray[np.floating], totals: Doubles) -> Doubles:
    """Return log(1 + x) of cells scaled to the median total."""
    seen = totals > 0
    middle = np.median(totals[seen]) if seen.any() else 1.0
    factor = np.divide(middle, totals, out=np.ones_like(totals), where=seen)
    even: Doubles = np.log1p(np.maximum(values * factor[:, None], 0))
    return even


def _by_gene(
    result: Imputation, cells: NDArray[np.intp], observed: sp.csr_matrix, wanted: NDArray[np.intp]
) -> tuple[pd.DataFrame, float, Doubles, Doubles]:
    """Return the table of genes, the share of filled zeros, imputed totals of cells, and values of `wanted` genes."""
    import pandas as pd

    n_cells, n_genes = observed.shape
    counts = np.bincount(observed.indices, minlength=n_genes)
    sums = np.bincount(observed.indices, weights=observed.data, minlength=n_genes)
    typical = np.divide(sums, counts, out=np.full(n_genes, np.inf), where=counts > 0)
    imputed, squares, filled = np.zeros((3, n_genes))
    totals, kept = np.empty(n_cells), np.empty((n_cells, len(wanted)))
    for start, stop in RowBlocks.panels(n_cells, n_genes, _PANEL_BYTES):
        rows = slice(start, stop)
        before = observed[rows].toarray()
        after = result[cells[rows]] if result.X is None else _rows_of(result.X, cells[rows]).toarray()
        kept[rows], totals[rows] = after[:, wanted], after.sum(axis=1, dtype=np.float64)
        imputed += after.sum(axis=0, dtype=np.float64)
        squares += np.square(after - before).sum(axis=0, dtype=np.float64)
        filled += ((before == 0) & (after >= typical)).sum(axis=0)
    zeros = n_cells - counts
    table = {
        "detected": counts / n_cells,
        "mean_observed": sums / n_cells,
        "mean_imputed": imputed / n_cells,
        "change": np.sqrt(squares / n_cells),
        "filled": np.divide(filled, zeros, out=np.zeros(n_genes), where=zeros > 0),
    }
    return pd.DataFrame(table, index=result.var.index), float(filled.sum() / max(1, zeros.sum())), totals, kept


def _components(values: Doubles) -> tuple[Doubles, tuple[float, float]]:
    """Return the first two principal components, with signs fixed by skewness, and their shares of the variance."""
    from scipy.linalg import eigh

    centred = values - values.mean(axis=0)
    squares, axes = eigh(centred.T @ centred)
    scores = centred @ axes[:, :-3:-1]
    scores = np.pad(scores, ((0, 0), (0, 2 - scores.shape[1])))
    scores *= np.where((scores**3).sum(axis=0) < 0, -1.0, 1.0)
    one, two = np.square(scores).sum(axis=0) / max(squares.sum(), np.finfo(np.float64).tiny)
    return scores, (float(one), float(two))


def warnings_of(result: Imputation, compared: Comparison | None = None) -> list[tuple[str, str]]:
    """Return warnings, the most important first: pairs of a fact and its meaning or remedy."""
    return [*_of_the_fit(result), *_of_inflation(result, compared), *_of_the_input(result.summary)]


def _of_the_fit(result: Imputation) -> Warnings:
    summary, history, most = result.summary, result.history, result.summary.get("settings", {}).get("max_rank")
    known, errors = "held_out" in known_curves(history)[0], summary.get("unseen")
    if summary.get("converged") is False:
        falling = known and bool(history["held_out"].idxmin() == history.index[-1])
        so = " while the held-out error was still falling" if falling else ""
        yield "It did not converge.", f"The maximum number of iterations was reached{so}: raise --max-iterations."
    if not known and "unseen" not in summary and summary.get("settings", {}).get("stop") == "residual":
        yield (
            "Nothing was held out.",
            "The fit continued until it matched the observed entries, noise included, and no error shows whether that "
            "was too long. Preset complete stops earlier.",
        )
    if errors and errors["imputed"] >= min(errors["observed"], errors["gene_mean"]):
        simple = "the raw counts" if errors["observed"] < errors["gene_mean"] else "gene means"
        yield (
            f"Unseen molecules are predicted no better than by {simple}.",
            "Imputation does not help here: compare with the observed counts before you rely on it.",
        )
    if result.rank == 0:
        remedy = "It ended too early: raise --max-iterations."
        if "unseen" in summary:
            remedy = "No component recurs in unseen molecules: use the observed counts."
        yield "The rank is 0, so all entries are imputed as zero.", remedy
    elif result.rank == 1:
        yield (
            "The rank is 1, so imputed cells differ only in depth.",
            "Cell types cannot be told apart: use more cells, or deeper ones.",
        )
    elif most is not None and result.rank >= most and (summary.get("weights") or [1.0])[-1] > _MUCH:
        remedy = "Structure may be missing: raise --max-rank, if memory allows."
        yield f"The rank reached its limit, {most}.", remedy


def _of_inflation(result: Imputation, compared: Comparison | None) -> Warnings:
    if result.observed == "finite":
        return  # zeros of a general matrix are values, and its means may be anything
    preserved, ratio = (result.summary.get("X") or {}).get("written") == "preserve_zeros", result.mean_ratio
    if ratio is not None and ratio > _INFLATED:
        zeros = "that were not kept as biological were" if preserved else "were treated as unknown and"
        yield (
            f"Expression is inflated: the imputed mean is {ratio:.3g} times the observed one.",
            f"Zeros {zeros} filled in. Single dropouts may be well recovered, but do not compare expression levels "
            "between genes or with other data; for that, impute raw counts with preset denoise.",
        )
    if compared is not None and compared.filled > _FILLED:
        remedy = "--preserve-zeros keeps biological zeros."
        if preserved:
            remedy = "Preset denoise trusts zeros as far as raw counts support them."
        yield (
            f"{compared.filled:.0%} of the zeros became as large as observed values.",
            f"Genes that are off in some cells may look expressed. {remedy}",
        )


def _of_the_input(summary: dict[str, Any]) -> Warnings:
    if "few_genes" in summary:  # imputed by `transform`
        yield "Few genes of the fit were measured in these cells.", f"{summary['few_genes']}."
    for what, option in (("cell", "--min-genes"), ("gene", "--min-cells")):
        empty, of = int(summary.get(f"n_empty_{what}s", 0)), int(summary.get(f"n_{what}s", 0))
        if of and empty / of > _EMPTY:
            noun, they, them = (f"{what} has", "It is", "it") if empty == 1 else (f"{what}s have", "They are", "them")
            remedy = f"{they} imputed as zero; `scialm-dask qc {option} 1` drops {them}."
            yield f"{empty:,} {noun} no observed entry.", remedy
    if "cells not" in str(summary.get("scaling", "")):
        yield (
            "Cells were not scaled, as their raw totals are unknown.",
            "Noise differs between cells more than necessary: give raw counts, or raw totals in obs['total_counts'] as "
            "written by `scialm-dask qc`.",
        )
