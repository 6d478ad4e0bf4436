"""What the benchmarks share: a process of its own for each measurement, its peak memory, the machine."""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
FOLDER = Path(__file__).parent


def peak_memory() -> int:
    """Most bytes this process has held. Unlike ru_maxrss it starts from nothing in a child process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def in_child(module: str, function: str, memory_cap: float = np.inf, **arguments: Any) -> Record:
    """Call a function of a benchmark in a process of its own.

    Returns what it returns, with ``seconds`` and ``peak_GB`` if it does not tell them, and ``imports_GB``, the peak
    before the call; ``survived`` is false if the process died or took more than `memory_cap` GB and was ended.
    """
    command = [sys.executable, __file__, module, function, json.dumps(arguments)]
    path = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as child:
        while True:
            try:
                output, _ = child.communicate(timeout=0.05)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, _resident(child.pid))
                if peak > memory_cap * 2**30:
                    child.kill()
    if child.returncode == 0:
        return {"survived": True, **json.loads(output.splitlines()[-1])}
    spent = time.perf_counter() - began
    return {"survived": False, "seconds": round(spent, 2), "peak_GB": gigabytes(peak)}


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has just ended
        return 0


def _child() -> None:
    module, function, arguments = sys.argv[1:]
    for library in ("anndata", "dask.array", "numba", "scialm_dask.run.job"):
        importlib.import_module(library)  # so that what follows is the work alone
    call = getattr(importlib.import_module(module), function)
    imports, began = peak_memory(), time.perf_counter()
    answer = call(**json.loads(arguments))
    own = {"seconds": round(time.perf_counter() - began, 2), "peak_GB": gigabytes(peak_memory())}
    print(json.dumps({**own, **answer, "imports_GB": gigabytes(imports)}))


def gigabytes(size: float) -> float:
    """Turn bytes into GB of 2**30."""
    return round(size / 2**30, 3)


def interleaved(calls: dict[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Time calls in turns, after one turn that is not counted; seconds of each turn, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repetitions + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if turn:
                seconds[name].append(clock() - began)
    return seconds


def machine() -> Record:
    """Describe the processor, the memory and the libraries."""
    from importlib.metadata import version

    import psutil

    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "benchmark": "machine",
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_GB": gigabytes(psutil.virtual_memory().total),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "scipy", "numba", "dask", "zarr")},
    }


if __name__ == "__main__":
    _child()
