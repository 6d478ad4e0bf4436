"""The whole run is killed at set points: never a wrong answer, never a lost checkpoint."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import dask
import faults
import numpy as np
import pytest
from problems import low_rank_counts

from scialm_dask import Imputation, impute
from scialm_dask.data.checkpoint import Checkpoints
from scialm_dask.errors import CheckpointError

POINTS = {
    "first pass": ("linalg.kernels:visit", 1),
    "first SVD": ("linalg.kernels:visit", 8),
    "a later pass": ("linalg.kernels:visit", 21),
    "its scratch": ("data.scratch:ZarrScratch._write", 40),
    "the first manifest": ("data.checkpoint:_manifest_of", 1),
    "an array of a checkpoint": ("data.checkpoint:ArrayFolder.put", 25),
    "a checkpoint before its manifest": ("data.checkpoint:_manifest_of", 4),
    "before an old checkpoint is removed": ("data.checkpoint:Checkpoints.remove", 2),
    "while an old checkpoint is removed": ("data.checkpoint:Checkpoints._delete", 2),
    "the result": ("solve.stored:write_left", 1),
    "after the result": ("run.checkpointing:finish", 1),
}

# Each run is a fork of one process that has imported everything and has no threads.
RUNS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import anndata, dask.array, faults
import scialm_dask.run.job, scialm_dask.solve.biological_zeros
from scialm_dask.__main__ import main
from scialm_dask.data.checkpoint import Checkpoints

def run(folder, target, call):
    os.chdir(folder)
    sys.stdout = sys.stderr = open("output", "w")
    commit = Checkpoints.commit
    def logged(self, files, notes, arrays):
        written = commit(self, files, notes, arrays)
        with open("log", "a") as log:
            print(len(notes["state"]["history"]) if notes["state"] else 0, file=log)
        return written
    Checkpoints.commit = logged
    faults.inject(f"scialm_dask.{target}", "calls", {call: faults.die})
    with dask.config.set(scheduler="synchronous"):
        main(WORDS)

for folder, (target, call) in json.load(sys.stdin).items():
    child = os.fork()
    if child == 0:
        try:
            run(folder, target, call)
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

SETTINGS = {"preset": "paper", "max_iterations": 8}
WORDS = [
    *("impute", "../source.h5ad", "r.zarr", "--preset", "paper", "--max-iterations", "8", "--blocks", "2", "--quiet"),
    *("--scratch", "zarr:.", "--checkpoint", "c", "--checkpoint-every", "1"),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs that were killed, by the point."""
    import anndata

    root = tmp_path_factory.mktemp("killed")
    counts = low_rank_counts(60, 40, density=0.4, seed=3)
    anndata.AnnData(counts).write_h5ad(root / "source.h5ad")
    folders = {point: root / point.replace(" ", "-") for point in POINTS}
    for folder in folders.values():
        folder.mkdir()
    program = RUNS.replace("WORDS", repr(WORDS))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(Path(faults.__file__).parent)],
        input=json.dumps({str(folders[point]): fault for point, fault in POINTS.items()}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(POINTS), [
        f.joinpath("output").read_text() for f in folders.values()
    ]
    with dask.config.set(scheduler="synchronous"):
        return folders, impute(root / "source.h5ad", **SETTINGS)


@pytest.mark.parametrize("point", list(POINTS))
def test_a_killed_run_goes_on(killed, cli, monkeypatch, point):
    folders, expected = killed
    monkeypatch.chdir(folders[point])
    written = [int(line) for line in Path("log").read_text().split()] if os.path.exists("log") else []
    with dask.config.set(scheduler="synchronous"):
        if not written:
            refused = cli("resume", "c", "--quiet")
            assert refused.exit_code == 2
            assert "holds no checkpoint that can be read" in refused.stderr
            result = cli(*WORDS, "--json")
        else:
            with Checkpoints("c") as checkpoints:
                assert whole(checkpoints) == checkpoints.names()
            result = cli("resume", "c", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout).get("resumed_after_iteration", max(written, default=0)) >= max(written, default=0)
    found = Imputation.open("r.zarr")
    for one, two in ((found.left.compute(), expected.left.compute()), (found.right, expected.right)):
        assert np.linalg.norm(one - two) <= 1e-4 * np.linalg.norm(two)
    left = {name for name in os.listdir() if not name.endswith(".partial")}  # of a result, whose name is its own
    assert left == {"c", "calls", "output", "r.zarr"} | ({"log"} if written else set())
    assert len([name for name in os.listdir("c") if not name.startswith(".")]) == 1


def whole(checkpoints):
    def readable(name):
        try:
            return checkpoints.read(name)
        except CheckpointError:
            return None

    return [name for name in checkpoints.names() if readable(name)]
