"""Disks that fill up while a result is written: a real one of every size, up to that which is just enough."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from problems import low_rank_counts

NAMESPACE = ("unshare", "--map-root-user", "--mount")


@pytest.fixture(scope="module")
def _may_mount():
    if (
        shutil.which("unshare") is None
        or subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no mount namespace may be made here")


@pytest.mark.slow
@pytest.mark.usefixtures("_may_mount")
@pytest.mark.parametrize("command", ["convert", "impute"])
def test_a_disk_that_fills_up_has_a_whole_result_or_none(store_of, tmp_path, command):
    source = store_of(low_rank_counts(150, 60, density=0.5, seed=3))
    program = Path(__file__).with_name("filling.py")
    done = subprocess.run(
        [*NAMESPACE, sys.executable, program, tmp_path, command, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    for run in runs:
        if run["code"] == 0:
            assert (run["left"], run["whole"]) == (["r.zarr"], True), run
        else:
            assert (run["code"], run["left"]) == (2, []), run
            assert run["says"].count("\n") == 1
            assert "could not be written, the disk is full; free some space or choose another disk" in run["says"]
    for of in ("bytes", "files"):  # how much more the files take that are renamed when whole depends on the moment
        assert [run for run in runs if run.get(of, 0) < 0 and not run["code"]] == []
        assert [run["code"] for run in runs if of in run][-1] == 0
