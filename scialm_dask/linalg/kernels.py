"""Functions of one row block: NumPy, SciPy and numba. No Dask, no Zarr; the interpreter lock is released.

Notation, for a block of ``m`` rows: ``d``, ``w`` and ``a`` are the observed values, their estimates and the low-rank
matrix A restricted to the observed entries, vectors in the order of the block's CSR pattern. An estimate of NaN
marks an entry that is held out: it is scored, and otherwise treated as unknown.
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

# Everything that lets loops be vectorised but "no NaN": NaN is what marks the held-out entries.
_jit = compiled(boundscheck=False, fastmath={"reassoc", "contract", "arcp", "nsz"})

_DENSE_FROM = 0.5  # density from which BLAS on dense panels beats the sparse loops, with 128 columns and more clearly
PANEL_VALUES = 4_000_000  # of a dense panel: 16 MB
_TALL_ROWS = 1024  # of a panel of a tall matrix


@dataclass(frozen=True)
class Block:
    """What stays the same about a row block.

    Parameters
    ----------
    indptr, indices
        CSR pattern of the observed entries, columns ascending; shapes ``(m + 1,)`` and ``(N,)``.
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
class Halves:
    """Two independent measurements of a row block, on one CSR pattern.

    Parameters
    ----------
    indptr, indices
        CSR pattern, shapes ``(m + 1,)`` and ``(N,)``.
    train, test
        Values of either, float32, shape ``(N,)``; zeros among them.
    size
        h, one number for each row that both are predicted to grow with, float32, shape ``(m,)``.
    n_columns
        Number of columns (n).
    """

    indptr: NDArray[np.integer]
    indices: NDArray[np.int32]
    train: Floats
    test: Floats
    size: Floats
    n_columns: int


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
class Update:
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
class ReleaseHeldOut:
    """How held-out entries become observed ones: with the estimate they would have, had A always been as it is.

    The multiplier update then makes w = a + (1 + t + … + tᵏ)(d − a), with t = 1/ρ.

    Parameters
    ----------
    ratio
        1 / ρ.
    steps
        k, how often the estimate was updated so far.
    """

    ratio: float
    steps: int


@dataclass(frozen=True)
class PassInputs:
    """What a pass carries to every block.

    Parameters
    ----------
    right
        V, float32, shape ``(n, r)``, of the A that is in force in this pass (after `step`).
    basis
        Q, float32, shape ``(n, l)``, or None when only the step is to be taken.
    overlap
        VᵀQ, float32, or None.
    step
        Taken before the products, or None.
    give_back
        Done before the products, or None; goes without a step.
    """

    right: Floats
    basis: Floats | None = None
    overlap: Floats | None = None
    step: Update | None = None
    give_back: ReleaseHeldOut | None = None


class Sums(NamedTuple):
    """What the blocks of a group give back, added up.

    ``sparse_cross`` is Sᵀ W Q (n × l), ``left_cross`` Uᵀ W Q, ``gram`` (W Q)ᵀ W Q (l × l); then sums over the
    entries, after the step: (d − a)² over the observed ones, (d − a)² over the held-out ones.
    """

    sparse_cross: Floats
    left_cross: Doubles
    gram: Doubles
    misfit: float
    held_out: float


def visit(block: Block, state: BlockState, view: PassInputs, total: Sums | None = None) -> tuple[BlockState, Sums]:
    """Do all that a pass asks of one block: take the step, then multiply W = U Vᵀ + S with the basis.

    Returns the new state and the sums, added to those of the blocks before in `total`, whose arrays are used for it.
    The block and its state are not changed, so that a task can be run again.
    """
    misfit = held_out = 0.0
    if view.step is not None:
        state = replace(state, left=state.sketch @ view.step.rotation)
    sparse = sampled_product(block, state.left, view.right)
    if view.give_back is not None:
        state = replace(state, estimate=_given_back(block.observed, state.estimate, sparse, view.give_back))
    if view.step is not None:
        estimate = np.empty_like(state.estimate)
        growth, ratio = np.float32(view.step.growth), np.float32(view.step.ratio)
        misfit, held_out = _advance(block.observed, state.estimate, growth, ratio, sparse, estimate)
        state = replace(state, estimate=estimate)
    else:
        _sparse_part(state.estimate, sparse)
    total = total or _no_sums(view)
    total = total._replace(misfit=total.misfit + misfit, held_out=total.held_out + held_out)
    if view.basis is None or view.overlap is None:
        return state, total
    sketch = state.left @ view.overlap
    if block.is_dense:
        _dense_products(block, sparse, view.basis, sketch, total.sparse_cross)
    else:
        spmm(block.indptr, block.indices, sparse, view.basis, sketch)
        spmm_t(block.indptr, block.indices, sparse, sketch, total.sparse_cross)
    wide = sketch.astype(np.float64)
    np.add(total.left_cross, state.left.T.astype(np.float64) @ wide, out=total.left_cross)
    np.add(total.gram, wide.T @ wide, out=total.gram)
    return replace(state, sketch=sketch), total


def _no_sums(view: PassInputs) -> Sums:
    width = 0 if view.basis is None else view.basis.shape[1]
    n, rank = view.right.shape if width else (0, 0)
    return Sums(np.zeros((n, width), np.float32), np.zeros((rank, width)), np.zeros((width, width)), 0.0, 0.0)


def sampled_product(block: Block, left: Floats, right: Floats) -> Floats:
    """(U Vᵀ) at the observed entries, float32, shape ``(N,)``."""
    if not block.is_dense:
        return sddmm(block.indptr, block.indices, left, right)
    values = np.empty(len(block.indices), np.float32)
    for rows, entries in _panels(block):
        _pick(left[rows] @ right.T, block.indptr[rows.start : rows.stop + 1], block.indices[entries], values[entries])
    return values


def _given_back(observed: Floats, estimate: Floats, a: Floats, how: ReleaseHeldOut) -> Floats:
    hidden = np.flatnonzero(np.isnan(estimate))
    weight = np.float32(sum(how.ratio**k for k in range(how.steps + 1)))
    estimate = estimate.copy()
    estimate[hidden] = a[hidden] + weight * (observed[hidden] - a[hidden])
    return estimate


def project(block: Block, left: Floats, sparse: Floats, vectors: Floats) -> tuple[Floats, Doubles]:
    """Compute SᵀY and UᵀY, of which WᵀY is made, for the block's rows Y of some vectors."""
    cross = np.zeros((block.n_columns, vectors.shape[1]), np.float32)
    spmm_t(block.indptr, block.indices, sparse, vectors, cross)
    return cross, left.T.astype(np.float64) @ vectors


def column_gram(block: Block, state: BlockState, view: PassInputs) -> tuple[Doubles, Doubles, Doubles]:
    """Return UᵀU, UᵀS and SᵀS (n × n), float64, of which WᵀW is made."""
    left, sparse = state.left, sparse_part(block, state, view)
    cross = np.zeros((block.n_columns, left.shape[1]), np.float32)
    spmm_t(block.indptr, block.indices, sparse, left, cross)
    gram = np.zeros((block.n_columns, block.n_columns))
    for rows, entries in _panels(block):
        panel = _dense_panel(block, sparse, rows, entries)
        gram += panel.T @ panel
    return left.T.astype(np.float64) @ left, cross.T.astype(np.float64), gram


class RowHalf(NamedTuple):
    """What a row block brings to WWᵀ = P Uᵀ + U Pᵀ + S Sᵀ, where P = S V + ½ U VᵀV.

    U and P, float32 and float64 with m rows, and S at the observed entries, float32.
    """

    left: Floats
    mixed: Doubles
    sparse: Floats


def row_half(block: Block, state: BlockState, view: PassInputs, core: Doubles) -> RowHalf:
    """Prepare a block for `row_gram`; `core` is VᵀV."""
    left, sparse = state.left, sparse_part(block, state, view)
    sparse_right = np.zeros((block.n_rows, view.right.shape[1]), np.float32)
    spmm(block.indptr, block.indices, sparse, view.right, sparse_right)
    mixed = left @ (core / 2)
    mixed += sparse_right
    return RowHalf(left, mixed, sparse)


def row_gram(blocks: tuple[Block, Block], halves: tuple[RowHalf, RowHalf]) -> Doubles:
    """W₁W₂ᵀ of two row blocks, float64."""
    gram = halves[0].mixed @ halves[1].left.T + halves[0].left @ halves[1].mixed.T
    for rows, entries in _panels(blocks[0]):
        panel = _dense_panel(blocks[0], halves[0].sparse, rows, entries)
        if blocks[1].is_dense:
            other = _dense_panel(blocks[1], halves[1].sparse, slice(0, blocks[1].n_rows), slice(None))
            gram[rows] += panel @ other.T
        else:
            product = np.zeros((blocks[1].n_rows, len(panel)), np.float32)
            spmm(blocks[1].indptr, blocks[1].indices, halves[1].sparse, np.ascontiguousarray(panel.T), product)
            gram[rows] += product.T
    return gram


def sparse_part(block: Block, state: BlockState, view: PassInputs) -> Floats:
    """Return S at the observed entries, where this block's W = U Vᵀ + S."""
    sparse = sampled_product(block, state.left, view.right)
    _sparse_part(state.estimate, sparse)
    return sparse


def compare_halves(halves: Halves, left: Floats) -> tuple[Floats, Doubles, float]:
    """Sum up what one half of a block tells of the other, where `left` is U, shape ``(m, l)``.

    Returns
    -------
    tuple
        UᵀT, as float32 of shape ``(n, l)``; for each column Σ st, Σ s², Σ t², Σ hs and Σ ht over the rows, float64 of
        shape ``(5, n)``, with s and t the entries of train and test; Σ h².
    """
    cross = np.zeros((halves.n_columns, left.shape[1]), np.float32)
    spmm_t(halves.indptr, halves.indices, halves.test, np.ascontiguousarray(left), cross)
    s, t, h = halves.train, halves.test, np.repeat(halves.size, np.diff(halves.indptr))
    by_column = np.zeros((5, halves.n_columns))
    for total, (one, other) in zip(by_column, ((s, t), (s, s), (t, t), (h, s), (h, t)), strict=True):
        total += np.bincount(halves.indices, np.multiply(one, other, dtype=np.float64), halves.n_columns)
    return cross, by_column, float(np.square(halves.size, dtype=np.float64).sum())


def gram(tall: Floats) -> Doubles:
    """Return TᵀT, float64, of T with shape ``(n, l)``; by panels, as the next two, to make no float64 copy of T."""
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
    """Return T M in float32."""
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
    """Row ranges whose dense form is small, with the range of their entries."""
    step = max(1, PANEL_VALUES // block.n_columns)
    for start in range(0, block.n_rows, step):
        stop = min(start + step, block.n_rows)
        yield slice(start, stop), slice(int(block.indptr[start]), int(block.indptr[stop]))


def _dense_products(block: Block, sparse: Floats, basis: Floats, sketch: Floats, cross: Floats) -> None:
    for rows, entries in _panels(block):
        panel = _dense_panel(block, sparse, rows, entries)
        sketch[rows] += panel @ basis
        cross += panel.T @ sketch[rows]


@_jit
def _advance(observed, estimate, growth, ratio, a, new):  # type: ignore[no-untyped-def]
    """Take w ← d + (w − a)/ρ; `a` becomes the sparse part of W. Returns the sums of (d − a)².

    An entry that is held out belongs to A alone.
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
