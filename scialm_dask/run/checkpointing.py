"""A run as it was asked for, in a checkpoint and out of it again."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from scialm_dask.arguments import short_repr, validated
from scialm_dask.config import Settings
from scialm_dask.data.checkpoint import Checkpoint, Checkpoints
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import lasting
from scialm_dask.errors import CheckpointError, InputError

EVERY = "10 minutes"


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
