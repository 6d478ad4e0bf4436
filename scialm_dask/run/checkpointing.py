"""A run as requested, and its state: how they are saved in checkpoints and loaded again."""

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
from dask.utils import parse_timedelta

from scialm_dask import __version__
from scialm_dask.config import Settings, short_repr, validated
from scialm_dask.data.checkpoint import Checkpoint, Checkpoints, Piece
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
_SAME_SUM = 1e-9  # relative difference between sums of the same numbers on two machines
_SAME_SQUARES = 1e-5
_OF_OPERATOR = ("estimate", "left", "sketch", "best_estimate", "best_left", "right", "best_right")


@dataclass(frozen=True)
class Job:
    """A run as requested.

    `scratch` says where the working state goes. With ``"memory"``, workers hold it and the matrix. With
    ``"zarr:PATH"``, it is in a new folder in PATH, on a disk that all workers see, and the matrix is read in every
    pass. ``"auto"`` is memory if the forecast fits `memory_limit`, otherwise Zarr in `scratch_folder`.
    """

    matrix: ExpressionMatrix
    settings: Settings
    scratch: str = "auto"
    memory_limit: int | None = None  # bytes for each process; free memory by default
    scratch_folder: str | None = None  # by default Dask's temporary-directory, or the system's
    resumed: bool = False  # from a checkpoint, so that blocks and settings are fixed

    def notes(self) -> dict[str, Any]:
        """Return JSON values for `job_of`."""
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

    # of this run alone, on a disk that all workers see; or opened checkpoints
    folder: str | os.PathLike[str] | Checkpoints
    every: int | str = EVERY  # iterations, or a time such as "10 minutes"
    # what to do with the result, as notes for resuming the run
    result: Mapping[str, Any] = field(default_factory=dict)
    stop: Callable[[], bool] = lambda: False  # called before each pass; True to save and stop

    def __post_init__(self) -> None:
        cadence(self.every)


def cadence(every: int | str) -> tuple[float, float]:
    """Return the most iterations and seconds between checkpoints; raise `InputError` if `every` is neither."""
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
    """Return the job of a checkpoint, on a given matrix, or on the one it was saved with.

    Fields of the job in `changes` that are not None replace those that were saved.
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
        kinds = {"scratch": str, "memory_limit": int | None, "scratch_folder": str | None}
        asked = {name: validated(name, run[name], kind) for name, kind in kinds.items()}
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
    """Open the matrix of a run; raise `InputError` if it was in memory or cannot be opened."""
    with as_written("the checkpoint"):
        run = notes["run"]
        name, source, observed = run["name"], run["source"], run["observed"]
        if source is not None:
            opened = functools.partial(ExpressionMatrix.open, **source, observed=observed)
    if source is None:
        raise InputError(f"{name} was in memory; resume the run from Python, and give the matrix again")
    return opened()


def ended(folder: str, notes: Mapping[str, Any]) -> str:
    """Return a line that says that a run is finished, or an empty string if it is not."""
    where = notes.get("finished")
    return f"{folder}: that run is finished; its result is {where}" if where else ""


def finish(checkpoints: Checkpoints, destination: str) -> None:
    """Record that a run is finished, with its result at `destination`, and remove its checkpoints."""
    older = checkpoints.names()
    checkpoints.commit(checkpoints.begin(), checkpoints.notes() | {"finished": destination}, {})
    checkpoints.own(None)
    for name in set(older) & set(checkpoints.names()):
        checkpoints.remove(name)


def array_of(saved: Checkpoint, name: str) -> Any:
    """Return an array that is not divided into blocks; None if there is none."""
    group = saved.arrays.get(name)
    return None if group is None else saved.files.get(group[0])


@contextlib.contextmanager
def as_written(path: str) -> Iterator[None]:
    """Raise `CheckpointError` for values that no run has written: manifests can be edited and signed again."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: holds what no run has written ({short_repr(error)})") from error


State = DenoiseState | LoopState  # of a solver between two steps, except for what its operator holds
S = TypeVar("S", DenoiseState, LoopState)


class RunState:
    """The state of a run.

    Saves to `checkpoints` as `asked` says, unless both are None, and starts from the checkpoint `saved`, if given.
    """

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
        """Set the survey and the scratch folder; raise `CheckpointError` if the checkpoint is of another matrix."""
        self._found = found
        if self._saved is not None:
            with as_written(self._saved.path):
                before = self._saved.notes["matrix"]
                if before is not None:
                    n_before, sums = int(before["n_observed"]), array_of(self._saved, "gene_sums")
            now = _identity(found)
            if before is not None and (now != before or not _close(sums, found.gene_sums, _SAME_SUM)):
                raise CheckpointError(
                    f"{self._saved.path}: is of another matrix, of {n_before} observed entries, and this one of "
                    f"{now['n_observed']} differs in genes, cells or values"
                )
        if self._checkpoints is not None:
            self._checkpoints.own(scratch)
        self.stop_if_asked()

    def load(self, kind: type[S], operator: LowRankPlusSparse | None = None) -> S | None:
        """Return the saved state, or None, and load that of the operator."""
        saved = self._saved
        if saved is None or (notes := saved.notes["state"]) is None:
            return None
        with as_written(saved.path):
            state = kind.of_plain(notes, {name: array_of(saved, name) for name in notes["arrays"]})
            if operator is not None:
                at = notes["operator"]
                blocks = {name: group for name, group in saved.arrays.items() if name in _OF_OPERATOR}
                self._check_shapes(operator, blocks)
                before = Observations(*at["observations"])
                operator.load(saved.files, blocks, validated("passes", at["passes"], int), before)
                self._before = before
        self._written(state.steps)
        return state

    def save(self, state: State | None = None, operator: LowRankPlusSparse | None = None, *, now: bool = False) -> None:
        """Save a state and its operator, between two steps, if a checkpoint is due.

        It is due at the start, without a state, and with `now` unless the state is saved already. Raises `OutputError`
        if it cannot be written; earlier checkpoints stay.
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
            of_state, arrays, blocks = (None, {}, {}) if state is None else (*state.plain(), {})
            if of_state is not None:
                of_state |= {"arrays": sorted(arrays), "operator": None}
                if operator is not None:
                    of_state["operator"] = {"passes": operator.passes, "observations": list(operator.observations)}
                    # If the next SVD has begun, the sketch is a later one, but its passes will be repeated.
                    blocks = operator.save(files, sketch=bool(arrays))
            if found is not None:
                arrays["gene_sums"] = found.gene_sums
            notes = {
                "program": __version__,
                "run": self.job.notes(),
                "every": self._asked.every,
                "result": dict(self._asked.result),
                "matrix": None if found is None else _identity(found),
                "state": of_state,
                "finished": None,
            }
            pieces = {name: [files.put(name, 0, array)] for name, array in arrays.items()}
            checkpoint = self._checkpoints.commit(files, notes, blocks | pieces)
        except BaseException as error:
            self._checkpoints.abandon(files)
            if isinstance(error, OSError):
                raise self._checkpoints.error(error) from error
            raise
        if operator is not None and operator.depends_on_workers and blocks:
            operator.load(checkpoint.files, blocks, operator.passes)
        self._written(0 if state is None else state.steps)

    def stop_if_asked(self) -> None:
        """Raise `StoppedError` if the run was asked to stop."""
        if self._checkpoints is not None and self._asked is not None and self._asked.stop():
            raise StoppedError(f"stopped as asked; continue with `scialm-dask resume {self._checkpoints.folder}`")

    def check_source(self, listen: Listener, *, read_once: bool) -> None:
        """Check that the run has read one and the same matrix, if its store has changed since the run began.

        With `read_once`, everything was read before the last call, and `listen` gets a note. Otherwise the matrix is
        read again, and `InputError` is raised if it differs.
        """
        latest = fingerprint(self.job.matrix.rows)
        if latest == self._fingerprint:
            return
        self._fingerprint, name = latest, self.job.matrix.name
        if read_once:
            listen(Note(f"{name}: has changed since it was read; the result is of what was there before"))
        elif self._found is not None:
            again = "start again"
            if self._checkpoints is not None:
                again = f"put back what was there and `scialm-dask resume {self._checkpoints.folder}`, or start again"
            try:
                now, before = survey(self.job.matrix), self._found
                same = _identity(now) == _identity(before) and _close(now.gene_sums, before.gene_sums, _SAME_SUM)
            except InputError as error:
                raise InputError(f"{error}; it has changed since the run began: {again}") from error
            if not same:
                raise InputError(f"{name}: has changed since the run began, while it was read; {again}")

    def _written(self, steps: int) -> None:
        self._steps, self._time = steps, time.monotonic()

    def check_observations(self, now: Observations) -> None:
        """Raise `CheckpointError` if the entries that were read are not those of the saved state."""
        if self._before is not None and not _close(np.array(self._before, float), np.array(now, float), _SAME_SQUARES):
            assert self._saved is not None
            raise CheckpointError(f"{self._saved.path}: is of another matrix, or of one that was scaled otherwise")

    def _check_shapes(self, operator: LowRankPlusSparse, blocks: Mapping[str, tuple[Piece, ...]]) -> None:
        """Raise `ValueError` if arrays do not fit the operator, as kernels would read past their ends."""
        assert self._found is not None
        rows, entries = np.diff(operator.bounds).tolist(), self._found.block_gene_counts.sum(axis=1).tolist()
        wanted: dict[str, list[tuple[int, ...]]] = {}
        for which in ("", "best_") if "best_right" in blocks else ("",):
            r = blocks[f"{which}right"][0].shape[1]
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


def _close(one: Any, other: Any, tolerance: float) -> bool:
    return one is not None and one.shape == other.shape and np.allclose(one, other, rtol=tolerance, atol=0)


def _identity(found: Survey) -> dict[str, Any]:
    """Return what tells one matrix from another, except for sums."""
    digest = hashlib.sha256()
    for counts in (found.block_gene_counts, found.cell_counts):
        digest.update(np.ascontiguousarray(counts).tobytes())
    return {"n_observed": found.n_observed, "integer": found.integer, "pattern": digest.hexdigest()}
