"""The matrix as the loop sees it: surveyed, scaled so that noise is even, with a share of its entries held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import dask
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.arguments import short_repr
from scialm_dask.config import Settings
from scialm_dask.data.annotation import total_counts
from scialm_dask.data.matrix import ExpressionMatrix, check_observed
from scialm_dask.errors import InputError
from scialm_dask.linalg.kernels import Block, Doubles, Floats
from scialm_dask.linalg.random import hidden_entries, n_to_hide, thinned

__all__ = ["Confidence", "Molecules", "PreparedBlocks", "Scales", "Survey", "prepare", "survey"]


@dataclass(frozen=True)
class Survey:
    """What one pass over a matrix tells.

    Parameters
    ----------
    block_gene_counts
        Observed entries of each gene in each block, int32, shape ``(blocks, n)``.
    gene_sums, cell_sums
        Sums of the observed entries, float64, shapes ``(n,)`` and ``(m,)``.
    cell_counts
        Observed entries of each cell, shape ``(m,)``.
    integer
        Whether all values are whole numbers.
    """

    block_gene_counts: NDArray[np.int32]
    gene_sums: Doubles
    cell_sums: Doubles
    cell_counts: NDArray[np.int64]
    integer: bool

    @property
    def gene_counts(self) -> NDArray[np.int64]:
        """Observed entries of each gene, shape ``(n,)``."""
        return self.block_gene_counts.sum(axis=0, dtype=np.int64)  # type: ignore[no-any-return]

    @property
    def n_observed(self) -> int:
        """Number of observed entries."""
        return int(self.cell_counts.sum())


class _BlockSurvey(NamedTuple):
    gene_counts: NDArray[np.int32]
    gene_sums: Doubles
    cell_sums: Doubles
    cell_counts: NDArray[np.int64]
    integer: bool


def survey(matrix: ExpressionMatrix) -> Survey:
    """Read the matrix once. Raises `InputError` for values that cannot be used, and if nothing is observed."""
    shared, visit = dask.delayed(matrix, traverse=False), dask.delayed(_survey_block)
    parts = dask.compute(*(visit(shared, b) for b in range(len(matrix.blocks))))
    counts, gene_sums, cell_sums, cell_counts, integer = zip(*parts, strict=True)
    found = Survey(
        np.stack(counts),
        np.sum(gene_sums, axis=0),
        np.concatenate(cell_sums),
        np.concatenate(cell_counts),
        all(integer),
    )
    check_observed(found.n_observed, matrix.name)
    return found


def _survey_block(matrix: ExpressionMatrix, block: int) -> _BlockSurvey:
    csr = matrix.read_block(block)
    n_genes = matrix.shape[1]
    values = csr.data.astype(np.float64)
    return _BlockSurvey(
        np.bincount(csr.indices, minlength=n_genes).astype(np.int32),
        np.bincount(csr.indices, weights=values, minlength=n_genes).astype(np.float64),
        np.asarray(csr.sum(axis=1, dtype=np.float64)).ravel(),
        np.diff(csr.indptr).astype(np.int64),
        not np.any(csr.data % 1),
    )


@dataclass(frozen=True)
class Scales:
    """What entries are multiplied with before the loop; factors are divided by it after.

    Parameters
    ----------
    cell, gene
        Positive, float32, shapes ``(m,)`` and ``(n,)``; None for ones.
    note
        What was done, in words.
    centre
        Geometric mean of the size factors of cells.
    """

    cell: Floats | None
    gene: Floats | None
    note: str
    centre: float = 1.0


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
    return Scales((factor**-cell_exponent).astype(np.float32), gene.astype(np.float32), note, centre)


@dataclass(frozen=True)
class Confidence:
    """How far zeros are trusted: ω = αβᵀ, between 0 (unknown) and 1 (measured as well as the rest).

    Parameters
    ----------
    gene
        β, float32, shape ``(n,)``.
    cell
        α, float32, shape ``(m,)``; None for ones.

    Raises
    ------
    InputError
        If they are no vectors of numbers, or one is below 0, over 1 or NaN.
    """

    gene: Floats
    cell: Floats | None = None

    def __post_init__(self) -> None:
        for part in (self.gene,) if self.cell is None else (self.gene, self.cell):
            if not isinstance(part, np.ndarray) or part.dtype.kind not in "buif" or part.ndim != 1:
                raise InputError(f"confidence in zeros is {short_repr(part)}; give a one-dimensional array of numbers")
            if not (np.all(part >= 0) and np.all(part <= 1)):
                raise InputError(f"confidence in zeros reaches from {part.min()} to {part.max()}; give 0 to 1")

    def check(self, matrix: ExpressionMatrix) -> None:
        """Raise `InputError` if there is not one number for each gene, and for each cell.

        Parameters
        ----------
        matrix
            Of the zeros.
        """
        for part, length, what in ((self.gene, matrix.shape[1], "gene"), (self.cell, matrix.shape[0], "cell")):
            if part is not None and part.shape != (length,):
                raise InputError(
                    f"confidence in zeros of {what}s has shape {part.shape}, and {matrix.name} has {length} {what}s; "
                    f"give one number for each {what}"
                )

    @classmethod
    def uniform(cls, omega: float, n_genes: int) -> Confidence | None:
        """Trust all zeros alike; None for not at all.

        Parameters
        ----------
        omega
            Between 0 and 1.
        n_genes
            Length of β.
        """
        return cls(np.full(n_genes, omega, np.float32)) if omega else None


@dataclass(frozen=True)
class Molecules:
    """A share of the molecules of a count matrix, or what that leaves: count splitting.

    Parameters
    ----------
    share
        Probability of a molecule to be in the first part.
    rest
        Take the other part.
    seed
        Which molecules.
    """

    share: float
    rest: bool
    seed: int

    def of(self, csr: sp.csr_matrix, first_row: int) -> sp.csr_matrix:
        """Take this part of a block of rows."""
        kept = thinned(csr.indptr, csr.indices, csr.data, first_row=first_row, share=self.share, seed=self.seed)
        part = csr.copy()  # what follows works in place
        part.data = csr.data - kept if self.rest else kept
        part.eliminate_zeros()
        return part


@dataclass(frozen=True)
class PreparedBlocks:
    """Row blocks, scaled, for `LowRankPlusSparse`.

    Parameters
    ----------
    matrix
        Read anew for each block.
    scales
        To multiply with.
    validation
        Share of each gene's entries to hold out, 0 for none.
    seed
        Which entries.
    block_gene_counts
        See `Survey`.
    confidence
        In zeros; None where they are unknown.
    molecules
        Take only these; None for all.
    """

    matrix: ExpressionMatrix
    scales: Scales
    validation: float
    seed: int
    block_gene_counts: NDArray[np.int32]
    confidence: Confidence | None = None
    molecules: Molecules | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.matrix.shape

    @property
    def bounds(self) -> tuple[int, ...]:
        """First cell of each block, and the number of cells."""
        return self.matrix.blocks.bounds

    @property
    def column_confidence(self) -> Floats | None:
        """β."""
        return None if self.confidence is None else self.confidence.gene

    @property
    def has_row_confidence(self) -> bool:
        """Whether α are not all one."""
        return self.confidence is not None and self.confidence.cell is not None

    @property
    def weights(self) -> list[int]:
        """Observed entries of each block."""
        return self.block_gene_counts.sum(axis=1, dtype=np.int64).tolist()  # type: ignore[no-any-return]

    def load(self, block: int) -> Block:
        """Read and scale a block."""
        start, stop = self.matrix.blocks[block]
        csr = self.matrix.read_block(block)
        if self.molecules is not None:
            csr = self.molecules.of(csr, start)
        values = csr.data
        if self.scales.gene is not None:
            values = values * self.scales.gene[csr.indices]
        if self.scales.cell is not None:
            values = values * np.repeat(self.scales.cell[start:stop], np.diff(csr.indptr))
        alpha = None if self.confidence is None or self.confidence.cell is None else self.confidence.cell[start:stop]
        return Block(csr.indptr, csr.indices, values, csr.shape[1], alpha)

    def held_out(self, block: int, loaded: Block) -> NDArray[np.bool_] | None:
        """Tell which of its observed entries are held out."""
        if self.validation == 0:
            return None
        counts = self.block_gene_counts.sum(axis=0, dtype=np.int64)
        before = self.block_gene_counts[:block].sum(axis=0, dtype=np.int64)
        return hidden_entries(loaded.indices, before, counts, n_to_hide(counts, self.validation), self.seed)


def prepare(
    matrix: ExpressionMatrix,
    found: Survey,
    settings: Settings,
    *,
    confidence: Confidence | None = None,
    molecules: Molecules | None = None,
) -> PreparedBlocks:
    """Scale the matrix, and hold out a share of it if the stop rule needs that."""
    scales = scales_of(matrix, found, settings.exponents, totals_needed=settings.scaling is not None)
    validation = settings.validation if settings.stop == "held-out" else 0.0
    counts = found.block_gene_counts
    return PreparedBlocks(matrix, scales, validation, settings.seed, counts, confidence, molecules)
