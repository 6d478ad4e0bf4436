"""Runs on a real Slurm: workers as jobs, a job cancelled in the middle, a walltime that ends, the scripts that sites copy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from one_node import until

from scialm_dask import Imputation, impute

pytestmark = pytest.mark.slow

DEPLOY = Path(__file__).parents[2] / "deploy"
THIS_NODE = ("--nodes=1", "--mem=6G")
RUN = {"preset": "paper", "max_iterations": 14}
WORDS = ("--preset", "paper", "--max-iterations", "14")


@pytest.fixture(scope="module")
def cells(shared):
    return shared / "reference" / "klein_d2_d4_mask10.h5ad"


@pytest.fixture(scope="module")
def expected(cells):
    """What threads of one process give."""
    return impute(cells, **RUN)


@pytest.fixture
def jobqueue(on_slurm, monkeypatch, tmp_path):
    """dask-jobqueue as deploy/jobqueue/slurm.yaml sets it up, but for the network: all is on this machine."""
    folder = tmp_path / "configuration"
    folder.mkdir()
    shutil.copy(DEPLOY / "jobqueue" / "slurm.yaml", folder / "jobqueue.yaml")
    monkeypatch.setenv("DASK_CONFIG", str(folder))
    monkeypatch.setenv("DASK_JOBQUEUE__SLURM__INTERFACE", "lo")
    return on_slurm


def same(path, expected):
    found = Imputation.open(path)
    assert list(found.history["rank"]) == list(expected.history["rank"])
    rows = slice(0, 500)
    ours, theirs = (np.asarray(r.left[rows].compute()) @ r.right.T for r in (found, expected))
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def running(queue):
    return queue.jobs("running")


def test_two_jobs_give_what_threads_give_and_one_may_be_cancelled(jobqueue, cells, expected, tmp_path):
    command = [sys.executable, "-m", "scialm_dask", "impute", cells, tmp_path / "r.zarr", *WORDS]
    where = ["--cluster", "slurm", "--workers", "2", "--threads", "1", "--worker-memory", "3GB", "--tls"]
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen([*command, *where], stdout=out, stderr=out, cwd=tmp_path) as run:
        try:
            until(lambda: "iteration 5" in log.read_text() or run.poll() is not None, log.read_text)
            assert run.poll() is None, log.read_text()
            first = running(jobqueue)
            assert len(first) == 2
            jobqueue.run("scancel", first[0])
            until(lambda: first[0] not in running(jobqueue), jobqueue.logs)
            assert run.wait(timeout=240) == 0, log.read_text()
        finally:
            run.kill()
    same(tmp_path / "r.zarr", expected)
    until(lambda: not running(jobqueue), "the workers' jobs end with the command")
    assert [path.name for path in tmp_path.glob(".dask-jobqueue*")] == []  # the certificate is gone


def test_scheduler_and_workers_in_one_allocation(on_slurm, cells, expected, tmp_path):
    options = (*THIS_NODE, "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10")
    job = on_slurm.submit(
        DEPLOY / "slurm" / "cluster.sbatch", cells, tmp_path / "r.zarr", *WORDS, options=options, cwd=tmp_path
    )
    state = on_slurm.finished(job)
    log = (tmp_path / f"scialm-{job}.log").read_text()
    assert state == "COMPLETED", log
    same(tmp_path / "r.zarr", expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.zarr", f"scialm-{job}.log"]


def test_a_job_of_one_node(on_slurm, cells, expected, tmp_path):
    options = (*THIS_NODE, "--cpus-per-task=2", "--time=10")
    job = on_slurm.submit(
        DEPLOY / "slurm" / "impute.sbatch", cells, tmp_path / "r.zarr", *WORDS, options=options, cwd=tmp_path
    )
    state = on_slurm.finished(job)
    assert state == "COMPLETED", (tmp_path / f"scialm-{job}.log").read_text()
    same(tmp_path / "r.zarr", expected)


def test_an_array_of_jobs_takes_a_sample_each(on_slurm, cells, expected, tmp_path):
    (tmp_path / "other.h5ad").symlink_to(cells)
    (tmp_path / "samples.txt").write_text(f"{cells}\n{tmp_path / 'other.h5ad'}\n")
    options = (*THIS_NODE, "--cpus-per-task=1", "--time=10", "--array=1-2%1")
    job = on_slurm.submit(
        DEPLOY / "slurm" / "array.sbatch", "samples.txt", "results", *WORDS, options=options, cwd=tmp_path
    )
    for task, name in ((1, cells.stem), (2, "other")):
        assert on_slurm.finished(f"{job}_{task}") == "COMPLETED", (tmp_path / f"scialm-{job}-{task}.log").read_text()
        same(tmp_path / "results" / f"{name}.zarr", expected)


@pytest.mark.timeout(1500)  # Slurm looks at walltimes twice a minute, and waits before it starts a job again
def test_a_walltime_ends_and_a_second_run_of_the_job_resumes(on_slurm, shared, tmp_path):
    cells = shared / "reference" / "pbmc_donor_a_mask10.h5ad"
    words = ("--preset", "paper", "--max-iterations", "36")
    # Slurm sends the signal 10 to 40 s after the start: it looks twice a minute and rounds in favour of the job
    options = (*THIS_NODE, "--cpus-per-task=2", "--time=1", "--signal=B:USR1@20")
    job = on_slurm.submit(
        DEPLOY / "slurm" / "requeue.sbatch", cells, tmp_path / "r.zarr", *words, options=options, cwd=tmp_path
    )
    log = tmp_path / f"scialm-{job}.log"
    until(lambda: "Restarts=1" in on_slurm.run("scontrol", "show", "job", job), lambda: log.read_text())
    assert not (tmp_path / "r.zarr").exists()
    on_slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    state = on_slurm.finished(job)
    assert state == "COMPLETED", log.read_text()
    iterations = [int(number) for number in re.findall(r"iteration (\d+)", log.read_text())]
    assert iterations.count(1) == 1  # the second run did not begin anew
    assert sorted(set(iterations)) == list(range(1, 37))
    result = Imputation.open(tmp_path / "r.zarr")
    uninterrupted = np.array([126, 340])  # of the published trace, at iterations 20 and 27
    assert np.abs(np.asarray(result.history["rank"])[[19, 26]] / uninterrupted - 1).max() < 0.15


def test_a_cancelled_job_stays_so_and_the_same_command_resumes(on_slurm, cells, expected, tmp_path):
    script, options = DEPLOY / "slurm" / "requeue.sbatch", (*THIS_NODE, "--cpus-per-task=2", "--time=10")
    job = on_slurm.submit(script, cells, tmp_path / "r.zarr", *WORDS, options=options, cwd=tmp_path)
    log = tmp_path / f"scialm-{job}.log"
    until(lambda: log.exists() and "iteration 5" in log.read_text(), on_slurm.logs)
    on_slurm.run("scancel", job)
    assert on_slurm.finished(job) == "CANCELLED"
    assert not (tmp_path / "r.zarr").exists()
    job = on_slurm.submit(script, cells, tmp_path / "r.zarr", *WORDS, options=options, cwd=tmp_path)
    assert on_slurm.finished(job) == "COMPLETED", (tmp_path / f"scialm-{job}.log").read_text()
    assert "iteration 1:" not in (tmp_path / f"scialm-{job}.log").read_text()
    same(tmp_path / "r.zarr", expected)
