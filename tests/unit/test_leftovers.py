"""What killed runs leave is named by the next run at that place, and removed by `clean` unless a living process holds it."""

import os
import subprocess
import sys

import pytest
from problems import low_rank_counts

from scialm_dask import InputError
from scialm_dask.data import lease
from scialm_dask.data.lease import clean

PROGRAM = """
import os, sys
from scialm_dask.data.rows import MemoryRows
from scialm_dask.data.scratch import new_scratch
from scialm_dask.data.store import atomic_output
from scialm_dask.data.temporary import temporary_folder
import dask
dask.config.set({"temporary-directory": "."})
with atomic_output("r.zarr") as partial, temporary_folder(), new_scratch(".", None):
    partial.mkdir()
    (partial / "chunk").write_text("half")
    print(flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path):
    """A process in the middle of its work, and the names of what it holds."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        yield process, sorted(os.listdir(tmp_path))
        process.kill()


def test_only_what_nobody_holds_is_named_and_removed(held, tmp_path, cli, store_of):
    process, names = held
    assert len(names) == 3
    assert clean(tmp_path) == {"folder": str(tmp_path), "removed": [], "kept": names}
    process.kill()
    process.wait()
    (tmp_path / ".r.zarr.somebody.partial").mkdir()
    (tmp_path / "scialm-results").mkdir()
    done = cli("convert", store_of(low_rank_counts(20, 10)), tmp_path / "new.zarr")
    assert done.exit_code == 0
    assert f"holds what killed runs have left, {', '.join(names)}; remove it by `scialm-dask clean" in done.stderr
    done = cli("clean", tmp_path)
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in names)
    assert sorted(os.listdir(tmp_path)) == [".r.zarr.somebody.partial", "new.zarr", "scialm-results", "source.zarr"]


def test_what_is_of_another_machine_is_kept(held, tmp_path, monkeypatch):
    process, names = held
    process.kill()
    process.wait()
    with monkeypatch.context() as there:
        there.setattr(lease, "_machine", lambda: "0" * 8)
        assert clean(tmp_path)["kept"] == names
    assert clean(tmp_path)["removed"] == names


def test_the_only_copies_there_are_stay(tmp_path):
    """Killed between the two renames that put a new result in the place of an old one."""
    for end in ("partial", "replaced"):
        (tmp_path / f".r.zarr.{'0' * 8}-1-0-abcd.{end}").mkdir()
    assert clean(tmp_path) == {"folder": str(tmp_path), "removed": [], "kept": []}
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_that_is_not_there():
    with pytest.raises(InputError, match="nowhere: no such folder"):
        clean("nowhere")
