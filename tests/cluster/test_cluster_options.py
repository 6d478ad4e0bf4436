"""Where a command computes: options, settings, what is refused, and who is let in."""

from __future__ import annotations

import json
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dask
import faults
import numpy as np
import psutil
import pytest
import yaml
from distributed import Client, LocalCluster, Security
from problems import low_rank_counts

import scialm_dask
from scialm_dask import ExpressionMatrix, Imputation, connect
from scialm_dask.config import configured, seconds_of
from scialm_dask.errors import ClusterError, InputError
from scialm_dask.reduction import current_client
from scialm_dask.run.cluster import Workers, workers_here

SHORT = ("--preset", "paper", "--max-iterations", "6", "--quiet")


@pytest.fixture
def source(store_of):
    return store_of(low_rank_counts(120, 60, density=0.5, seed=3))


@pytest.fixture(scope="module")
def standing():
    """A scheduler with one worker, as another user or a site has started it."""
    with LocalCluster(
        n_workers=1, threads_per_worker=1, memory_limit="1GB", dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """The same with TLS by files, and what Dask's configuration must say to be let in."""
    made, folder = Security.temporary(), tmp_path_factory.mktemp("tls")
    files = {}
    for name in (
        "ca_file",
        "client_cert",
        "client_key",
        "scheduler_cert",
        "scheduler_key",
        "worker_cert",
        "worker_key",
    ):
        files[f"tls_{name}"] = str(folder / f"{name}.pem")
        Path(files[f"tls_{name}"]).write_text(getattr(made, f"tls_{name}"))
    security = Security(require_encryption=True, **files)
    with LocalCluster(
        n_workers=1, threads_per_worker=1, security=security, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield (
            cluster.scheduler_address,
            {
                "distributed.comm.tls.ca-file": files["tls_ca_file"],
                "distributed.comm.tls.client.cert": files["tls_client_cert"],
                "distributed.comm.tls.client.key": files["tls_client_key"],
            },
        )


def in_a_new_process(*words, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(each, marks=pytest.mark.slow) for each in ("SIGINT", "SIGHUP"))]
)
def test_a_signal_ends_a_run_on_a_local_cluster_in_one_line(source, tmp_path, name):
    """That of a terminal reaches the workers too."""
    command = [sys.executable, "-m", "scialm_dask", "impute", source, tmp_path / "r.zarr", "--cluster", "local"]
    words = ["--workers", "1", "--threads", "1", "--preset", "paper", "--max-iterations", "900", "--max-rank", "40"]
    words += ["--rank-policy", "adaptive", "--scratch", f"zarr:{tmp_path}"]
    with subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        for line in run.stderr:
            if line.startswith("iteration 3:"):
                break
        os.killpg(run.pid, getattr(signal, name))
        left = [line for line in run.stderr if not line.startswith("iteration ")]
    what = "interrupted" if name == "SIGINT" else "terminated"
    assert left == [f"scialm-dask: {what}; nothing was written\n"]
    assert run.returncode == (130 if name == "SIGINT" else 143)
    assert os.listdir(tmp_path) == ["source.zarr"]


def factors(path):
    result = Imputation.open(path)
    return np.asarray(result.left.compute()) @ result.right.T


# Computing elsewhere


@pytest.fixture
def expected(cli, source, tmp_path):
    assert cli("impute", source, tmp_path / "here.zarr", *SHORT).exit_code == 0
    return factors(tmp_path / "here.zarr")


def test_workers_started_for_a_command_give_what_threads_give(cli, source, tmp_path, expected):
    done = cli(
        "impute", source, tmp_path / "r.zarr", *SHORT, "--cluster", "local", "--workers", "2", "--threads", "1", "--tls"
    )
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(factors(tmp_path / "r.zarr"), expected, rtol=1e-3, atol=1e-4)
    assert current_client() is None


def test_a_running_scheduler_is_used_by_all_commands(cli, source, tmp_path, standing, expected, monkeypatch):
    with Client(standing, set_as_default=False) as client:
        client.write_scheduler_file(str(tmp_path / "scheduler.json"))
    where = ("--scheduler-file", tmp_path / "scheduler.json", "--workers", "1")
    done = cli("impute", source, tmp_path / "r.zarr", *SHORT, *where)
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(factors(tmp_path / "r.zarr"), expected, rtol=1e-3, atol=1e-4)
    done = cli("transform", tmp_path / "r.zarr", source, tmp_path / "t.zarr", "--scheduler", standing.scheduler_address)
    assert done.exit_code == 0, done.output
    monkeypatch.setattr("scialm_dask.run.plan.visit", None)  # the block is timed by a worker, not here
    done = cli("plan", source, "--json", "--scheduler", standing.scheduler_address)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["workers"], told["threads_per_worker"]) == (1, 1)
    assert told["memory_limit_bytes"] == 800_000_000  # above it a worker pauses


def test_workers_of_a_running_scheduler_are_waited_for(standing):
    lines = []
    with (
        dask.config.set({"scialm.worker-timeout": "100ms"}),
        connect(standing.scheduler_address, workers=2, notify=lines.append),
    ):
        pass
    assert lines == ["waiting for 2 workers, 0.1 s at most", "going on with 1 of 2 workers"]


def test_relative_paths_mean_the_folder_of_the_command_not_of_the_worker(
    cli, source, tmp_path, standing, monkeypatch, expected
):
    with Client(standing, set_as_default=False) as client:
        before = client.run(os.getcwd)
        client.run(os.chdir, "/")
        monkeypatch.chdir(tmp_path)
        try:
            (tmp_path / "scratch").mkdir()
            words = ("--scheduler", standing.scheduler_address, "--scratch", "zarr:scratch", "--write", "dense")
            done = cli("impute", Path(source).name, "r.zarr", *SHORT, *words)
            assert done.exit_code == 0, done.output
            where = ("--scheduler", standing.scheduler_address)
            done = cli("transform", "r.zarr", Path(source).name, "t.zarr", *where)
            assert done.exit_code == 0, done.output
        finally:
            client.run(os.chdir, next(iter(before.values())))
    np.testing.assert_allclose(factors(tmp_path / "r.zarr"), expected, rtol=1e-3, atol=1e-4)


def test_the_forecast_is_held_against_the_memory_of_the_workers(cli, source, tmp_path, standing):
    done = cli(
        "impute", source, tmp_path / "r.zarr", "--scheduler", standing.scheduler_address, "--memory-limit", "1MB"
    )
    assert "the limit 0.95 MiB; " in done.stderr
    assert done.stderr.rstrip().endswith("; raise --memory-limit")
    with LocalCluster(
        n_workers=1, threads_per_worker=1, memory_limit="120MB", dashboard_address="127.0.0.1:0"
    ) as small:
        done = cli("impute", source, tmp_path / "r.zarr", "--scheduler", small.scheduler_address)
    assert done.exit_code == 2
    assert "limit 91.55 MiB" in done.stderr
    assert done.stderr.rstrip().endswith("; raise --worker-memory")
    assert not (tmp_path / "r.zarr").exists()


def test_threads_of_this_process(cli, source):
    done = cli("plan", source, "--json", "--threads", "3")
    assert json.loads(done.stdout.splitlines()[-1])["threads_per_worker"] == 3
    with connect(threads=5) as nobody:
        assert nobody is None
        assert workers_here() == Workers(1, 5, None)
    with dask.config.set(scheduler="synchronous"):
        assert workers_here() == Workers(1, 1, None)


def test_any_client_of_python_is_used(standing):
    assert current_client() is None
    with Client(standing) as client:
        assert current_client() is client
        assert replace(workers_here(), resident=None) == Workers(1, 1, 800_000_000)
        assert workers_here().resident > 0
        with dask.config.set(scheduler="threads"):
            assert current_client() is None


def test_more_workers_hold_less_each(source):
    from scialm_dask.config import preset
    from scialm_dask.run.cluster import Workers
    from scialm_dask.run.plan import forecast

    matrix = ExpressionMatrix.open(source, blocks=6)
    one, three = (forecast(matrix, preset("complete"), Workers(workers, 1, None)) for workers in (1, 3))
    assert one.on_disk == three.on_disk
    held = one.in_memory - one.on_disk
    assert three.in_memory - three.on_disk == pytest.approx(held / 3, abs=1)


def test_dask_has_our_commands(source):
    code, out, err = in_a_new_process("-m", "dask", "scialm", "plan", source, "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["n_cells"] == 120


# Refusals, each one line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scheduler", "tcp://h:1", "--cluster", "local"), "--scheduler and --cluster exclude each other"),
        (("--scheduler", "tcp://h:1", "--scheduler-file", "f"), "--scheduler and --scheduler-file exclude each other"),
        (("--cluster", "mesos"), "cluster is 'mesos'; choose one of local, slurm, pbs, sge, lsf"),
        (("--workers", "2"), "--workers counts other processes; give --cluster, --scheduler or --scheduler-file too"),
        (("--worker-memory", "2GB"), "describes a cluster to start; give --cluster too"),
        (("--cluster", "local", "--worker-memory", "2 bags"), "worker memory is '2 bags'; give a number with a unit"),
        (("--scheduler", "tcp://h:1", "--threads", "2"), "the workers of --scheduler have theirs already"),
        (("--tls",), "--tls is for workers in other processes"),
        (("--scheduler", "smoke://h:1"), "smoke://h:1: not an address"),
        (("--scheduler", "tcp://h:1", "--tls"), "tcp://h:1: not encrypted, and --tls was given"),
        (("--scheduler", "h:1", "--tls"), "distributed.comm.tls.ca-file is not set"),
        (("--cluster", "slurm"), "--cluster slurm needs a number of --workers"),
    ],
)
def test_contradictions_are_refused(cli, source, tmp_path, words, message):
    done = cli("impute", source, tmp_path / "r.zarr", *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "r.zarr").exists()


@pytest.mark.parametrize("program", ["slurm", "pbs", "sge", "lsf"])
def test_a_machine_without_the_queue_is_told(cli, source, tmp_path, monkeypatch, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = cli("impute", source, tmp_path / "r.zarr", "--cluster", program, "--workers", "2")
    assert done.exit_code == 2
    assert "which is not on PATH" in done.stderr


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("dask_jobqueue", ("--cluster", "slurm", "--workers", "1"), "jobqueue"),
        ("cryptography", ("--cluster", "local", "--tls"), "tls"),
    ],
)
def test_a_missing_package_is_named(cli, source, tmp_path, monkeypatch, missing, words, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    done = cli("impute", source, tmp_path / "r.zarr", *words)
    assert f"pip install 'scialm-dask[{extra}]'" in done.stderr


def queue_of(folder, *, answer, code):
    """A queue that answers `sbatch` with these words: only its words matter here; real ones are in tests/slurm."""
    script = folder / "sbatch"
    script.write_text(f"#!/bin/sh\necho '{answer}' >&2\nexit {code}\n")
    script.chmod(0o755)


def test_a_job_that_is_not_taken_is_told_in_the_queues_words(cli, source, tmp_path, monkeypatch):
    queue_of(tmp_path, answer="sbatch: error: invalid partition specified: fast", code=1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ("--cluster", "slurm", "--workers", "1", "--threads", "1", "--worker-memory", "1GB")
    done = cli("impute", source, tmp_path / "r.zarr", *words)
    assert "jobqueue.slurm.interface is not set" in done.stderr
    with dask.config.set({"jobqueue.slurm.interface": "lo"}):
        done = cli("impute", source, tmp_path / "r.zarr", *words[:-2])
        assert "needs --worker-memory, or jobqueue.slurm.memory" in done.stderr
        done = cli("impute", source, tmp_path / "r.zarr", *words)
    assert done.exit_code == ClusterError.exit_code
    assert "the job was refused: sbatch: error: invalid partition specified: fast" in done.stderr


def test_nobody_at_the_address(cli, source, tmp_path):
    with dask.config.set({"scialm.connect-timeout": "0.3s"}):
        done = cli("impute", source, tmp_path / "r.zarr", "--scheduler", "tcp://127.0.0.1:9")
        assert done.exit_code == ClusterError.exit_code
        assert "tcp://127.0.0.1:9: no scheduler answered within 0.3 s" in done.stderr
        done = cli("impute", source, tmp_path / "r.zarr", "--scheduler-file", tmp_path / "none.json")
        assert "none.json: no such file after 0.3 s" in done.stderr
        (tmp_path / "other.json").write_text("[1]")
        done = cli("impute", source, tmp_path / "r.zarr", "--scheduler-file", tmp_path / "other.json")
        assert "other.json: not what a scheduler writes" in done.stderr
    with (
        dask.config.set({"scialm.connect-timeout": "soon"}),
        pytest.raises(InputError, match="connect-timeout is 'soon'"),
    ):
        connect("tcp://127.0.0.1:9").__enter__()
    assert current_client() is None  # what is computed next is not sent there


def test_no_worker_comes():
    with (
        LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty,
        dask.config.set({"scialm.worker-timeout": "0.2s"}),
        pytest.raises(ClusterError, match=r"no worker came within 0\.2 s"),
        connect(empty.scheduler_address),
    ):
        pass


def test_another_version_at_the_workers_is_refused(tmp_path):
    info = tmp_path / "scialm_dask-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scialm-dask\nVersion: 9.9\n")
    program = (
        "from distributed import LocalCluster, Client\n"
        "if __name__ == '__main__':\n"
        "    with LocalCluster(n_workers=1, processes=False, protocol='tcp', dashboard_address='127.0.0.1:0') as c:\n"
        "        print(c.scheduler_address, flush=True)\n"
        "        input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            address = other.stdout.readline().strip()
            with pytest.raises(
                ClusterError, match=r"the scheduler has scialm_dask 9\.9, this process .*; install the same"
            ):
                connect(address).__enter__()
        finally:
            other.communicate("\n", timeout=60)


def test_workers_that_die_over_a_task_are_explained():
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        pytest.raises(ClusterError, match="workers died 1 times on the same task, most likely for lack of memory"),
        connect(cluster="local", workers=1, threads=1) as client,
    ):
        client.submit(os._exit, 1).result()


# Who is let in


def test_everything_listens_on_the_loopback_interface():
    with connect(cluster="local", workers=1, threads=1) as client:
        info = client.scheduler_info(n_workers=-1)
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        heard = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(heard) >= 3  # scheduler, dashboard, worker
    assert set(heard) == {"127.0.0.1"}
    assert info["address"].startswith("tcp://127.0.0.1:")


def test_a_client_without_the_certificate_is_refused():
    with connect(cluster="local", workers=1, threads=1, tls=True) as client:
        address = client.scheduler_info()["address"]
        assert address.startswith("tls://127.0.0.1:")
        assert all(worker.startswith("tls://") for worker in client.scheduler_info(n_workers=-1)["workers"])
        assert client.submit(sum, [1, 2]).result() == 3
        for stranger in (
            lambda: Client(address, security=Security.temporary(), timeout="1s"),
            lambda: Client(address.replace("tls://", "tcp://"), timeout="1s"),
        ):
            with pytest.raises((OSError, TimeoutError, RuntimeError)):
                stranger()


def test_a_running_scheduler_lets_in_who_has_the_files(cli, source, tmp_path, secured):
    address, files = secured
    words = ("impute", source, tmp_path / "r.zarr", *SHORT, "--scheduler", address)
    assert "distributed.comm.tls.ca-file is not set" in cli(*words).stderr
    absent = files | {"distributed.comm.tls.client.cert": str(tmp_path / "absent.pem")}
    with dask.config.set(absent):
        assert "absent.pem: no such file" in cli(*words).stderr
    with dask.config.set(files):
        done = cli(*words[:-1], address.removeprefix("tls://"), "--tls")
    assert done.exit_code == 0, done.output


def test_a_stranger_at_a_running_scheduler_is_refused_in_one_line(cli, source, tmp_path, secured):
    stranger = Security.temporary()
    files = {}
    for key in ("ca-file", "client.cert", "client.key"):
        files[f"distributed.comm.tls.{key}"] = str(tmp_path / f"{key}.pem")
        (tmp_path / f"{key}.pem").write_text(getattr(stranger, f"tls_{key.replace('-', '_').replace('.', '_')}"))
    with dask.config.set(files | {"scialm.connect-timeout": "1s"}):
        done = cli("impute", source, tmp_path / "r.zarr", "--scheduler", secured[0])
    assert done.exit_code == ClusterError.exit_code
    assert "no scheduler answered" in done.stderr


# Settings

ASK = (
    "import sys, json; from scialm_dask.config import configured as c;"
    "print(json.dumps([c('scratch'), c('threads'), c('worker-memory'), c('worker-memory', '5GB')]))"
)


def test_the_argument_comes_before_the_environment_and_that_before_the_file(tmp_path):
    folder = {"DASK_CONFIG": str(tmp_path)}
    assert json.loads(in_a_new_process("-c", ASK, **folder)[1]) == ["auto", None, None, "5GB"]
    shipped = tmp_path / "scialm.yaml"  # put there, as Dask's other packages do
    assert "# scialm:" in shipped.read_text()
    assert yaml.safe_load(shipped.read_text()) is None
    shipped.write_text("scialm:\n  worker-memory: 3GB\n  scratch: memory\n")
    environment = folder | {"DASK_SCIALM__THREADS": "3", "DASK_SCIALM__SCRATCH": "zarr:/tmp"}
    assert json.loads(in_a_new_process("-c", ASK, **environment)[1]) == ["zarr:/tmp", 3, "3GB", "5GB"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"SCRATCH": "disk"}, "scratch is 'disk'; give auto"),
        ({"MEMORY_LIMIT": "a lot"}, "memory limit is 'a lot'"),
        ({"SCRACH": "memory"}, "scialm.scrach in Dask's configuration is unknown; choose one of cluster, "),
        ({"CLUSTER": "mesos"}, "cluster is 'mesos'"),
        ({"THREADS": "many"}, "threads is 'many'; give a whole number"),
    ],
)
def test_settings_of_the_environment_reach_the_command(cli, source, tmp_path, setting, message):
    configured("scratch")  # our defaults are Dask's by now
    dask.config.refresh(env={f"DASK_SCIALM__{name}": value for name, value in setting.items()})
    try:
        done = cli("impute", source, tmp_path / "r.zarr")
    finally:
        dask.config.refresh()
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_place_given_comes_before_the_place_configured(standing):
    with (
        dask.config.set({"scialm.cluster": "mesos", "scialm.threads": 7}),
        connect(standing.scheduler_address) as client,
    ):
        assert client.scheduler_info(n_workers=-1)["address"] == standing.scheduler_address
    with dask.config.set({"scialm.scheduler": standing.scheduler_address}), connect() as client:
        assert client.scheduler_info(n_workers=-1)["address"] == standing.scheduler_address
    assert configured("scheduler") is None


def test_every_setting_has_a_line_that_says_what_it_is():
    lines = (Path(scialm_dask.__file__).parent / "scialm.yaml").read_text().splitlines()
    settings = [line for line in lines if line.startswith("  ") and not line.strip().startswith("#")]
    assert len(settings) == len(yaml.safe_load("\n".join(lines))["scialm"])
    assert [line for line in settings if "# " not in line] == []
    with connect() as nobody:  # and all of them can be read
        assert nobody is None
    assert (seconds_of("connect-timeout"), seconds_of("worker-timeout")) == (30, 600)


def test_connections_are_retried_unless_the_site_says_otherwise(standing):
    with connect(standing.scheduler_address):
        assert dask.config.get("distributed.comm.retry.count") == 10
    with dask.config.set({"distributed.comm.retry.count": 2}), connect(standing.scheduler_address):
        assert dask.config.get("distributed.comm.retry.count") == 2


def test_a_script_that_workers_would_begin_anew_is_refused_in_one_line(tmp_path):
    (tmp_path / "script.py").write_text(
        "import scialm_dask\nwith scialm_dask.connect(cluster='local', workers=2):\n    print('begun')\n"
    )
    code, told, errors = in_a_new_process(tmp_path / "script.py")
    assert (code, told) == (1, "")
    last = errors.splitlines()[-1]
    assert last.startswith(f"scialm_dask.errors.InputError: {tmp_path}/script.py: would run again in every worker; put")
    assert errors.count("Error") == 1 + errors.count("raise InputError(")


def test_workers_that_could_not_be_talked_to_are_not_started(cli, source, tmp_path, monkeypatch):
    """As where /dev/shm is full."""
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", lambda *_, **__: faults.fill_disk())
    done = cli("impute", source, tmp_path / "r.zarr", *SHORT, "--cluster", "local")
    assert done.exit_code == 69
    assert "/dev/shm: no room for semaphores of worker processes (No space left on device); free" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r.zarr").exists()
