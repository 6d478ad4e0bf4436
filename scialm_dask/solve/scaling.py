"""The matrix as the solvers see it: surveyed, scaled to even noise, and with some entries held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import dask
import numpy as np
import scipy.sparse as sp
from dask.delayed import Delayed
from numpy.typing import NDArray

from scialm_dask.config import Settings
from scialm_dask.data.annotation import total_counts
from scialm_dask.data.csr import check_observed
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.linalg.kernels import Block, Doubles, Floats
from scialm_dask.linalg.random import hidden_entries, n_to_hide, thinned
from scialm_dask.linalg.tasks import add
from scialm_dask.reduction import tree_reduce


@dataclass(frozen=True)
class Survey:
    """Counts and sums of a matrix, from one pass."""

    block_gene_counts: NDArray[np.int32]  # observed entries of each gene in each block, shape (blocks, n)
    gene_sums: Doubles  # of the observed entries, float64, shape (n,)
    cell_sums: Doubles  # float64, shape (m,)
    cell_counts: NDArray[np.int64]  # observed entries of each cell, shape (m,)
    # cell, gene and value of the first entry that is not a whole number; None if all are
    fraction: tuple[int, int, float] | None

    @property
    def integer(self) -> bool:
        """Whether all entries are whole numbers."""
        return self.fraction is None

    @property
    def gene_counts(self) -> NDArray[np.int64]:
        """Observed entries of each gene, shape ``(n,)``."""
        return self.block_gene_counts.sum(axis=0, dtype=np.int64)  # type: ignore[no-any-return]

    @property
    def n_observed(self) -> int:
        """Number of observed entries."""
        return int(self.cell_counts.sum())


def survey(matrix: ExpressionMatrix) -> Survey:
    """Read the matrix once; raise `InputError` for unusable values, or if nothing is observed."""
    shared, visit = dask.delayed(matrix, traverse=False), dask.delayed(_survey_block)
    parts = dask.compute(*(visit(shared, b) for b in range(len(matrix.blocks))))
    counts, gene_sums, cell_sums, cell_counts, fractions = zip(*parts, strict=True)
    found = Survey(
        np.stack(counts),
        np.sum(gene_sums, axis=0),
        np.concatenate(cell_sums),
        np.concatenate(cell_counts),
        next((fraction for fraction in fractions if fraction), None),
    )
    check_observed(found.n_observed, matrix.name)
    return found


def _survey_block(matrix: ExpressionMatrix, block: int) -> tuple[Any, ...]:
    """Return the fields of a `Survey` for one block."""
    csr, n_genes, fraction = matrix.read_block(block), matrix.shape[1], None
    for at in np.flatnonzero(csr.data % 1)[:1]:
        row = int(np.searchsorted(csr.indptr, at, side="right")) - 1
        fraction = matrix.blocks[block][0] + row, int(csr.indices[at]), float(csr.data[at])
    return (
        np.bincount(csr.indices, minlength=n_genes).astype(np.int32),
        np.bincount(csr.indices, weights=csr.data.astype(np.float64), minlength=n_genes).astype(np.float64),
        np.asarray(csr.sum(axis=1, dtype=np.float64)).ravel(),
        np.diff(csr.indptr).astype(np.int64),
        fraction,
    )


@dataclass(frozen=True)
class Scales:
    """Factors that multiply entries before the fit, and divide its result."""

    cell: Floats | None  # positive, shape (m,); None for ones
    gene: Floats | None  # positive, shape (n,); None for ones
    note: str  # in words
    centre: float = 1.0  # geometric mean of the size factors of cells
    cell_exponent: float = 0.0  # cells are multiplied by (size factor / centre)^−cell_exponent


def scales_of(
    matrix: ExpressionMatrix, found: Survey, exponents: tuple[float, float], *, totals_needed: bool = False
) -> Scales:
    """Return scales that multiply genes by mean^−g and cells by (size factor)^−c, given the exponents (g, c).

    The variance of a normalised count is its mean times the cell's size factor, by which normalisation multiplied the
    cell: 1 over the raw total in ``obs["total_counts"]``. For raw counts, the size factor is the cell's total. If
    neither is known cells are not scaled, or with `totals_needed`, `InputError` is raised.
    """
    gene_exponent, cell_exponent = exponents
    if matrix.observed == "finite" or exponents == (0.0, 0.0):
        return Scales(None, None, "not scaled")
    counts = found.gene_counts
    means = np.divide(found.gene_sums, counts, out=np.ones_like(found.gene_sums), where=counts > 0)
    gene = means**-gene_exponent
    if cell_exponent == 0:
        return Scales(None, gene.astype(np.float32), "genes scaled")
    if found.integer:
        factor, note = found.cell_sums, "genes and cells scaled; cells by their totals, as these are raw counts"
    elif (totals := total_counts(matrix.obs, matrix.name)) is not None:
        factor = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
        note = "genes and cells scaled; cells by obs['total_counts']"
    elif totals_needed:
        raise InputError(
            f"{matrix.name}: cells are to be scaled by size^−{cell_exponent:g}, but obs has no total_counts and these "
            f"are not raw counts; add the raw totals to obs (as `qc` does), or pass --scaling {gene_exponent:g},0"
        )
    else:
        return Scales(None, gene.astype(np.float32), "genes scaled; cells not, as obs has no total_counts")
    used = factor > 0
    centre = float(np.exp(np.log(factor[used]).mean()))
    factor = np.where(used, factor / centre, 1.0)
    return Scales((factor**-cell_exponent).astype(np.float32), gene.astype(np.float32), note, centre, cell_exponent)


@dataclass(frozen=True)
class Molecules:
    """Part of the molecules of a count matrix, by count splitting."""

    share: float  # probability that a molecule is in the first part
    rest: bool  # whether this is the other part
    seed: int

    def kept(self, csr: sp.csr_matrix, first_row: int) -> Floats:
        """Draw the number of molecules of each entry in the first part."""
        return thinned(csr.indptr, csr.indices, csr.data, first_row=first_row, share=self.share, seed=self.seed)

    def of(self, csr: sp.csr_matrix, first_row: int) -> sp.csr_matrix:
        """Return this part of a block of rows."""
        kept = self.kept(csr, first_row)
        part = csr.copy()  # as the next lines work in place
        part.data = csr.data - kept if self.rest else kept
        part.eliminate_zeros()
        return part


@dataclass(frozen=True)
class PreparedBlocks:
    """Scaled row blocks, for `LowRankPlusSparse`."""

    matrix: ExpressionMatrix
    scales: Scales = Scales(None, None, "not scaled")
    validation: float = 0.0  # share of each gene's entries to hold out
    seed: int = 0  # of the choice of these entries
    block_gene_counts: NDArray[np.int32] | None = None  # see Survey; None in a `part`
    molecules: Molecules | None = None  # to use; None for all
    # in a `part`, if entries are held out: number of entries of each gene before each block, and in all blocks
    entries_before: tuple[dict[int, NDArray[np.int32]], NDArray[np.int64]] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.matrix.shape

    @property
    def bounds(self) -> tuple[int, ...]:
        """First cell of each block, and the number of cells."""
        return self.matrix.blocks.bounds

    @property
    def weights(self) -> Sequence[int]:
        """Observed entries of each block, or its cells if these are unknown."""
        if self.block_gene_counts is None:
            return self.matrix.blocks.sizes
        return self.block_gene_counts.sum(axis=1, dtype=np.int64).tolist()  # type: ignore[no-any-return]

    def part(self, blocks: tuple[int, ...]) -> PreparedBlocks:
        """Return a source for these blocks alone, without the counts of all blocks, which can be gigabytes."""
        if self.validation == 0:
            return replace(self, block_gene_counts=None)
        assert self.block_gene_counts is not None
        sums, before, last = np.zeros(self.shape[1], np.int64), {}, 0
        for block in blocks:  # in ascending order
            sums += self.block_gene_counts[last:block].sum(axis=0, dtype=np.int64)
            before[block], last = sums.astype(np.int32), block
        sums += self.block_gene_counts[last:].sum(axis=0, dtype=np.int64)
        return replace(self, block_gene_counts=None, entries_before=(before, sums))

    def load(self, block: int) -> Block:
        """Read and scale a block."""
        csr = self.matrix.read_block(block)
        if self.molecules is not None:
            csr = self.molecules.of(csr, self.bounds[block])
        return Block(csr.indptr, csr.indices, csr.data * self._scale(csr, block), csr.shape[1])

    def halves(self, block: int) -> tuple[Block, Floats, Floats]:
        """Read a block and return the scaled training and test molecules, zeros kept, and the size of each cell.

        Test molecules are multiplied by p/(1 − p), to estimate what the training molecules estimate.
        """
        assert self.molecules is not None
        csr, share = self.matrix.read_block(block), self.molecules.share
        kept, scale = self.molecules.kept(csr, self.bounds[block]), self._scale(csr, block)
        test = (csr.data - kept) * np.float32(share / (1 - share))
        rows = slice(*self.bounds[block : block + 2])
        size = np.ones(csr.shape[0], np.float32)
        if self.scales.cell is not None:
            size /= self.scales.cell[rows]
        train, test = ((part * scale).astype(np.float32, copy=False) for part in (kept, test))
        return Block(csr.indptr, csr.indices, train, csr.shape[1]), test, size

    def _scale(self, csr: sp.csr_matrix, block: int) -> Floats | np.float32:
        """Return the factor of each entry."""
        gene = np.float32(1) if self.scales.gene is None else self.scales.gene[csr.indices]
        if self.scales.cell is None:
            return gene
        return gene * np.repeat(self.scales.cell[slice(*self.bounds[block : block + 2])], np.diff(csr.indptr))

    def held_out(self, block: int, loaded: Block) -> NDArray[np.bool_] | None:
        """Return a mask of its held-out entries, or None if there are none."""
        if self.validation == 0:
            return None
        every, counts = self.entries_before or self.part((block,)).entries_before  # type: ignore[misc]
        before = every[block].astype(np.int64)
        return hidden_entries(loaded.indices, before, counts, n_to_hide(counts, self.validation), self.seed)


def prepare(
    matrix: ExpressionMatrix, found: Survey, settings: Settings, molecules: Molecules | None = None
) -> PreparedBlocks:
    """Return the scaled blocks, with entries held out if the stop rule needs them."""
    scales = scales_of(matrix, found, settings.exponents, totals_needed=settings.scaling is not None)
    held_out = settings.method == "complete" and settings.stop == "held-out"
    validation = settings.validation if held_out else 0.0
    return PreparedBlocks(matrix, scales, validation, settings.seed, found.block_gene_counts, molecules)


@dataclass(frozen=True)
class CellModel:
    """A model of the fitted cells, on the scale with even noise, to impute other cells."""

    gene_scale: Floats  # multiplies each gene, shape (n,)
    # share of each gene in the sum of the matrix; a cell with some genes has its total over their shares as its size
    gene_share: Doubles
    raw_counts: bool  # whether the matrix was raw counts
    cell_exponent: float  # cells were multiplied by (size factor / centre)^−cell_exponent
    centre: float  # geometric mean of the size factors
    weights: Doubles | None = None  # of the components of a denoised matrix, shape (r,); None for a completed one
    # of a completed matrix: mean and covariance of the rows of the left factor, shapes (r,) and (r, r), and the
    # residual on the observed entries, relative to their norm
    mean: Doubles | None = None
    covariance: Doubles | None = None
    residual: float | None = None


def model_of(stored: Mapping[str, Any]) -> CellModel:
    """Return the model that AnnData has read."""
    other = {"mean", "covariance", "residual"} if "weights" in stored else {"weights"}
    plain: dict[str, Any] = {"raw_counts": bool, "cell_exponent": float, "centre": float, "residual": float}
    names = [field.name for field in fields(CellModel) if field.name not in other]
    return CellModel(**{name: plain.get(name, np.asarray)(stored[name]) for name in names})


def cell_model(blocks: PreparedBlocks, found: Survey, **of_method: Any) -> CellModel:
    """Return the model of a fit, given the fields that only its method has."""
    scales = blocks.scales
    return CellModel(
        gene_scale=np.ones(blocks.shape[1], np.float32) if scales.gene is None else scales.gene,
        gene_share=found.gene_sums / (found.gene_sums.sum() or 1.0),
        raw_counts=found.integer,
        cell_exponent=scales.cell_exponent,
        centre=scales.centre,
        **of_method,
    )


def mean_and_covariance(lefts: list[Delayed], n_cells: int) -> tuple[Doubles, Doubles]:
    """Return mean and covariance of the rows of a left factor, given in blocks."""
    moments = dask.delayed(_moments)
    total, squares = tree_reduce([moments(left) for left in lefts], add).compute()
    mean = total / n_cells
    return mean, squares / n_cells - np.outer(mean, mean)


def _moments(left: Floats) -> tuple[Doubles, Doubles]:
    wide = left.astype(np.float64)
    return wide.sum(axis=0), wide.T @ wide
