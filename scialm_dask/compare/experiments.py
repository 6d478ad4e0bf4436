"""Input and target of each experiment: masking, count splitting, or a truth. Out of core.

Every experiment has two views of the same cells: counts normalised to one total, and the raw counts if they are known.
Imputed raw counts are multiplied by the size factors, so that all methods are scored on the normalised scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from scialm_dask.data.annotated import aligned, as_matrix, refuse_logarithms
from scialm_dask.data.annotation import Annotation, new_anndata, total_counts
from scialm_dask.data.csr import CSRWriter, row_of, scaled_rows
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.metrics import ratio
from scialm_dask.solve.scaling import Molecules

Doubles = NDArray[np.float64]
TRAIN_SHARE = 0.8
_OTHER = 0x5CA1E  # XORed to the seed of a split, which must differ from that of methods
_WHOLE = 1e-2  # rounding error that restored counts may have, due to float32


@dataclass(frozen=True)
class Source:
    """A matrix as AnnData stores: cells normalised to the same total, and counts if they are known."""

    name: str
    normalised: Path
    counts: Path | None = None
    factors: Doubles | None = None  # normalised over raw counts of each cell, shape (m,)

    @property
    def matrix(self) -> ExpressionMatrix:
        """The normalised view."""
        return ExpressionMatrix.open(self.normalised)


@dataclass(frozen=True)
class Experiment:
    """A matrix to impute and its target."""

    kind: str  # masking, count split, truth or all data
    share: float | None  # hidden share, if any
    seed: int  # of the hidden entries and of the methods
    given: Source
    target: ExpressionMatrix | None  # normalised; for masking only its stored entries are scored

    @property
    def all_entries(self) -> bool:
        """Whether all entries are scored, including zeros."""
        return self.kind != "masking"


def open_source(source: Any, folder: Path, *, layer: str | None = None) -> Source:
    """Write both views of a matrix to `folder`. Raises `InputError` if it cannot be read or holds logarithms.

    Whole numbers count as raw counts and are normalised to the median total. Anything else counts as normalised; its
    raw counts are restored if ``obs["total_counts"]`` has the raw totals, as written by ``scialm-dask qc``.
    """
    matrix = as_matrix(source, layer, observed="nonzero")
    refuse_logarithms(matrix, source, layer)
    sums, whole = _totals(matrix)
    name = matrix.name if matrix.origin is None else Path(matrix.origin.path).stem
    normalised, counts = folder / "normalised.zarr", folder / "counts.zarr"
    if whole:
        factors = ratio(np.median(sums[sums > 0]) if sums.any() else 1.0, sums)
        obs = matrix.obs.assign(total_counts=sums.astype(np.float32))
        _write(normalised, _blocks(matrix, factors), obs=obs, var=matrix.var)
        _write(counts, matrix.stream(), obs=matrix.obs, var=matrix.var)
        return Source(name, normalised, counts, factors)
    _write(normalised, matrix.stream(), obs=matrix.obs, var=matrix.var)
    if (totals := total_counts(matrix.obs, matrix.name)) is not None:
        factors = ratio(sums, totals)
        if _restore(matrix, factors, counts):
            return Source(name, normalised, counts, factors)
    return Source(name, normalised)


def _totals(matrix: ExpressionMatrix) -> tuple[Doubles, bool]:
    """Return the total of each cell, and whether all values are whole numbers."""
    sums, whole = [], True
    for block in matrix.stream():
        sums.append(block.sum(axis=1, dtype=np.float64).A1)
        whole = whole and not np.any(block.data % 1)
    return np.concatenate(sums), whole


def _blocks(
    matrix: ExpressionMatrix, factors: Doubles | None = None, part: Molecules | None = None
) -> Iterator[sp.csr_matrix]:
    """Yield the row blocks of a matrix, or of a part of its counts, with cells multiplied by `factors`."""
    for (start, stop), block in zip(matrix.blocks, matrix.stream(), strict=True):
        block = block if part is None else part.of(block, start)
        yield block if factors is None else scaled_rows(block, factors[start:stop])


def _write(path: Path, blocks: Iterator[sp.csr_matrix], *, obs: Any, var: Any) -> None:
    root = new_anndata(path, obs=obs, var=var)
    with CSRWriter(root, "X", n_columns=len(var)) as writer:
        for block in blocks:
            writer.append(block)
    zarr.consolidate_metadata(root.store)


def _restore(matrix: ExpressionMatrix, factors: Doubles, path: Path) -> bool:
    """Write the counts from which a matrix was normalised; return whether they are whole numbers."""
    whole = True

    def restored() -> Iterator[sp.csr_matrix]:
        nonlocal whole
        for (start, stop), block in zip(matrix.blocks, matrix.stream(), strict=True):
            exact = block.data / np.where(factors > 0, factors, 1)[start:stop][row_of(block)]
            block.data = np.rint(exact).astype(np.float32)
            whole = whole and bool(np.all(np.abs(exact - block.data) <= _WHOLE) and block.data.all())
            yield block

    _write(path, restored(), obs=matrix.obs, var=matrix.var)
    return whole


def masked(source: Source, share: float, seed: int, folder: Path) -> Experiment:
    """Hide the same share of each gene's non-zeros in both views; see `mask`."""
    given = replace(source, normalised=folder / "normalised.zarr")
    mask(source.normalised, given.normalised, fraction=share, seed=seed)
    if source.counts is not None:
        given = replace(given, counts=folder / "counts.zarr")
        mask(source.counts, folder / "counts.zarr", fraction=share, seed=seed)
    target = ExpressionMatrix.open(given.normalised, "held_out")
    return Experiment("masking", share, seed, given, target)


def count_split(source: Source, seed: int, folder: Path) -> Experiment:
    """Split the molecules of every count binomially: some are given, the others, including zeros, are predicted.

    Raises `InputError` if the counts are unknown.
    """
    if source.counts is None or source.factors is None:
        raise InputError(
            f"{source.name}: no raw counts, nor obs['total_counts'] to restore them from, which count splitting needs; "
            "give one of them, or leave count splitting out"
        )
    counts, factors = ExpressionMatrix.open(source.counts), source.factors
    given = Source(source.name, folder / "normalised.zarr", folder / "counts.zarr", factors / TRAIN_SHARE)
    obs = counts.obs.drop(columns="total_counts", errors="ignore")
    # denoise splits its input with the same seed, so these draws must differ
    train, test = (Molecules(TRAIN_SHARE, rest, _OTHER ^ seed) for rest in (False, True))
    _write(folder / "counts.zarr", _blocks(counts, part=train), obs=obs, var=counts.var)
    totals, _ = _totals(ExpressionMatrix.open(folder / "counts.zarr"))
    normalised = _blocks(counts, factors / TRAIN_SHARE, train)
    _write(given.normalised, normalised, obs=obs.assign(total_counts=totals.astype(np.float32)), var=counts.var)
    unseen = _blocks(counts, factors / (1 - TRAIN_SHARE), test)
    _write(folder / "target.zarr", unseen, obs=obs, var=counts.var)
    target = ExpressionMatrix.open(folder / "target.zarr")
    return Experiment("count split", 1 - TRAIN_SHARE, seed, given, target)


def check_truth(truth: ExpressionMatrix, given: ExpressionMatrix) -> ExpressionMatrix:
    """Return a truth in the order of the given cells and genes. Raises `InputError` if they differ.

    If no cell has the same name in both, cells are matched by position.
    """
    if len(truth.obs) == len(given.obs) and not truth.obs.index.isin(given.obs.index).any():
        truth = replace(truth, annotation=Annotation(given.obs[[]], truth.var))
    return aligned(truth, given)


def against_truth(source: Source, truth: ExpressionMatrix, seed: int, folder: Path) -> Experiment:
    """Score all entries against a truth, scaled to the same totals of cells; see `check_truth`."""
    factors = ratio(_totals(source.matrix)[0], _totals(truth)[0])
    _write(folder / "target.zarr", _blocks(truth, factors), obs=truth.obs, var=truth.var)
    target = ExpressionMatrix.open(folder / "target.zarr")
    return Experiment("truth", None, seed, source, target)
