"""Simulated counts of low rank with known factors, of any size, streamed to disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.config import Count, Interval, Share, checked
from scialm_dask.data.annotation import new_anndata
from scialm_dask.data.arrays import new_array, write_element
from scialm_dask.data.csr import CSRWriter
from scialm_dask.data.store import atomic_store, check_output
from scialm_dask.errors import InputError
from scialm_dask.events import Advance, Listener, begin, silent
from scialm_dask.linalg.random import mixed
from scialm_dask.linalg.sparse_products import compiled
from scialm_dask.reduction import in_order

_GROUP = 256  # cells whose factors are drawn together; other values change the draws of a seed
_BLOCK_VALUES = 1_000_000
_GENE_SD = 2.0  # of the log of the gene means: 1.7 to 2.1 in 10x, inDrop and Microwell data
_LIBRARY_SD = 0.4  # of the log of the totals of cells
_MARKERS = 0.15  # share of genes that a program raises
_MOST_MOLECULES = 50  # per gene and cell, on average
_GENE_KEY = (1 << 64) - 1  # groups of cells have the other keys
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW, _S32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@dataclass(frozen=True)
class Programs:
    """Parameters common to all cells."""

    expression: NDArray[np.float32]  # share of each gene in the molecules of each program, (n_genes, rank)
    types: NDArray[np.float64]  # mean share of each program in each cell type, (n_types, rank)
    type_shares: NDArray[np.float64]  # frequency of the types, (n_types,)
    library: float  # median number of molecules of a cell

    @classmethod
    def draw(cls, n_genes: int, rank: int, density: float, seed: int) -> Programs:
        """Draw programs, with the library size at which the share `density` of the counts is non-zero."""
        rng = _generator(seed, _GENE_KEY)
        base = np.exp(rng.normal(0, _GENE_SD, (n_genes, 1)))
        raised = rng.random((n_genes, rank)) < _MARKERS
        expression = base * np.where(raised, rng.gamma(1.5, 4, (n_genes, rank)), 1)
        expression /= expression.sum(axis=0)
        n_types = max(2, rank // 2)
        types = rng.dirichlet(np.full(rank, 0.3), n_types) if rank > 1 else np.ones((n_types, 1))
        unit = cls(expression.astype(np.float32), types, rng.dirichlet(np.full(n_types, 5.0)), 1.0)
        sample = np.concatenate([unit.cells(_GENE_KEY - 1 - i, seed)[1] for i in range(2)]).astype(np.float32)
        return cls(unit.expression, types, unit.type_shares, _library(sample @ unit.expression.T, density))

    def cells(self, group: int, seed: int) -> tuple[NDArray[np.int16], NDArray[np.float32], np.random.Generator]:
        """Return types and left factors of a group of cells, and the generator for further draws."""
        rng = _generator(seed, group)
        types = rng.choice(len(self.types), _GROUP, p=self.type_shares)
        weights = rng.gamma(10 * self.types[types] + 0.02)
        weights /= weights.sum(axis=1, keepdims=True)
        library = self.library * np.exp(rng.normal(0, _LIBRARY_SD, (_GROUP, 1)))
        return types.astype(np.int16), (library * weights).astype(np.float32), rng


def _generator(seed: int, key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed & _GENE_KEY, key], dtype=np.uint64)))


def _library(expected: NDArray[np.float32], density: float) -> float:
    """Return the factor of the Poisson means at which the share `density` of the counts is non-zero."""
    low, high = 0.0, np.log(_MOST_MOLECULES * expected.shape[1])
    if -np.expm1(-np.exp(high) * expected).mean() < density:
        raise InputError(f"density is {density}; with gene means this uneven it cannot be reached, give less")
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-np.exp(middle) * expected).mean() < density else (low, middle)
    return float(np.exp(high))


@checked
def simulate(
    destination: str | os.PathLike[str],
    *,
    n_cells: Count,
    n_genes: Annotated[int, Interval(2)],
    density: Share = 0.05,
    rank: Count = 20,
    seed: int = 0,
    overwrite: bool = False,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Write simulated counts of low rank, with the truth, as an AnnData Zarr store.

    Counts are independent Poisson draws with means ``true_left @ true_right.T``: each cell spreads its molecules over a
    few non-negative expression programs, according to its type, and each program over the genes. Gene means and totals
    of cells are log-normal, as uneven as in real data. The counts of a cell depend on the seed, its number and the
    other settings, but not on the number of cells.

    The store has X (int32 CSR), ``obs["cell_type"]``, ``obsm["true_left"]`` of shape ``(n_cells, rank)`` and
    ``varm["true_right"]`` of shape ``(n_genes, rank)``, float32. `rank` is the number of programs, `density` the mean
    share of non-zero counts.

    Returns ``destination``, ``n_cells``, ``n_genes``, ``n_observed``, ``density`` (reached), ``rank`` and ``seed``.
    Raises `InputError` if a setting is out of range, and `OutputError` if the destination cannot be written.
    """
    if rank > n_genes:
        raise InputError(f"rank is {rank}; give no more than the number of genes, {n_genes}")
    check_output(destination, overwrite=overwrite)
    programs = Programs.draw(n_genes, rank, density, seed)
    with atomic_store(destination, overwrite=overwrite) as partial:
        n_observed = _write(partial, programs, n_cells, density, seed, begin(listen, "simulating"))
    told = {"destination": os.fspath(destination), "n_cells": n_cells, "n_genes": n_genes, "n_observed": n_observed}
    return told | {"density": n_observed / (n_cells * n_genes), "rank": rank, "seed": seed}


def _write(path: Any, programs: Programs, n_cells: int, density: float, seed: int, advance: Advance) -> int:
    import pandas as pd
    import zarr

    n_genes, rank = programs.expression.shape
    step = _GROUP * max(1, round(_BLOCK_VALUES / (density * n_genes * _GROUP)))
    blocks = [(start, min(start + step, n_cells)) for start in range(0, n_cells, step)]
    tables = _alias_tables(programs.expression)
    types, n_observed = np.empty(n_cells, np.int16), 0
    genes = pd.DataFrame(index=pd.Index([f"gene{j}" for j in range(n_genes)]))
    root = new_anndata(path, obs=pd.DataFrame(), var=genes)
    write_element(root["varm"], "true_right", programs.expression)
    left = new_array(root, "obsm/true_left", (n_cells, rank), (step, rank), np.float32)
    with CSRWriter(root, "X", n_columns=n_genes, dtype=np.int32) as writer:
        drawn = in_order(lambda span: draw_cells(programs, tables, span, seed), blocks)
        for (start, stop), (of_cells, factors, counts) in zip(blocks, drawn, strict=True):
            types[start:stop], left[start:stop] = of_cells, factors
            writer.append(counts)
            n_observed += counts.nnz
            advance((stop - start) / n_cells)
    names = [f"type{t}" for t in range(len(programs.types))]
    index = pd.Index([f"cell{i}" for i in range(n_cells)])
    write_element(root, "obs", pd.DataFrame({"cell_type": pd.Categorical.from_codes(types, names)}, index=index))
    zarr.consolidate_metadata(root.store)
    return n_observed


def draw_cells(
    programs: Programs, tables: NDArray[np.uint32], span: tuple[int, int], seed: int
) -> tuple[NDArray[np.int16], NDArray[np.float32], sp.csr_matrix]:
    """Return types, left factors and counts of cells ``span[0]`` to ``span[1] - 1``; the first one starts a group."""
    start, stop = span
    parts = []
    for group in range(start // _GROUP, -(-stop // _GROUP)):
        first, size = group * _GROUP, min(_GROUP, stop - group * _GROUP)
        of_types, factors, rng = programs.cells(group, seed)
        n_molecules = rng.poisson(factors)[:size]
        total = int(n_molecules.sum())
        indices, data, indptr = np.empty(total, np.int32), np.empty(total, np.int32), np.zeros(size + 1, np.int64)
        _spread(n_molecules, tables, np.uint64(first), np.uint64(seed & _GENE_KEY), indices, data, indptr)
        stored = slice(0, int(indptr[-1]))
        drawn = sp.csr_matrix((data[stored].copy(), indices[stored].copy(), indptr), shape=(size, tables.shape[1]))
        parts.append((of_types[:size], factors[:size], drawn))
    types, left, counts = zip(*parts, strict=True)
    return np.concatenate(types), np.concatenate(left), sp.vstack(counts, format="csr")


@compiled()
def _spread(
    n_molecules: NDArray[np.int64],
    tables: NDArray[np.uint32],
    first_cell: np.uint64,
    seed: np.uint64,
    indices: NDArray[np.int32],
    data: NDArray[np.int32],
    indptr: NDArray[np.int64],
) -> None:
    """Draw the gene of each molecule from its program, keyed by seed and cell, and count molecules per gene."""
    n_cells, rank = n_molecules.shape
    n_genes = tables.shape[1]
    counts = np.zeros(n_genes, np.int32)
    stored = 0
    for i in range(n_cells):
        state = mixed(mixed(seed) + (first_cell + np.uint64(i)) * _GOLDEN)
        for k in range(rank):
            table = tables[k]
            for _ in range(n_molecules[i, k]):
                state += _GOLDEN
                random = mixed(state)
                slot = ((random >> _S32) * np.uint64(n_genes)) >> _S32
                gene = slot if (random & _LOW) < np.uint64(table[slot, 0]) else np.uint64(table[slot, 1])
                counts[gene] += 1
        for j in range(n_genes):
            if counts[j]:
                indices[stored], data[stored] = j, counts[j]
                stored += 1
                counts[j] = 0
        indptr[i + 1] = stored


def _alias_tables(expression: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return tables of shape (rank, n_genes, 2) for drawing a gene in constant time (Walker's alias method).

    Each slot has a 32-bit threshold, below which its own gene is drawn, and the other gene.
    """
    share = expression.T.astype(np.float64)
    tables: NDArray[np.uint32] = _alias(share / share.sum(axis=1, keepdims=True))
    return tables


@compiled()
def _alias(share: NDArray[np.float64]) -> NDArray[np.uint32]:
    rank, n = share.shape
    tables: NDArray[np.uint32] = np.empty((rank, n, 2), np.uint32)
    for k in range(rank):
        weight = share[k] * n
        poor, rich = [j for j in range(n) if weight[j] < 1], [j for j in range(n) if weight[j] >= 1]
        while poor and rich:
            j, donor = poor.pop(), rich[-1]
            tables[k, j, 0], tables[k, j, 1] = np.uint32(weight[j] * 4294967295.0), np.uint32(donor)
            weight[donor] -= 1 - weight[j]
            if weight[donor] < 1:
                poor.append(rich.pop())
        for j in poor + rich:
            tables[k, j, 0], tables[k, j, 1] = np.uint32(4294967295), np.uint32(j)
    return tables
