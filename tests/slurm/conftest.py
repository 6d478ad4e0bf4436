"""A real Slurm of one node, from Debian's packages, for as long as the tests last."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from one_node import Slurm, until

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
