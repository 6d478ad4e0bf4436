"""Checkpoints on disk: whole or refused by name, two kept, one run at a time."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from scialm_dask.data import checkpoint, lease
from scialm_dask.data.checkpoint import Checkpoints
from scialm_dask.errors import CheckpointError, OutputError

ARRAYS = {
    "estimate": [np.arange(5, dtype=np.float32), np.zeros(0, np.float32)],
    "left": [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((3, 0))],
    "gram": [np.array([[np.nan, np.inf], [-0.0, 1e-300]])],
}


def write(checkpoints, notes=None):
    files = checkpoints.begin()
    arrays = {name: [files.put(name, b, array) for b, array in enumerate(group)] for name, group in ARRAYS.items()}
    return checkpoints.commit(files, notes or {"pi": np.pi, "list": [1, None, "ρ"]}, arrays)


def visible(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "c") as opened:
        yield opened


def test_what_is_written_is_read(checkpoints):
    write(checkpoints)
    read = checkpoints.read("000001")
    assert read.notes == {"pi": np.pi, "list": [1, None, "ρ"]}
    for name, group in ARRAYS.items():
        for array, file in zip(group, read.arrays[name], strict=True):
            again = read.files.get(file)
            assert again.dtype == array.dtype
            np.testing.assert_array_equal(again, array)


def test_the_last_two_are_kept(checkpoints):
    for _ in range(4):
        write(checkpoints)
    assert checkpoints.names() == ["000004", "000003"]
    assert visible(checkpoints.folder) == ["000003", "000004"]


def test_writing_the_same_array_twice_does_no_harm(checkpoints):
    files = checkpoints.begin()
    first, second = (files.put("left", 0, ARRAYS["left"][0]) for _ in range(2))
    assert first == second
    assert sorted(os.listdir(files.path)) == ["left.0", "zarr.json"]
    np.testing.assert_array_equal(files.get(first), ARRAYS["left"][0])


def test_large_arrays_are_written_in_chunks_with_checksums(checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CHUNK", 64)
    files = checkpoints.begin()
    array = np.arange(120, dtype=np.float32).reshape(30, 4)
    piece = files.put("left", 0, array)
    stored = zarr.open_array(files.path, path="left.0")
    assert stored.chunks == (4, 4)
    assert [type(codec).__name__ for codec in stored.compressors] == ["Crc32cCodec"]
    np.testing.assert_array_equal(files.get(piece), array)
    np.testing.assert_array_equal(stored[...], array)


def truncated(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def edited(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


def of_manifest(change):
    """Change the manifest as someone would who knows nothing of its digest."""

    def damage(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def newer(content):
    content["format"] += 1


def older(content):
    content["format"] -= 1


def notes_changed(content):
    content["notes"]["pi"] = 3


def redone(change):
    """Change the manifest as someone would who knows of its digest."""

    def damage(path):
        content = json.loads(path.read_text())
        change(content)
        del content["sha256"]
        path.write_text(json.dumps(content | {"sha256": checkpoint._digest(content)}))

    return damage


def of_arrays(value):
    return redone(lambda content: content["arrays"].update(left=value))


DAMAGES = {
    "an array is missing": ("left.0", shutil.rmtree, "left.0 is missing"),
    "a chunk is missing": ("left.0/c/0/0", Path.unlink, "left.0 is not whole"),
    "a chunk is truncated": ("left.0/c/0/0", truncated, "left.0 is damaged"),
    "a chunk is edited": ("estimate.0/c/0", edited, "estimate.0 is damaged"),
    "what an array is, is damaged": ("left.0/zarr.json", truncated, "left.0 is damaged"),
    "the manifest is truncated": ("manifest.json", truncated, "manifest.json is damaged"),
    "the manifest is edited": ("manifest.json", of_manifest(notes_changed), "manifest.json is not what was written"),
    "the manifest is another file": ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
    "it is deep": ("manifest.json", lambda path: path.write_text("[" * 10**5), "manifest.json is damaged"),
    "a newer version": ("manifest.json", of_manifest(newer), "of format 3, and this program reads format 2"),
    "an older version": ("manifest.json", of_manifest(older), "of format 1, and this program reads format 2; continue with"),
    "names lead out": ("manifest.json", of_arrays([["../000001/left.0", [2, 3], "<f8"]]), "names a file '../000001/"),
    "arrays are text": ("manifest.json", of_arrays("all"), "manifest.json is not what a run writes"),
    "another shape": ("manifest.json", of_arrays([["left.0", [3, 2], "<f8"]]), "left.0 is not whole, or not what was"),
    "no notes": ("manifest.json", redone(lambda content: content.update(notes=None)), "is not what a run writes"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_told_by_name(checkpoints, damage):
    write(checkpoints)
    write(checkpoints)
    name, harm, message = DAMAGES[damage]
    harm(Path(checkpoints.folder) / "000002" / name)
    with pytest.raises(CheckpointError) as told:
        checkpoints.read("000002")
    assert message in str(told.value)
    assert str(told.value).startswith(f"{checkpoints.folder}/000002: ")
    assert "\n" not in str(told.value)
    assert checkpoints.read("000001").notes["pi"] == np.pi


def test_an_array_that_is_damaged_later_is_not_handed_out(checkpoints):
    written = write(checkpoints)
    edited(Path(written.path) / "left.0/c/0/0")
    with pytest.raises(CheckpointError, match=r"left\.0 is damaged"):
        written.files.get(written.arrays["left"][0])


def test_refused_ones_are_neither_listed_nor_deleted(checkpoints):
    for _ in range(2):
        write(checkpoints)
    checkpoints.refuse("000002")
    for _ in range(2):
        write(checkpoints)
    assert checkpoints.names() == ["000004", "000003"]
    assert visible(checkpoints.folder) == ["000002", "000003", "000004"]


def test_nothing_is_seen_of_what_was_not_completed(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        write(checkpoints)
        checkpoints.begin().put("left", 0, ARRAYS["left"][0])
        assert checkpoints.names() == ["000001"]
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert visible(checkpoints.folder) == ["000001"]


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with (
        Checkpoints(tmp_path / "c"),
        pytest.raises(OutputError, match="another run writes its checkpoints there"),
        Checkpoints(tmp_path / "c"),
    ):
        pass
    with Checkpoints(tmp_path / "c"):
        pass


HOLD = "import sys, time; from scialm_dask.data.checkpoint import Checkpoints; c = Checkpoints(sys.argv[1]); print(); time.sleep(99)"


@pytest.fixture
def elsewhere(monkeypatch):
    """A disk seen from another machine."""
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "_machine", lambda: "another")


def test_a_lock_that_a_dead_process_does_not_hold(tmp_path):
    held = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "c"], stdout=subprocess.PIPE)
    held.stdout.readline()
    with pytest.raises(OutputError, match="another run writes its checkpoints there"):
        Checkpoints(tmp_path / "c")
    held.kill()
    held.communicate()
    with Checkpoints(tmp_path / "c"):
        assert len([key for key in os.listdir(tmp_path / "c") if key.startswith(".lease-")]) == 1


@pytest.mark.parametrize("same_machine", [True, False])
def test_one_of_several_at_the_same_time_gets_the_lock(tmp_path, monkeypatch, same_machine):
    """However they interleave; on another machine a holder is only known to live by its renewals."""
    monkeypatch.setattr(lease, "BEAT", 0.2)
    if not same_machine:
        monkeypatch.setattr(lease, "is_alive", lambda _: None)
    together = threading.Barrier(6)

    def ask(_):
        together.wait()
        try:
            return Checkpoints(tmp_path / "c")
        except OutputError:
            return None

    with ThreadPoolExecutor(6) as pool:
        holders = [found for found in pool.map(ask, range(6)) if found is not None]
    assert len(holders) == 1
    with holders[0], pytest.raises(OutputError, match="another run writes its checkpoints there"):
        Checkpoints(tmp_path / "c")


def test_a_holder_on_another_machine(tmp_path, elsewhere, monkeypatch):
    """One that renews its lease keeps others off; one that does not is dead."""
    with Checkpoints(tmp_path / "c") as first, monkeypatch.context() as here:
        here.setattr(lease, "_machine", lambda: "here")
        with pytest.raises(OutputError, match="another run writes its checkpoints there"):
            Checkpoints(tmp_path / "c")
        first._lease._ended.set()  # as if it stood still
        first._lease._renewing.join()
        with Checkpoints(tmp_path / "c"), pytest.raises(OutputError, match="another run goes on"):
            write(first)


def test_a_holder_on_another_machine_that_ends_meanwhile(tmp_path, elsewhere, monkeypatch):
    held = tmp_path / "c" / ".lease-0"
    held.parent.mkdir()
    held.write_text('{"machine": "here"}')
    monkeypatch.setattr(lease.time, "sleep", lambda _: held.unlink(missing_ok=True))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.names() == []


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(OutputError, match="no such folder; create it first"):
        Checkpoints(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not writable"):
        Checkpoints(tmp_path / "file")


def test_workers_that_write_elsewhere(checkpoints):
    files = checkpoints.begin()
    written = files.put("left", 0, ARRAYS["left"][0])
    shutil.rmtree(Path(files.path) / "left.0")  # as if the worker's folder were another
    with pytest.raises(OutputError, match="choose a folder on a disk that all workers share"):
        checkpoints.commit(files, {}, {"left": [written]})
    assert checkpoints.names() == []


def test_temporary_files_of_a_killed_run_go(tmp_path):
    (tmp_path / "scratch").mkdir()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.own(str(tmp_path / "scratch"))
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.own(None)
    assert sorted(os.listdir(tmp_path)) == ["c"]


def test_only_a_folder_that_was_taken_charge_of_is_removed(tmp_path):
    """What a killed run left goes; what somebody else has named there stays."""
    scratch, precious = tmp_path / "scratch", tmp_path / "precious"
    scratch.mkdir()
    precious.mkdir()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.own(str(scratch))
        checkpoints.own(None)
        assert not scratch.exists()
        (tmp_path / "c" / ".scratch").write_text(f"{'0' * 32} {precious}")
        checkpoints.own(None)
    assert precious.is_dir()
