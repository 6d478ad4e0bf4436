"""W, low rank plus sparse, over all row blocks. The one numeric file that builds Dask graphs."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import dask
import numpy as np
from dask.base import get_scheduler
from dask.delayed import Delayed
from threadpoolctl import threadpool_limits

from scialm_dask.linalg import tall, tasks
from scialm_dask.linalg.kernels import Doubles, Floats, PassInputs, ReleaseHeldOut, Sums, Update, add_sums
from scialm_dask.linalg.tasks import BlockSource, Files, SplitSource, Store

__all__ = ["LowRankPlusSparse", "Observations", "Product"]


class Observations(NamedTuple):
    """What is known of the observed entries before the first iteration.

    Number of entries in Ω and of those that are held out of it; ‖D‖² over either; number of rows that had observed
    entries and of which all are held out.
    """

    n_observed: int
    n_held_out: int
    sum_squares: float
    held_out_squares: float
    n_emptied: int


class Product(NamedTuple):
    """What one pass gives: WᵀWQ (n × l) and its Gram (WQ)ᵀWQ (l × l), float64; sums over entries as in `Sums`."""

    cross: Doubles
    gram: Doubles
    misfit: float
    held_out: float


class _Kept(NamedTuple):
    """State without the sketch, V, and the versions of what the state refers to."""

    state: tuple[Any, ...]
    right: Floats
    versions: dict[str, int]


PANEL_COLUMNS = 256  # of left vectors that are projected at once
_UNUSED = 1  # a version that no pass makes


class LowRankPlusSparse:
    """The matrix whose SVD each iteration takes, never formed: A = U Vᵀ plus what A misses on the observed entries.

    Every method that reads the blocks makes one *pass*: one task for each block, and a tree that adds up what they
    give back. Works with whatever scheduler Dask has: threads in this process, or a `distributed.Client`.

    Parameters
    ----------
    source
        Hands out the blocks.
    store
        Keeps the blocks, as they were read once, and their working state.
    on_pass
        Called after each pass with their number so far.
    before_pass
        Called before each pass but the first. If it raises, all is as after the pass before.
    homes
        Tells for each block the worker that is to visit it, None for any; asked before each pass.

    Attributes
    ----------
    shape : tuple of int
        Rows × columns.
    bounds : tuple of int
        First row of each block, and the number of rows.
    observations : Observations
        Of the observed entries.
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
        homes: Callable[[int], Sequence[str | None]] = lambda n_blocks: (None,) * n_blocks,
    ) -> None:
        self.shape = source.shape
        self.bounds = source.bounds
        self.passes, self._on_pass, self._before_pass = 0, on_pass, before_pass
        self._homes = homes
        self._home = homes(self.n_blocks)
        self._id = uuid.uuid4().hex[:12]
        self._store = store
        self._confidence = source.column_confidence
        self._row_confidence = source.has_row_confidence
        self._right = np.zeros((self.shape[1], 0), np.float32)
        self._versions: dict[str, int] = dict.fromkeys(("estimate", "left", "sketch"), 0)
        self._best: _Kept | None = None
        source_task = dask.delayed(source, name=f"source-{self._id}", traverse=False)
        hold, begin = dask.delayed(tasks.hold, pure=False), dask.delayed(tasks.begin, pure=False, nout=2)
        self._blocks = self._hold(self._at_home(lambda b: hold(self._store, source_task, b)))
        parts = self._at_home(lambda b: tuple(begin(self._store, source_task, b, self._blocks[b])))
        total = self._sum([counted for _, counted in parts], tasks.add)
        self._state, counted = self._settle([refs for refs, _ in parts], total)
        self.observations = Observations(*counted)
        self._count_pass()

    @property
    def size(self) -> float:
        """Number of entries, mn."""
        return float(self.shape[0]) * self.shape[1]

    @property
    def zeros_unknown(self) -> bool:
        """Whether entries that are not observed are free."""
        return self._confidence is None

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
        changed = {"sketch"} if basis is not None else set()
        if step is not None:
            changed |= {"estimate", "left"}
        if give_back is not None:
            changed |= {"estimate"}
        view = self._view(right)
        overlap = None if basis is None else view.spread.T @ basis
        view = replace(view, basis=basis, overlap=overlap, step=step, give_back=give_back)
        return self._pass(view, changed)

    def project(self, vectors: Floats) -> Floats:
        """Compute Wᵀ times left vectors, shape ``(m, l)``, which become the sketch: float32, ``(n, l)``. One pass.

        A few vectors at a time, so that what the blocks give back is never all there at once.
        """
        view, number = self._view(), self.passes + 1
        carried = self._carry(view)
        rows = [vectors[a:b] for a, b in pairwise(self.bounds)]
        prepare = dask.delayed(tasks.take_sketch, pure=False, nout=2)
        begun = self._at_home(
            lambda b: tuple(prepare(self._store, b, self._blocks[b], self._state[b], carried, number, rows[b]))
        )
        held = _run([part for pair in begun for part in pair])
        self._state, parts = self._hold(list(held[::2])), held[1::2]
        cross = np.empty((self.shape[1], vectors.shape[1]), np.float32)
        for start in range(0, vectors.shape[1], PANEL_COLUMNS):
            some = slice(start, start + PANEL_COLUMNS)
            cross[:, some], left_cross = self._project_some(parts, vectors[:, some])
            tall.add_product(cross[:, some], view.spread, left_cross)
        self._count_pass()
        self._renew({"sketch"}, number)
        return cross

    def _project_some(self, parts: Sequence[Delayed], vectors: Floats) -> tuple[Floats, Doubles]:
        project = dask.delayed(tasks.project)
        rows = [vectors[a:b] for a, b in pairwise(self.bounds)]
        sums = self._at_home(lambda b: project(self._store, self._blocks[b], parts[b], rows[b]))
        (total,) = _run([self._sum(sums, tasks.add)])
        return total.compute()  # type: ignore[no-any-return]

    def column_gram(self) -> Doubles:
        """WᵀW, shape ``(n, n)``, when columns are the short side. One pass."""
        view = self._view()
        carried, visit = self._carry(view), dask.delayed(tasks.column_gram)
        parts = self._at_home(lambda b: visit(self._store, self._blocks[b], self._state[b], carried))
        (total,) = _run([self._sum(parts, tasks.add)])
        self._count_pass()
        left_gram, cross, sparse_gram = total.compute()
        right = view.spread.astype(np.float64)
        gram = right @ cross
        gram += gram.T
        gram += sparse_gram
        tall.add_product(gram, view.spread, left_gram @ right.T)
        return gram  # type: ignore[no-any-return]

    def row_gram(self) -> Doubles:
        """WWᵀ, shape ``(m, m)``, when rows are the short side: a task for each pair of blocks. One pass."""
        view = self._view()
        carried, core = self._carry(view), dask.delayed(tall.gram(view.spread), traverse=False)
        prepare, pair = dask.delayed(tasks.row_half), dask.delayed(tasks.row_gram)
        halves = self._at_home(lambda b: prepare(self._store, self._blocks[b], self._state[b], carried, core))
        corners = [(i, j) for i in self._each() for j in range(i, self.n_blocks)]
        tiles = _run([pair(self._store, self._blocks[i], self._blocks[j], halves[i], halves[j]) for i, j in corners])
        self._count_pass()
        gram = np.empty((self.shape[0], self.shape[0]))
        for (i, j), tile in zip(corners, dask.compute(*tiles), strict=True):
            rows, columns = slice(*self.bounds[i : i + 2]), slice(*self.bounds[j : j + 2])
            gram[rows, columns] = tile
            gram[columns, rows] = tile.T
        return gram

    def quadratic(
        self, other: BlockSource | None = None, columns: Floats | None = None
    ) -> tuple[Doubles, Doubles, float]:
        """Give g and H, shapes ``(r,)`` and ``(r, r)``, and s = ‖D‖² of the fit of A diag-scaled by c.

        It minimises cᵀHc − 2gᵀc + s = Σ_Ω (d − a)² + Σ_rest ω a², with A = U diag(c) Vᵀ in force. One pass.

        Parameters
        ----------
        other
            Take d, Ω and ω of these blocks instead, cut as these are.
        columns
            Multiply the columns of A by these numbers first, shape ``(n,)``.
        """
        right, source = self._right, None
        if columns is not None:
            right = columns[:, None] * right
        view = replace(self._view(), right=right)
        if other is not None:
            source = dask.delayed(other, name=f"source-{uuid.uuid4().hex[:12]}", traverse=False)
            view = replace(view, confidence=other.column_confidence)
        carried, visit = self._carry(view), dask.delayed(tasks.quadratic)
        parts = self._at_home(lambda b: visit(self._store, source, b, self._blocks[b], self._state[b], carried))
        (total,) = _run([self._sum(parts, tasks.add)])
        self._count_pass()
        linear, square, rows, squares = total.compute()
        if view.confidence is not None:
            square = square + rows * (right.T.astype(np.float64) @ (view.confidence[:, None] * right))
        return linear, square, squares

    def compare_halves(self, source: SplitSource, to_left: Doubles) -> tuple[Floats, Doubles, float]:
        """Sum up what the two halves of each block tell of each other; see `kernels.compare_halves`. One pass.

        Parameters
        ----------
        source
            Hands out the halves of the blocks, cut as these are.
        to_left
            U in terms of the last sketch, as in `PartialSVD`.
        """
        self._begin_pass()
        split = dask.delayed(source, name=f"source-{uuid.uuid4().hex[:12]}", traverse=False)
        rotation, compare = dask.delayed(to_left.astype(np.float32), traverse=False), dask.delayed(tasks.compare_halves)
        parts = self._at_home(lambda b: compare(self._store, split, b, self._state[b], rotation))
        (total,) = _run([self._sum(parts, tasks.add)])
        self._count_pass()
        return total.compute()  # type: ignore[no-any-return]

    def sketched(self, rotation: Doubles) -> list[Delayed]:
        """Return the last sketch times `rotation`: for each block a delayed float32 array of its rows. No pass."""
        carried, rotate = dask.delayed(rotation.astype(np.float32), traverse=False), dask.delayed(tasks.sketched)
        return [rotate(self._store, at, carried) for at in self._state]

    def keep(self) -> None:
        """Remember the A in force, and W, as the best so far; `factors` gives that A back."""
        versions = {name: self._versions[name] for name in ("estimate", "left")}
        forgotten, self._best = self._best, _Kept(self._pick(tasks.without_sketch, self._state), self._right, versions)
        if forgotten is not None:
            for name, version in forgotten.versions.items():
                if version != versions[name]:
                    self._store.drop(name, version)

    def restore(self) -> None:
        """Put the A last kept in force again, and W with it."""
        if self._best is not None:
            self._state = self._pick(tasks.with_kept, self._state, self._best.state)
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
        get = dask.delayed(tasks.get_left)
        return [get(self._store, kept) for kept in self._best.state], self._best.right

    def release(self) -> None:
        """Forget the blocks and all that is known of them."""
        names = {*self._versions.items(), *((name, 0) for name in tasks.BLOCK_ARRAYS)}
        for name, version in names if self._best is None else names | {*self._best.versions.items()}:
            self._store.drop(name, version)

    def save(self, files: Files, *, sketch: bool) -> dict[str, list[Any]]:
        """Write the state, each block from the worker that has it, so that `load` can put it back.

        Parameters
        ----------
        files
            Where to.
        sketch
            Write the sketch of the last pass too, from which the next step is made.

        Returns
        -------
        dict
            What `files` gave for each array, by what the array holds.
        """
        names = ("estimate", "left", "sketch") if sketch else ("estimate", "left")
        apart = self._best if self._best is not None and self._best.versions["left"] != self._versions["left"] else None
        best = (None,) * self.n_blocks if apart is None else apart.state
        save = dask.delayed(tasks.save, pure=False)
        parts = _run(self._at_home(lambda b: save(self._store, files, b, self._state[b], names, best[b])), dask.compute)
        saved = {name: [part[name] for part in parts] for name in parts[0]}
        saved["right"] = [files.put("right", 0, self._right)]
        if apart is not None:
            saved["best_right"] = [files.put("best_right", 0, apart.right)]
        return saved

    def load(self, files: Files, saved: Mapping[str, Sequence[Any]], passes: int) -> None:
        """Put back what `save` wrote, of this operator or of one over the same blocks.

        Parameters
        ----------
        files
            Where from.
        saved
            What `save` returned.
        passes
            Their number then.
        """
        of_all = {name: saved[name][0] for name in ("right", "best_right") if name in saved}
        apart = "best_right" in of_all
        restore = dask.delayed(tasks.restore, pure=False, nout=2)
        parts = []
        for b in self._each():
            of_block = {name: group[b] for name, group in saved.items() if name not in of_all}
            parts.append(restore(self._store, files, b, of_block, passes, _UNUSED))
        held = self._hold([part for pair in parts for part in pair])
        for name, version in self._versions.items():
            self._store.drop(name, version)
        self._state, self._right, self.passes = held[::2], files.get(of_all["right"]), passes
        self._versions = dict.fromkeys(self._versions, passes)
        best_right = files.get(of_all["best_right"]) if apart else self._right
        self._best = _Kept(held[1::2], best_right, dict.fromkeys(("estimate", "left"), _UNUSED if apart else passes))

    @property
    def depends_on_workers(self) -> bool:
        """Whether a block that a worker loses is made again by all the passes since the state was last put back."""
        return not self._store.durable and _on_cluster()

    def _pass(self, view: PassInputs, changed: set[str]) -> Product:
        """Visit each block once and add up the sums that it gives beside its new state."""
        number = self.passes + 1
        carried = self._carry(view)
        visit = dask.delayed(tasks.visit, pure=False, nout=2)
        parts = self._at_home(lambda b: tuple(visit(self._store, b, self._blocks[b], self._state[b], carried, number)))
        total = self._sum([sums for _, sums in parts], add_sums)
        sums: Sums
        state, sums = self._settle([state for state, _ in parts], total)
        self._state, self._right = state, view.right
        self._count_pass()
        self._renew(changed, number)
        cross = sums.sparse_cross.astype(np.float64)
        if cross.size:
            tall.add_product(cross, view.spread, sums.left_cross)
        return Product(cross, sums.gram, sums.misfit, sums.held_out)

    def _renew(self, changed: set[str], number: int) -> None:
        """Forget what a pass has made anew, unless it is kept."""
        for name in changed:
            if self._best is None or self._best.versions.get(name) != self._versions[name]:
                self._store.drop(name, self._versions[name])
            self._versions[name] = number

    def _count_pass(self) -> None:
        self.passes += 1
        self._on_pass(self.passes)

    def _settle(self, states: list[Delayed], total: Delayed) -> tuple[tuple[Any, ...], Any]:
        """Compute the new states of the blocks and what they add up to.

        Where states are but references to a disk they come here: a scheduler that held them would make a lost one
        again from versions that are gone. Else they stay with the workers.
        """
        *settled, total = self._hold([*states, total])
        return tuple(settled), total if self._store.durable else total.compute()

    def _hold(self, values: list[Delayed]) -> tuple[Any, ...]:
        return _run(values, dask.compute if self._store.durable else dask.persist)

    def _pick(self, function: Callable[..., Any], *columns: tuple[Any, ...]) -> tuple[Any, ...]:
        """Apply a function that moves no data to what is held of each block."""
        if self._store.durable:
            return tuple(map(function, *columns))
        pick = dask.delayed(function)
        return _run([pick(*parts) for parts in zip(*columns, strict=True)])

    def _view(self, right: Floats | None = None) -> PassInputs:
        """Make what a pass carries, without a basis; `right` is that of a new A."""
        right, beta = self._right if right is None else right, self._confidence
        if beta is None:
            return PassInputs(right, right)
        if self._row_confidence:
            return PassInputs(right, np.hstack([right, -beta[:, None] * right]), beta)
        return PassInputs(right, (1 - beta)[:, None] * right, beta)

    def _carry(self, view: PassInputs) -> Delayed:
        """Begin a pass: wrap what every task of it needs as one task, which is sent to each worker once."""
        self._begin_pass()
        return dask.delayed(view, name=f"view-{self._id}-{uuid.uuid4().hex[:8]}", traverse=False)

    def _begin_pass(self) -> None:
        self._before_pass()
        self._home = self._homes(self.n_blocks)

    def _at_home(self, make: Callable[[int], Any]) -> list[Any]:
        """Make a task for each block, to run where the block is at home."""
        made = []
        for block, home in enumerate(self._home):
            with _at(home):
                made.append(make(block))
        return made

    def _sum(self, parts: list[Delayed], add: Callable[..., Any]) -> Delayed:
        """Add up what blocks give: at each home what is there, then what homes have."""
        of_homes: dict[str | None, list[Delayed]] = {}
        for home, part in zip(self._home, parts, strict=True):
            of_homes.setdefault(home, []).append(part)
        sums = []
        for home, group in of_homes.items():
            with _at(home):
                sums.append(_tree(group, dask.delayed(add)))
        return _tree(sums, dask.delayed(add))

    def _each(self) -> range:
        return range(self.n_blocks)


def _run(values: list[Any], how: Callable[..., Any] = dask.persist) -> tuple[Any, ...]:
    """Compute and hold on the scheduler in force, where threads of this process leave BLAS one thread each."""
    # A view of some megabytes goes to the workers with every pass: that is meant, and no cause for a warning. Without
    # distributed there are none; were it imported while its configuration is changed, its defaults would go with that.
    large = {"distributed.admin.large-graph-warning-threshold": "1GB"} if "distributed" in sys.modules else {}
    with threadpool_limits(1, user_api="blas"), dask.config.set(large):
        return how(*values)  # type: ignore[no-any-return]


@contextmanager
def _at(home: str | None) -> Iterator[None]:
    """Tasks made meanwhile go to this worker, or elsewhere if it is no more."""
    if home is None:
        yield
    else:
        with dask.annotate(workers=[home], allow_other_workers=True):
            yield


def _on_cluster() -> bool:
    """Whether tasks run in other processes, which may die."""
    return hasattr(getattr(get_scheduler(), "__self__", None), "persist")


def _tree(parts: list[Delayed], add: Any) -> Delayed:
    """Add up, neighbours first, in a fixed order."""
    while len(parts) > 1:
        pairs = [add(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]
