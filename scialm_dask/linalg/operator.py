"""W, low rank plus sparse, over all row blocks. The one numeric file that builds Dask graphs."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import dask
import numpy as np
from dask.delayed import Delayed

from scialm_dask.linalg import kernels, tasks
from scialm_dask.linalg.kernels import Doubles, Floats, PassInputs, ReleaseHeldOut, Sums, Update
from scialm_dask.linalg.tasks import BlockSource, Files, Observations, Records, Store
from scialm_dask.reduction import (
    Group,
    at_home,
    current_client,
    execute,
    moved,
    spread,
    sum_of_groups,
    threads_anywhere,
)


class Product(NamedTuple):
    """What one pass gives: WᵀWQ (n × l) and its Gram (WQ)ᵀWQ (l × l), float64; sums over entries as in `Sums`."""

    cross: Doubles
    gram: Doubles
    misfit: float
    held_out: float


class _Kept(NamedTuple):
    """State without the sketch, V, and the versions of what the state refers to."""

    states: list[Any]
    right: Floats
    versions: dict[str, int]


PANEL_COLUMNS = 256  # of left vectors that are projected at once
_UNUSED = -1  # a version that no pass makes


class LowRankPlusSparse:
    """The matrix whose SVD each iteration takes, never formed: A = U Vᵀ plus what A misses on the observed entries.

    Every method that visits the blocks makes one *pass*: one task for each thread of each worker, which visits its
    blocks in turn and adds up what they give, and a tree over workers. The first pass reads the blocks. Works with
    whatever scheduler Dask has: threads in this process, or a `distributed.Client`.

    Parameters
    ----------
    source
        Hands out the blocks. If it has ``weights``, a number for each block in proportion to its entries, work is
        shared out by those, else by rows; if it has ``part``, tasks get what that returns for the numbers of theirs.
    store
        Keeps the blocks, as they were read once, and their working state.
    on_pass
        Called after each pass with their number so far.
    before_pass
        Called before each pass but the first. If it raises, all is as after the pass before.
    on_read
        Called with the `observations` when a pass has read the blocks.
    placement
        Shares blocks of given weights out among workers; asked before each pass.

    Attributes
    ----------
    shape : tuple of int
        Rows × columns.
    bounds : tuple of int
        First row of each block, and the number of rows.
    passes : int
        How many times the blocks were visited so far.
    """

    def __init__(
        self,
        source: BlockSource,
        store: Store,
        *,
        on_pass: Callable[[int], None] = lambda _: None,
        before_pass: Callable[[], None] = lambda: None,
        on_read: Callable[[Observations], None] = lambda _: None,
        placement: Callable[[Sequence[float]], tuple[Group, ...]] = threads_anywhere,
    ) -> None:
        self.shape = source.shape
        self.bounds = source.bounds
        self.passes, self._on_pass, self._before_pass, self._on_read = 0, on_pass, before_pass, on_read
        self._placement = placement
        self._weights: Sequence[float] = getattr(source, "weights", np.diff(source.bounds).tolist())
        self._groups = placement(self._weights)
        self._store = store
        self._right = np.zeros((self.shape[1], 0), np.float32)
        self._versions: dict[str, int] = dict.fromkeys(("estimate", "left", "sketch"), 0)
        self._best: _Kept | None = None
        self._source: BlockSource | None = source  # until it has been read
        self._blocks: list[Any] = [Records() for _ in self._groups]
        self._states: list[Any] = [Records() for _ in self._groups]
        self._observations: Observations | None = None

    @property
    def observations(self) -> Observations:
        """Of the observed entries, as they were before the first iteration; takes a pass if there was none yet."""
        if self._observations is None:
            self.reduce(tasks.nothing)
            assert self._observations is not None
        return self._observations

    @property
    def size(self) -> float:
        """Number of entries, mn."""
        return float(self.shape[0]) * self.shape[1]

    @property
    def right(self) -> Floats:
        """V, float32, shape ``(n, r)``, of the A in force."""
        return self._right

    @property
    def n_blocks(self) -> int:
        """Number of row blocks."""
        return len(self.bounds) - 1

    def multiply(
        self,
        basis: Floats | None,
        step: Update | None = None,
        right: Floats | None = None,
        give_back: ReleaseHeldOut | None = None,
    ) -> Product:
        """Take a step or give back the held-out entries, if told to, then compute WᵀWQ. One pass.

        Parameters
        ----------
        basis
            Q, shape ``(n, l)``; None to take the step only.
        step, right
            The new A, as its left factor in terms of the last pass's W Q, and its right factor, ``(n, r)``.
        give_back
            Make held-out entries observed ones.
        """
        view = self._view(right)
        overlap = None if basis is None else view.right.T @ basis
        view = replace(view, basis=basis, overlap=overlap, step=step, give_back=give_back)
        changes = {"sketch"} if basis is not None else set()
        changes |= {"estimate", "left"} if step is not None else set()
        changes |= {"estimate"} if give_back is not None else set()
        # A step makes a new left factor of the sketch; without one the old left factor is in force.
        unneeded = ("left",) if step is not None else ("sketch",)
        sums: Sums = self._pass(tasks.visit, view, changes=changes, without=unneeded)
        self._right = view.right
        cross = sums.sparse_cross.astype(np.float64)
        if cross.size:
            kernels.add_product(cross, view.right, sums.left_cross)
        return Product(cross, sums.gram, sums.misfit, sums.held_out)

    def reduce(self, kernel: Callable[..., Any], *arguments: Any) -> Any:
        """Add up what ``kernel(number, block, state, *arguments)`` returns of each block. One pass.

        Parameters
        ----------
        kernel
            A function of a module. Gets the number of the block, a `Block` and a `BlockState`, and returns numbers and
            new arrays, which are added up, dicts, which are joined, or a tuple of these.
        arguments
            Sent to each worker once.
        """
        return self._pass(tasks.reduce, kernel, *arguments)

    def project(self, vectors: Floats) -> Floats:
        """Compute Wᵀ times left vectors, shape ``(m, l)``, which become the sketch: float32, ``(n, l)``. One pass.

        A few vectors at a time, so that what the blocks give back is never all there at once.
        """
        view = self._view()
        parts = self._pass(tasks.take_sketch, view, rows=vectors, changes={"sketch"}, together=False)
        cross = np.empty((self.shape[1], vectors.shape[1]), np.float32)
        for start in range(0, vectors.shape[1], PANEL_COLUMNS):
            some = slice(start, start + PANEL_COLUMNS)
            project, rows = dask.delayed(tasks.project), self._rows(vectors[:, some])
            sums = at_home(self._groups, lambda g: project(self._store, self._blocks[g], parts[g], *rows[g]))  # noqa: B023
            (total,) = execute([sum_of_groups(self._groups, tasks.add, sums)], dask.compute)
            cross[:, some] = total[0]
            kernels.add_product(cross[:, some], view.right, total[1])
        return cross

    def column_gram(self) -> Doubles:
        """WᵀW, shape ``(n, n)``, when columns are the short side. One pass."""
        view = self._view()
        left_gram, cross, sparse_gram = self.reduce(tasks.column_gram, view)
        right = view.right.astype(np.float64)
        gram = right @ cross
        gram += gram.T
        gram += sparse_gram
        kernels.add_product(gram, view.right, left_gram @ right.T)
        return gram  # type: ignore[no-any-return]

    def row_gram(self) -> Doubles:
        """WWᵀ, shape ``(m, m)``, when rows are the short side: a task for each pair of groups. One pass."""
        view = self._view()
        halves = self._pass(tasks.reduce, tasks.row_half, view, kernels.gram(view.right), together=False)
        pair, groups = dask.delayed(tasks.row_gram), range(len(self._groups))
        pairs = [(g, h) for g in groups for h in groups[g:]]
        blocks = self._blocks
        tiles = [pair(self._store, (blocks[g], blocks[h]), (halves[g], halves[h])) for g, h in pairs]
        gram = np.empty((self.shape[0], self.shape[0]))
        for (i, j), tile in tasks.join(*execute(tiles, dask.compute)).items():
            rows, columns = slice(*self.bounds[i : i + 2]), slice(*self.bounds[j : j + 2])
            gram[rows, columns] = tile
            gram[columns, rows] = tile.T
        return gram

    def keep(self) -> None:
        """Remember the A in force, and W, as the best so far; `factors` gives that A back."""
        versions = {name: self._versions[name] for name in ("estimate", "left")}
        states = list(execute([self._where_held(tasks.without_sketch)(states) for states in self._states]))
        forgotten, self._best = self._best, _Kept(states, self._right, versions)
        if forgotten is not None:
            for name, version in forgotten.versions.items():
                if version != versions[name]:
                    self._store.drop(name, version)

    def restore(self) -> None:
        """Put the A last kept in force again, and W with it."""
        if self._best is not None:
            with_kept = self._where_held(tasks.with_kept)
            self._states = list(execute([*map(with_kept, self._states, self._best.states)]))
            self._right = self._best.right
            for name, version in self._best.versions.items():
                if version != self._versions[name]:
                    self._store.drop(name, self._versions[name])
                self._versions[name] = version

    def factors(self) -> tuple[list[Delayed], Floats]:
        """Left factor, a delayed float32 array of shape ``(rows of the block, r)`` for each block, and right factor.

        Those of the A last kept, else of the one in force.
        """
        if self._best is None:
            self.keep()
        assert self._best is not None
        return self._by_block(tasks.get_left, self._best.states), self._best.right

    def sketched(self, rotation: Doubles) -> list[Delayed]:
        """Return the last sketch times `rotation`: for each block a delayed float32 array of its rows. No pass."""
        return self._by_block(tasks.sketched, self._states, dask.delayed(rotation.astype(np.float32), traverse=False))

    def _by_block(self, function: Callable[..., Floats], states: list[Any], *arguments: Any) -> list[Delayed]:
        """Apply a function lazily to the state of each block."""
        apply, made = dask.delayed(function), {}
        for group, held in zip(self._groups, states, strict=True):
            for b in group.blocks:
                made[b] = apply(self._store, tasks.pick(held, (b,)) if self._store.durable else held, b, *arguments)
        return [made[b] for b in range(self.n_blocks)]

    def release(self) -> None:
        """Forget the blocks and all that is known of them."""
        names = {*self._versions.items(), *((name, 0) for name in tasks.BLOCK_ARRAYS)}
        for name, version in names if self._best is None else names | {*self._best.versions.items()}:
            self._store.drop(name, version)

    def save(self, files: Files, *, sketch: bool) -> dict[str, list[Any]]:
        """Write the state, each block from the worker that has it, so that `load` can put it back.

        With the `sketch` of the last pass too, if the next step is made from that. Returns what `files` gave for each
        array, by what the array holds.
        """
        names = ("estimate", "left", "sketch") if sketch else ("estimate", "left")
        apart = self._best if self._best is not None and self._best.versions["left"] != self._versions["left"] else None
        best = [None] * len(self._groups) if apart is None else apart.states
        save = dask.delayed(tasks.save, pure=False)
        parts = at_home(self._groups, lambda g: save(self._store, files, self._states[g], names, best[g]))
        written = tasks.join(*execute(parts, dask.compute))
        saved = {name: [written[b][name] for b in range(self.n_blocks)] for name in written[0]}
        saved["right"] = [files.put("right", 0, self._right)]
        if apart is not None:
            saved["best_right"] = [files.put("best_right", 0, apart.right)]
        return saved

    def load(
        self,
        files: Files,
        saved: Mapping[str, Sequence[Any]],
        passes: int,
        observations: Observations | None = None,
    ) -> None:
        """Put back what `save` wrote to `files`, of this operator or of one over the same blocks, which are read later.

        `passes` and `observations` are as they were then.
        """
        of_all = {name: saved[name][0] for name in ("right", "best_right") if name in saved}
        of_blocks = {name: group for name, group in saved.items() if name not in of_all}
        apart = "best_right" in of_all
        restore = dask.delayed(tasks.restore, pure=False, nout=2)

        def restored(g: int) -> tuple[Delayed, ...]:
            written = Records(
                (b, {name: group[b] for name, group in of_blocks.items()}) for b in self._groups[g].blocks
            )
            return tuple(restore(self._store, files, written, passes, _UNUSED))

        parts = at_home(self._groups, restored)
        held = execute([part for pair in parts for part in pair], dask.compute if self._store.durable else dask.persist)
        for name, version in self._versions.items():
            self._store.drop(name, version)
        self._states, self._right, self.passes = list(held[::2]), files.get(of_all["right"]), passes
        self._versions = dict.fromkeys(self._versions, passes)
        self._observations = observations or self._observations
        best_right = files.get(of_all["best_right"]) if apart else self._right
        versions = dict.fromkeys(("estimate", "left"), _UNUSED if apart else passes)
        self._best = _Kept(list(held[1::2]), best_right, versions)

    @property
    def depends_on_workers(self) -> bool:
        """Whether a block that a worker loses is made again by all the passes since the state was last put back."""
        return not self._store.durable and current_client() is not None

    def _pass(
        self,
        kernel: Callable[..., Any],
        *arguments: Any,
        changes: Collection[str] = (),
        without: Collection[str] = (),
        rows: Floats | None = None,
        together: bool = True,
    ) -> Any:
        """Visit each block once: a task for each group, and a tree over them that adds up what they give.

        Parameters
        ----------
        kernel, arguments, without
            See `tasks.run`.
        changes
            Arrays of the state that the kernel makes anew.
        rows
            The last argument, of which a group gets the rows of its blocks.
        together
            Add up; else what each group gives stays where it is.
        """
        if self.passes:
            self._before_pass()
        self._follow(self._placement(self._weights))
        number, source, run = self.passes + 1, self._source, dask.delayed(tasks.run, pure=False, nout=4)
        shared, own = spread(arguments, self._groups), self._rows(rows)

        def visit(g: int) -> Delayed:
            held, numbers = (self._blocks[g], self._states[g]), self._groups[g].blocks
            part = None if source is None else _shipped(source, numbers)
            return run(self._store, part, numbers, held, number, without, kernel, shared[g], *own[g])

        parts, fresh = at_home(self._groups, visit), source is not None
        blocks, states, total, observed = self._settled(parts, fresh, fresh or bool(changes), together)
        if fresh:
            self._blocks, self._source = blocks, None
        if fresh or changes:
            self._states = states
        self.passes = number
        self._renew(changes, number)
        self._on_pass(number)
        if observed is not None:
            self._observations = observed
            self._on_read(observed)
        return total

    def _settled(self, parts: list[Delayed], fresh: bool, changed: bool, together: bool) -> tuple[Any, ...]:
        """Compute what `tasks.run` returns: blocks and states by groups, their total, and the observations."""
        add_up = functools.partial(sum_of_groups, self._groups, tasks.add)
        if self._store.durable and together:
            # References to a disk come here: a scheduler that held them would make a lost one again from versions that
            # are gone. Else blocks and states stay with the workers.
            ((read, states, total, observed),) = execute([add_up(parts)], dask.compute)
            return self._shares(read), self._shares(states), total, observed
        read, states, totals, seen = (list(column) for column in zip(*map(tuple, parts), strict=True))
        wanted = [add_up(totals)] if together else totals, [add_up(seen)] if fresh else []
        blocks, states, total, seen = execute([read if fresh else [], states if changed else [], *wanted])
        if self._store.durable:
            blocks, states = dask.compute(blocks, states)
        return blocks, states, total[0].compute() if together else total, seen[0].compute() if fresh else None

    def _renew(self, changed: Collection[str], number: int) -> None:
        """Forget what a pass has made anew, unless it is kept."""
        for name in changed:
            if self._best is None or self._best.versions.get(name) != self._versions[name]:
                self._store.drop(name, self._versions[name])
            self._versions[name] = number

    def _view(self, right: Floats | None = None) -> PassInputs:
        """Return what a pass carries, without a basis; `right` is that of a new A."""
        return PassInputs(self._right if right is None else right)

    def _rows(self, rows: Floats | None) -> list[tuple[Records, ...]]:
        """Give the rows of the blocks of each group, by block."""
        if rows is None:
            return [()] * len(self._groups)
        spans = list(pairwise(self.bounds))
        return [(Records((b, rows[slice(*spans[b])]) for b in group.blocks),) for group in self._groups]

    def _follow(self, groups: tuple[Group, ...]) -> None:
        """Take on a new placement: what is held of blocks that move goes with them."""
        if groups == self._groups:
            return
        before, self._groups = self._groups, groups

        def follow(held: list[Any]) -> list[Any]:
            if self._store.durable:
                return self._shares(tasks.join(*held))
            return list(execute(moved(held, before, groups, tasks.pick, tasks.join)))

        self._blocks, self._states = follow(self._blocks), follow(self._states)
        if self._best is not None:
            self._best = self._best._replace(states=follow(self._best.states))

    def _shares(self, records: Records) -> list[Records]:
        return [tasks.pick(records, group.blocks) for group in self._groups]

    def _where_held(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function that moves no data work on what is held of a group."""
        return function if self._store.durable else dask.delayed(function)


def _shipped(source: BlockSource, blocks: tuple[int, ...]) -> Delayed:
    if hasattr(source, "part"):
        source = source.part(blocks)
    return dask.delayed(source, name=f"source-{uuid.uuid4().hex[:12]}", traverse=False)
