"""What methods are given and what they are scored against: masking, count splitting, a truth. Out of core.

Every experiment has two views of the same cells: counts normalised to one total, and the raw counts where they are
known. Answers to raw counts are multiplied by the size factors, so that all are scored on the normalised scale.
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
_OTHER = 0x5CA1E  # bits by which the seed of a split differs from that of methods
_WHOLE = 1e-2  # how far from whole numbers restored counts may be, by rounding of float32


@dataclass(frozen=True)
class Source:
    """A matrix as AnnData stores: one of cells with the same total, and one of counts, if they are known."""

    name: str
    normalised: Path
    counts: Path | None = None
    factors: Doubles | None = None  # what the counts of each cell were multiplied by, shape (m,)

    @property
    def matrix(self) -> ExpressionMatrix:
        """The normalised view."""
        return ExpressionMatrix.open(self.normalised)


@dataclass(frozen=True)
class Experiment:
    """One matrix to complete."""

    kind: str  # masking, count split, truth or all data
    share: float | None  # of what is hidden; None where nothing is
    seed: int  # of what is hidden, and of the methods
    given: Source
    target: ExpressionMatrix | None  # what to predict, normalised: by masking its stored entries, else all

    @property
    def all_entries(self) -> bool:
        """Whether zeros are scored too."""
        return self.kind != "masking"


def open_source(source: Any, folder: Path, *, layer: str | None = None) -> Source:
    """Write both views of a matrix to `folder`. Raises `InputError` if it cannot be read, or holds logarithms.

    Whole numbers are taken for raw counts and normalised to the median total. Anything else is taken as normalised;
    with the raw totals in ``obs["total_counts"]``, as ``scialm-dask qc`` leaves them, its counts are restored.
    """
    matrix = as_matrix(source, layer, observed="nonzero")
    refuse_logarithms(matrix, source, layer)
    sums, whole = _totals(matrix)
    name = matrix.name if matrix.origin is None else Path(matrix.origin.path).stem
    normalised, counts = folder / "normalised.zarr", folder / "counts.zarr"
    if whole:
        factors = ratio(np.median(sums[sums > 0]) if sums.any() else 1.0, sums)
        obs = matrix.obs.assign(total_counts=sums.astype(np.float32))
        _write(normalised, _scaled(matrix, factors), obs=obs, var=matrix.var)
        _write(counts, matrix.stream(), obs=matrix.obs, var=matrix.var)
        return Source(name, normalised, counts, factors)
    _write(normalised, matrix.stream(), obs=matrix.obs, var=matrix.var)
    if (totals := total_counts(matrix.obs, matrix.name)) is not None:
        factors = ratio(sums, totals)
        if _restore(matrix, factors, counts):
            return Source(name, normalised, counts, factors)
    return Source(name, normalised)


def _totals(matrix: ExpressionMatrix) -> tuple[Doubles, bool]:
    """Total of each cell, and whether all values are whole numbers."""
    sums, whole = [], True
    for block in matrix.stream():
        sums.append(block.sum(axis=1, dtype=np.float64).A1)
        whole = whole and not np.any(block.data % 1)
    return np.concatenate(sums), whole


def _write(path: Path, blocks: Iterator[sp.csr_matrix], *, obs: Any, var: Any) -> None:
    root = new_anndata(path, obs=obs, var=var)
    with CSRWriter(root, "X", n_columns=len(var)) as writer:
        for block in blocks:
            writer.append(block)
    zarr.consolidate_metadata(root.store)


def _restore(matrix: ExpressionMatrix, factors: Doubles, path: Path) -> bool:
    """Write the counts that a matrix was normalised from; return whether they came out whole."""
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


def as_it_is(source: Source, seed: int) -> Experiment:
    """Hide nothing and score nothing: for clustering alone."""
    return Experiment("all data", None, seed, source, None)


def masked(source: Source, share: float, seed: int, folder: Path) -> Experiment:
    """Hide a share of each gene's non-zeros, in both views the same; see `mask`."""
    given = replace(source, normalised=folder / "normalised.zarr")
    mask(source.normalised, given.normalised, fraction=share, seed=seed)
    if source.counts is not None:
        given = replace(given, counts=folder / "counts.zarr")
        mask(source.counts, folder / "counts.zarr", fraction=share, seed=seed)
    target = ExpressionMatrix.open(given.normalised, "held_out")
    return Experiment("masking", share, seed, given, target)


def count_split(source: Source, seed: int, folder: Path) -> Experiment:
    """Split the molecules of every count binomially: some to complete, the others to predict, zeros too.

    Raises `InputError` if the counts are not known.
    """
    if source.counts is None or source.factors is None:
        raise InputError(
            f"{source.name}: no raw counts, nor obs['total_counts'] to restore them by, and counts alone can be split; "
            "give those, or leave count splitting out"
        )
    counts, factors = ExpressionMatrix.open(source.counts), source.factors
    given = Source(source.name, folder / "normalised.zarr", folder / "counts.zarr", factors / TRAIN_SHARE)
    obs = counts.obs.drop(columns="total_counts", errors="ignore")
    # Methods get the seed too, and denoise splits what it gets: that must be by other draws.
    train, test = (Molecules(TRAIN_SHARE, rest, _OTHER ^ seed) for rest in (False, True))
    _write(folder / "counts.zarr", _part(counts, train), obs=obs, var=counts.var)
    totals, _ = _totals(ExpressionMatrix.open(folder / "counts.zarr"))
    normalised = _part(counts, train, factors / TRAIN_SHARE)
    _write(given.normalised, normalised, obs=obs.assign(total_counts=totals.astype(np.float32)), var=counts.var)
    unseen = _part(counts, test, factors / (1 - TRAIN_SHARE))
    _write(folder / "target.zarr", unseen, obs=obs, var=counts.var)
    target = ExpressionMatrix.open(folder / "target.zarr")
    return Experiment("count split", 1 - TRAIN_SHARE, seed, given, target)


def _part(counts: ExpressionMatrix, which: Molecules, factors: Doubles | None = None) -> Iterator[sp.csr_matrix]:
    for (start, stop), block in zip(counts.blocks, counts.stream(), strict=True):
        part = which.of(block, start)
        yield part if factors is None else scaled_rows(part, factors[start:stop])


def check_truth(truth: ExpressionMatrix, given: ExpressionMatrix) -> ExpressionMatrix:
    """Return a truth in the order of the given cells and genes. Raises `InputError` if these are not the same.

    If no cell has the same name in both, cells are taken in their order.
    """
    if len(truth.obs) == len(given.obs) and not truth.obs.index.isin(given.obs.index).any():
        truth = replace(truth, annotation=Annotation(given.obs[[]], truth.var))
    return aligned(truth, given)


def against_truth(source: Source, truth: ExpressionMatrix, seed: int, folder: Path) -> Experiment:
    """Score all entries against the same cells sequenced deeply, scaled to the same totals; see `check_truth`."""
    factors = ratio(_totals(source.matrix)[0], _totals(truth)[0])
    _write(folder / "target.zarr", _scaled(truth, factors), obs=truth.obs, var=truth.var)
    target = ExpressionMatrix.open(folder / "target.zarr")
    return Experiment("truth", None, seed, source, target)


def _scaled(matrix: ExpressionMatrix, factors: Doubles) -> Iterator[sp.csr_matrix]:
    for (start, stop), block in zip(matrix.blocks, matrix.stream(), strict=True):
        yield scaled_rows(block, factors[start:stop])
