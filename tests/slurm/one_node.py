"""Asking a queue, and waiting for what it does."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
        return str(until(lambda: (state := self.state(job)) in last and state, f"end of job {job}", 900))

    def logs(self) -> str:
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))
