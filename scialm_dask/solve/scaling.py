"""The matrix as the loop sees it: surveyed, scaled so that noise is even, with a share of its entries held out."""

from __future__ import annotations

from collections.abc import Mapping
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
    """What one pass over a matrix tells."""

    block_gene_counts: NDArray[np.int32]  # observed entries of each gene in each block, shape (blocks, n)
    gene_sums: Doubles  # of the observed entries, float64, shape (n,)
    cell_sums: Doubles  # float64, shape (m,)
    cell_counts: NDArray[np.int64]  # observed entries of each cell, shape (m,)
    # cell, gene and value of the first that is no whole number; None if all are
    fraction: tuple[int, int, float] | None

    @property
    def integer(self) -> bool:
        """Whether all values are whole numbers."""
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
    """Read the matrix once. Raises `InputError` for values that cannot be used, and if nothing is observed."""
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
    """Return what a `Survey` has of one block, in its order."""
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
    """What entries are multiplied with before the loop; factors are divided by it after."""

    cell: Floats | None  # positive, shape (m,); None for ones
    gene: Floats | None  # positive, shape (n,); None for ones
    note: str  # what was done, in words
    centre: float = 1.0  # geometric mean of the size factors of cells
    cell_exponent: float = 0.0  # cells were multiplied with (size factor / centre)^−cell_exponent


def scales_of(
    matrix: ExpressionMatrix, found: Survey, exponents: tuple[float, float], *, totals_needed: bool = False
) -> Scales:
    """Scale genes by mean^−g and cells by (size factor)^−c.

    The variance of a normalised count is its mean times the cell's size factor: the number that normalisation
    multiplied the cell with. It is known from the raw totals in ``obs["total_counts"]``. Raw counts were multiplied
    with nothing, and their variance goes with the cell's own total instead. Where neither is known cells are not
    scaled; raises `InputError` if they must be.
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
            f"are no raw counts; add the raw totals to obs (as `qc` does), or pass --scaling {gene_exponent:g},0"
        )
    else:
        return Scales(None, gene.astype(np.float32), "genes scaled; cells not, as obs has no total_counts")
    used = factor > 0
    centre = float(np.exp(np.log(factor[used]).mean()))
    factor = np.where(used, factor / centre, 1.0)
    return Scales((factor**-cell_exponent).astype(np.float32), gene.astype(np.float32), note, centre, cell_exponent)


@dataclass(frozen=True)
class Molecules:
    """A share of the molecules of a count matrix, or what that leaves: count splitting."""

    share: float  # probability of a molecule to be in the first part
    rest: bool  # take the other part
    seed: int  # which molecules

    def kept(self, csr: sp.csr_matrix, first_row: int) -> Floats:
        """Draw how many molecules of each entry are in the first part."""
        return thinned(csr.indptr, csr.indices, csr.data, first_row=first_row, share=self.share, seed=self.seed)

    def of(self, csr: sp.csr_matrix, first_row: int) -> sp.csr_matrix:
        """Take this part of a block of rows."""
        kept = self.kept(csr, first_row)
        part = csr.copy()  # what follows works in place
        part.data = csr.data - kept if self.rest else kept
        part.eliminate_zeros()
        return part


@dataclass(frozen=True)
class PreparedBlocks:
    """Row blocks, read anew and scaled, for `LowRankPlusSparse`."""

    matrix: ExpressionMatrix
    scales: Scales
    validation: float  # share of each gene's entries to hold out, 0 for none
    seed: int  # which entries
    block_gene_counts: NDArray[np.int32] | None  # see Survey; None in a part of the source
    molecules: Molecules | None = None  # take only these; None for all
    # of a part that holds out: entries of each gene before each of its blocks, and in all
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
    def weights(self) -> list[int]:
        """Observed entries of each block."""
        assert self.block_gene_counts is not None
        return self.block_gene_counts.sum(axis=1, dtype=np.int64).tolist()  # type: ignore[no-any-return]

    def part(self, blocks: tuple[int, ...]) -> PreparedBlocks:
        """Return what reads these blocks alone: the counts of all blocks can be gigabytes."""
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
        """Return what each entry is multiplied with."""
        gene = np.float32(1) if self.scales.gene is None else self.scales.gene[csr.indices]
        if self.scales.cell is None:
            return gene
        return gene * np.repeat(self.scales.cell[slice(*self.bounds[block : block + 2])], np.diff(csr.indptr))

    def held_out(self, block: int, loaded: Block) -> NDArray[np.bool_] | None:
        """Tell which of its observed entries are held out."""
        if self.validation == 0:
            return None
        every, counts = self.entries_before or self.part((block,)).entries_before  # type: ignore[misc]
        before = every[block].astype(np.int64)
        return hidden_entries(loaded.indices, before, counts, n_to_hide(counts, self.validation), self.seed)


def prepare(
    matrix: ExpressionMatrix, found: Survey, settings: Settings, molecules: Molecules | None = None
) -> PreparedBlocks:
    """Scale the matrix, and hold out a share of it if the stop rule needs that."""
    scales = scales_of(matrix, found, settings.exponents, totals_needed=settings.scaling is not None)
    held_out = settings.method == "complete" and settings.stop == "held-out"
    validation = settings.validation if held_out else 0.0
    return PreparedBlocks(matrix, scales, validation, settings.seed, found.block_gene_counts, molecules)


@dataclass(frozen=True)
class CellModel:
    """What a fit has learnt of cells, on the scale on which it made their noise even."""

    gene_scale: NDArray[np.float32]  # what genes were multiplied with, shape (n,)
    # of each gene in the sum of the matrix: where genes are missing, a cell's size is its total over their share
    gene_share: NDArray[np.float64]
    raw_counts: bool  # whether it was made from these
    cell_exponent: float  # cells were multiplied with (size factor / centre)^−cell_exponent
    centre: float  # geometric mean of the size factors


@dataclass(frozen=True)
class CompletionModel(CellModel):
    """Of a completion, where zeros are unknown."""

    mean: NDArray[np.float64]  # of the rows of the left factor, shape (r,)
    covariance: NDArray[np.float64]  # of these rows, shape (r, r)
    residual: float  # what the fit left of the observed entries, relative to their norm


@dataclass(frozen=True)
class DenoisingModel(CellModel):
    """Of a denoised matrix."""

    weights: NDArray[np.float64]  # of the components, shape (r,)


def model_of(stored: Mapping[str, Any]) -> CellModel:
    """Return the model that AnnData has read."""
    kind = DenoisingModel if "weights" in stored else CompletionModel
    plain: dict[str, Any] = {"raw_counts": bool, "cell_exponent": float, "centre": float, "residual": float}
    return kind(**{field.name: plain.get(field.name, np.asarray)(stored[field.name]) for field in fields(kind)})


def completion_model(
    lefts: list[Delayed], blocks: PreparedBlocks, found: Survey, *, residual: float
) -> CompletionModel:
    """Sum up the rows of a fitted left factor, not yet scaled back, block by block."""
    moments = dask.delayed(_moments)
    total, squares = tree_reduce([moments(left) for left in lefts], add).compute()
    mean = total / blocks.shape[0]
    covariance = squares / blocks.shape[0] - np.outer(mean, mean)
    return CompletionModel(**_of_cells(blocks, found), mean=mean, covariance=covariance, residual=residual)


def denoising_model(blocks: PreparedBlocks, found: Survey, weights: Doubles) -> DenoisingModel:
    """Return what completes other cells as these were denoised, with these weights of components."""
    return DenoisingModel(**_of_cells(blocks, found), weights=weights)


def _of_cells(blocks: PreparedBlocks, found: Survey) -> dict[str, Any]:
    scales = blocks.scales
    return {
        "gene_scale": np.ones(blocks.shape[1], np.float32) if scales.gene is None else scales.gene,
        "gene_share": found.gene_sums / (found.gene_sums.sum() or 1.0),
        "raw_counts": found.integer,
        "cell_exponent": scales.cell_exponent,
        "centre": scales.centre,
    }


def _moments(left: Floats) -> tuple[Doubles, Doubles]:
    wide = left.astype(np.float64)
    return wide.sum(axis=0), wide.T @ wide
