"""Pools of genes: designs, their properties, and measurements through them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from numpy.typing import ArrayLike, NDArray

from scialm_dask.config import Count, Natural, checked
from scialm_dask.data.annotated import as_dask
from scialm_dask.data.store import atomic_output
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PoolReport:
    """Size of a design P and how well it separates genes.

    Attributes
    ----------
    genes, pools, rank : int
        Size of P and its rank. At most `rank` components of expression can be identified.
    pools_per_gene, genes_per_pool : (int, int)
        Smallest and largest number.
    coherence, mean_coherence : float
        Largest and mean cosine between the rows of two genes in P. 1 means that two genes are in the same pools.
    alike : int
        Number of genes in exactly the same pools as another gene.
    condition : float
        Largest over smallest non-zero singular value of P: how much noise can be amplified.
    """

    genes: int
    pools: int
    rank: int
    pools_per_gene: tuple[int, int]
    genes_per_pool: tuple[int, int]
    coherence: float
    mean_coherence: float
    alike: int
    condition: float

    def __str__(self) -> str:
        low, high = self.pools_per_gene
        small, large = self.genes_per_pool
        return (
            f"{self.genes} genes in {self.pools} pools (rank {self.rank}): {low} to {high} pools per gene, "
            f"{small} to {large} genes per pool; coherence {self.coherence:.3f} (mean {self.mean_coherence:.3f}), "
            f"{self.alike} genes measured like another, condition {self.condition:.3g}"
        )


def check_pools(pools: ArrayLike, genes: int | None = None) -> NDArray[np.float64]:
    """Return a design as float64, genes × pools.

    Raises `InputError` if it is not a binary matrix, has an empty pool or a gene in no pool, or does not have `genes`
    rows.
    """
    try:
        P = np.asarray(pools)
    except ValueError as error:
        raise InputError(f"pools: rows differ in length ({error}); give a matrix of genes × pools") from error
    if P.ndim != 2 or 0 in P.shape:
        raise InputError(f"pools: shape {P.shape}; give a matrix of genes × pools")
    if P.dtype.kind not in "buif" or not np.isin(P, (0, 1)).all():
        raise InputError("pools: holds values other than 0 and 1; mark a gene in a pool by 1, else 0")
    if genes is not None and len(P) != genes:
        raise InputError(f"pools: {len(P)} genes, the matrix has {genes}; give one row for each gene, in its order")
    P = P.astype(np.float64)
    empty, lost = np.flatnonzero(P.sum(axis=0) == 0), np.flatnonzero(P.sum(axis=1) == 0)
    if len(empty):
        raise InputError(f"pools: {len(empty)} pools are empty, first pool {empty[0]}; leave them out")
    if len(lost):
        raise InputError(
            f"pools: {len(lost)} genes are in no pool, first gene {lost[0]}; they are not measured: add them or leave "
            "them out"
        )
    return P


@checked
def random_pools(genes: Count, pools: Count, *, density: float = 0.25, random_state: Natural = 0) -> NDArray[np.int8]:
    """Draw a design in which each gene is in each pool with the same probability.

    Genes in no pool are drawn again.

    Parameters
    ----------
    genes, pools : int
        Size of the design.
    density : float in (0, 1], default=0.25
        The probability.
    random_state : int, default=0
        Seed of the draws, which are keyed by gene.

    Returns
    -------
    ndarray of shape (genes, pools), int8
        P: 1 where a gene is in a pool, else 0.

    Raises
    ------
    InputError
        If the design cannot exist, or leaves a pool empty.

    Examples
    --------
    >>> import scialm_dask
    >>> scialm_dask.random_pools(4, 3, density=0.5)
    array([[0, 1, 1],
           [0, 1, 1],
           [1, 1, 0],
           [0, 0, 1]], dtype=int8)
    """
    if not 0 < density <= 1:
        raise InputError(f"density {density} is outside (0, 1]; about a quarter is usual")
    P = np.zeros((genes, pools), np.int8)
    for gene in range(genes):
        rng = np.random.default_rng([random_state, gene])
        while not P[gene].any():
            P[gene] = rng.random(pools) < density
    check_pools(P)
    return P


@checked
def balanced_pools(genes: Count, pools: Count, *, per_gene: Count, random_state: Natural = 0) -> NDArray[np.int8]:
    """Draw a design in which all genes are in the same number of pools, and pool sizes differ by at most one.

    Genes are placed one after another into the emptiest pools. Ties are broken at random several times, and the choice
    that overlaps least with earlier genes is kept.

    Parameters
    ----------
    genes, pools : int
        Size of the design.
    per_gene : int
        Number of pools per gene.
    random_state : int, default=0
        Seed.

    Returns
    -------
    ndarray of shape (genes, pools), int8
        P: 1 where a gene is in a pool, else 0.

    Raises
    ------
    InputError
        If the design cannot exist.

    Examples
    --------
    >>> import scialm_dask
    >>> scialm_dask.balanced_pools(40, 20, per_gene=3).sum(axis=0)
    array([6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6])
    """
    if per_gene > pools:
        raise InputError(f"per_gene is {per_gene}; give no more than the number of pools, {pools}")
    if genes * per_gene < pools:
        raise InputError(f"{genes} genes in {per_gene} pools each leave some of {pools} pools empty; use fewer pools")
    rng = np.random.default_rng(random_state)
    P = np.zeros((genes, pools), np.int8)
    for gene in range(genes):
        sizes = P.sum(axis=0, dtype=np.int64)
        ways = [np.argsort(sizes + rng.random(pools))[:per_gene] for _ in range(32)]
        overlaps = [np.sort(P[:gene, way].sum(axis=1, dtype=np.int64))[::-1] for way in ways]
        best = min(range(len(ways)), key=lambda way: (overlaps[way] ** 4).sum())
        P[gene, ways[best]] = 1
    return P


def pool_report(pools: ArrayLike) -> PoolReport:
    """Describe a design.

    Parameters
    ----------
    pools : array-like of shape (n_genes, n_pools)
        P, binary.

    Returns
    -------
    PoolReport
        Size, rank, coherence and condition.

    Raises
    ------
    InputError
        If P is not binary, or has an empty pool or a gene in no pool.

    Examples
    --------
    >>> import scialm_dask
    >>> report = scialm_dask.pool_report(scialm_dask.balanced_pools(40, 20, per_gene=3))
    >>> report.rank, report.alike
    (20, 0)
    """
    P = check_pools(pools)
    per_gene, per_pool = P.sum(axis=1), P.sum(axis=0)
    unit = P / np.sqrt(per_gene)[:, None]
    cosine = (unit @ unit.T)[np.triu_indices(len(P), 1)]
    singular = np.linalg.svd(P, compute_uv=False)
    rank = int(np.sum(singular > singular[0] * max(P.shape) * np.finfo(float).eps))
    _, copies = np.unique(P, axis=0, return_counts=True)
    return PoolReport(
        P.shape[0],
        P.shape[1],
        rank,
        (int(per_gene.min()), int(per_gene.max())),
        (int(per_pool.min()), int(per_pool.max())),
        float(cosine.max(initial=0.0)),
        float(cosine.mean()) if len(cosine) else 0.0,
        int(copies[copies > 1].sum()),
        float(singular[0] / singular[rank - 1]),
    )


def measure(expression: Any, pools: ArrayLike) -> da.Array:
    """Measure expression through pools, D = M P.

    Parameters
    ----------
    expression : matrix of shape (n_cells, n_genes)
        M: an array, data frame, AnnData, path to a store, or anything with ``to_dask()``.
    pools : array-like of shape (n_genes, n_pools)
        P, binary.

    Returns
    -------
    dask.array.Array of shape (n_cells, n_pools), float64
        D, in the row blocks of M.

    Raises
    ------
    InputError
        If the shapes do not fit, or P is not a design; see `pool_report`.

    Examples
    --------
    >>> import scialm_dask
    >>> scialm_dask.measure([[1, 2, 3]], [[1, 0], [0, 1], [1, 1]]).compute()
    array([[4., 5.]])
    """
    array = as_dask(expression, "expression")
    P = check_pools(pools, array.shape[1])
    array = array.rechunk({1: -1})
    return array.map_blocks(_product, P, chunks=(array.chunks[0], (P.shape[1],)), meta=np.empty((0, 0)))


def _product(block: Any, P: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(block.astype(np.float64) @ P)


def read_design(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Return a design, genes × pools, from a .csv or .tsv table with names, or a .npy array without names.

    Raises `InputError` if the file cannot be read. `check_pools` checks the values.
    """
    import pandas as pd

    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv", ".npy"):
        raise InputError(f"{os.fspath(path)}: unknown kind of file; give the design as .csv, .tsv or .npy")
    try:
        if suffix != ".npy":
            table = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", index_col=0)
            return table.set_axis(table.index.astype(str))
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)}: cannot be read as a design ({error})") from error
    if values.ndim != 2:
        raise InputError(f"{os.fspath(path)}: shape {values.shape}; give a matrix of genes × pools")
    return pd.DataFrame(values).rename(index=lambda gene: f"gene{gene}", columns=lambda pool: f"pool{pool}")


def write_design(design: pd.DataFrame, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a design as a .csv or .tsv table. Raises `InputError` if `path` has another suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv"):
        raise InputError(f"{os.fspath(path)}: unknown kind of file; name the design .csv or .tsv")
    with atomic_output(path, overwrite=overwrite) as partial:
        design.to_csv(partial, sep="\t" if suffix == ".tsv" else ",")
