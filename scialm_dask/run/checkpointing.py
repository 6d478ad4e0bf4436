"""A run as it was asked for, and what it knows so far: in a checkpoint and out of it again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from scialm_dask import __version__
from scialm_dask.config import Settings, short_repr, validated
from scialm_dask.data.checkpoint import ArrayFolder, Checkpoint, Checkpoints, Piece
from scialm_dask.data.csr import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.rows import fingerprint
from scialm_dask.data.store import lasting
from scialm_dask.errors import CheckpointError, InputError, StoppedError
from scialm_dask.events import Listener, Note
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.tasks import Observations
from scialm_dask.solve.denoise import DenoiseState
from scialm_dask.solve.ialm import LoopState
from scialm_dask.solve.scaling import Survey, survey

EVERY = "10 minutes"
_SAME_SUM = 1e-9  # relative; sums of the same numbers on another machine
_SAME_SQUARES = 1e-5
_OF_OPERATOR = ("estimate", "left", "sketch", "best_estimate", "best_left", "right", "best_right")


@dataclass(frozen=True)
class Job:
    """A run as it was asked for.

    `scratch` is where the working state goes: ``"memory"``, where the workers hold it, and the matrix; ``"zarr:PATH"``,
    in a new folder under PATH, on a disk that all workers see, while the matrix is read anew in every pass; or
    ``"auto"``, in memory if the forecast fits `memory_limit`, else in Zarr under `scratch_folder`.
    """

    matrix: ExpressionMatrix
    settings: Settings
    scratch: str = "auto"
    memory_limit: int | None = None  # bytes that each process may take in all; what is free by default
    scratch_folder: str | None = None  # Dask's temporary-directory by default, else the system's
    resumed: bool = False  # from a checkpoint, by whose blocks and settings it is bound

    def notes(self) -> dict[str, Any]:
        """Return plain values, of which `job_of` makes it again."""
        origin = self.matrix.origin
        source = None if origin is None else asdict(origin) | {"path": lasting(origin.path)}
        return {
            "source": source,
            "name": self.matrix.name,
            "observed": self.matrix.observed,
            "bounds": list(self.matrix.blocks.bounds),
            "settings": asdict(self.settings),
            "scratch": self.scratch,
            "memory_limit": self.memory_limit,
            "scratch_folder": self.scratch_folder,
        }


@dataclass(frozen=True)
class Checkpointing:
    """Where and when to write checkpoints."""

    # of this run alone, on a disk that all workers see; or those there, opened
    folder: str | os.PathLike[str] | Checkpoints
    every: int | str = EVERY  # iterations, or a time such as "10 minutes"
    # notes on what is to become of it, for whoever resumes the run
    result: Mapping[str, Any] = field(default_factory=dict)
    stop: Callable[[], bool] = lambda: False  # asked before every pass whether to save and stop there

    def __post_init__(self) -> None:
        cadence(self.every)


def cadence(every: int | str) -> tuple[float, float]:
    """Return the most iterations and seconds between checkpoints; `InputError` if that is neither number nor time."""
    from dask.utils import parse_timedelta

    words = str(every).strip()
    try:
        if re.fullmatch(r"\d+", words):
            iterations, seconds = float(words), np.inf
        else:
            iterations, seconds = np.inf, float(parse_timedelta(re.sub(r"min$", "minutes", words)))
    except (ValueError, KeyError):
        iterations = seconds = 0
    if not min(iterations, seconds) > 0:
        raise InputError(f"checkpoint_every is {every!r}; give a number of iterations, or a time such as 10min")
    return iterations, seconds


def job_of(saved: Checkpoint, matrix: ExpressionMatrix | None, changes: Mapping[str, Any]) -> Job:
    """Make a job again from a checkpoint, of a matrix instead of opening it where it was, if one is given.

    What is not None in `changes`, fields of the job, replaces what was saved.
    """
    with as_written(saved.path):
        run = saved.notes["run"]
        observed = validated("observed", run["observed"], Literal["nonzero", "finite"])
        bounds = validated("bounds", run["bounds"], Sequence[int])
        if bounds[0] != 0 or not all(np.diff(bounds) > 0):
            raise ValueError(f"bounds is {short_repr(bounds)}")
        if run["settings"].keys() != {each.name for each in fields(Settings)}:
            raise ValueError("its settings are not those of this version")
        settings = Settings(**run["settings"])
        asked = {name: run[name] for name in ("scratch", "memory_limit", "scratch_folder")}
        for (name, value), kind in zip(asked.items(), (str, int | None, str | None), strict=True):
            validated(name, value, kind)
    if matrix is None:
        matrix = source_of(saved.notes)
    elif matrix.observed != observed:
        matrix = replace(matrix, observed=observed)
    if matrix.shape[0] != bounds[-1]:
        raise CheckpointError(
            f"{saved.path}: is of a matrix of {bounds[-1]} cells, and {matrix.name} has {matrix.shape[0]}"
        )
    asked |= {name: value for name, value in changes.items() if value is not None}
    return Job(matrix.with_blocks(RowBlocks(bounds)), settings, resumed=True, **asked)


def source_of(notes: Mapping[str, Any]) -> ExpressionMatrix:
    """Open the matrix of a run again; raises `InputError` if it was in memory, or cannot be opened."""
    with as_written("the checkpoint"):
        run = notes["run"]
        name, source = run["name"], run["source"]
        matrix = (
            None if source is None else functools.partial(ExpressionMatrix.open, **source, observed=run["observed"])
        )
    if matrix is None:
        raise InputError(f"{name} was in memory; resume the run from Python, and give the matrix again")
    return matrix()


def ended(folder: str, notes: Mapping[str, Any]) -> str:
    """Say what became of a run, if it has ended."""
    where = notes.get("finished")
    return f"{folder}: that run is finished; its result is {where}" if where else ""


def finish(checkpoints: Checkpoints, destination: str) -> None:
    """Note that a run is finished and its result written, and remove its checkpoints."""
    older = checkpoints.names()
    checkpoints.commit(checkpoints.begin(), checkpoints.notes() | {"finished": destination}, {})
    checkpoints.own(None)
    for name in set(older) & set(checkpoints.names()):
        checkpoints.remove(name)


def array_of(saved: Checkpoint, name: str) -> Any:
    """Return an array of which there is but one; None if there is none."""
    group = saved.arrays.get(name)
    return None if group is None else saved.files.get(group[0])


@contextlib.contextmanager
def as_written(path: str) -> Iterator[None]:
    """Refuse values that no run has written: a manifest can be changed and digested anew."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: holds what no run has written ({short_repr(error)})") from error


State = DenoiseState | LoopState  # what a solver knows between two steps, but for what its operator holds
S = TypeVar("S", DenoiseState, LoopState)


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
        files, found = self._checkpoints.begin(), self._found
        try:
            notes, small, blocks = _parts(state, operator, files)
            others = small if found is None else {"gene_sums": found.gene_sums} | small
            arrays = {name: [files.put(name, 0, array)] for name, array in others.items()}
            notes = {
                "program": __version__,
                "run": self.job.notes(),
                "every": self._asked.every,
                "result": dict(self._asked.result),
                "matrix": None if found is None else _identity(found),
                "state": notes,
                "finished": None,
            }
            checkpoint = self._checkpoints.commit(files, notes, blocks | arrays)
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
                now, before = survey(self.job.matrix), self._found
                same = _identity(now) == _identity(before) and _close(now.gene_sums, before.gene_sums, _SAME_SUM)
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


def _close(one: Any, other: Any, tolerance: float) -> bool:
    return one is not None and one.shape == other.shape and np.allclose(one, other, rtol=tolerance, atol=0)


def _identity(found: Survey) -> dict[str, Any]:
    """Sum up what tells one matrix from another, but for its sums."""
    digest = hashlib.sha256()
    for counts in (found.block_gene_counts, found.cell_counts):
        digest.update(np.ascontiguousarray(counts).tobytes())
    return {"n_observed": found.n_observed, "integer": found.integer, "pattern": digest.hexdigest()}
