"""One method, one matrix, a process of its own: time and memory are its alone, and so is its death.

The process reads what to do from a JSON file and leaves a JSON file and arrays (.npy); nothing is pickled.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scialm_dask.compare.methods import find_method
from scialm_dask.compare.peers import Task
from scialm_dask.evaluate.predictions import write_prediction
from scialm_dask.run.result import peak_memory

__all__ = ["Outcome", "Request", "run_isolated"]

_REQUEST, _ANSWER, _LOG = "request.json", "answer.json", "log.txt"
_INSTALL = "install it by `pip install 'scialm-dask[bench]'`"


@dataclass(frozen=True)
class Request:
    """What to run.

    Parameters
    ----------
    method
        Name, or ``module:function``.
    path
        AnnData store whose X it is to complete.
    scale
        A .npy file with what to multiply each cell of the answer with; None for ones.
    seed, zeros_matter, settings
        As in `Task`.
    memory_limit
        Bytes of data that the process may hold over what its imports take; None for no limit.
    """

    method: str
    path: str
    scale: str | None = None
    seed: int = 0
    zeros_matter: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    memory_limit: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Parameters
    ----------
    status
        ``"ok"``, ``"failed"``, ``"out of memory"``, ``"timed out"`` or ``"not installed"``.
    seconds
        Wall time of the method, imports not counted.
    peak_bytes
        Most memory that it held over what its imports took.
    imports_bytes
        What those took.
    note
        What the method says of itself, or what went wrong.
    """

    status: str
    seconds: float = float("nan")
    peak_bytes: float = float("nan")
    imports_bytes: float = float("nan")
    note: str = ""


def run_isolated(request: Request, folder: Path, *, time_limit: float | None = None) -> Outcome:
    """Run a method in a new process and wait for it.

    Parameters
    ----------
    request
        What to run.
    folder
        A folder of its own, for what it leaves: on success its prediction, see `read_prediction`.
    time_limit
        Seconds after which it is ended.
    """
    (folder / _ANSWER).unlink(missing_ok=True)  # of a run before, not to be taken for one of this
    (folder / _REQUEST).write_text(json.dumps(asdict(request)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", __name__, str(folder)]
    began = time.perf_counter()
    with (
        open(folder / _LOG, "wb") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        ) as child,
    ):
        try:
            code = child.wait(timeout=time_limit)
        except subprocess.TimeoutExpired:
            return Outcome("timed out", time.perf_counter() - began, note=f"ended after {time_limit:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and whatever it has started
    if (folder / _ANSWER).exists():
        return Outcome(**json.loads((folder / _ANSWER).read_text()))
    return _of_the_dead(code, request, time.perf_counter() - began, (folder / _LOG).read_text(errors="replace"))


def _of_the_dead(code: int, request: Request, seconds: float, log: str) -> Outcome:
    """Judge by how a process ended that left no answer."""
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")
    if code == -signal.SIGKILL or (code < 0 and request.memory_limit) or "memory" in last.lower():
        return Outcome("out of memory", seconds, note=f"process ended by signal {-code}" if code < 0 else last)
    return Outcome("failed", seconds, note=f"process ended with code {code}: {last}"[:300])


def _main(folder: Path) -> None:
    request = Request(**json.loads((folder / _REQUEST).read_text()))
    outcome = _measured(request, folder)
    partial = folder / (_ANSWER + ".partial")
    partial.write_text(json.dumps(asdict(outcome)))
    partial.replace(folder / _ANSWER)


def _measured(request: Request, folder: Path) -> Outcome:
    method = find_method(request.method)
    try:
        for module in ("anndata", "dask.array", "pandas", *method.needs):
            importlib.import_module(module)
    except ImportError as error:
        return Outcome("not installed", note=f"{error}; {_INSTALL}")
    scale = None if request.scale is None else np.load(request.scale, allow_pickle=False)
    task = Task(Path(request.path), request.seed, request.zeros_matter, request.settings)
    imports = peak_memory()
    if request.memory_limit is not None:
        _limit_memory(request.memory_limit)
    began = time.perf_counter()

    def outcome(status: str, note: str) -> Outcome:
        return Outcome(status, time.perf_counter() - began, peak_memory() - imports, imports, note)

    try:
        write_prediction(method.complete(task), folder, scale)
    except MemoryError as error:
        return outcome("out of memory", _words(error))
    except Exception as error:  # any other failure of a method is a row of the table too
        status = "out of memory" if "memory" in str(error).lower() and "alloc" in str(error).lower() else "failed"
        return outcome(status, _words(error))
    return outcome("ok", task.note)


def _words(error: BaseException) -> str:
    """Say what was raised, and where."""
    *_, last = traceback.extract_tb(error.__traceback__)
    where = f"{Path(last.filename).name}:{last.lineno}"
    return " ".join(f"{type(error).__name__}: {error} ({where})".split())[:300]


def _limit_memory(limit: int) -> None:
    """Let allocations fail that would pass `limit` bytes of private data over what is held now (Linux alone)."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        held = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmData")))
        resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
