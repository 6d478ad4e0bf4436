"""W, low rank plus sparse, over all row blocks. The one numeric file that builds Dask graphs."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import dask
import numpy as np
from dask.delayed import Delayed
from threadpoolctl import threadpool_limits

from scialm_dask.linalg import tasks
from scialm_dask.linalg.kernels import Doubles, Floats, GiveBack, Step, Sums, View, add_sums
from scialm_dask.linalg.tasks import BlockSource, Store

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

    state: tuple[Delayed, ...]
    right: Floats
    versions: dict[str, int]


_PANEL_ROWS = 1024


class LowRankPlusSparse:
    """The matrix whose SVD each iteration takes, never formed: A = U Vᵀ plus what A misses on the observed entries.

    Every method that reads the blocks makes one *pass*: one task for each block, and a tree that adds up what they
    give back. Works with whatever scheduler Dask has: threads in this process, or a `distributed.Client`.

    Parameters
    ----------
    source
        Hands out the blocks.
    store
        Keeps the working state of the blocks.
    resident
        Keep the blocks themselves in memory too, rather than read them in every pass.
    on_pass
        Called after each pass with their number so far.

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
        resident: bool,
        on_pass: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.shape = source.shape
        self.bounds = source.bounds
        self.passes, self._on_pass = 0, on_pass
        self._id = uuid.uuid4().hex[:12]
        self._source = dask.delayed(source, name=f"source-{self._id}", traverse=False)
        self._store = store
        self._confidence = source.column_confidence
        self._row_confidence = source.has_row_confidence
        self._right = np.zeros((self.shape[1], 0), np.float32)
        self._versions: dict[str, int] = dict.fromkeys(("estimate", "left", "sketch"), 0)
        self._best: _Kept | None = None
        self._blocks: tuple[Delayed | None, ...] = (None,) * self.n_blocks
        if resident:
            load = dask.delayed(tasks.load)
            self._blocks = _run([load(self._source, b) for b in range(self.n_blocks)])
        begin = dask.delayed(tasks.begin, pure=False, nout=2)
        parts = [begin(self._store, self._source, b, self._blocks[b]) for b in self._each()]
        total = _tree([counted for _, counted in parts], dask.delayed(tasks.add))
        *state, total = _run([refs for refs, _ in parts] + [total])
        self._state: tuple[Delayed, ...] = tuple(state)
        self.observations = Observations(*total.compute())
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
        step: Step | None = None,
        right: Floats | None = None,
        give_back: GiveBack | None = None,
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
        if step is not None and right is not None:
            self._right = right
        changed = {"sketch"} if basis is not None else set()
        if step is not None:
            changed |= {"estimate", "left"}
        if give_back is not None:
            changed |= {"estimate"}
        view = self._view()
        overlap = None if basis is None else view.spread.T @ basis
        view = replace(view, basis=basis, overlap=overlap, step=step, give_back=give_back)
        return self._pass(tasks.visit, view, [None] * self.n_blocks, changed)

    def project(self, vectors: Floats) -> Product:
        """Compute Wᵀ times orthonormal left vectors, shape ``(m, l)``, which become the sketch. One pass."""
        rows = [dask.delayed(vectors[a:b]) for a, b in pairwise(self.bounds)]
        return self._pass(tasks.project, self._view(), rows, {"sketch"})

    def column_gram(self) -> Doubles:
        """WᵀW, shape ``(n, n)``, when columns are the short side. One pass."""
        view = self._view()
        carried, visit = self._carry(view), dask.delayed(tasks.column_gram)
        parts = [visit(self._store, self._source, b, self._blocks[b], self._state[b], carried) for b in self._each()]
        (total,) = _run([_tree(parts, dask.delayed(tasks.add))])
        self._count_pass()
        left_gram, cross, sparse_gram = total.compute()
        right = view.spread.astype(np.float64)
        gram = right @ cross
        gram += gram.T
        gram += sparse_gram
        _add_product(gram, view.spread, left_gram @ right.T)
        return gram  # type: ignore[no-any-return]

    def row_gram(self) -> Doubles:
        """WWᵀ, shape ``(m, m)``, when rows are the short side: a task for each pair of blocks. One pass."""
        view = self._view()
        core, carried = view.spread.T.astype(np.float64) @ view.spread, self._carry(view)
        prepare, pair = dask.delayed(tasks.row_half), dask.delayed(tasks.row_gram)
        halves = [prepare(self._store, self._source, b, self._blocks[b], self._state[b], carried) for b in self._each()]
        corners = [(i, j) for i in self._each() for j in range(i, self.n_blocks)]
        tiles = _run(
            [
                pair(self._source, (i, j), self._blocks[i], self._blocks[j], halves[i], halves[j], core)
                for i, j in corners
            ]
        )
        self._count_pass()
        gram = np.empty((self.shape[0], self.shape[0]))
        for (i, j), tile in zip(corners, dask.compute(*tiles), strict=True):
            rows, columns = slice(*self.bounds[i : i + 2]), slice(*self.bounds[j : j + 2])
            gram[rows, columns] = tile
            gram[columns, rows] = tile.T
        return gram

    def quadratic(self, other: BlockSource | None = None, columns: Floats | None = None) -> tuple[Doubles, Doubles]:
        """Give g and H, shapes ``(r,)`` and ``(r, r)``, of the fit of A diag-scaled by c: minimise cᵀHc − 2gᵀc.

        That is Σ_Ω (d − a)² + Σ_rest ω a², up to a constant, with A = U diag(c) Vᵀ in force. One pass.

        Parameters
        ----------
        other
            Take d, Ω and ω of these blocks instead, cut as these are.
        columns
            Multiply the columns of A by these numbers first, shape ``(n,)``.
        """
        source, blocks, right = self._source, self._blocks, self._right
        if columns is not None:
            right = columns[:, None] * right
        view = replace(self._view(), right=right)
        if other is not None:
            source = dask.delayed(other, name=f"source-{uuid.uuid4().hex[:12]}", traverse=False)
            blocks = (None,) * self.n_blocks
            view = replace(view, confidence=other.column_confidence)
        carried, visit = self._carry(view), dask.delayed(tasks.quadratic)
        parts = [visit(self._store, source, b, blocks[b], self._state[b], carried) for b in self._each()]
        (total,) = _run([_tree(parts, dask.delayed(tasks.add))])
        self._count_pass()
        linear, square, rows = total.compute()
        if view.confidence is not None:
            square = square + rows * (right.T.astype(np.float64) @ (view.confidence[:, None] * right))
        return linear, square

    def keep(self) -> None:
        """Remember the A in force, and W, as the best so far; `factors` gives that A back."""
        pick = dask.delayed(tasks.without_sketch)
        versions = {name: self._versions[name] for name in ("estimate", "left")}
        forgotten, self._best = self._best, _Kept(_run([pick(at) for at in self._state]), self._right, versions)
        if forgotten is not None:
            for name, version in forgotten.versions.items():
                if version != versions[name]:
                    self._store.drop(name, version)

    def restore(self) -> None:
        """Put the A last kept in force again, and W with it."""
        if self._best is not None:
            put = dask.delayed(tasks.with_kept)
            self._state = _run([put(at, kept) for at, kept in zip(self._state, self._best.state, strict=True)])
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

    def _pass(self, function: Callable[..., Any], view: View, extra: list[Any], changed: set[str]) -> Product:
        """Run `function` once for each block and add up the sums that it returns beside the block's new state."""
        number = self.passes + 1
        carried = self._carry(view)
        visit = dask.delayed(function, pure=False, nout=2)
        parts = [
            visit(self._store, self._source, b, self._blocks[b], self._state[b], carried, number, extra[b])
            for b in self._each()
        ]
        total = _tree([sums for _, sums in parts], dask.delayed(add_sums))
        *state, total = _run([state for state, _ in parts] + [total])
        sums: Sums = total.compute()
        self._state = tuple(state)
        self._count_pass()
        for name in changed:
            if self._best is None or self._best.versions.get(name) != self._versions[name]:
                self._store.drop(name, self._versions[name])
            self._versions[name] = number
        cross = sums.sparse_cross.astype(np.float64)
        if cross.size:
            _add_product(cross, view.spread, sums.left_cross)
        return Product(cross, sums.gram, sums.misfit, sums.held_out)

    def _count_pass(self) -> None:
        self.passes += 1
        self._on_pass(self.passes)

    def _view(self) -> View:
        """Make what a pass carries, without a basis."""
        right, beta = self._right, self._confidence
        if beta is None:
            return View(right, right)
        if self._row_confidence:
            return View(right, np.hstack([right, -beta[:, None] * right]), beta)
        return View(right, (1 - beta)[:, None] * right, beta)

    def _carry(self, view: View) -> Delayed:
        """Wrap what every task of a pass needs as one task, which is sent to each worker once."""
        return dask.delayed(view, name=f"view-{self._id}-{uuid.uuid4().hex[:8]}", traverse=False)

    def _each(self) -> range:
        return range(self.n_blocks)


def _run(values: list[Any]) -> tuple[Any, ...]:
    """Compute and hold on the scheduler in force, where threads of this process leave BLAS one thread each."""
    with threadpool_limits(1, user_api="blas"):
        return dask.persist(*values)  # type: ignore[no-any-return]


def _add_product(total: Doubles, tall: Floats, wide: Doubles) -> None:
    """Add a product to `total`, some rows at a time: on large matrices a temporary of its size is too much."""
    for start in range(0, len(tall), _PANEL_ROWS):
        rows = slice(start, start + _PANEL_ROWS)
        total[rows] += tall[rows].astype(np.float64) @ wide


def _tree(parts: list[Delayed], add: Any) -> Delayed:
    """Add up, neighbours first, in a fixed order."""
    while len(parts) > 1:
        pairs = [add(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]
