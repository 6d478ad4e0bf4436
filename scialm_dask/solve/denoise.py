"""Denoising by count splitting: one split, two short SVDs, no search.

For counts C, cells × genes, the scaled counts S(C) = diag(a) C diag(b) have even noise; p = 0.8.

    C = C₁ + C₂                             1. split the molecules binomially, shares p and 1 − p;
                                               T = C₂ p/(1 − p) is an independent measurement of C₁'s mean
    S(C₁) ≈ U diag(s) Vᵀ                    2. SVD of the training part
    w = min(1, ĉ/s),  c = diag(UᵀS(T)V)     3. weights of components: the share of s that is signal; and of the
    λ = ⟨S(C₁) − M, S(T) − M⟩ / ‖S(C₁) − M‖²   residuals of each gene: the share of S(C₁) − M that is signal,
                                               where M = U diag(ĉ) Vᵀ
    S(C) ≈ U diag(s) Vᵀ                     4. SVD of all molecules
    X̂ = A diag(1 − λ) + C diag(λ)           5. with A = diag(a)⁻¹ U diag(w s) Vᵀ diag(b)⁻¹

ĉ is c made non-increasing and non-negative. Step 3 needs only l × genes products, since UᵀU = I.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from scialm_dask.config import Interval, Settings, validated
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.linalg.kernels import Block, BlockState, Doubles, Floats, compare_halves
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.svd import PartialSVD, extended_basis, rayleigh_ritz
from scialm_dask.solve.scaling import Molecules, PreparedBlocks, Survey, prepare

_STEPS_OF_WEIGHTS = 100  # more than the passes of an SVD, so that steps increase
TRAIN_SHARE = 0.8  # p; 0.5 and 0.9 change the errors by less than 2 %


@dataclass(frozen=True)
class Unseen:
    """Relative errors of predictions P of the test molecules, on the scale with even noise: ‖S(T) − P‖ / ‖S(T)‖."""

    observed: float  # P: the training molecules themselves
    gene_mean: float  # P: the mean of each gene times the size of each cell
    # P: the imputed training molecules. As the weights were fitted to the test molecules, it is corrected as in
    # Mallows' Cp, by twice the number of weights over the number of entries
    imputed: float

    @property
    def verdict(self) -> str:
        """The conclusion, in a sentence."""
        best = min(self.observed, self.gene_mean)
        if self.imputed < best:
            return (
                f"Yes: unseen molecules are predicted with {1 - self.imputed / self.observed:.1%} less error than by "
                f"the raw counts, and {1 - self.imputed / self.gene_mean:.1%} less than by the gene means."
            )
        if self.gene_mean <= self.observed:
            return "No: the gene means predict unseen molecules as well; no difference between cells was found."
        return "No: the raw counts predict unseen molecules as well; use those."


@dataclass(frozen=True)
class Weights:
    """Weights of components and residuals, from the test molecules (step 3)."""

    component: Doubles  # w, between 0 and 1, float64, shape (l,)
    residual: Floats  # λ, between 0 and 1, float32, shape (n,)
    unseen: Unseen  # errors on the test molecules


@dataclass(frozen=True)
class DenoiseState:
    """The state between two passes. W does not change, so no state of cells has to be kept."""

    basis: Floats  # of the next pass: orthonormal, float32, shape (n, l)
    passes: int = 0  # made so far for the present SVD
    weights: Weights | None = None  # None during the SVD of the training part
    svd: PartialSVD | None = None  # from the last pass; not saved

    @property
    def steps(self) -> int:
        """A number that increases with each pass."""
        return self.passes + (0 if self.weights is None else _STEPS_OF_WEIGHTS)

    def is_last(self, settings: Settings) -> bool:
        """Return whether no pass follows."""
        return self.weights is not None and self.passes == settings.svd_passes

    def plain(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return JSON values and small arrays for `of_plain`."""
        notes: dict[str, Any] = {"passes": self.passes, "unseen": None}
        arrays: dict[str, NDArray[Any]] = {"basis": self.basis}
        if self.weights is None:
            return notes, arrays
        arrays |= {"component_weight": self.weights.component, "residual_weight": self.weights.residual}
        return notes | {"unseen": asdict(self.weights.unseen)}, arrays

    @classmethod
    def of_plain(cls, notes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> DenoiseState:
        """Return the state from what `plain` returned; raise `ValueError` for values that no run leaves."""
        basis, weights = arrays["basis"], None
        passes = validated("passes", notes["passes"], Annotated[int, Interval(0)])
        if notes["unseen"] is not None:
            component, residual = arrays["component_weight"], arrays["residual_weight"]
            if residual.shape != basis.shape[:1] or not all(np.all((x >= 0) & (x <= 1)) for x in (component, residual)):
                raise ValueError("weights are not of these genes, or not between 0 and 1")
            weights = Weights(component, residual, Unseen(**notes["unseen"]))
        if basis.ndim != 2 or basis.dtype != np.float32 or not np.isfinite(basis).all():
            raise ValueError(f"basis is {basis.dtype} of shape {basis.shape}")
        return cls(basis, passes, weights)


@dataclass(frozen=True)
class Denoised:
    """The low-rank part, on the scale of S, and the weights."""

    operator: LowRankPlusSparse  # over all molecules; its last sketch spans U
    svd: PartialSVD  # of S(C), without components of weight 0
    weights: Weights  # of these components, and of residuals


def check_counts(matrix: ExpressionMatrix, found: Survey) -> None:
    """Raise `InputError` if a matrix does not hold raw counts."""
    remedy = "denoising needs raw counts: give those (`qc` keeps them in layer counts), or use preset complete"
    if matrix.observed == "finite":
        raise InputError(f"{matrix.name}: opened with zeros as values and NaN as missing; {remedy}")
    if found.fraction is not None:
        row, column, value = found.fraction
        cell, gene = matrix.obs.index[row], matrix.var.index[column]
        raise InputError(f"{matrix.name}: {value:g} of gene {gene} in cell {cell} is not a whole number; {remedy}")


def denoise(
    matrix: ExpressionMatrix,
    found: Survey,
    settings: Settings,
    operator_of: Callable[[PreparedBlocks], LowRankPlusSparse],
    state: DenoiseState | None = None,
) -> Iterator[DenoiseState | Denoised]:
    """Yield the state after each pass, to resume from, and finally the result.

    `max_rank` of the settings is l, and `svd_passes` the passes of each SVD; `operator_of` returns the operator over
    given blocks. Raises `InputError` if the values are not raw counts, or too few to predict molecules from others.
    """
    check_counts(matrix, found)
    n = matrix.shape[1]
    if state is None:
        width = min(*matrix.shape, settings.max_rank or n)
        state = DenoiseState(extended_basis(np.zeros((n, 0), np.float32), width, settings.seed))
    if state.weights is None:
        train = prepare(matrix, found, settings, Molecules(TRAIN_SHARE, False, settings.seed))
        operator = operator_of(train)
        for state in _svd(operator, state, settings.svd_passes):  # noqa: B020
            yield state
        assert state.svd is not None
        weights = _weights(operator, train, state.svd, matrix.name)
        operator.release()
        state = DenoiseState(state.svd.right, weights=weights)
        yield state
    operator = operator_of(prepare(matrix, found, settings))
    for state in _svd(operator, state, settings.svd_passes):  # noqa: B020
        yield state
    assert state.svd is not None
    assert state.weights is not None
    svd, component = state.svd, state.weights.component
    kept = min(len(svd.values), int(np.count_nonzero(component)))
    svd = PartialSVD(svd.values[:kept], np.ascontiguousarray(svd.right[:, :kept]), svd.to_left[:, :kept])
    yield Denoised(operator, svd, replace(state.weights, component=component[:kept]))


def _svd(operator: LowRankPlusSparse, state: DenoiseState, passes: int) -> Iterator[DenoiseState]:
    """Yield the state after each pass of subspace iteration: S(C) V, then the SVD of S(C) projected on its range.

    When all passes were made before a restart, the last is repeated, since U is in its sketch.
    """
    for number in range(min(state.passes + 1, passes), passes + 1):
        svd = rayleigh_ritz(operator.multiply(state.basis))
        state = replace(state, basis=svd.right if number < passes else state.basis, passes=number, svd=svd)
        yield state


def _weights(operator: LowRankPlusSparse, train: PreparedBlocks, svd: PartialSVD, name: str) -> Weights:
    """Return the weights of components and residuals from the test molecules (step 3). One pass."""
    cross, (st, ss, tt, hs, ht), hh = operator.reduce(_compare, train, svd.to_left.astype(np.float32))
    s, V, UtT = svd.values, svd.right.astype(np.float64), cross.astype(np.float64)
    c = np.einsum("jr,jr->r", UtT, V)
    signal = np.maximum(isotonic_regression(c, increasing=False).x, 0)
    if signal[0] == 0:
        raise InputError(
            f"{name}: its molecules are too few to predict some from the others; give more cells or deeper "
            "ones, or use preset complete"
        )
    # With M = U diag(ĉ) Vᵀ, sums over the cells, for each gene:
    mm, ms, mt = V**2 @ signal**2, V**2 @ (signal * s), (V * UtT) @ signal
    missed = np.maximum(ss - 2 * ms + mm, 0)  # ‖S(C₁) − M‖²
    shared = st - ms - mt + mm  # ⟨S(C₁) − M, S(T) − M⟩
    some = missed > np.finfo(np.float32).eps * ss
    residual = np.clip(np.divide(shared, missed, out=np.zeros_like(shared), where=some), 0, 1)
    imputed = tt - 2 * mt + mm - 2 * residual * shared + residual**2 * missed
    mean = hs / hh
    n_weights = np.count_nonzero(residual) + np.count_nonzero(signal)
    unseen = Unseen(
        observed=_relative(tt - 2 * st + ss, tt),
        gene_mean=_relative(tt - 2 * mean * ht + mean**2 * hh, tt),
        imputed=_relative(imputed, tt) * math.sqrt(1 + 2 * n_weights / operator.size),
    )
    return Weights(np.minimum(1, signal / s), residual.astype(np.float32), unseen)


def _compare(
    number: int, _: Block, state: BlockState, train: PreparedBlocks, to_left: Floats
) -> tuple[Floats, Doubles, float]:
    return compare_halves(*train.halves(number), state.sketch @ to_left)


def _relative(squares: Doubles, of: Doubles) -> float:
    return math.sqrt(max(0.0, squares.sum()) / of.sum())
