"""Some cells before and after: how genes have changed, and how the cells lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.annotated import aligned
from scialm_dask.data.csr import row_of
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.events import Advance, Listener, begin, silent
from scialm_dask.imputation import Imputation
from scialm_dask.reduction import in_order

if TYPE_CHECKING:
    import pandas as pd

MOST_CELLS = 2000
GENES_OF_PLANE = 1000  # the most variable ones, by which cells are laid out
_PANEL_BYTES = 32 << 20
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The observed and the imputed matrix side by side, on a sample of cells.

    Parameters
    ----------
    cells
        Numbers of the sampled cells, rising, shape ``(k,)``.
    genes_seen
        Number of genes with an observed value in each of them, shape ``(k,)``.
    genes
        A row for each gene, over these cells: ``detected`` (share of cells with an observed value),
        ``mean_observed`` (zeros counted), ``mean_imputed``, ``change`` (root mean square of imputed − observed),
        ``filled`` (share of its zeros that were imputed as high as the mean of its non-zeros, or higher).
    filled
        That share over all zeros of all genes.
    before, after
        First two principal components of the cells, float64, shape ``(k, 2)``.
    shares
        Of the variance, on the axes of `before` and of `after`.
    gene_before, gene_after
        Values of the gene that was asked for, float64, shape ``(k,)``; None if none was.
    """

    cells: NDArray[np.intp]
    genes_seen: NDArray[np.intp]
    genes: pd.DataFrame
    filled: float
    before: Doubles
    after: Doubles
    shares: tuple[tuple[float, float], tuple[float, float]]
    gene_before: Doubles | None = None
    gene_after: Doubles | None = None


def compare(
    result: Imputation,
    source: ExpressionMatrix,
    *,
    gene: int | None = None,
    most_cells: int = MOST_CELLS,
    listen: Listener = silent,
) -> Comparison:
    """Compare a result with the matrix it was made from, in one pass over that.

    Parameters
    ----------
    result
        Completed from `source`; its X is compared where it was written with one.
    source
        Cells × genes.
    gene
        Number of a gene whose values are wanted.
    most_cells
        Size of the sample. Which cells are in it depends on their numbers alone.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    Comparison
        Of the sampled cells.

    Raises
    ------
    InputError
        If the cells or genes are not the same.
    """
    source = aligned(source, result)
    cells = sample(result.shape[0], most_cells)
    observed = _rows_of(source, cells, begin(listen, "comparing"))
    plane = _variable_genes(observed)
    wanted = plane if gene is None else np.append(plane, gene)
    genes, filled, totals, imputed = _by_gene(result, cells, observed, wanted)
    before, first = _components(_evened(observed[:, plane].toarray(), _totals(observed)))
    after, second = _components(_evened(imputed[:, : len(plane)], totals))
    turn = np.where((before * after).sum(axis=0) < 0, -1.0, 1.0)  # the same way round as before
    of_gene = () if gene is None else (observed[:, gene].toarray().ravel().astype(np.float64), imputed[:, -1])
    seen = np.diff(observed.indptr).astype(np.intp)
    return Comparison(cells, seen, genes, filled, before, after * turn, (first, second), *of_gene)


def sample(n_cells: int, most: int) -> NDArray[np.intp]:
    """Draw cells without replacement: those of the lowest draws, of which each cell has its own."""
    draws = np.random.default_rng(0).random(n_cells)
    return np.sort(np.argsort(draws, kind="stable")[:most])


def _rows_of(source: ExpressionMatrix, cells: NDArray[np.intp], advance: Advance = lambda _: None) -> sp.csr_matrix:
    """Read the sampled rows: blocks in order, each let go before the next."""
    cuts = np.searchsorted(cells, source.blocks.bounds)
    needed = [block for block in range(len(source.blocks)) if cuts[block] < cuts[block + 1]]
    pieces = []
    for block, csr in zip(needed, in_order(source.read_block, needed), strict=True):
        pieces.append(csr[cells[cuts[block] : cuts[block + 1]] - source.blocks.bounds[block]])
        advance(1 / len(needed))
    return sp.vstack(pieces, format="csr")


def _totals(observed: sp.csr_matrix) -> Doubles:
    return np.asarray(observed.sum(axis=1, dtype=np.float64)).ravel()


def _evened(values: NDArray[np.floating], totals: Doubles) -> Doubles:
    """Scale cells to their median total and take logarithms, as is usual before principal components."""
    seen = totals > 0
    middle = np.median(totals[seen]) if seen.any() else 1.0
    factor = np.divide(middle, totals, out=np.ones_like(totals), where=seen)
    even: Doubles = np.log1p(np.maximum(values * factor[:, None], 0))
    return even


def _variable_genes(observed: sp.csr_matrix) -> NDArray[np.intp]:
    """Genes of the largest variance, after the same scaling and logarithm."""
    even = observed.astype(np.float64)
    totals = _totals(observed)
    even.data = _evened(even.data[:, None], totals[row_of(observed)])[:, 0]
    mean = np.asarray(even.mean(axis=0)).ravel()
    even.data **= 2
    variance = np.asarray(even.mean(axis=0)).ravel() - mean**2
    return np.sort(np.argsort(-variance, kind="stable")[:GENES_OF_PLANE])


def _by_gene(
    result: Imputation, cells: NDArray[np.intp], observed: sp.csr_matrix, wanted: NDArray[np.intp]
) -> tuple[pd.DataFrame, float, Doubles, Doubles]:
    """Sum over the cells, some at a time; return also the total of each cell and the `wanted` genes, imputed."""
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
    """Return the first two principal components, signs fixed by the skewness, and their shares of the variance."""
    from scipy.linalg import eigh

    centred = values - values.mean(axis=0)
    squares, axes = eigh(centred.T @ centred)
    scores = centred @ axes[:, :-3:-1]
    scores = np.pad(scores, ((0, 0), (0, 2 - scores.shape[1])))
    scores *= np.where((scores**3).sum(axis=0) < 0, -1.0, 1.0)
    one, two = np.square(scores).sum(axis=0) / max(squares.sum(), np.finfo(np.float64).tiny)
    return scores, (float(one), float(two))
