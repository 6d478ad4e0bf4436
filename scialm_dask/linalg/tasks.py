"""What the workers run: each task loads what it needs of a block, calls a kernel, and stores what has changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scialm_dask.linalg import kernels
from scialm_dask.linalg.kernels import Block, BlockState, Doubles, Floats, Halves, PassInputs, RowHalf, Sums

__all__ = ["BlockSource", "Files", "References", "SplitSource", "Store"]


class BlockSource(Protocol):
    """Hands out row blocks, in whichever process asks."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows × columns."""
        ...

    @property
    def bounds(self) -> tuple[int, ...]:
        """First row of each block, and the number of rows."""
        ...

    def load(self, block: int) -> Block:
        """Read a block."""
        ...

    @property
    def column_confidence(self) -> Floats | None:
        """β, where zeros are trusted with ω = αβᵀ (α in the blocks); None where they are unknown."""
        ...

    @property
    def has_row_confidence(self) -> bool:
        """Whether blocks carry α, rather than ones."""
        ...

    def held_out(self, block: int, loaded: Block) -> NDArray[np.bool_] | None:
        """Tell which of the block's observed entries are held out; None for none."""
        ...


class SplitSource(Protocol):
    """Hands out row blocks measured twice."""

    def halves(self, block: int) -> Halves:
        """Read a block."""
        ...


class Store(Protocol):
    """Keeps arrays by name, version and block between passes; see `scialm_dask.data.scratch`."""

    @property
    def durable(self) -> bool:
        """Whether what `put` returns is small and outlives the process that made it."""
        ...

    def put(self, name: str, version: int, block: int, array: NDArray[Any]) -> Any:
        """Keep an array; what is returned is all that travels between tasks.

        The same call again does no harm, so that a task can be run twice, even at once.
        """
        ...

    def get(self, reference: Any) -> NDArray[Any]:
        """Give back what `put` kept."""
        ...

    def drop(self, name: str, version: int) -> None:
        """Forget a version in all blocks."""
        ...


class Files(Protocol):
    """Keeps arrays for good; see `scialm_dask.data.checkpoint`."""

    def put(self, name: str, block: int, array: NDArray[Any]) -> Any:
        """Write an array and return what to refer to it by."""
        ...

    def get(self, file: Any) -> NDArray[Any]:
        """Read an array."""
        ...


ARRAYS = ("estimate", "left", "sketch")


@dataclass(frozen=True)
class References:
    """Where the arrays of a `BlockState` are."""

    estimate: Any
    left: Any
    sketch: Any


@dataclass(frozen=True)
class HeldBlock:
    """Where the arrays of a `Block` are."""

    indptr: Any
    indices: Any
    observed: Any
    confidence: Any
    n_columns: int


BLOCK_ARRAYS = ("indptr", "indices", "observed", "confidence")


def hold(store: Store, source: BlockSource, block: int) -> HeldBlock:
    data = source.load(block)
    arrays = {name: getattr(data, name) for name in BLOCK_ARRAYS}
    held = {name: None if array is None else store.put(name, 0, block, array) for name, array in arrays.items()}
    return HeldBlock(**held, n_columns=data.n_columns)


def _block(store: Store, held: HeldBlock) -> Block:
    confidence = None if held.confidence is None else store.get(held.confidence)
    return Block(store.get(held.indptr), store.get(held.indices), store.get(held.observed), held.n_columns, confidence)


def begin(store: Store, source: BlockSource, block: int, held: HeldBlock) -> tuple[References, tuple[float, ...]]:
    data = _block(store, held)
    hidden = source.held_out(block, data)
    estimate, n_hidden, held_out_squares, n_emptied = data.observed, 0, 0.0, 0
    if hidden is not None:
        estimate = np.where(hidden, np.float32(np.nan), data.observed)
        n_hidden, held_out_squares = int(hidden.sum()), _squares(data.observed[hidden])
        n_left = np.diff(np.concatenate([[0], np.cumsum(~hidden)])[data.indptr])
        n_emptied = int(np.count_nonzero((n_left == 0) & (np.diff(data.indptr) > 0)))
    empty = np.zeros((data.n_rows, 0), np.float32)
    refs = References(*(store.put(n, 0, block, a) for n, a in zip(ARRAYS, (estimate, empty, empty), strict=True)))
    squares = _squares(data.observed) - held_out_squares
    return refs, (len(data.observed) - n_hidden, n_hidden, squares, held_out_squares, n_emptied)


def _squares(values: Floats) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def visit(
    store: Store,
    block: int,
    held: HeldBlock,
    at: References,
    view: PassInputs,
    number: int,
) -> tuple[References, Sums]:
    # A step makes a new left factor of the sketch; without one the old left factor is in force and the sketch is not.
    unneeded = np.zeros((0, 0), np.float32)
    left, sketch = (unneeded, store.get(at.sketch)) if view.step else (store.get(at.left), unneeded)
    state = BlockState(store.get(at.estimate), left, sketch)
    new, sums = kernels.visit(_block(store, held), state, view)
    return _put_changes(store, block, number, at, state, new), sums


def take_sketch(
    store: Store, block: int, held: HeldBlock, at: References, view: PassInputs, number: int, vectors: Floats
) -> tuple[References, tuple[Floats, Floats]]:
    state = BlockState(store.get(at.estimate), store.get(at.left), vectors)
    parts = kernels.left_and_sparse(_block(store, held), state, view)
    return replace(at, sketch=store.put("sketch", number, block, vectors)), parts


def project(store: Store, held: HeldBlock, parts: tuple[Floats, Floats], vectors: Floats) -> tuple[Floats, Doubles]:
    return kernels.project(_block(store, held), *parts, vectors)


def column_gram(store: Store, held: HeldBlock, at: References, view: PassInputs) -> tuple[Doubles, Doubles, Doubles]:
    state = BlockState(store.get(at.estimate), store.get(at.left), np.zeros((0, 0), np.float32))
    return kernels.column_gram(_block(store, held), state, view)


def row_half(store: Store, held: HeldBlock, at: References, view: PassInputs, core: Doubles) -> RowHalf:
    state = BlockState(store.get(at.estimate), store.get(at.left), np.zeros((0, 0), np.float32))
    return kernels.row_half(_block(store, held), state, view, core)


def row_gram(store: Store, one: HeldBlock, other: HeldBlock, half: RowHalf, other_half: RowHalf) -> Doubles:
    return kernels.row_gram((_block(store, one), _block(store, other)), (half, other_half))


def quadratic(
    store: Store, other: BlockSource | None, block: int, held: HeldBlock, at: References, view: PassInputs
) -> tuple[Doubles, Doubles, Doubles, float]:
    data = _block(store, held) if other is None else other.load(block)
    return kernels.quadratic(data, store.get(at.left), view)


def compare_halves(
    store: Store, source: SplitSource, block: int, at: References, to_left: Floats
) -> tuple[Floats, Doubles, float]:
    return kernels.compare_halves(source.halves(block), sketched(store, at, to_left))


def sketched(store: Store, at: References, rotation: Floats) -> Floats:
    return store.get(at.sketch) @ rotation


def _put_changes(store: Store, block: int, number: int, at: References, old: BlockState, new: BlockState) -> References:
    changed = {name: getattr(new, name) for name in ARRAYS if getattr(new, name) is not getattr(old, name)}
    return replace(at, **{name: store.put(name, number, block, array) for name, array in changed.items()})


def save(
    store: Store, files: Files, block: int, at: References, names: tuple[str, ...], best: References | None
) -> dict[str, Any]:
    kept = {name: getattr(at, name) for name in names}
    if best is not None:
        kept |= {"best_estimate": best.estimate, "best_left": best.left}
    return {name: files.put(name, block, store.get(reference)) for name, reference in kept.items()}


def restore(
    store: Store, files: Files, block: int, saved: dict[str, Any], version: int, of_best: int
) -> tuple[References, References]:
    def keep(name: str, file: str, version: int) -> Any:
        return store.put(name, version, block, files.get(saved[file]))

    left = files.get(saved["left"])
    sketch = files.get(saved["sketch"]) if "sketch" in saved else np.zeros((len(left), 0), np.float32)
    at = References(
        keep("estimate", "estimate", version),
        store.put("left", version, block, left),
        store.put("sketch", version, block, sketch),
    )
    if "best_left" not in saved:
        return at, without_sketch(at)
    return at, References(keep("estimate", "best_estimate", of_best), keep("left", "best_left", of_best), None)


def without_sketch(at: References) -> References:
    return replace(at, sketch=None)


def with_kept(at: References, kept: References) -> References:
    return replace(kept, sketch=at.sketch)


def get_left(store: Store, at: References) -> Floats:
    return store.get(at.left)


def add(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))
