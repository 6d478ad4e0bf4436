"""What a run knows so far: saved in a checkpoint between two steps, and loaded from one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from scialm_dask import __version__
from scialm_dask.arguments import validated
from scialm_dask.config import Settings
from scialm_dask.data.checkpoint import ArrayFolder, Checkpoint, Checkpoints, Piece
from scialm_dask.data.rows import fingerprint
from scialm_dask.errors import CheckpointError, InputError, StoppedError
from scialm_dask.events import Listener, Note
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.tasks import Observations
from scialm_dask.run.checkpointing import Checkpointing, Job, array_of, as_written, cadence
from scialm_dask.solve.scaling import Survey, survey

_SAME_SUM = 1e-9  # relative; sums of the same numbers on another machine
_SAME_SQUARES = 1e-5
_OF_OPERATOR = ("estimate", "left", "sketch", "best_estimate", "best_left", "right", "best_right")


class State(Protocol):
    """What a solver knows between two steps, but for what its operator holds."""

    @property
    def steps(self) -> int:
        """How many were made."""
        ...

    def is_last(self, settings: Settings) -> bool:
        """Whether no step is to follow, so that it is saved in any case."""
        ...

    def plain(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return plain values, for JSON, and small arrays, of which `of_plain` makes it again."""
        ...

    @classmethod
    def of_plain(cls, notes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Make it again; a `ValueError` of any kind where that cannot be."""
        ...


S = TypeVar("S", bound=State)


class RunState:
    """What a run knows so far; where to save it, and when, None for nowhere; and what it goes on from, if it does."""

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints | None = None,
        asked: Checkpointing | None = None,
        saved: Checkpoint | None = None,
    ) -> None:
        self.job, self._checkpoints, self._asked, self._saved = job, checkpoints, asked, saved
        self._most_steps, self._most_seconds = (np.inf, np.inf) if asked is None else cadence(asked.every)
        self._fingerprint = fingerprint(job.matrix.rows)
        self._found: Survey | None = None
        self._before: Observations | None = None
        self._written(0)

    def surveyed(self, found: Survey, scratch: str | None) -> None:
        """Learn what the matrix holds, and where the scratch is; raises `CheckpointError` if it is another matrix."""
        self._found = found
        if self._saved is not None:
            self._compare(found, self._saved)
        if self._checkpoints is not None:
            self._checkpoints.own(scratch)
        self.stop_if_asked()

    def load(self, kind: type[S], operator: LowRankPlusSparse | None = None) -> S | None:
        """Return the state that was saved, None if there is none, and put the operator back where it was then."""
        if self._saved is None or (notes := self._saved.notes["state"]) is None:
            return None
        with as_written(self._saved.path):
            small = {name: array_of(self._saved, name) for name in notes["arrays"]}
            state = kind.of_plain(notes, small)
            if operator is not None:
                self._put_back(operator, notes["operator"])
        self._written(state.steps)
        return state

    def save(self, state: State | None = None, operator: LowRankPlusSparse | None = None, *, now: bool = False) -> None:
        """Save a state, the rest of which its operator holds, between two steps, if that is due.

        None, as long as there is no state, is due, and with `now` any state that is not saved already. Raises
        `OutputError` if it cannot be written; those before it are as they were.
        """
        if self._checkpoints is None or self._asked is None:
            return
        if state is not None:
            steps, seconds = state.steps - self._steps, time.monotonic() - self._time
            due = steps >= self._most_steps or seconds >= self._most_seconds or state.is_last(self.job.settings)
            if not (steps if now else due):
                return
        files = self._checkpoints.begin()
        try:
            notes, small, blocks = _parts(state, operator, files)
            others = self._of_job() | small
            arrays = {name: [files.put(name, 0, array)] for name, array in others.items()}
            checkpoint = self._checkpoints.commit(files, self._notes(self._asked, notes), blocks | arrays)
        except BaseException as error:
            self._checkpoints.abandon(files)
            if isinstance(error, OSError):
                raise self._checkpoints.error(error) from error
            raise
        if operator is not None and operator.depends_on_workers and blocks:
            operator.load(checkpoint.files, blocks, operator.passes)
        self._written(0 if state is None else state.steps)

    def stop_if_asked(self) -> None:
        """Raise `StoppedError`, which says how to go on, if the run was asked to stop."""
        if self._checkpoints is not None and self._asked is not None and self._asked.stop():
            raise StoppedError(f"stopped as asked; go on by `scialm-dask resume {self._checkpoints.folder}`")

    def check_source(self, listen: Listener, *, read_once: bool) -> None:
        """See that all that was read is of one matrix, though its store has changed since the run began.

        With `read_once`, all that was used was read before this was called the last time, and `listen` is told; else
        the matrix is read again now, and `InputError` raised if what was read at different times differs.
        """
        latest = fingerprint(self.job.matrix.rows)
        if latest == self._fingerprint:
            return
        self._fingerprint, name = latest, self.job.matrix.name
        if read_once:
            listen(Note(f"{name}: has changed since it was read; the result is of what was there before"))
        elif self._found is not None:
            again = "begin anew"
            if self._checkpoints is not None:
                again = f"put back what was there and `scialm-dask resume {self._checkpoints.folder}`, or begin anew"
            try:
                same = _same(survey(self.job.matrix), self._found)
            except InputError as error:
                raise InputError(f"{error}; it has changed since the run began: {again}") from error
            if not same:
                raise InputError(f"{name}: has changed since the run began, while it was read; {again}")

    def _written(self, steps: int) -> None:
        self._steps, self._time = steps, time.monotonic()

    def _compare(self, found: Survey, saved: Checkpoint) -> None:
        with as_written(saved.path):
            if (before := saved.notes["matrix"]) is None:
                return
            latest, n_before, sums = _identity(found), int(before["n_observed"]), array_of(saved, "gene_sums")
        if latest != before or not _close(sums, found.gene_sums, _SAME_SUM):
            raise CheckpointError(
                f"{saved.path}: is of another matrix, of {n_before} observed entries, and this one of "
                f"{latest['n_observed']} differs in genes, cells or values"
            )

    def _put_back(self, operator: LowRankPlusSparse, notes: Mapping[str, Any]) -> None:
        assert self._saved is not None
        blocks = {name: group for name, group in self._saved.arrays.items() if name in _OF_OPERATOR}
        self._check_shapes(operator, blocks)
        before = Observations(*notes["observations"])
        operator.load(self._saved.files, blocks, validated("passes", notes["passes"], int), before)
        self._before = before

    def check_observations(self, now: Observations) -> None:
        """Raise `CheckpointError` if the entries that were read are not those of the state that was saved."""
        if self._before is not None and not _close(np.array(self._before, float), np.array(now, float), _SAME_SQUARES):
            assert self._saved is not None
            raise CheckpointError(f"{self._saved.path}: is of another matrix, or of one that was scaled otherwise")

    def _check_shapes(self, operator: LowRankPlusSparse, blocks: Mapping[str, tuple[Piece, ...]]) -> None:
        """Raise `ValueError` if arrays are not of this operator: with others kernels would read past their ends."""
        assert self._found is not None
        rows, entries = np.diff(operator.bounds).tolist(), self._found.block_gene_counts.sum(axis=1).tolist()
        rank = {"": blocks["right"][0].shape[1]}
        if "best_right" in blocks:
            rank["best_"] = blocks["best_right"][0].shape[1]
        wanted: dict[str, list[tuple[int, ...]]] = {}
        for which, r in rank.items():
            wanted[f"{which}right"] = [(operator.shape[1], r)]
            wanted[f"{which}left"] = [(n, r) for n in rows]
            wanted[f"{which}estimate"] = [(n,) for n in entries]
        if "sketch" in blocks:
            wanted["sketch"] = [(n, blocks["sketch"][0].shape[1]) for n in rows]
        for name, group in blocks.items():
            if [piece.shape for piece in group] != wanted.get(name) or {piece.dtype for piece in group} != {"<f4"}:
                raise ValueError(f"{name} is not of these blocks")
        if wanted.keys() != blocks.keys():
            raise ValueError(f"{min(wanted.keys() - blocks.keys())} is not there")

    def _of_job(self) -> dict[str, NDArray[Any]]:
        return {} if self._found is None else {"gene_sums": self._found.gene_sums}

    def _notes(self, asked: Checkpointing, state: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "program": __version__,
            "run": self.job.notes(),
            "every": asked.every,
            "result": dict(asked.result),
            "matrix": None if self._found is None else _identity(self._found),
            "state": state,
            "finished": None,
        }


def _parts(
    state: State | None, operator: LowRankPlusSparse | None, files: ArrayFolder
) -> tuple[dict[str, Any] | None, dict[str, NDArray[Any]], dict[str, list[Piece]]]:
    """Return the notes of a state and its small arrays; write those of its operator."""
    if state is None:
        return None, {}, {}
    notes, small = state.plain()
    notes |= {"arrays": sorted(small), "operator": None}
    if operator is None:
        return notes, small, {}
    notes["operator"] = {"passes": operator.passes, "observations": list(operator.observations)}
    # Passes of the next SVD may have made another sketch since, but then they will do so again.
    return notes, small, operator.save(files, sketch=bool(small))


def _same(one: Survey, other: Survey) -> bool:
    return _identity(one) == _identity(other) and _close(one.gene_sums, other.gene_sums, _SAME_SUM)


def _close(one: Any, other: Any, tolerance: float) -> bool:
    return one is not None and one.shape == other.shape and np.allclose(one, other, rtol=tolerance, atol=0)


def _identity(found: Survey) -> dict[str, Any]:
    """Sum up what tells one matrix from another, but for its sums."""
    digest = hashlib.sha256()
    for counts in (found.block_gene_counts, found.cell_counts):
        digest.update(np.ascontiguousarray(counts).tobytes())
    return {"n_observed": found.n_observed, "integer": found.integer, "pattern": digest.hexdigest()}
