"""What sites copy: scripts that the shell can read, with commands that the command line takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "deploy").rglob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_runs_with_a_real_matrix(script, counts, store_of, tmp_path):
    """As Slurm would run it, but for Slurm."""
    source, result = store_of(counts), tmp_path / "imputed.zarr"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run(
        ["bash", script, source, result, "--validation", "0.2"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    assert result.is_dir()
    assert re.search(r"#SBATCH --mem=", script.read_text())
