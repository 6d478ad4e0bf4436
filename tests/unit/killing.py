"""Kills runs at random moments, resumes them, and tells whether they end as one that was left alone; a program of its own.

    python killing.py PRESET SEED N_KILLS

Each process is killed, by SIGKILL, at a moment between its start and the time that a whole run takes. A run is
killed up to three times, then left alone. Prints a line for each run, and the number of kills at the end.
"""

import os
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import dask
import numpy as np

import scialm_dask.run.job
import scialm_dask.solve.biological_zeros  # noqa: F401  a fork of this process is to import nothing more
from scialm_dask import Imputation
from scialm_dask.__main__ import main as command
from scialm_dask.data.lease import clean

sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
from problems import low_rank_counts

RUNS = {
    "denoise": ["--preset", "denoise", "--max-rank", "8"],
    "complete": ["--preset", "complete", "--max-iterations", "20", "--max-rank", "8"],
}
BEGIN = ["impute", "../source.h5ad", "r.zarr", "--blocks", "3", "--scratch", "zarr:.", "--checkpoint", "c"]
MOST_KILLS = 3  # of one run
LONGEST = 60  # seconds of one process


def started(words, folder, limit):
    """Run a command in a fork, killed after some seconds; return its exit code and how long it took."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = open("output", "a")  # noqa: SIM115
            with dask.config.set(num_workers=2):
                command([*words, "--quiet"])
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code or 0)
        finally:
            os._exit(1)
    ended = os.pidfd_open(child)
    if not select.select([ended], [], [], limit)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began


def checkpoints(folder):
    return sorted(path.parent.name for path in folder.glob("c/*/manifest.json"))


def trial(folder, preset, rng, usual):
    """Run, kill and resume until there is a result; return the moments at which it was killed."""
    moments, begin = [], [*BEGIN, "--checkpoint-every", "1", *RUNS[preset]]
    while True:
        found = checkpoints(folder)
        limit = float(rng.uniform(0, usual)) if len(moments) < MOST_KILLS else LONGEST
        code, seconds = started(["resume", "c"] if found else begin, folder, limit)
        if code == 0:
            return moments
        if code != -signal.SIGKILL or limit == LONGEST:
            raise AssertionError(f"exit code {code} after {seconds:.2f} s: {(folder / 'output').read_text()}")
        moments.append(f"{seconds:.2f} s, {len(found)} before")


def difference(result, expected):
    parts = zip((result.left.compute(), result.right), (expected.left.compute(), expected.right), strict=True)
    return max(np.linalg.norm(one - two) / np.linalg.norm(two) for one, two in parts)


def main(preset, seed, n_kills):
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as parent, dask.config.set(scheduler="synchronous"):
        root, rng, kills = Path(parent), np.random.default_rng(seed), 0
        anndata.AnnData(low_rank_counts(1200, 300, density=0.3, seed=3)).write_h5ad(root / "source.h5ad")
        for name in ("first", "whole"):  # the first one compiles
            (root / name).mkdir()
            code, usual = started([*BEGIN, "--checkpoint-every", "1", *RUNS[preset]], root / name, LONGEST)
            assert code == 0, (root / name / "output").read_text()
        while kills < n_kills:
            (folder := root / "trial").mkdir()
            moments = trial(folder, preset, rng, usual)
            kills += len(moments)
            far = difference(Imputation.open(folder / "r.zarr"), Imputation.open(root / "whole" / "r.zarr"))
            print(f"{'same' if far <= 1e-4 else 'WRONG'} to {far:.1e}, killed after {moments}", flush=True)
            left = {name for name in os.listdir(folder) if not name.startswith((".r.zarr.", "scialm-"))}
            if left != {"c", "output", "r.zarr"}:
                print(f"WRONG: left {left}")
            clean(folder)
            if names := [name for name in os.listdir(folder) if name not in ("c", "output", "r.zarr")]:
                print(f"WRONG: not cleaned {names}")
            shutil.rmtree(folder)
        print(f"{kills} kills; a whole run took {usual:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
