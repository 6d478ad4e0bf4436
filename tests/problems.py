"""Small problems that the numerical tests share, and W written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp

from scialm_dask.data.scratch import MemoryScratch
from scialm_dask.linalg.kernels import Block
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.solve.ialm import complete, iterations


class InMemory:
    """Row blocks of a CSR matrix, for `LowRankPlusSparse`; counts how often they are read."""

    def __init__(self, matrix, n_blocks=1, hidden=None):
        self.matrix = sp.csr_matrix(matrix, dtype=np.float32)
        self.hidden = hidden
        self.shape = self.matrix.shape
        self.bounds = tuple(int(b) for b in np.linspace(0, self.shape[0], n_blocks + 1).round())
        self.loads = []

    def load(self, block):
        self.loads.append(block)
        rows = self.matrix[self.bounds[block] : self.bounds[block + 1]]
        return Block(rows.indptr, rows.indices.astype(np.int32), rows.data, rows.shape[1])

    def held_out(self, block, loaded):
        if self.hidden is None:
            return None
        a, b = self.matrix.indptr[[self.bounds[block], self.bounds[block + 1]]]
        return self.hidden[a:b]


def low_rank_counts(m, n, *, rank=4, density=0.3, seed=0, dispersion=20.0):
    """Counts whose mean has low rank, CSR: about `density` of the entries, one at least in every row and column."""
    rng = np.random.default_rng(seed)
    mean = dispersion * rng.gamma(1.0, 1.0, (m, rank)) @ rng.gamma(0.5, 1.0, (rank, n)) / rank
    counts = rng.poisson(mean) + 1.0
    keep = rng.random((m, n)) < density
    keep[np.arange(m), np.arange(m) % n] = keep[np.arange(n) % m, np.arange(n)] = True
    return sp.csr_matrix(np.where(keep, counts, 0.0))


def operator_of(matrix, n_blocks=1, *, hidden=None, store=None):
    """The operator over a matrix."""
    return LowRankPlusSparse(InMemory(matrix, n_blocks, hidden), store or MemoryScratch())


def product_of(lefts, right):
    """U Vᵀ from what `LowRankPlusSparse.factors` gives."""
    return np.vstack([left.compute() for left in lefts]).astype(np.float64) @ right.T


def completed(operator, settings, listen=lambda _: None, stop=None):
    """Run the loop to its end; the operator holds the factors."""
    *_, last = iterations(operator, settings, listen, stop)
    return complete(operator, last, settings)


def names_in(path, axis):
    """Folder of the array of names in a Zarr store: with pandas 3, AnnData writes them as values and a mask."""
    index = Path(path, axis, "_index")
    return index / "values" if (index / "values").is_dir() else index
