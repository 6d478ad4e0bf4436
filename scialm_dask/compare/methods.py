"""Methods by name, each run in a process of its own.

So time and memory are those of the method alone, and a crash ends nothing else. The process reads its task from a JSON
file and writes a JSON file and the imputed matrix, as a store or arrays (.npy). Nothing is pickled. If this process is
killed, a third one, the watcher, kills the method and removes the folder.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dask
import dask.array as da
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scialm_dask.api import impute
from scialm_dask.compare import peers
from scialm_dask.compare.peers import Task
from scialm_dask.config import Settings, preset
from scialm_dask.data.csr import RowBlocks
from scialm_dask.errors import InputError
from scialm_dask.imputation import Imputation
from scialm_dask.reduction import stacked
from scialm_dask.run.job import peak_memory

OURS = ("denoise", "complete", "paper")
_REQUEST, _ANSWER, _LOG = "request.json", "answer.json", "log.txt"
_INSTALL = "install it by `pip install 'scialm-dask[bench]'`"
_PANEL_BYTES = 16 << 20
_WATCH = """
import os, shutil, signal, sys, time
child = 0
for line in sys.stdin:
    child = int(line)
if child:
    try:
        os.killpg(child, signal.SIGKILL)
        time.sleep(0.2)
    except ProcessLookupError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
_watchers: list[subprocess.Popen[str]] = []


class Method(NamedTuple):
    """An imputation method."""

    label: str  # in figures
    takes: Literal["counts", "normalised", "either"]  # either: counts if they are known
    complete: Callable[[Task], Any]  # returns a dense matrix, a pair of factors or an Imputation, on the scale it takes
    needs: tuple[str, ...] = ()  # modules to import before time and memory are measured
    seconds: tuple[float, float] = (5.0, 0.5)  # on one core: for the start, and per million entries including zeros


def _ours(name: str) -> Callable[[Task], Any]:
    def complete(task: Task) -> Any:
        result = impute(task.path, preset=name, **{"seed": task.seed, **task.settings})
        task.note = f"rank {result.rank}, {result.summary['passes']} passes"
        return result

    return complete


_RUN = ("scialm_dask.run.job",)
METHODS = {
    "denoise": Method("scIALM denoise", "counts", _ours("denoise"), _RUN, (8, 0.1)),
    "complete": Method("scIALM complete", "normalised", _ours("complete"), _RUN, (10, 0.5)),
    "paper": Method("scIALM as published", "normalised", _ours("paper"), _RUN, (8, 10)),
    "magic": Method("MAGIC", "normalised", peers.magic, ("magic",), (10, 0.4)),
    "scvi": Method("scVI", "counts", peers.scvi, ("anndata", "scvi"), (30, 20)),
    "alra": Method("ALRA", "counts", peers.alra, ("sklearn.utils.extmath",), (5, 0.2)),
    "knn": Method("kNN smoothing", "counts", peers.knn, ("sklearn.decomposition", "sklearn.neighbors"), (5, 0.2)),
    "softimpute": Method("softImpute", "normalised", peers.softimpute, ("scipy.sparse.linalg",), (40, 1)),
    "gene-mean": Method("gene mean", "normalised", peers.gene_mean, (), (5, 0.02)),
    "auto": Method("scIALM auto", "either", _ours("auto"), _RUN, (5, 0.1)),  # denoise or complete
}


# methods that are not run here: label, scores and words in the text of the publication
_COMPARED = "10 % masked: Pearson of scIALM higher by 3.2 % (PBMC) and 2.1 % (Klein), cosine by 3.5 % and 6.78 %"
QUOTED: dict[str, tuple[str, dict[str, dict[str, float]], str]] = {
    "dca": ("DCA", {}, _COMPARED),
    "saver": ("SAVER", {"PBMC": {"pearson": 0.7768}, "Campbell": {"pearson": 0.3389}}, "10 % masked"),
    "scimpute": ("scImpute", {"PBMC": {"mse": 32.9176}, "Klein": {"mse": 288.8302}}, "10 % masked"),
}


@dataclass(frozen=True)
class Contestant:
    """A method by name, with values of swept fields of `Settings`."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The settings in words."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())

    def __str__(self) -> str:
        return f"{self.method} {self.words}".strip()


def label_of(method: str, setting: str = "") -> str:
    """Return the label of a method in figures and tables."""
    return f"{(METHODS.get(method) or QUOTED.get(method) or [method])[0]} {setting}".strip()


def labelled(scores: pd.DataFrame) -> pd.DataFrame:
    """Return scores with a column ``label``, the label of the method."""
    return scores.assign(label=list(map(label_of, scores["method"], scores["setting"])))


def find_method(name: str) -> Method:
    """Return a method by its name, or import it as ``module:function``. Raises `InputError` if there is none.

    The function takes a `Task` and returns the imputed matrix on the scale of normalised counts, or of raw counts if it
    has an attribute ``takes`` equal to ``"counts"``.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, function = name.partition(":")
    if not function:
        known = ", ".join([*METHODS, *QUOTED, "peers", "all"])
        raise InputError(f"no method is called {name!r}; choose from {known}, or give your own as module:function")
    try:
        complete = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"method {name} cannot be imported ({error}); check its name and PYTHONPATH") from error
    return Method(function, getattr(complete, "takes", "normalised"), complete)


def contestants(names: Iterable[str], sweeps: Iterable[str] = ()) -> list[Contestant]:
    """Return the methods to run, in order and without duplicates; quoted methods are left out.

    Our presets are run at each combination of values of the `sweeps`, such as ``"max_rank=10,20,…,50"``. Values that
    contain commas are separated by semicolons. Raises `InputError` if a method, field or value is invalid, or a preset
    does not use the field.
    """
    names, sweeps = list(dict.fromkeys(expanded(names))), list(sweeps)
    if sweeps and not set(names) & set(OURS):
        raise InputError(f"sweep is {sweeps[0]!r}, but no method has settings to sweep; add denoise, complete or paper")
    combinations = [dict(pairs) for pairs in itertools.product(*map(_sweep, sweeps))]
    listed = [Contestant(n, c) for n in names if n not in QUOTED for c in (combinations if n in OURS else [{}])]
    for each in listed:
        find_method(each.method)
        if each.method in OURS:
            preset(each.method, **each.settings)
    return listed


def expanded(names: Iterable[str]) -> list[str]:
    """Return the names with the groups ``"peers"`` and ``"all"`` replaced by their members."""
    runnable = [name for name in METHODS if name != "auto"]
    groups = {"peers": [*(name for name in runnable if name not in OURS), *QUOTED], "all": [*runnable, *QUOTED]}
    return [each for name in names for each in groups.get(name, [name])]


def _sweep(words: str) -> list[tuple[str, Any]]:
    """Read ``field=value,value,…`` into pairs of field and value; an ellipsis stands for even steps."""
    name, equals, listed = words.partition("=")
    types: dict[str, type[Any]] = {f.name: type(f.default) for f in fields(Settings)}
    name = name.strip().replace("-", "_")
    if not equals or name not in types:
        raise InputError(f"sweep is {words!r}; give field=value,value with a field out of {', '.join(types)}")
    values = [value.strip().replace("...", "…") for value in listed.split(";" if ";" in listed else ",")]
    read: Callable[[str], Any] = types[name] if types[name] in (int, float) else str
    try:
        if "…" in values:
            at = values.index("…")
            before, first, last = (int(values[i]) for i in (max(at - 2, 0), at - 1, at + 1))
            steps = range(2 * first - before, last, first - before)
            values = [*values[:at], *map(str, steps), *values[at + 1 :]]
        return [(name, read(value)) for value in values]
    except (ValueError, IndexError):
        raise InputError(
            f"sweep is {words!r}; give values of {name} separated by commas, such as 10,20,30 or 10,20,…,100"
        ) from None


@dataclass(frozen=True)
class Outcome:
    """The outcome of running a method."""

    status: str  # ok, failed, out of memory, timed out, needs counts or not installed
    seconds: float = float("nan")  # wall time, without imports
    peak_bytes: float = float("nan")  # peak memory in excess of its imports
    imports_bytes: float = float("nan")
    note: str = ""  # of the method, or the error


@contextlib.contextmanager
def watched_folder(parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder. At the end it is removed and methods are killed, even if this process is killed."""
    folder = tempfile.mkdtemp(prefix="scialm-evaluate-", dir=parent)
    command = [sys.executable, "-I", "-S", "-c", _WATCH, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as watcher:
        _watchers.append(watcher)
        try:
            yield Path(folder)
        finally:
            _watchers.remove(watcher)
            shutil.rmtree(folder, ignore_errors=True)


def _watch(child: int) -> None:
    """Send the watchers the process to kill if this one is killed; 0 for none."""
    for watcher in _watchers:
        assert watcher.stdin is not None
        with contextlib.suppress(OSError):
            watcher.stdin.write(f"{child}\n")
            watcher.stdin.flush()


def run_isolated(
    method: str, task: Task, folder: Path, *, memory_limit: int | None = None, timeout: float | None = None
) -> Outcome:
    """Run a method in a new process. On success `folder` has the imputed matrix; see `read_answer`.

    The process may use `memory_limit` bytes of data in excess of its imports, and is killed after `timeout` seconds.
    """
    (folder / _ANSWER).unlink(missing_ok=True)  # of an earlier run
    request = {"method": method, "memory_limit": memory_limit, **asdict(task), "path": str(task.path)}
    (folder / _REQUEST).write_text(json.dumps(request))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command, began = [sys.executable, "-m", __name__, str(folder)], time.perf_counter()
    with (
        open(folder / _LOG, "wb") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        ) as child,
    ):
        _watch(child.pid)
        try:
            code = child.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome("timed out", time.perf_counter() - began, note=f"ended after {timeout:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and its child processes
            _watch(0)
    if (folder / _ANSWER).exists():
        return Outcome(**json.loads((folder / _ANSWER).read_text()))
    log_lines = (folder / _LOG).read_text(errors="replace").splitlines()
    last, seconds = next((line for line in reversed(log_lines) if line.strip()), ""), time.perf_counter() - began
    if code == -signal.SIGKILL or (code < 0 and memory_limit) or "memory" in last.lower():
        return Outcome("out of memory", seconds, note=f"process ended by signal {-code}" if code < 0 else last)
    return Outcome("failed", seconds, note=f"process ended with code {code}: {last.strip()}"[:300])


def _measured(name: str, folder: Path, memory_limit: int | None, task: Task) -> Outcome:
    """Run a method in this process, keep its answer in `folder`, and return its time and memory."""
    method = find_method(name)
    try:
        for module in ("anndata", "dask.array", "pandas", *method.needs):
            importlib.import_module(module)
    except ImportError as error:
        return Outcome("not installed", note=f"{error}; {_INSTALL}")
    imports = peak_memory()
    if memory_limit is not None and (proc := Path("/proc/self/status")).exists():  # Linux alone limits private data
        import resource

        held = int(next(line.split()[1] for line in proc.read_text().splitlines() if line.startswith("VmData")))
        resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + memory_limit, resource.RLIM_INFINITY))
    status, began = "ok", time.perf_counter()
    try:
        _keep(method.complete(task), folder)
    except Exception as error:  # any failure becomes a row of the table
        lost = isinstance(error, MemoryError) or ("memory" in str(error).lower() and "alloc" in str(error).lower())
        last = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        status, task.note = "out of memory" if lost else "failed", " ".join(words.split())[:300]
    return Outcome(status, time.perf_counter() - began, peak_memory() - imports, imports, task.note)


def _keep(answer: Any, folder: Path) -> None:
    """Write the matrix that a method returned. Raises `ValueError` unless its numbers are finite."""
    if isinstance(answer, Imputation):
        answer.to_zarr(folder / "result.zarr")
        return
    parts = {"left": answer[0], "right": answer[1].T} if isinstance(answer, tuple) else {"dense": np.asarray(answer)}
    if isinstance(answer, tuple) and answer[0].shape[1] != answer[1].shape[1]:
        raise ValueError(f"gave factors of {answer[0].shape[1]} and {answer[1].shape[1]} columns")
    for name, values in parts.items():
        target = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=values.shape)
        for start, stop in RowBlocks.panels(len(values), values.shape[1], _PANEL_BYTES) if values.size else ():
            if not np.isfinite(values[start:stop]).all():
                raise ValueError("gave values that are not finite")
            target[start:stop] = values[start:stop]


def read_answer(folder: Path, scale: NDArray[np.floating] | None = None) -> da.Array:
    """Return the imputed matrix in a folder: lazy, cells × genes, clipped at 0, cells multiplied by `scale`."""

    def read(name: str) -> Any:
        return np.load(folder / f"{name}.npy", mmap_mode="r" if name == "dense" else None, allow_pickle=False)

    if (folder / "result.zarr").exists():
        values = Imputation.open(folder / "result.zarr").to_dask()
    elif (folder / "dense.npy").exists():
        dense = read("dense")
        values = by_panels(lambda cells: np.asarray(dense[cells]), dense.shape)
    else:
        left, right = read("left"), read("right")
        values = by_panels(lambda cells: left[cells] @ right, (len(left), right.shape[1]))
    if scale is not None:
        values = values * da.from_array(scale.astype(np.float32)[:, None], chunks=(values.chunks[0], 1))
    return da.maximum(values, np.float32(0))


def by_panels(read: Any, shape: tuple[int, int]) -> da.Array:
    """Return a lazy float32 array with the rows that ``read(slice)`` returns."""
    visit, rows = dask.delayed(read, pure=False, traverse=False), RowBlocks.panels(*shape, _PANEL_BYTES)
    return stacked([visit(slice(*span)) for span in rows], rows.sizes, shape[1])


if __name__ == "__main__":
    place = Path(sys.argv[1])
    request = json.loads((place / _REQUEST).read_text())
    outcome = _measured(request.pop("method"), place, request.pop("memory_limit"), Task(**request))
    partial = place / (_ANSWER + ".partial")
    partial.write_text(json.dumps(asdict(outcome)))
    partial.replace(place / _ANSWER)
