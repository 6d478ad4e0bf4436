"""The operator W, low rank plus sparse, over all row blocks. The one file in linalg that builds Dask graphs."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import dask
import numpy as np
from dask.delayed import Delayed

from scialm_dask.linalg import kernels, tasks
from scialm_dask.linalg.kernels import Doubles, Floats, PassInputs, Sums, Update
from scialm_dask.linalg.tasks import BlockSource, Files, Observations, Records, Store
from scialm_dask.reduction import (
    Group,
    at,
    at_home,
    current_client,
    execute,
    spread,
    sum_of_groups,
    threads_anywhere,
)

PANEL_COLUMNS = 256  # left vectors that are projected at a time
_UNUSED = -1  # a version that no pass makes


class Product(NamedTuple):
    """The result of a pass."""

    cross: Doubles  # WᵀWQ, float64, shape (n, l)
    gram: Doubles  # (WQ)ᵀWQ, float64, shape (l, l)
    misfit: float = 0.0  # as in `Sums`
    held_out: float = 0.0


class _Kept(NamedTuple):
    """The best A so far, and the W that goes with it."""

    states: list[Any]  # of each group, without the sketch
    right: Floats
    versions: dict[str, int]


class LowRankPlusSparse:
    """W = U Vᵀ + S, the matrix of which each iteration takes the SVD: A = U Vᵀ plus a sparse correction, never formed.

    Every method that visits the blocks makes one *pass*: one task for each thread of each worker visits its blocks in
    turn and adds up results, and a tree adds up those of the tasks. The first pass reads the blocks. Runs on whichever
    scheduler Dask uses: threads of this process, or a `distributed.Client`.

    Parameters
    ----------
    source
        Reads the blocks. Its attribute ``weights``, if it has one, balances work, one number for each block; otherwise
        rows do. Its method ``part``, if it has one, returns the source to send to a task, given block numbers.
    store
        Keeps the blocks and their state between passes.
    on_pass
        Called after each pass with the number of passes so far.
    before_pass
        Called before each pass except the first. If it raises, the operator stays as the last pass left it.
    on_read
        Called with the `observations` after the pass that reads the blocks.
    placement
        Assigns blocks of given weights to workers; called before each pass.

    Attributes
    ----------
    shape : tuple of int
        Rows × columns.
    bounds : tuple of int
        First row of each block, and the number of rows.
    passes : int
        Number of passes so far.
    right : ndarray of shape (n, r), float32
        V.
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
        self.right = np.zeros((self.shape[1], 0), np.float32)
        self._versions: dict[str, int] = dict.fromkeys(("estimate", "left", "sketch"), 0)
        self._best: _Kept | None = None
        self._source: BlockSource | None = source  # until it has been read
        self._blocks: list[Any] = [Records() for _ in self._groups]
        self._states: list[Any] = [Records() for _ in self._groups]
        self._observations: Observations | None = None

    @property
    def observations(self) -> Observations:
        """Counts and norms of the observed entries; makes a pass if there was none yet."""
        if self._observations is None:
            self.reduce(lambda *_: None)
        assert self._observations is not None
        return self._observations

    @property
    def size(self) -> float:
        """Number of entries, mn."""
        return float(self.shape[0]) * self.shape[1]

    def multiply(
        self,
        basis: Floats | None,
        step: Update | None = None,
        right: Floats | None = None,
        release: float | None = None,
    ) -> Product:
        """Take a step, or make held-out entries observed, then compute WᵀWQ. One pass.

        The basis is Q, of shape ``(n, l)``; None for a step only. `step` and `right`, of shape ``(n, r)``, make the new
        A. `release` is the weight of d − a in the estimates of entries that were held out.
        """
        right = self.right if right is None else right
        inputs = PassInputs(right, basis, None if basis is None else right.T @ basis, step, release)
        changes = {"sketch"} if basis is not None else set()
        changes |= {"estimate", "left"} if step is not None else set()
        changes |= {"estimate"} if release is not None else set()
        # A step computes the left factor from the sketch; without a step the left factor is needed instead.
        unneeded = ("left",) if step is not None else ("sketch",)
        sums: Sums = self._pass(tasks.visit, inputs, changes=changes, without=unneeded)
        self.right = right
        cross = sums.sparse_cross.astype(np.float64)
        if cross.size:
            kernels.add_product(cross, right, sums.left_cross)
        return Product(cross, sums.gram, sums.misfit, sums.held_out)

    def reduce(self, kernel: Callable[..., Any], *arguments: Any) -> Any:
        """Sum ``kernel(number, block, state, *arguments)`` over the blocks. One pass.

        The kernel takes the number of a block, a `Block` and a `BlockState`, and returns numbers or new arrays, which
        are added up, dicts, which are joined, or a tuple of these.
        """
        return self._pass(tasks.reduce, kernel, *arguments)

    def project(self, vectors: Floats) -> Floats:
        """Return Wᵀ times left vectors, shape ``(m, l)``, which become the sketch: float32, ``(n, l)``. One pass.

        Works on some vectors at a time, to limit memory.
        """
        parts = self._pass(tasks.take_sketch, PassInputs(self.right), rows=vectors, changes={"sketch"}, together=False)
        cross = np.empty((self.shape[1], vectors.shape[1]), np.float32)
        for start in range(0, vectors.shape[1], PANEL_COLUMNS):
            some = slice(start, start + PANEL_COLUMNS)
            project, rows = dask.delayed(tasks.project), self._rows(vectors[:, some])
            sums = at_home(self._groups, lambda g: project(self._store, self._blocks[g], parts[g], *rows[g]))  # noqa: B023
            (total,) = execute([sum_of_groups(self._groups, tasks.add, sums)], dask.compute)
            cross[:, some] = total[0]
            kernels.add_product(cross[:, some], self.right, total[1])
        return cross

    def column_gram(self) -> Doubles:
        """Return WᵀW, float64, shape ``(n, n)``, for matrices with fewer columns than rows. One pass."""
        left_gram, cross, sparse_gram = self.reduce(tasks.column_gram, PassInputs(self.right))
        right = self.right.astype(np.float64)
        gram = right @ cross
        gram += gram.T
        gram += sparse_gram
        kernels.add_product(gram, self.right, left_gram @ right.T)
        return gram  # type: ignore[no-any-return]

    def row_gram(self) -> Doubles:
        """Return WWᵀ, float64, shape ``(m, m)``, from a task for each pair of groups. One pass."""
        core = kernels.gram(self.right)
        halves = self._pass(tasks.reduce, tasks.row_half, PassInputs(self.right), core, together=False)
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
        """Keep the present A and W as the best so far."""
        versions = {name: self._versions[name] for name in ("estimate", "left")}
        states = list(execute([self._where_held(tasks.without_sketch)(states) for states in self._states]))
        forgotten, self._best = self._best, _Kept(states, self.right, versions)
        if forgotten is not None:
            for name, version in forgotten.versions.items():
                if version != versions[name]:
                    self._store.drop(name, version)

    def restore(self) -> None:
        """Go back to the A and W last kept."""
        if self._best is not None:
            with_kept = self._where_held(tasks.with_kept)
            self._states = list(execute([*map(with_kept, self._states, self._best.states)]))
            self.right = self._best.right
            self._renew(self._best.versions)

    def factors(self) -> tuple[list[Delayed], Floats]:
        """Return U and V of the A last kept, or else of the present A.

        U is a list with a delayed float32 array of shape ``(rows of the block, r)`` for each block.
        """
        if self._best is None:
            self.keep()
        assert self._best is not None
        return self._by_block(self._best.states, None), self._best.right

    def sketched(self, rotation: Doubles) -> list[Delayed]:
        """Return the last sketch times `rotation`, a delayed float32 array for each block. No pass."""
        return self._by_block(self._states, dask.delayed(rotation.astype(np.float32), traverse=False))

    def _by_block(self, states: list[Any], rotation: Delayed | None) -> list[Delayed]:
        apply, made = dask.delayed(tasks.left_of), {}
        for group, held in zip(self._groups, states, strict=True):
            for b in group.blocks:
                made[b] = apply(self._store, tasks.pick(held, (b,)) if self._store.durable else held, b, rotation)
        return [made[b] for b in sorted(made)]

    def release(self) -> None:
        """Delete the blocks and their state."""
        best = {} if self._best is None else self._best.versions
        for versions in (self._versions, best, dict.fromkeys(tasks.BLOCK_ARRAYS, 0)):
            for name, version in versions.items():
                self._store.drop(name, version)

    def save(self, files: Files, *, sketch: bool) -> dict[str, list[Any]]:
        """Write the state to files, each block from the worker that holds it, for `load`.

        With `sketch`, write the sketch too, for when the next step is made from it. Returns the references that `files`
        gave, by array and then by block.
        """
        names = ("estimate", "left", "sketch") if sketch else ("estimate", "left")
        apart = self._best if self._best is not None and self._best.versions["left"] != self._versions["left"] else None
        best = [None] * len(self._groups) if apart is None else apart.states
        save = dask.delayed(tasks.save, pure=False)
        parts = at_home(self._groups, lambda g: save(self._store, files, self._states[g], names, best[g]))
        written = tasks.join(*execute(parts, dask.compute))
        saved = {name: [written[b][name] for b in sorted(written)] for name in written[0]}
        saved["right"] = [files.put("right", 0, self.right)]
        if apart is not None:
            saved["best_right"] = [files.put("best_right", 0, apart.right)]
        return saved

    def load(
        self, files: Files, saved: Mapping[str, Sequence[Any]], passes: int, observations: Observations | None = None
    ) -> None:
        """Load a state that `save` wrote, from this operator or another over the same blocks.

        `passes` and `observations` are the values at that time.
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
        self._states, self.right, self.passes = list(held[::2]), files.get(of_all["right"]), passes
        self._renew(dict.fromkeys(self._versions, passes))
        self._observations = observations or self._observations
        best_right = files.get(of_all["best_right"]) if apart else self.right
        versions = dict.fromkeys(("estimate", "left"), _UNUSED if apart else passes)
        self._best = _Kept(list(held[1::2]), best_right, versions)

    @property
    def depends_on_workers(self) -> bool:
        """Whether a lost worker's state would be computed again by all passes since the state was last loaded."""
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
        """Visit each block once: `tasks.run` for each group, and a tree that adds up their totals.

        `changes` names the arrays of the state that the kernel changes; of `rows`, its last argument, a group gets the
        rows of its blocks. Without `together`, return a delayed total for each group.
        """
        if self.passes:
            self._before_pass()
        self._follow(self._placement(self._weights))
        number, source, run = self.passes + 1, self._source, dask.delayed(tasks.run, pure=False, nout=4)
        shared, own = spread(arguments, self._groups), self._rows(rows)

        def visit(g: int) -> Delayed:
            held, numbers, part = (self._blocks[g], self._states[g]), self._groups[g].blocks, None
            if source is not None:  # under a name of its own, so that Dask does not hash it
                some = source.part(numbers) if hasattr(source, "part") else source
                part = dask.delayed(some, name=f"source-{uuid.uuid4().hex[:12]}", traverse=False)
            return run(self._store, part, numbers, held, number, without, kernel, shared[g], *own[g])

        parts, fresh = at_home(self._groups, visit), source is not None
        blocks, states, total, observed = self._settled(parts, fresh, fresh or bool(changes), together)
        if fresh:
            self._blocks, self._source = blocks, None
        if fresh or changes:
            self._states = states
        self.passes = number
        self._renew(dict.fromkeys(changes, number))
        self._on_pass(number)
        if observed is not None:
            self._observations = observed
            self._on_read(observed)
        return total

    def _settled(self, parts: list[Delayed], fresh: bool, changed: bool, together: bool) -> tuple[Any, ...]:
        """Compute the results of `tasks.run`: blocks and states by group, the total, and the observations."""
        add_up = functools.partial(sum_of_groups, self._groups, tasks.add)
        if self._store.durable and together:
            # References to a disk are kept here: a scheduler that held them would recompute a lost one from versions
            # that are gone. In memory, blocks and states stay with the workers.
            ((read, states, total, observed),) = execute([add_up(parts)], dask.compute)
            return self._shares(read), self._shares(states), total, observed
        read, states, totals, seen = (list(column) for column in zip(*map(tuple, parts), strict=True))
        wanted = [add_up(totals)] if together else totals, [add_up(seen)] if fresh else []
        blocks, states, total, seen = execute([read if fresh else [], states if changed else [], *wanted])
        if self._store.durable:
            blocks, states = dask.compute(blocks, states)
        return blocks, states, total[0].compute() if together else total, seen[0].compute() if fresh else None

    def _renew(self, versions: Mapping[str, int]) -> None:
        """Replace versions of arrays, and delete those that are not kept as the best."""
        best = {} if self._best is None else self._best.versions
        for name, version in versions.items():
            if self._versions[name] not in (version, best.get(name)):
                self._store.drop(name, self._versions[name])
            self._versions[name] = version

    def _rows(self, rows: Floats | None) -> list[tuple[Records, ...]]:
        """Return for each group a tuple of its part of `rows`, by block; empty tuples for None."""
        if rows is None:
            return [()] * len(self._groups)
        spans = list(pairwise(self.bounds))
        return [(Records((b, rows[slice(*spans[b])]) for b in group.blocks),) for group in self._groups]

    def _follow(self, groups: tuple[Group, ...]) -> None:
        """Move blocks and their state to a new placement."""
        if groups == self._groups:
            return
        before, self._groups = self._groups, groups

        def follow(held: list[Any]) -> list[Any]:
            if self._store.durable:
                return self._shares(tasks.join(*held))
            whole = {group.blocks: part for group, part in zip(before, held, strict=True)}
            pick, join = dask.delayed(tasks.pick), dask.delayed(tasks.join)

            def collected(g: int) -> Any:
                if groups[g].blocks in whole:
                    return whole[groups[g].blocks]
                pieces = []
                for group, part in zip(before, held, strict=True):
                    if common := set(groups[g].blocks).intersection(group.blocks):
                        with at(group.home):
                            pieces.append(pick(part, common))
                return join(*pieces)

            return list(execute(at_home(groups, collected)))

        self._blocks, self._states = follow(self._blocks), follow(self._states)
        if self._best is not None:
            self._best = self._best._replace(states=follow(self._best.states))

    def _shares(self, records: Records) -> list[Records]:
        return [tasks.pick(records, group.blocks) for group in self._groups]

    def _where_held(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function run where its arguments are held."""
        return function if self._store.durable else dask.delayed(function)
