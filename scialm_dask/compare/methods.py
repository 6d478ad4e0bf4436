"""The methods that can be compared, by name, and how one is run: in a process of its own.

Time and memory are then the method's alone, and so is its death. The process reads what to do from a JSON file, and
leaves a JSON file and its answer: a store or arrays (.npy). Nothing is pickled. A watcher, a third process, ends it
and removes the folder should this one be killed.
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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import dask
import numpy as np
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

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

OURS = ("denoise", "complete", "paper")
_ELLIPSES = ("...", "…")
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
    """A way to complete a matrix."""

    label: str  # in figures
    takes: Literal["counts", "normalised", "either"]  # either: counts where they are known
    complete: Callable[[Task], Any]  # gives a dense matrix, a pair of factors or an Imputation, on the scale it takes
    needs: tuple[str, ...] = ()  # modules, imported before time and memory are taken
    # about what it takes on one core, imports included: to begin with, and for each million of entries, zeros too
    seconds: tuple[float, float] = (5.0, 0.5)


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
    "auto": Method("scIALM auto", "either", _ours("auto"), _RUN, (5, 0.1)),  # one of the first two
}


class Quoted(NamedTuple):
    """What the publication's text says of a method that is not run here."""

    label: str
    scores: dict[str, dict[str, float]]
    words: str


_COMPARED = "10 % masked: Pearson of scIALM higher by 3.2 % (PBMC) and 2.1 % (Klein), cosine by 3.5 % and 6.78 %"
QUOTED = {
    "dca": Quoted("DCA", {}, _COMPARED),
    "saver": Quoted("SAVER", {"PBMC": {"pearson": 0.7768}, "Campbell": {"pearson": 0.3389}}, "10 % masked"),
    "scimpute": Quoted("scImpute", {"PBMC": {"mse": 32.9176}, "Klein": {"mse": 288.8302}}, "10 % masked"),
}


@dataclass(frozen=True)
class Contestant:
    """A method, by name, at some settings: fields of `Settings` that are swept."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The settings in words, empty where there are none."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())

    def __str__(self) -> str:
        return f"{self.method} {self.words}".strip()


def label_of(method: str, setting: str = "") -> str:
    """Return what figures and tables call a method."""
    known = METHODS.get(method) or QUOTED.get(method)
    return f"{known.label if known else method} {setting}".strip()


def labelled(scores: pd.DataFrame) -> pd.DataFrame:
    """Add a column ``label``, what figures call the method of each row."""
    return scores.assign(label=list(map(label_of, scores["method"], scores["setting"])))


def find_method(name: str) -> Method:
    """Look a method up by its name, or import it as ``module:function``. Raises `InputError` if there is none.

    Such a function takes a `Task` and returns the completed matrix, on the scale of normalised counts, or of raw counts
    if it has an attribute ``takes`` that is ``"counts"``.
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
    """List what is compared, in order and once each; what is quoted is left out.

    Our presets are run at each combination of values of the `sweeps`, such as ``"max_rank=10,20,…,50"``. Values that
    hold commas are separated by semicolons.

    Raises
    ------
    InputError
        If a method, a field or a value is not valid, or a preset does not use the field.
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
    """Replace ``"peers"`` and ``"all"`` by the names they stand for."""
    runnable = [name for name in METHODS if name != "auto"]
    groups = {"peers": [*(name for name in runnable if name not in OURS), *QUOTED], "all": [*runnable, *QUOTED]}
    return [each for name in names for each in groups.get(name, [name])]


def _sweep(words: str) -> list[tuple[str, Any]]:
    """Read ``field=value,value,…`` into pairs."""
    name, equals, listed = words.partition("=")
    types: dict[str, type[Any]] = {f.name: type(f.default) for f in fields(Settings)}
    name = name.strip().replace("-", "_")
    if not equals or name not in types:
        raise InputError(f"sweep is {words!r}; give field=value,value with a field out of {', '.join(types)}")
    values = [value.strip() for value in listed.split(";" if ";" in listed else ",")]
    read: Callable[[str], Any] = types[name] if types[name] in (int, float) else str
    try:
        return [(name, read(value)) for value in _filled(values)]
    except (ValueError, IndexError):
        raise InputError(
            f"sweep is {words!r}; give values of {name} with commas between, such as 10,20,30 or 10,20,…,100"
        ) from None


def _filled(values: list[str]) -> list[str]:
    """Replace an ellipsis by the even steps that it stands for."""
    if not set(values) & set(_ELLIPSES):
        return values
    at = next(i for i, value in enumerate(values) if value in _ELLIPSES)
    before, first, last = (int(values[i]) for i in (max(at - 2, 0), at - 1, at + 1))
    return values[:at] + [str(v) for v in range(2 * first - before, last, first - before)] + values[at + 1 :]


@dataclass(frozen=True)
class Outcome:
    """What became of a method."""

    status: str  # ok, failed, out of memory, timed out, needs counts or not installed
    seconds: float = float("nan")  # wall time, without imports
    peak_bytes: float = float("nan")  # most memory over what its imports took
    imports_bytes: float = float("nan")
    note: str = ""  # what the method says of itself, or what went wrong


@contextlib.contextmanager
def watched_folder(parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Make a temporary folder. It goes at the end, and so do methods that run, even if this process is killed."""
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
    """Tell the watchers which process to end if this one is killed; 0 for none."""
    for watcher in _watchers:
        assert watcher.stdin is not None
        with contextlib.suppress(OSError):
            watcher.stdin.write(f"{child}\n")
            watcher.stdin.flush()


def run_isolated(
    method: str, task: Task, folder: Path, *, memory_limit: int | None = None, timeout: float | None = None
) -> Outcome:
    """Run a method in a new process and wait for it; on success `folder` has its answer, see `read_answer`.

    The process may hold `memory_limit` bytes of data over what its imports take, and is ended after `timeout` seconds.
    """
    (folder / _ANSWER).unlink(missing_ok=True)  # of a run before, not to be taken for one of this
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
                os.killpg(child.pid, signal.SIGKILL)  # and whatever it has started
            _watch(0)
    if (folder / _ANSWER).exists():
        return Outcome(**json.loads((folder / _ANSWER).read_text()))
    log_lines = (folder / _LOG).read_text(errors="replace").splitlines()
    last, seconds = next((line for line in reversed(log_lines) if line.strip()), ""), time.perf_counter() - began
    if code == -signal.SIGKILL or (code < 0 and memory_limit) or "memory" in last.lower():
        return Outcome("out of memory", seconds, note=f"process ended by signal {-code}" if code < 0 else last)
    return Outcome("failed", seconds, note=f"process ended with code {code}: {last.strip()}"[:300])


def _main(folder: Path) -> None:
    request = json.loads((folder / _REQUEST).read_text())
    outcome = _measured(request.pop("method"), folder, request.pop("memory_limit"), Task(**request))
    partial = folder / (_ANSWER + ".partial")
    partial.write_text(json.dumps(asdict(outcome)))
    partial.replace(folder / _ANSWER)


def _measured(name: str, folder: Path, memory_limit: int | None, task: Task) -> Outcome:
    method = find_method(name)
    try:
        for module in ("anndata", "dask.array", "pandas", *method.needs):
            importlib.import_module(module)
    except ImportError as error:
        return Outcome("not installed", note=f"{error}; {_INSTALL}")
    imports = peak_memory()
    if memory_limit is not None:
        _limit_memory(memory_limit)
    status, began = "ok", time.perf_counter()
    try:
        _keep(method.complete(task), folder)
    except Exception as error:  # any failure of a method is a row of the table too
        lost = isinstance(error, MemoryError) or ("memory" in str(error).lower() and "alloc" in str(error).lower())
        status, task.note = "out of memory" if lost else "failed", _words(error)
    return Outcome(status, time.perf_counter() - began, peak_memory() - imports, imports, task.note)


def _words(error: BaseException) -> str:
    """Say what was raised, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return " ".join(f"{type(error).__name__}: {error} ({where})".split())[:300]


def _limit_memory(limit: int) -> None:
    """Make allocations fail past `limit` bytes of private data over what is held now. Linux alone."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        held = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmData")))
        resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + limit, resource.RLIM_INFINITY))


def _keep(answer: Any, folder: Path) -> None:
    """Write what a method has returned. Raises `ValueError` if that is no matrix of finite numbers."""
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
    """Return the answer in a folder: lazy, cells × genes, not negative, each cell multiplied by its `scale`."""
    import dask.array as da

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
    """Return a lazy float32 array whose rows are what ``read(slice)`` returns."""
    visit, rows = dask.delayed(read, pure=False, traverse=False), RowBlocks.panels(*shape, _PANEL_BYTES)
    return stacked([visit(slice(*span)) for span in rows], rows.sizes, shape[1])


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
