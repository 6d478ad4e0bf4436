"""Tasks of workers: each visits the blocks of a group in turn, and adds up what a kernel returns."""
# ruff: noqa: ARG001 (some kernels do not need all arguments)

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from scialm_dask.linalg import kernels
from scialm_dask.linalg.kernels import Block, BlockState, Doubles, Floats, PassInputs, RowHalf, Sums

R = TypeVar("R")
_ADDED_IN_PLACE = 16  # blocks that are summed in one float32 array before it is added to the others, for accuracy


class BlockSource(Protocol):
    """Reads row blocks, in any process."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows × columns."""

    @property
    def bounds(self) -> tuple[int, ...]:
        """First row of each block, and the number of rows."""

    def load(self, block: int) -> Block:
        """Read a block."""

    def held_out(self, block: int, loaded: Block) -> NDArray[np.bool_] | None:
        """Return a mask of the block's held-out entries, or None if there are none."""


class Store(Protocol):
    """Keeps the `Block` and the `BlockState` of each block between passes; see `scialm_dask.data.scratch`."""

    @property
    def durable(self) -> bool:
        """Whether what `put` returns is small and outlives the process that made it."""

    def put(self, record: R, block: int, version: int, old: R | None = None, kept: R | None = None) -> R:
        """Keep a record, and return it with references in place of its arrays.

        Arrays shared with `old` are not written again: their references come from `kept`, which `put` returned for
        `old`. The call can be repeated, even at the same time, so that a task can be run twice.
        """

    def get(self, kept: R, without: Collection[str] = ()) -> R:
        """Return a record from what `put` returned; arrays named in `without` may be empty."""

    def drop(self, name: str, version: int) -> None:
        """Delete a version of an array in all blocks."""


class Files(Protocol):
    """Files of a checkpoint; see `scialm_dask.data.checkpoint`."""

    def put(self, name: str, block: int, array: NDArray[Any]) -> Any:
        """Write an array and return a reference to it."""

    def get(self, file: Any) -> NDArray[Any]:
        """Read an array."""


class Observations(NamedTuple):
    """Counts and norms of the observed entries, before the first iteration."""

    n_observed: int  # entries in Ω
    n_held_out: int  # entries held out of Ω
    sum_squares: float  # ‖D‖² over Ω
    held_out_squares: float  # ‖D‖² over held-out entries
    n_emptied: int  # rows with observed entries that are all held out


BLOCK_ARRAYS = tuple(field.name for field in fields(Block) if field.name != "n_columns")
_NOTHING = np.zeros((0, 0), np.float32)


class Records(dict[Any, Any]):
    """Records of the blocks of a group, by block number. Unlike plain dicts, Dask does not traverse it."""


def run(
    store: Store,
    source: BlockSource | None,
    numbers: tuple[int, ...],
    held: tuple[Records, Records],
    version: int,
    without: Collection[str],
    kernel: Callable[..., tuple[BlockState, Any]],
    arguments: tuple[Any, ...],
    *own: Any,
) -> tuple[Records, Records, Any, Observations | None]:
    """Call ``kernel(number, block, state, total, *arguments, *own)``, which adds to the total, for blocks of a group.

    `source` reads the blocks on their first visit, and is None afterwards; `held` has the blocks, empty on their first
    visit, and their states, as the store returned them. Arrays that the kernel changes get a new `version`; those in
    `without` it does not need. Returns the blocks that were read, all states, the total, and the observations of the
    blocks that were read.
    """
    blocks, states = held
    read, changed, observed, total, recent = Records(), Records(states), None, None, None
    for turn, number in enumerate(numbers, start=1):
        state = None
        if source is None:
            block = store.get(blocks[number])
        else:
            block = source.load(number)
            read[number] = store.put(block, number, 0)
            first, seen = begin(block, source.held_out(number, block))
            observed = add(observed, seen)
            if number in states and len(store.get(states[number], without).estimate) != block.indptr[-1]:
                raise ValueError(f"block {number} is not the block whose state was saved")
            if number not in states:
                state, changed[number] = first, store.put(first, number, 0)
        at = changed[number]
        state = state or store.get(at, without)
        new, recent = kernel(number, block, state, recent, *arguments, *own)
        if new is not state:
            changed[number] = store.put(new, number, version, state, at)
        if turn % _ADDED_IN_PLACE == 0 or turn == len(numbers):
            total, recent = add(total, recent, in_place=True), None
    return read, changed, total, observed


def begin(block: Block, hidden: NDArray[np.bool_] | None) -> tuple[BlockState, Observations]:
    """Return the first state, W = D and A = 0, and the observations of a block with the mask `hidden`."""
    estimate, n_hidden, held_out_squares, n_emptied = block.observed, 0, 0.0, 0
    if hidden is not None:
        estimate = np.where(hidden, np.float32(np.nan), block.observed)
        n_hidden, held_out_squares = int(hidden.sum()), _squares(block.observed[hidden])
        n_left = np.diff(np.concatenate([[0], np.cumsum(~hidden)])[block.indptr])
        n_emptied = int(np.count_nonzero((n_left == 0) & (np.diff(block.indptr) > 0)))
    empty = np.zeros((block.n_rows, 0), np.float32)
    squares = _squares(block.observed) - held_out_squares
    seen = Observations(len(block.observed) - n_hidden, n_hidden, squares, held_out_squares, n_emptied)
    return BlockState(estimate, empty, empty), seen


def _squares(values: Floats) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def add(one: Any, other: Any, *, in_place: bool = False) -> Any:
    """Add numbers or arrays, join dicts, or do so for each item of tuples; None counts as zero.

    With `in_place`, add to the arrays of `one`.
    """
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, dict):
        return type(one)({**one, **other})
    if isinstance(one, tuple):
        sums = [add(*pair, in_place=in_place) for pair in zip(one, other, strict=True)]
        return type(one)(*sums) if hasattr(one, "_fields") else tuple(sums)
    if in_place and isinstance(one, np.ndarray):
        one += other
        return one
    return one + other


def visit(
    number: int, block: Block, state: BlockState, total: Sums | None, inputs: PassInputs
) -> tuple[BlockState, Sums]:
    return kernels.visit(block, state, inputs, total)


def reduce(
    number: int, block: Block, state: BlockState, total: Any, kernel: Callable[..., Any], *arguments: Any
) -> tuple[BlockState, Any]:
    return state, add(total, kernel(number, block, state, *arguments), in_place=True)


def column_gram(number: int, block: Block, state: BlockState, inputs: PassInputs) -> tuple[Doubles, Doubles, Doubles]:
    return kernels.column_gram(block, state, inputs)


def row_half(number: int, block: Block, state: BlockState, inputs: PassInputs, core: Doubles) -> dict[int, RowHalf]:
    return {number: kernels.row_half(block, state, inputs, core)}


def row_gram(
    store: Store, blocks: tuple[Records, Records], halves: tuple[dict[int, RowHalf], dict[int, RowHalf]]
) -> dict[tuple[int, int], Doubles]:
    """Return W₁W₂ᵀ of each pair of blocks of two groups, or of each pair within one group, once."""
    tiles = {}
    same = halves[0].keys() == halves[1].keys()
    for i, one in halves[0].items():
        block = store.get(blocks[0][i])
        for j, other in halves[1].items():
            if not same or i <= j:
                tiles[i, j] = kernels.row_gram((block, store.get(blocks[1][j])), (one, other))
    return tiles


def take_sketch(
    number: int, block: Block, state: BlockState, total: Any, inputs: PassInputs, vectors: Mapping[int, Floats]
) -> tuple[BlockState, dict[int, tuple[Floats, Floats]]]:
    parts = {number: (state.left, kernels.sparse_part(block, state, inputs))}
    return replace(state, sketch=vectors[number]), add(total, parts)


def project(store: Store, blocks: Records, parts: Mapping[int, Any], vectors: Mapping[int, Floats]) -> Any:
    total = None
    for number, (left, sparse) in parts.items():
        part = kernels.project(store.get(blocks[number]), left, sparse, vectors[number])
        total = add(total, part, in_place=True)
    return total


def pick(held: Records, numbers: Collection[int]) -> Records:
    return Records((number, held[number]) for number in numbers if number in held)


def join(*parts: Mapping[Any, Any]) -> Records:
    return Records(item for part in parts for item in part.items())


def without_sketch(states: Records) -> Records:
    return Records((number, replace(state, sketch=_NOTHING)) for number, state in states.items())


def with_kept(states: Records, kept: Records) -> Records:
    return Records((number, replace(kept[number], sketch=state.sketch)) for number, state in states.items())


def left_of(store: Store, states: Records, number: int, rotation: Floats | None) -> Floats:
    """Return the left factor of a block, or its sketch times `rotation`."""
    state: BlockState = store.get(states[number], ("estimate", "sketch" if rotation is None else "left"))
    return state.left if rotation is None else state.sketch @ rotation


def save(
    store: Store, files: Files, states: Records, names: tuple[str, ...], best: Records | None
) -> dict[int, dict[str, Any]]:
    """Write arrays of the states; return references, by block number and then by array."""
    saved = {}
    for number, at in states.items():
        state = store.get(at)
        arrays = {name: getattr(state, name) for name in names}
        if best is not None:
            kept = store.get(best[number], ("sketch",))
            arrays |= {"best_estimate": kept.estimate, "best_left": kept.left}
        saved[number] = {name: files.put(name, number, array) for name, array in arrays.items()}
    return saved


def restore(
    store: Store, files: Files, saved: Mapping[int, Mapping[str, Any]], version: int, of_best: int
) -> tuple[Records, Records]:
    """Return the states that `save` wrote, and the best states."""
    states, best = Records(), Records()
    for number, written in saved.items():
        left = files.get(written["left"])
        sketch = files.get(written["sketch"]) if "sketch" in written else np.zeros((len(left), 0), np.float32)
        states[number] = store.put(BlockState(files.get(written["estimate"]), left, sketch), number, version)
        best[number] = replace(states[number], sketch=_NOTHING)
        if "best_left" in written:
            kept = BlockState(files.get(written["best_estimate"]), files.get(written["best_left"]), _NOTHING)
            best[number] = store.put(kept, number, of_best)
    return states, best
