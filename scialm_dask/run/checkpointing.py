"""What a checkpoint of a run holds, when one is written, and how a run is put back from it."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np

from scialm_dask import __version__
from scialm_dask.config import Settings
from scialm_dask.data.array_files import ArrayFile, ArrayFolder
from scialm_dask.data.checkpoint import Checkpoint, Checkpoints
from scialm_dask.data.fingerprint import fingerprint
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import lasting
from scialm_dask.errors import CheckpointError, InputError, StoppedError
from scialm_dask.events import Iteration
from scialm_dask.linalg.operator import LowRankPlusSparse, Observations, Product
from scialm_dask.solve.denoise import DenoiseState, Unseen, Weights
from scialm_dask.solve.ialm import LoopState, Penalty
from scialm_dask.solve.scaling import Survey

__all__ = ["Checkpointing", "Job", "Keeper", "Saved", "cadence", "ended", "source_of", "under_way"]

_SAME_SUM = 1e-9  # relative; sums of the same numbers on another machine
_SAME_SQUARES = 1e-5
EVERY = "10 minutes"


@dataclass(frozen=True)
class Job:
    """A run as it was asked for.

    Parameters
    ----------
    matrix, settings, scratch, memory_limit, scratch_folder
        See `scialm_dask.run.job.complete_matrix`.
    resumed
        Whether it goes on from a checkpoint that an earlier run has written, by whose blocks and settings it is bound.
    """

    matrix: ExpressionMatrix
    settings: Settings
    scratch: str = "auto"
    memory_limit: int | None = None
    scratch_folder: str | None = None
    resumed: bool = False

    def notes(self) -> dict[str, Any]:
        """Plain values, of which `Saved.job` makes it again."""
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
    """Where and when to write checkpoints.

    Parameters
    ----------
    folder
        Of this run alone, on a disk that all workers see.
    every
        A number of iterations, or a time such as ``"10 minutes"``.
    result
        Notes on what is to become of the result, for whoever resumes the run.
    stop
        Asked before every pass whether to write a checkpoint and stop there.
    """

    folder: str | os.PathLike[str]
    every: int | str = EVERY
    result: Mapping[str, Any] = field(default_factory=dict)
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        cadence(self.every)


def cadence(every: int | str) -> tuple[float, float]:
    """Give the most iterations and the most seconds from one checkpoint to the next.

    Raises
    ------
    InputError
        If `every` is neither a number of iterations nor a time.
    """
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


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says, in our terms."""

    checkpoint: Checkpoint

    def job(self, matrix: ExpressionMatrix | None, changes: Mapping[str, Any]) -> Job:
        """Make the job again.

        Parameters
        ----------
        matrix
            Instead of opening it where it was.
        changes
            Fields that are to differ, where not None.
        """
        run = self.checkpoint.notes["run"]
        if matrix is None:
            matrix = source_of(self.checkpoint.notes)
        elif matrix.observed != run["observed"]:
            matrix = ExpressionMatrix(matrix.rows, matrix.blocks, run["observed"], matrix.annotation, matrix.origin)
        if matrix.shape[0] != run["bounds"][-1]:
            raise CheckpointError(
                f"{self.checkpoint.path}: is of a matrix of {run['bounds'][-1]} cells, and {matrix.name} has "
                f"{matrix.shape[0]}"
            )
        settings = run["settings"]
        if settings["scaling"] is not None:
            settings = settings | {"scaling": tuple(settings["scaling"])}
        asked = {name: run[name] for name in ("scratch", "memory_limit", "scratch_folder")}
        asked |= {name: value for name, value in changes.items() if value is not None}
        blocks = RowBlocks(tuple(run["bounds"]))
        return Job(matrix.with_blocks(blocks), Settings(**settings), resumed=True, **asked)

    def check(self, found: Survey) -> None:
        """Raise `CheckpointError` if this is of another matrix."""
        matrix = self.checkpoint.notes["matrix"]
        if matrix is None:
            return
        latest, sums = _identity(found), self._array("gene_sums")
        if latest != matrix or not np.allclose(sums, found.gene_sums, rtol=_SAME_SUM, atol=0):
            raise CheckpointError(
                f"{self.checkpoint.path}: is of another matrix, of {matrix['n_observed']} observed entries, and this "
                f"one of {latest['n_observed']} differs in genes, cells or values"
            )

    @property
    def denoising(self) -> DenoiseState | None:
        """How far denoising has come; None if it has not begun."""
        notes, weights = self.checkpoint.notes["denoising"], None
        if notes is None:
            return None
        if notes["unseen"] is not None:
            weights = Weights(
                self._array("component_weight"), self._array("residual_weight"), Unseen(**notes["unseen"])
            )
        return DenoiseState(self._array("basis"), notes["passes"], weights)

    def put_back(self, operator: LowRankPlusSparse) -> LoopState | None:
        """Put the state back into a new operator over the same blocks; None if there is none yet."""
        loop = self.checkpoint.notes["loop"]
        if loop is None:
            return None
        before, now = Observations(*loop["observations"]), operator.observations
        if not np.allclose(before, now, rtol=_SAME_SQUARES):
            raise CheckpointError(f"{self.checkpoint.path}: is of another matrix, or of one that was scaled otherwise")
        blocks = {name: group for name, group in self.checkpoint.arrays.items() if name in _OF_OPERATOR}
        operator.load(self.checkpoint.files, blocks, loop["passes"])
        product = None
        if (cross := self._array("cross")) is not None:
            product = Product(cross, self._array("gram"), 0.0, 0.0)
        history = tuple(Iteration(*line) for line in loop["history"])
        penalty, values = Penalty(*loop["penalty"]), tuple(loop["values"])
        return LoopState(history, penalty, loop["chosen"], values, product, reason=loop["reason"])

    def _array(self, name: str) -> Any:
        file = self.checkpoint.arrays.get(name)
        return None if file is None else self.checkpoint.files.get(file[0])


def source_of(notes: Mapping[str, Any]) -> ExpressionMatrix:
    """Open the matrix of a run again.

    Raises
    ------
    InputError
        If it was in memory, or cannot be opened.
    """
    run = notes["run"]
    if run["source"] is None:
        raise InputError(f"{run['name']} was in memory; resume the run from Python, and give the matrix again")
    return ExpressionMatrix.open(**run["source"], observed=run["observed"])


def under_way(notes: Mapping[str, Any]) -> bool:
    """Tell whether more is known of a run than what was asked for."""
    return notes["denoising"] is not None or notes["loop"] is not None


def ended(folder: str, notes: Mapping[str, Any]) -> str:
    """Say what became of a run, if it has ended."""
    return f"{folder}: that run is finished; its result is {notes['finished']}" if notes["finished"] else ""


_OF_OPERATOR = ("estimate", "left", "sketch", "best_estimate", "best_left", "right", "best_right")


class Keeper:
    """Writes the checkpoints of a run when they are due, stops it when asked, and sees that its source stays as it is.

    Parameters
    ----------
    job
        The run.
    checkpoints, asked
        Where to, and when; None for no checkpoints.
    saved
        What the run goes on from, if it does.
    """

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints | None = None,
        asked: Checkpointing | None = None,
        saved: Saved | None = None,
    ) -> None:
        self._job, self._checkpoints, self._asked, self._saved = job, checkpoints, asked, saved
        self._most_iterations, self._most_seconds = (np.inf, np.inf) if asked is None else cadence(asked.every)
        self._source = fingerprint(job.matrix.rows)
        self._found: Survey | None = None
        self._operator: LowRankPlusSparse | None = None
        self._state: LoopState | None = None
        self.denoising: DenoiseState | None = None if saved is None else saved.denoising
        self._passes = 0
        self._written(0)

    def surveyed(self, found: Survey, scratch: str | None) -> None:
        """Learn what the matrix holds, and where the scratch is; raises `CheckpointError` if it is another."""
        self._found = found
        if self._saved is not None:
            self._saved.check(found)
        if self._checkpoints is not None:
            self._checkpoints.own(scratch)
        self.before_pass()

    def watch(self, operator: LowRankPlusSparse) -> LoopState | None:
        """Take charge of the operator that the loop is to work with, and put it back where it was."""
        state = None if self._saved is None else self._saved.put_back(operator)
        self._operator, self._state = operator, state
        self._written(0 if state is None else len(state.history))
        return state

    def let_go(self) -> None:
        """Forget the operator, which knows of this: neither is to outlive the run for the other's sake."""
        self._operator = self._state = None

    def after_iteration(self, state: LoopState) -> None:
        """Learn the latest state, and write it if that is due, or if there is no other: what follows changes W."""
        self._state = state
        iterations = len(state.history) - self._iterations
        if iterations >= self._most_iterations or self._is_time() or state.is_last(self._job.settings):
            self.write()

    def after_pass(self, state: DenoiseState) -> None:
        """Learn how far denoising has come, and write it if that is due."""
        self.denoising, self._passes = state, self._passes + 1
        if self._passes - self._iterations >= self._most_iterations or self._is_time():
            self.write()

    def before_pass(self) -> None:
        """Stop, if asked to, with a checkpoint of the latest iteration.

        Raises
        ------
        StoppedError
            Which says how to go on.
        """
        if self._checkpoints is None or self._asked is None or not self._asked.stop():
            return
        if self._done() > self._iterations:
            self.write()
        raise StoppedError(f"stopped as asked; go on by `scialm-dask resume {self._checkpoints.folder}`")

    def check_source(self) -> None:
        """Raise `InputError` if the store that is read has changed."""
        if fingerprint(self._job.matrix.rows) != self._source:
            after = "" if self._checkpoints is None else f" and `scialm-dask resume {self._checkpoints.folder}`"
            raise InputError(
                f"{self._job.matrix.name}: has changed since the run began; put back what was there{after}, or begin "
                "anew"
            )

    def write(self) -> None:
        """Write a checkpoint of what is known now.

        Raises
        ------
        OutputError
            If it cannot be written; those before it are as they were.
        InputError
            If the source has changed.
        """
        if self._checkpoints is None or self._asked is None:
            return
        self.check_source()
        files = self._checkpoints.begin()
        try:
            saved, arrays = self._arrays(files)
            checkpoint = self._checkpoints.commit(files, self._notes(self._asked), saved | arrays)
        except BaseException as error:
            self._checkpoints.abandon(files)
            if isinstance(error, OSError):
                raise self._checkpoints.error(error) from error
            raise
        if self._operator is not None and self._operator.depends_on_workers and saved:
            self._operator.load(checkpoint.files, saved, self._operator.passes)
        self._written(self._done())

    def _done(self) -> int:
        """Count the iterations, or passes of denoising, that are known."""
        return self._passes if self._state is None else len(self._state.history)

    def _is_time(self) -> bool:
        return time.monotonic() - self._time >= self._most_seconds

    def _written(self, iterations: int) -> None:
        self._iterations, self._time = iterations, time.monotonic()

    def _arrays(self, files: ArrayFolder) -> tuple[dict[str, list[ArrayFile]], dict[str, list[ArrayFile]]]:
        """Write the arrays: those of the operator, and the others."""
        saved: dict[str, list[ArrayFile]] = {}
        others: dict[str, Any] = {}
        if self.denoising is not None:
            others = {"basis": self.denoising.basis}
            if (weights := self.denoising.weights) is not None:
                others |= {"component_weight": weights.component, "residual_weight": weights.residual}
        if self._found is not None:
            others["gene_sums"] = self._found.gene_sums
        if self._operator is not None and self._state is not None:
            # Passes of the next SVD may have made another sketch since, but then they will do so again.
            product = self._state.product
            saved = self._operator.save(files, sketch=product is not None)
            if product is not None:
                others |= {"cross": product.cross, "gram": product.gram}
        return saved, {name: [files.put(name, 0, array)] for name, array in others.items() if array is not None}

    def _notes(self, asked: Checkpointing) -> dict[str, Any]:
        loop = None
        if self._state is not None and self._operator is not None:
            loop = {
                "history": [astuple(iteration) for iteration in self._state.history],
                "penalty": astuple(self._state.penalty),
                "chosen": self._state.chosen,
                "values": self._state.values,
                "reason": self._state.reason,
                "passes": self._operator.passes,
                "observations": list(self._operator.observations),
            }
        denoising = None
        if self.denoising is not None:
            weights = self.denoising.weights
            unseen = None if weights is None else asdict(weights.unseen)
            denoising = {"passes": self.denoising.passes, "unseen": unseen}
        return {
            "program": __version__,
            "run": self._job.notes(),
            "every": asked.every,
            "result": dict(asked.result),
            "matrix": None if self._found is None else _identity(self._found),
            "denoising": denoising,
            "loop": loop,
            "finished": None,
        }


def _identity(found: Survey) -> dict[str, Any]:
    """Sum up what tells one matrix from another, but for its sums."""
    digest = hashlib.sha256()
    for counts in (found.block_gene_counts, found.cell_counts):
        digest.update(np.ascontiguousarray(counts).tobytes())
    return {"n_observed": found.n_observed, "integer": found.integer, "pattern": digest.hexdigest()}
