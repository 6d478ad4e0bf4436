"""Functions of one row block, in NumPy and numba: no Dask, no Zarr, and the interpreter lock is released.

For a block of m rows, d, w and a are vectors in the order of its CSR pattern: the observed values, their estimates, and
the low-rank matrix A on the observed entries. An estimate of NaN marks a held-out entry, which is scored and otherwise
treated as unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scialm_dask.linalg.sparse_products import compiled, sddmm, spmm, spmm_t

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# All flags that let loops be vectorised except "no NaN", since NaN marks held-out entries.
_jit = compiled(boundscheck=False, fastmath={"reassoc", "contract", "arcp", "nsz"})

_DENSE_FROM = 0.5  # density above which BLAS on dense panels beats the sparse loops, clearly from 128 columns on
PANEL_VALUES = 4_000_000  # in a dense panel: 16 MB
_TALL_ROWS = 1024  # in a panel of a tall matrix


@dataclass(frozen=True)
class Block:
    """The constant data of a row block: a CSR matrix of the observed entries, columns ascending."""

    indptr: NDArray[np.integer]  # shape (m + 1,)
    indices: NDArray[np.int32]  # shape (N,)
    observed: Floats  # the values d, float32, shape (N,)
    n_columns: int  # n

    @property
    def n_rows(self) -> int:
        """Number of rows (m)."""
        return len(self.indptr) - 1

    @property
    def is_dense(self) -> bool:
        """Whether dense panels are faster than the sparse loops."""
        return len(self.indices) >= _DENSE_FROM * self.n_rows * self.n_columns


@dataclass(frozen=True)
class BlockState:
    """The state of a row block between passes."""

    estimate: Floats  # w, float32, shape (N,); NaN where held out
    left: Floats  # the block's rows of U, where A = U Vᵀ; float32, shape (m, r)
    sketch: Floats  # W Q of the last pass, float32, shape (m, l)


@dataclass(frozen=True)
class Update:
    """A new A, and the multiplier update on the observed entries that follows it."""

    rotation: Floats  # shape (l, r): the new left factor is sketch @ rotation
    ratio: float  # 1 / ρ
    growth: float = 1.0  # by which the estimate grew in iterations where A was zero


@dataclass(frozen=True)
class PassInputs:
    """What a pass sends to every block."""

    right: Floats  # V of A, after the step; float32, shape (n, r)
    basis: Floats | None = None  # Q, float32, shape (n, l); None to take the step only
    overlap: Floats | None = None  # VᵀQ, float32
    step: Update | None = None  # taken before the products
    # make held-out entries observed before the products, with this weight: w = a + weight (d − a); excludes a step
    release: float | None = None


class Sums(NamedTuple):
    """What a pass computes, summed over blocks."""

    sparse_cross: Floats  # Sᵀ W Q, shape (n, l)
    left_cross: Doubles  # Uᵀ W Q, shape (r, l)
    gram: Doubles  # (W Q)ᵀ W Q, shape (l, l)
    misfit: float  # Σ (d − a)² over observed entries, after the step
    held_out: float  # Σ (d − a)² over held-out entries


def visit(block: Block, state: BlockState, inputs: PassInputs, total: Sums | None = None) -> tuple[BlockState, Sums]:
    """Take the step of a pass in one block, then multiply W = U Vᵀ + S with the basis.

    Returns the new state, and the sums added to `total` in place. The block and its state are not changed, so that a
    task can be run again.
    """
    misfit = held_out = 0.0
    if inputs.step is not None:
        state = replace(state, left=state.sketch @ inputs.step.rotation)
    sparse = sampled_product(block, state.left, inputs.right)
    if inputs.release is not None:
        hidden, estimate = np.flatnonzero(np.isnan(state.estimate)), state.estimate.copy()
        estimate[hidden] = sparse[hidden] + np.float32(inputs.release) * (block.observed[hidden] - sparse[hidden])
        state = replace(state, estimate=estimate)
    if inputs.step is not None:
        estimate = np.empty_like(state.estimate)
        growth, ratio = np.float32(inputs.step.growth), np.float32(inputs.step.ratio)
        misfit, held_out = _advance(block.observed, state.estimate, growth, ratio, sparse, estimate)
        state = replace(state, estimate=estimate)
    else:
        _sparse_part(state.estimate, sparse)
    if total is None:
        width = 0 if inputs.basis is None else inputs.basis.shape[1]
        n, rank = inputs.right.shape if width else (0, 0)
        total = Sums(np.zeros((n, width), np.float32), np.zeros((rank, width)), np.zeros((width, width)), 0.0, 0.0)
    total = total._replace(misfit=total.misfit + misfit, held_out=total.held_out + held_out)
    if inputs.basis is None or inputs.overlap is None:
        return state, total
    sketch = state.left @ inputs.overlap
    if block.is_dense:
        cross = total.sparse_cross
        for rows, entries in _panels(block):
            panel = _dense_panel(block, sparse, rows, entries)
            sketch[rows] += panel @ inputs.basis
            cross += panel.T @ sketch[rows]
    else:
        spmm(block.indptr, block.indices, sparse, inputs.basis, sketch)
        spmm_t(block.indptr, block.indices, sparse, sketch, total.sparse_cross)
    wide = sketch.astype(np.float64)
    np.add(total.left_cross, state.left.T.astype(np.float64) @ wide, out=total.left_cross)
    np.add(total.gram, wide.T @ wide, out=total.gram)
    return replace(state, sketch=sketch), total


def sampled_product(block: Block, left: Floats, right: Floats) -> Floats:
    """Return U Vᵀ at the observed entries, float32, shape ``(N,)``."""
    if not block.is_dense:
        return sddmm(block.indptr, block.indices, left, right)
    values = np.empty(len(block.indices), np.float32)
    for rows, entries in _panels(block):
        _pick(left[rows] @ right.T, block.indptr[rows.start : rows.stop + 1], block.indices[entries], values[entries])
    return values


def project(block: Block, left: Floats, sparse: Floats, vectors: Floats) -> tuple[Floats, Doubles]:
    """Return SᵀY and UᵀY, so that WᵀY = SᵀY + V UᵀY, for the block's rows Y of some vectors."""
    cross = np.zeros((block.n_columns, vectors.shape[1]), np.float32)
    spmm_t(block.indptr, block.indices, sparse, vectors, cross)
    return cross, left.T.astype(np.float64) @ vectors


def column_gram(block: Block, state: BlockState, inputs: PassInputs) -> tuple[Doubles, Doubles, Doubles]:
    """Return UᵀU, UᵀS and SᵀS (n × n), float64, which give WᵀW."""
    left, sparse = state.left, sparse_part(block, state, inputs)
    cross = np.zeros((block.n_columns, left.shape[1]), np.float32)
    spmm_t(block.indptr, block.indices, sparse, left, cross)
    gram = np.zeros((block.n_columns, block.n_columns))
    for rows, entries in _panels(block):
        panel = _dense_panel(block, sparse, rows, entries)
        gram += panel.T @ panel
    return left.T.astype(np.float64) @ left, cross.T.astype(np.float64), gram


RowHalf = tuple[Floats, Doubles, Floats]


def row_half(block: Block, state: BlockState, inputs: PassInputs, core: Doubles) -> RowHalf:
    """Return U, P and S, where WWᵀ = P Uᵀ + U Pᵀ + S Sᵀ and P = S V + ½ U VᵀV; `core` is VᵀV.

    U and P have m rows, float32 and float64; S has the observed entries, float32.
    """
    left, sparse = state.left, sparse_part(block, state, inputs)
    sparse_right = np.zeros((block.n_rows, inputs.right.shape[1]), np.float32)
    spmm(block.indptr, block.indices, sparse, inputs.right, sparse_right)
    mixed = left @ (core / 2)
    mixed += sparse_right
    return left, mixed, sparse


def row_gram(blocks: tuple[Block, Block], halves: tuple[RowHalf, RowHalf]) -> Doubles:
    """Return W₁W₂ᵀ of two row blocks, float64, from what `row_half` returned for them."""
    (one, two), ((left_1, mixed_1, sparse_1), (left_2, mixed_2, sparse_2)) = blocks, halves
    gram = mixed_1 @ left_2.T + left_1 @ mixed_2.T
    for rows, entries in _panels(one):
        panel = _dense_panel(one, sparse_1, rows, entries)
        if two.is_dense:
            gram[rows] += panel @ _dense_panel(two, sparse_2, slice(0, two.n_rows), slice(None)).T
        else:
            product = np.zeros((two.n_rows, len(panel)), np.float32)
            spmm(two.indptr, two.indices, sparse_2, np.ascontiguousarray(panel.T), product)
            gram[rows] += product.T
    return gram


def sparse_part(block: Block, state: BlockState, inputs: PassInputs) -> Floats:
    """Return S at the observed entries, float32, where the block's W = U Vᵀ + S."""
    sparse = sampled_product(block, state.left, inputs.right)
    _sparse_part(state.estimate, sparse)
    return sparse


def compare_halves(train: Block, test: Floats, size: Floats, left: Floats) -> tuple[Floats, Doubles, float]:
    """Return sums over the rows of two independent measurements, s and t, of the entries of a block.

    `size` has a number h for each row, and `left` is U, of shape ``(m, l)``. Returns TᵀU, float32, of shape ``(n, l)``;
    Σ st, Σ s², Σ t², Σ hs and Σ ht of each column, float64, of shape ``(5, n)``; and Σ h².
    """
    indices, n, s, t = train.indices, train.n_columns, train.observed, test
    cross = np.zeros((n, left.shape[1]), np.float32)
    spmm_t(train.indptr, indices, test, np.ascontiguousarray(left), cross)
    h = np.repeat(size, np.diff(train.indptr))
    by_column = np.zeros((5, n))
    for total, (one, other) in zip(by_column, ((s, t), (s, s), (t, t), (h, s), (h, t)), strict=True):
        total += np.bincount(indices, np.multiply(one, other, dtype=np.float64), n)
    return cross, by_column, float(np.square(size, dtype=np.float64).sum())


def column_minima(left: Floats, right: Floats) -> Floats:
    """Return the minimum of each column of U Vᵀ, float32, shape ``(n,)``, from one panel of rows at a time."""
    lowest = np.full(len(right), np.inf, np.float32)
    step = max(1, PANEL_VALUES // max(1, len(right)))
    for start in range(0, len(left), step):
        np.minimum(lowest, (left[start : start + step] @ right.T).min(axis=0), out=lowest)
    return lowest


def gram(tall: Floats) -> Doubles:
    """Return TᵀT, float64, of T with shape ``(n, l)``, by panels, so that T is not copied to float64."""
    total = np.zeros((tall.shape[1],) * 2)
    for rows in _tall_panels(tall):
        panel = tall[rows].astype(np.float64)
        total += panel.T @ panel
    return total


def add_product(total: Doubles | Floats, tall: Floats, wide: Doubles) -> None:
    """Add T M to `total`, shape ``(n, k)``, in place."""
    for rows in _tall_panels(tall):
        total[rows] += tall[rows].astype(np.float64) @ wide


def product(tall: Doubles, small: Doubles) -> Floats:
    """Return T M, float32."""
    result = np.empty((len(tall), small.shape[1]), np.float32)
    for rows in _tall_panels(tall):
        result[rows] = tall[rows] @ small
    return result


def _tall_panels(tall: Doubles | Floats) -> Iterator[slice]:
    return (slice(start, start + _TALL_ROWS) for start in range(0, len(tall), _TALL_ROWS))


def _dense_panel(block: Block, sparse: Floats, rows: slice, entries: slice) -> Floats:
    panel = np.zeros((rows.stop - rows.start, block.n_columns), np.float32)
    _place(panel, block.indptr[rows.start : rows.stop + 1], block.indices[entries], sparse[entries])
    return panel


def _panels(block: Block) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of rows that are small when dense, each with the range of its entries."""
    step = max(1, PANEL_VALUES // block.n_columns)
    for start in range(0, block.n_rows, step):
        stop = min(start + step, block.n_rows)
        yield slice(start, stop), slice(int(block.indptr[start]), int(block.indptr[stop]))


@_jit
def _advance(observed, estimate, growth, ratio, a, new):  # type: ignore[no-untyped-def]
    """Set `new` to d + (w − a)/ρ and `a` to the sparse part of W; return Σ (d − a)², observed and held out.

    Held-out entries have no sparse part.
    """
    misfit = held_out = 0.0
    for k in range(len(observed)):
        gap = observed[k] - a[k]
        w = growth * estimate[k]
        if w == w:
            misfit += np.float64(gap) * np.float64(gap)
            w = observed[k] + (w - a[k]) * ratio
            new[k] = w
            a[k] = w - a[k]
        else:
            held_out += np.float64(gap) * np.float64(gap)
            new[k] = w
            a[k] = np.float32(0)
    return misfit, held_out


@_jit
def _sparse_part(estimate, a):  # type: ignore[no-untyped-def]
    for k in range(len(estimate)):
        w = estimate[k]
        a[k] = w - a[k] if w == w else np.float32(0)


@_jit
def _pick(panel, indptr, indices, values):  # type: ignore[no-untyped-def]
    for i in range(len(panel)):
        for k in range(indptr[i] - indptr[0], indptr[i + 1] - indptr[0]):
            values[k] = panel[i, indices[k]]


@_jit
def _place(panel, indptr, indices, values):  # type: ignore[no-untyped-def]
    for i in range(len(panel)):
        for k in range(indptr[i] - indptr[0], indptr[i + 1] - indptr[0]):
            panel[i, indices[k]] = values[k]
