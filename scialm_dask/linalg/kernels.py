"""Functions of one row block: NumPy, SciPy and numba. No Dask, no Zarr; the interpreter lock is released.

Notation, for a block of ``m`` rows: ``d``, ``w`` and ``a`` are the observed values, their estimates and the low-rank
matrix A restricted to the observed entries, vectors in the order of the block's CSR pattern. An estimate of NaN
marks an entry that is held out: it is scored, and otherwise treated as unknown.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "BlockState", "Step", "Sums", "View", "add_sums", "sampled_product", "visit"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Everything that lets loops be vectorised but "no NaN": NaN is what marks the held-out entries.
_jit = numba.njit(nogil=True, cache=True, boundscheck=False, fastmath={"reassoc", "contract", "arcp", "nsz"})

_DENSE_FROM = 0.25  # density from which BLAS on dense panels beats the sparse loops
_PANEL_VALUES = 4_000_000  # of a dense panel: 16 MB


@dataclass(frozen=True)
class Block:
    """What stays the same about a row block.

    Parameters
    ----------
    indptr, indices
        CSR pattern of the observed entries; shapes ``(m + 1,)`` and ``(N,)``.
    observed
        Their values d, float32, shape ``(N,)``.
    n_columns
        Number of columns (n).
    """

    indptr: NDArray[np.integer]
    indices: NDArray[np.int32]
    observed: Floats
    n_columns: int

    @property
    def n_rows(self) -> int:
        """Number of rows (m)."""
        return len(self.indptr) - 1

    @property
    def is_dense(self) -> bool:
        """Whether dense panels are the faster way."""
        return len(self.indices) >= _DENSE_FROM * self.n_rows * self.n_columns


@dataclass(frozen=True)
class BlockState:
    """What changes about a row block.

    Parameters
    ----------
    estimate
        w, float32, shape ``(N,)``; NaN where held out.
    left
        The block's rows of the left factor U of A = U Vᵀ, float32, shape ``(m, r)``.
    sketch
        W Q of the last pass, float32, shape ``(m, l)``.
    """

    estimate: Floats
    left: Floats
    sketch: Floats


@dataclass(frozen=True)
class Step:
    """The next A, and how far the estimate follows it: the multiplier update on the observed entries.

    Parameters
    ----------
    rotation
        Shape ``(l, r)``: the left factor of the new A is ``sketch @ rotation``.
    ratio
        1 / ρ, the ratio of one penalty to the next.
    growth
        The factor by which the estimate grew in the iterations whose A was zero.
    """

    rotation: Floats
    ratio: float
    growth: float = 1.0


@dataclass(frozen=True)
class View:
    """What a pass carries to every block.

    Parameters
    ----------
    right
        V, float32, shape ``(n, r)``, of the A that is in force in this pass (after `step`).
    basis
        Q, float32, shape ``(n, l)``, or None when only the step is to be taken.
    overlap
        VᵀQ, float32, shape ``(r, l)``, or None.
    step
        Taken before the products, or None.
    """

    right: Floats
    basis: Floats | None = None
    overlap: Floats | None = None
    step: Step | None = None


class Sums(NamedTuple):
    """What blocks give back, to be added up.

    ``sparse_cross`` is Sᵀ W Q (n × l), ``left_cross`` Uᵀ W Q (r × l), ``gram`` (W Q)ᵀ W Q (l × l); then sums over the
    entries, after the step: (d − a)² over the observed ones, (d − a)² over the held-out ones.
    """

    sparse_cross: Floats
    left_cross: Doubles
    gram: Doubles
    misfit: float
    held_out: float


def add_sums(one: Sums, other: Sums) -> Sums:
    """Add what two blocks gave back."""
    return Sums(*map(operator.add, one, other))


def visit(block: Block, state: BlockState, view: View) -> tuple[BlockState, Sums]:
    """Do all that a pass asks of one block: take the step, then multiply W = A + P_Ω(w − a) with the basis.

    Returns the new state and the sums. Neither argument is changed, so that a task can be run again.
    """
    misfit = held_out = 0.0
    if view.step is not None:
        state = replace(state, left=state.sketch @ view.step.rotation)
    sparse = sampled_product(block, state.left, view.right)
    if view.step is not None:
        estimate = np.empty_like(state.estimate)
        growth, ratio = np.float32(view.step.growth), np.float32(view.step.ratio)
        misfit, held_out = _advance(block.observed, state.estimate, growth, ratio, sparse, estimate)
        state = replace(state, estimate=estimate)
    else:
        _sparse_part(state.estimate, sparse)
    if view.basis is None or view.overlap is None:
        return state, Sums(np.zeros((0, 0), np.float32), np.zeros((0, 0)), np.zeros((0, 0)), misfit, held_out)
    sketch = state.left @ view.overlap
    cross = np.zeros_like(view.basis)
    if block.is_dense:
        _dense_products(block, sparse, view.basis, sketch, cross)
    else:
        _gather(block.indptr, block.indices, sparse, view.basis, sketch)
        _scatter(block.indptr, block.indices, sparse, sketch, cross)
    wide = sketch.astype(np.float64)
    sums = Sums(cross, state.left.T.astype(np.float64) @ wide, wide.T @ wide, misfit, held_out)
    return replace(state, sketch=sketch), sums


def sampled_product(block: Block, left: Floats, right: Floats) -> Floats:
    """(U Vᵀ) at the observed entries, float32, shape ``(N,)``."""
    values = np.empty(len(block.indices), np.float32)
    if left.shape[1] == 0:
        values[:] = 0
    elif block.is_dense:
        for rows, entries in _panels(block):
            values[entries] = (left[rows] @ right.T)[_row_of(block, rows), block.indices[entries]]
    else:
        _sampled(block.indptr, block.indices, left, right, values)
    return values


def project(block: Block, state: BlockState, right: Floats) -> Sums:
    """Compute what Wᵀ Y needs of the block, for given rows Y of orthonormal left vectors in ``state.sketch``."""
    sparse = _sparse(block, state, right)
    cross = np.zeros((block.n_columns, state.sketch.shape[1]), np.float32)
    _scatter(block.indptr, block.indices, sparse, state.sketch, cross)
    wide = state.sketch.astype(np.float64)
    return Sums(cross, state.left.T.astype(np.float64) @ wide, wide.T @ wide, 0.0, 0.0)


def column_gram(block: Block, state: BlockState, right: Floats) -> tuple[Doubles, Doubles, Doubles]:
    """UᵀU (r × r), UᵀS (r × n) and SᵀS (n × n), float64, of which WᵀW is made."""
    sparse = _sparse(block, state, right)
    left_gram = state.left.T.astype(np.float64) @ state.left
    cross = np.zeros((block.n_columns, state.left.shape[1]), np.float32)
    _scatter(block.indptr, block.indices, sparse, state.left, cross)
    gram = np.zeros((block.n_columns, block.n_columns))
    for rows, entries in _panels(block):
        panel = _dense_panel(block, sparse, rows, entries)
        gram += panel.T @ panel
    return left_gram, cross.T.astype(np.float64), gram


class RowHalf(NamedTuple):
    """What a row block brings to WWᵀ: U (m × r), S V (m × r), and the values of S at the observed entries."""

    left: Floats
    sparse_right: Floats
    sparse: Floats


def row_half(block: Block, state: BlockState, right: Floats) -> RowHalf:
    """Prepare a block for `row_gram`."""
    sparse = _sparse(block, state, right)
    sparse_right = np.zeros((block.n_rows, right.shape[1]), np.float32)
    _gather(block.indptr, block.indices, sparse, right, sparse_right)
    return RowHalf(state.left, sparse_right, sparse)


def row_gram(blocks: tuple[Block, Block], halves: tuple[RowHalf, RowHalf], core: Doubles) -> Doubles:
    """W₁W₂ᵀ of two row blocks, float64; `core` is VᵀV (r × r)."""
    left, other = (half.left.astype(np.float64) for half in halves)
    gram = (left @ core + halves[0].sparse_right) @ other.T
    gram += left @ halves[1].sparse_right.T.astype(np.float64)
    one, two = (
        _dense_panel(block, half.sparse, slice(0, block.n_rows), slice(0, len(half.sparse)))
        for block, half in zip(blocks, halves, strict=True)
    )
    gram += one @ two.T
    return gram


def _sparse(block: Block, state: BlockState, right: Floats) -> Floats:
    """Give the sparse part of W: w − a at the observed entries."""
    sparse = sampled_product(block, state.left, right)
    _sparse_part(state.estimate, sparse)
    return sparse


def _dense_panel(block: Block, sparse: Floats, rows: slice, entries: slice) -> Floats:
    panel = np.zeros((rows.stop - rows.start, block.n_columns), np.float32)
    panel[_row_of(block, rows), block.indices[entries]] = sparse[entries]
    return panel


def _row_of(block: Block, rows: slice) -> NDArray[np.intp]:
    return np.repeat(np.arange(rows.stop - rows.start), np.diff(block.indptr[rows.start : rows.stop + 1]))


def _panels(block: Block) -> Iterator[tuple[slice, slice]]:
    """Row ranges whose dense form is small, with the range of their entries."""
    step = max(1, _PANEL_VALUES // block.n_columns)
    for start in range(0, block.n_rows, step):
        stop = min(start + step, block.n_rows)
        yield slice(start, stop), slice(int(block.indptr[start]), int(block.indptr[stop]))


def _dense_products(block: Block, sparse: Floats, basis: Floats, sketch: Floats, cross: Floats) -> None:
    for rows, entries in _panels(block):
        panel = _dense_panel(block, sparse, rows, entries)
        sketch[rows] += panel @ basis
        cross += panel.T @ sketch[rows]


@_jit
def _sampled(indptr, indices, left, right, values):  # type: ignore[no-untyped-def]
    rank = left.shape[1]
    for i in range(len(indptr) - 1):
        u = left[i]
        k, end = indptr[i], indptr[i + 1]
        while k + 2 <= end:  # two at a time: u is loaded once for both
            v0, v1 = right[indices[k]], right[indices[k + 1]]
            a0, a1 = np.float32(0), np.float32(0)
            for t in range(rank):
                a0 += u[t] * v0[t]
                a1 += u[t] * v1[t]
            values[k], values[k + 1] = a0, a1
            k += 2
        if k < end:
            v0 = right[indices[k]]
            a0 = np.float32(0)
            for t in range(rank):
                a0 += u[t] * v0[t]
            values[k] = a0


@_jit
def _advance(observed, estimate, growth, ratio, a, new):  # type: ignore[no-untyped-def]
    """Take w ← d + (w − a)/ρ; `a` becomes the sparse part w − a. Returns the sums of (d − a)²."""
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
            a[k] = 0
    return misfit, held_out


@_jit
def _sparse_part(estimate, a):  # type: ignore[no-untyped-def]
    for k in range(len(estimate)):
        w = estimate[k]
        a[k] = w - a[k] if w == w else np.float32(0)


@_jit
def _gather(indptr, indices, sparse, basis, sketch):  # type: ignore[no-untyped-def]
    """Add S Q to the sketch."""
    width = basis.shape[1]
    for i in range(len(indptr) - 1):
        y = sketch[i]
        k, end = indptr[i], indptr[i + 1]
        while k + 4 <= end:  # four at a time: y is loaded and stored once for all
            q0, q1, q2, q3 = basis[indices[k]], basis[indices[k + 1]], basis[indices[k + 2]], basis[indices[k + 3]]
            s0, s1, s2, s3 = sparse[k], sparse[k + 1], sparse[k + 2], sparse[k + 3]
            for t in range(width):
                y[t] += s0 * q0[t] + s1 * q1[t] + s2 * q2[t] + s3 * q3[t]
            k += 4
        while k < end:
            q0, s0 = basis[indices[k]], sparse[k]
            for t in range(width):
                y[t] += s0 * q0[t]
            k += 1


@_jit
def _scatter(indptr, indices, sparse, sketch, cross):  # type: ignore[no-untyped-def]
    """Add Sᵀ (W Q) to the cross product."""
    width = sketch.shape[1]
    for i in range(len(indptr) - 1):
        y = sketch[i]
        for k in range(indptr[i], indptr[i + 1]):
            z, s = cross[indices[k]], sparse[k]
            for t in range(width):
                z[t] += s * y[t]
