"""A real Slurm of one node, from Debian's packages, for as long as the tests last."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
# a job that is requeued waits until the credentials of its first run have expired
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Wait for a condition, and give what it gives."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what() if callable(what) else what}"
        time.sleep(0.1)
    return result


class Slurm:
    """Ask the queue."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: Any, check: bool = True, **more: Any) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | self.environment,
            **more,
        )
        assert done.returncode == 0 or not check, f"{words}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def submit(self, script: Path, *words: Any, options: tuple[str, ...] = (), cwd: Path) -> str:
        """Submit a script as it is, with options of sbatch for this one node; give the job's number."""
        return self.run("sbatch", "--parsable", *options, script, *words, cwd=cwd)

    def jobs(self, state: str = "all") -> list[str]:
        """Numbers of the jobs in a state."""
        return self.run("squeue", "--noheader", "--format=%i", "--states", state).split()

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", job, check=False)
        return next((word[9:] for word in shown.split() if word.startswith("JobState=")), "GONE")

    def finished(self, job: str) -> str:
        """Wait for the end of a job, and give its state."""
        last = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "GONE")
        return str(until(lambda: (state := self.state(job)) in last and state, f"end of job {job}", 240))

    def logs(self) -> str:
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Start munged, slurmctld and slurmd with a configuration of their own; end them and all jobs afterwards."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid() != 0:
        why = f"a Slurm of one node needs root and {', '.join(missing) or 'nothing else'} (Debian: slurm-wlm, munge)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=host,
            folder=folder,
            controller_port=_free_port(),
            node_port=_free_port(),
            cpus=os.cpu_count(),
            megabytes=int(0.9 * memory),
        )
    )
    queue = Slurm(folder)
    programs: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        environment = os.environ | queue.environment | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
        with (folder / f"{words[0]}.out.log").open("wb") as log:
            programs.append(subprocess.Popen(words, stdout=log, stderr=log, env=environment))

    try:
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
        files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
        start("munged", "--foreground", "--force", *(f"--{option}={path}" for option, path in files.items()))
        until((folder / "munge.socket").exists, queue.logs)
        start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        start("slurmd", "-D", "-N", host, "-f", str(folder / "slurm.conf"))
        until(lambda: queue.run("sinfo", "-h", "-o", "%T", check=False) == "idle", queue.logs)
        yield queue
        queue.run("scancel", "--user=root")
        until(lambda: not queue.jobs("running,completing,pending"), "all jobs gone")
    finally:
        for program in reversed(programs):
            program.terminate()
        for program in reversed(programs):
            program.wait(timeout=30)


@pytest.fixture
def on_slurm(slurm, monkeypatch):
    """The queue, for what is started in this process and from it; our command is on PATH."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return slurm
