"""Runs side by side in threads and in forks of one process, and where there is little memory."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import numpy as np
import pytest
from problems import low_rank_counts

from scialm_dask import Imputation, impute

COUNTS = low_rank_counts(160, 60, density=0.4, seed=3)
RUNS = {
    "denoise": {"preset": "denoise"},
    "complete": {"preset": "complete", "max_rank": 5},
    "paper": {"preset": "paper", "max_iterations": 6},
}

FORKS = """
import multiprocessing, os, sys
sys.path[:0] = sys.argv[1:]
import scialm_dask
from test_processes import COUNTS, RUNS

def total(preset):
    return float(scialm_dask.impute(COUNTS, **RUNS[preset])[:, :].sum())

before = [total(preset) for preset in RUNS]
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(before == pool.map_async(total, RUNS).get(60))
"""

FORKS_OF_A_CLIENT = """
import os, sys
sys.path[:0] = sys.argv[1:]
import scialm_dask
from test_processes import COUNTS

if __name__ == "__main__":
    with scialm_dask.connect(cluster="local", workers=1, threads=1):
        result = scialm_dask.impute(COUNTS)
        if os.fork() == 0:
            for use in (lambda: scialm_dask.impute(COUNTS), lambda: result[0, 0]):
                try:
                    use()
                except scialm_dask.InputError as error:
                    print(error, flush=True)
            os._exit(0)
        os.wait()
"""


NO_CLIENT = """
import dask, distributed
from scialm_dask import impute
with dask.config.set(scheduler="dask.distributed"):
    try:
        impute([[1, 2], [3, 4]])
    except Exception as error:
        print(error)
"""


def output_of(program):
    words = [sys.executable, "-W", "ignore", "-c", program, *map(str, Path(__file__).parents[:2])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_client_that_is_asked_for_and_not_open_is_said_in_one_line():
    told = output_of(NO_CLIENT)
    assert told.startswith("Dask's configuration asks for a distributed.Client, but none is open; create one")


def test_a_fork_of_a_process_that_has_imputed_gives_the_same():
    assert output_of(FORKS) == "True"


@pytest.mark.slow
def test_a_fork_of_a_process_with_a_client_is_told_so_in_one_line():
    told = output_of(FORKS_OF_A_CLIENT).splitlines()
    assert told[0].startswith("the current distributed.Client belongs to the process that this one was forked from")
    assert told[1].startswith("the factors of this result are on workers that this process can no longer reach")
    assert len(told) == 2


@pytest.mark.slow
def test_many_runs_in_threads_of_one_process_give_what_each_gives_alone(tmp_path):
    def run(number):
        preset = list(RUNS)[number % 3]
        with dask.config.set(scheduler="threads"):
            impute(COUNTS, **RUNS[preset]).to_zarr(tmp_path / f"{number}.zarr")
            return Imputation.open(tmp_path / f"{number}.zarr")[:, :]

    alone = [run(number) for number in range(3)]
    with ThreadPoolExecutor(6) as pool:
        for number, found in enumerate(pool.map(run, range(3, 15))):
            np.testing.assert_allclose(found, alone[number % 3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 3 GiB"), RuntimeError("can't start new thread")])
def test_too_little_memory_is_said_in_one_line(cli, store_of, tmp_path, monkeypatch, error):
    """As under `ulimit -v`."""

    def fail(*_):
        raise error

    monkeypatch.setattr("scialm_dask.linalg.kernels.visit", fail)
    with dask.config.set(scheduler="synchronous"):
        done = cli("impute", store_of(COUNTS), tmp_path / "r.zarr", "--quiet")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"scialm-dask: error: there is not enough memory ({error}); free some, raise the")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r.zarr").exists()
