"""What to know of a result: some cells beside the matrix they were imputed from, and what to beware of."""

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
GENES_OF_PLANE = 1000  # the most variable ones, by which cells are laid out
_PANEL_BYTES = 32 << 20
_INFLATED = 2.0  # mean imputed over mean observed
_FILLED = 0.05  # share of zeros that became as large as values seen
_MUCH = 0.5  # weight of the last component from which further ones would tell something
_EMPTY = 0.001  # share of cells or genes without an observed entry

Warnings = Iterator[tuple[str, str]]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The observed and the imputed matrix side by side, on a sample of k cells.

    `genes` has a row for each gene, over these cells: ``detected`` (share of cells with an observed value),
    ``mean_observed`` (zeros counted), ``mean_imputed``, ``change`` (root mean square of imputed − observed) and
    ``filled`` (share of its zeros that were imputed at least as high as the mean of its non-zeros).
    """

    cells: NDArray[np.intp]  # numbers of the cells, rising
    genes_seen: NDArray[np.intp]  # number of genes with an observed value in each
    genes: pd.DataFrame
    filled: float  # over all genes together
    before: Doubles  # first two principal components of the cells, (k, 2)
    after: Doubles
    shares: tuple[tuple[float, float], tuple[float, float]]  # of the variance, before and after
    gene_before: Doubles | None = None  # values of the gene that was asked for, if any
    gene_after: Doubles | None = None


def compare(
    result: Imputation,
    source: ExpressionMatrix,
    *,
    gene: int | None = None,
    most_cells: int = MOST_CELLS,
    listen: Listener = silent,
) -> Comparison:
    """Compare a result with the matrix that was imputed, in one pass over it.

    What is compared is the X of the result if it was written with one. Which cells are sampled depends on their numbers
    alone. Values of the gene of number `gene` are returned too. Raises `InputError` if the cells or genes differ.
    """
    source = aligned(source, result)
    cells = sample(result.shape[0], most_cells)
    observed = _rows_of(source, cells, begin(listen, "comparing"))
    plane = _variable_genes(observed)
    wanted = plane if gene is None else np.append(plane, gene)
    genes, filled, totals, imputed = _by_gene(result, cells, observed, wanted)
    before, first = _components(_evened(observed[:, plane].toarray(), observed.sum(axis=1, dtype=np.float64).A1))
    after, second = _components(_evened(imputed[:, : len(plane)], totals))
    turn = np.where((before * after).sum(axis=0) < 0, -1.0, 1.0)  # the same way round as before
    of_gene = () if gene is None else (observed[:, gene].toarray().ravel().astype(np.float64), imputed[:, -1])
    seen = np.diff(observed.indptr).astype(np.intp)
    return Comparison(cells, seen, genes, filled, before, after * turn, (first, second), *of_gene)


def sample(n_cells: int, most: int) -> NDArray[np.intp]:
    """Draw cells without replacement: those with the lowest of draws that do not depend on the number of cells."""
    draws = np.random.default_rng(0).random(n_cells)
    return np.sort(np.argsort(draws, kind="stable")[:most])


def _rows_of(source: ExpressionMatrix, cells: NDArray[np.intp], advance: Advance = lambda _: None) -> sp.csr_matrix:
    """Read the sampled rows, a block at a time."""
    cuts = np.searchsorted(cells, source.blocks.bounds)
    needed = [block for block in range(len(source.blocks)) if cuts[block] < cuts[block + 1]]
    pieces = []
    for block, csr in zip(needed, in_order(source.read_block, needed), strict=True):
        pieces.append(csr[cells[cuts[block] : cuts[block + 1]] - source.blocks.bounds[block]])
        advance(1 / len(needed))
    return sp.vstack(pieces, format="csr")


def _evened(values: NDArray[np.floating], totals: Doubles) -> Doubles:
    """Return log(1 + x) of cells scaled to their median total."""
    seen = totals > 0
    middle = np.median(totals[seen]) if seen.any() else 1.0
    factor = np.divide(middle, totals, out=np.ones_like(totals), where=seen)
    even: Doubles = np.log1p(np.maximum(values * factor[:, None], 0))
    return even


def _variable_genes(observed: sp.csr_matrix) -> NDArray[np.intp]:
    """Return the genes of the largest variance, after the same scaling and logarithm."""
    from sklearn.utils.sparsefuncs import mean_variance_axis

    even, totals = observed.astype(np.float64), observed.sum(axis=1, dtype=np.float64).A1
    even.data = _evened(even.data[:, None], totals[row_of(observed)])[:, 0]
    _, variance = mean_variance_axis(even, axis=0)
    return np.sort(np.argsort(-variance, kind="stable")[:GENES_OF_PLANE])


def _by_gene(
    result: Imputation, cells: NDArray[np.intp], observed: sp.csr_matrix, wanted: NDArray[np.intp]
) -> tuple[pd.DataFrame, float, Doubles, Doubles]:
    """Return the table of genes, the share of zeros filled, and imputed: totals of cells, and the `wanted` genes."""
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
    """Return the first two principal components, their signs fixed by skewness, and their shares of the variance."""
    from scipy.linalg import eigh

    centred = values - values.mean(axis=0)
    squares, axes = eigh(centred.T @ centred)
    scores = centred @ axes[:, :-3:-1]
    scores = np.pad(scores, ((0, 0), (0, 2 - scores.shape[1])))
    scores *= np.where((scores**3).sum(axis=0) < 0, -1.0, 1.0)
    one, two = np.square(scores).sum(axis=0) / max(squares.sum(), np.finfo(np.float64).tiny)
    return scores, (float(one), float(two))


def warnings_of(result: Imputation, compared: Comparison | None = None) -> list[tuple[str, str]]:
    """Return what is wrong or doubtful, most important first: pairs of a fact and its meaning or remedy."""
    return [
        *_of_the_end(result),
        *_of_unseen(result.summary.get("unseen") or {}),
        *_of_rank(result),
        *_of_inflation(result, compared),
        *_of_input(result.summary),
    ]


def _of_the_end(result: Imputation) -> Warnings:
    summary, history = result.summary, result.history
    known = "held_out" in known_curves(history)[0]
    if summary.get("converged") is False:
        falling = known and bool(history["held_out"].idxmin() == history.index[-1])
        so = ", and the held-out error was still falling" if falling else ""
        yield "It did not converge.", f"The most iterations allowed were made{so}: raise --max-iterations."
    if not known and "unseen" not in summary and summary.get("settings", {}).get("stop") == "residual":
        yield (
            "Nothing was held out.",
            "The fit went on until observed entries were met, noise included, and no error tells whether that was too "
            "far. Preset complete stops before.",
        )


def _of_unseen(errors: dict[str, float]) -> Warnings:
    if errors and errors["imputed"] >= min(errors["observed"], errors["gene_mean"]):
        simple = "the counts as they are" if errors["observed"] < errors["gene_mean"] else "gene means"
        yield (
            f"Unseen molecules are predicted no better than by {simple}.",
            "Imputation adds nothing here: compare with what was counted before you rely on it.",
        )


def _of_rank(result: Imputation) -> Warnings:
    most = result.summary.get("settings", {}).get("max_rank")
    if result.rank == 0:
        remedy = "It ended too early: raise --max-iterations."
        if "unseen" in result.summary:
            remedy = "No component recurs in unseen molecules: take the counts as they are."
        yield "The rank is 0, so that all is imputed as zero.", remedy
    elif result.rank == 1:
        yield (
            "The rank is 1, so that all cells are imputed alike but for their depth.",
            "Types of cells are lost: give more cells, or deeper ones.",
        )
    elif most is not None and result.rank >= most and (result.summary.get("weights") or [1.0])[-1] > _MUCH:
        yield (
            f"The rank reached its limit, {most}.",
            "Structure may have been left out: raise --max-rank, if memory allows.",
        )


def _of_inflation(result: Imputation, compared: Comparison | None) -> Warnings:
    if result.observed == "finite":
        return  # means of a general matrix may be anything, and its zeros were values
    preserved = (result.summary.get("X") or {}).get("written") == "preserve_zeros"
    ratio = result.mean_ratio
    if ratio is not None and ratio > _INFLATED:
        zeros = "that were not taken for biological were" if preserved else "were taken as unknown and"
        yield (
            f"Expression is inflated: the imputed mean is {ratio:.3g} times the observed one.",
            f"Zeros {zeros} filled in. Single entries that dropped out may be well recovered, but do not compare "
            "levels of expression between genes or with other data; for that, impute raw counts with preset denoise.",
        )
    if compared is not None and compared.filled > _FILLED:
        remedy = "--preserve-zeros leaves biological zeros."
        if preserved:
            remedy = "Preset denoise trusts zeros as far as raw counts say."
        yield (
            f"{compared.filled:.0%} of the zeros became as large as values that were seen.",
            f"Genes that are off in some cells may look as if they were on. {remedy}",
        )


def _of_input(summary: dict[str, Any]) -> Warnings:
    if "few_genes" in summary:  # completed by `transform`
        yield "Few genes of the fit were measured in these cells.", f"{summary['few_genes']}."
    for what, remedy in (("cell", "--min-genes"), ("gene", "--min-cells")):
        empty, of = int(summary.get(f"n_empty_{what}s", 0)), int(summary.get(f"n_{what}s", 0))
        if of and empty / of > _EMPTY:
            one = empty == 1
            yield (
                f"{empty:,} {what}{' has' if one else 's have'} no observed entry.",
                f"{'It is' if one else 'They are'} imputed as zero; `scialm-dask qc {remedy} 1` drops "
                f"{'it' if one else 'them'}.",
            )
    if "cells not" in str(summary.get("scaling", "")):
        yield (
            "Cells were not scaled, as their raw totals are unknown.",
            "Noise differs between cells more than it need: give raw counts, or raw totals in obs['total_counts'], as "
            "`scialm-dask qc` leaves them.",
        )
