"""Outputs appear whole or not at all."""

import asyncio
import errno
import os
import sys
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from scialm_dask.data import csr, store
from scialm_dask.data.annotation import new_anndata
from scialm_dask.data.arrays import missing_chunks
from scialm_dask.data.csr import CSRWriter
from scialm_dask.data.store import atomic_output, open_store
from scialm_dask.errors import InputError, OutputError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def fill(path, text="new"):
    path.mkdir()
    (path / "file").write_text(text)


def test_nothing_is_there_before_the_end(tmp_path):
    with atomic_output(tmp_path / "out") as partial:
        fill(partial)
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, InputError])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_output(tmp_path / "out") as partial:
        fill(partial)
        raise error("in the middle")
    assert names(tmp_path) == []


def test_overwrite_keeps_the_old_until_the_new_is_whole(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(OutputError, match=r"exists already; .*--overwrite"), atomic_output(tmp_path / "out"):
        pass
    with pytest.raises(ValueError), atomic_output(tmp_path / "out", overwrite=True) as partial:
        fill(partial)
        raise ValueError
    assert (tmp_path / "out" / "file").read_text() == "old"
    with atomic_output(tmp_path / "out", overwrite=True) as partial:
        fill(partial)
        assert (tmp_path / "out" / "file").read_text() == "old"
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_overwrite_brings_the_old_back_if_the_new_cannot_be_moved(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError), atomic_output(tmp_path / "out", overwrite=True):
        pass  # nothing written, so nothing to move
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


@pytest.mark.parametrize(
    "made", [lambda p: p.mkdir(), fill, lambda p: p.write_text("theirs"), lambda p: p.symlink_to("x")]
)
@pytest.mark.parametrize("write", [fill, lambda p: p.write_text("new")])
def test_what_another_program_makes_meanwhile_stays(tmp_path, made, write):
    out = tmp_path / "out.zarr"
    with (
        pytest.raises(
            OutputError, match=r"another program made it meanwhile, .* this one is .*/out\.[\w-]+\.zarr$"
        ) as error,
        atomic_output(out) as partial,
    ):
        write(partial)
        made(out)
    kept = Path(str(error.value).rpartition(" ")[2])
    assert names(tmp_path) == sorted(["out.zarr", kept.name])
    assert (kept / "file" if kept.is_dir() else kept).read_text() == "new"
    assert not out.is_file() or out.read_text() == "theirs"


def test_of_two_runs_to_one_place_the_first_to_end_keeps_it(tmp_path):
    with pytest.raises(OutputError, match="another program made it"), atomic_output(tmp_path / "out") as slow:
        fill(slow, "slow")
        with atomic_output(tmp_path / "out") as quick:
            fill(quick, "quick")
    assert (tmp_path / "out" / "file").read_text() == "quick"


def test_overwrite_through_a_link_replaces_what_it_leads_to(tmp_path):
    (tmp_path / "far").mkdir()
    fill(tmp_path / "far" / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "far" / "real")
    with atomic_output(tmp_path / "out", overwrite=True) as partial:
        fill(partial)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "far" / "real" / "file").read_text() == "new"
    assert names(tmp_path / "far") == ["real"]


def test_a_run_that_was_killed_while_it_replaced_is_told_of(tmp_path, monkeypatch):
    fill(tmp_path / "out", "old")

    monkeypatch.setattr(store, "_rename_to_new", lambda *_: sys.exit(9))
    monkeypatch.setattr(store, "_remove", lambda _: None)  # nor does it tidy up
    with pytest.raises(SystemExit), atomic_output(tmp_path / "out", overwrite=True) as partial:
        fill(partial)
    monkeypatch.undo()
    new, old = names(tmp_path)
    for look in (open_store, again := lambda path: atomic_output(path).__enter__()):
        with pytest.raises((InputError, OutputError), match=rf"rename the new one, .*/{new}, or the old, .*/{old}"):
            look(tmp_path / "out")
    os.rename(tmp_path / new, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        again(tmp_path / "out")


def test_what_zarr_still_writes_after_an_exception_is_removed_too(tmp_path):
    async def written_late(path):
        await asyncio.sleep(0.3)
        path.mkdir(parents=True, exist_ok=True)

    with pytest.raises(KeyboardInterrupt), atomic_output(tmp_path / "out") as partial:
        partial.mkdir()
        asyncio.run_coroutine_threadsafe(written_late(partial / "late"), zarr.core.sync._get_loop())
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_the_output_must_not_touch_the_input(tmp_path):
    fill(tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output in (tmp_path / "in", tmp_path / "in" / "out", tmp_path, tmp_path / "link", tmp_path / "x" / ".." / "in"):
        with (
            pytest.raises(OutputError, match="overlaps the input"),
            atomic_output(output, overwrite=True, sources=(tmp_path / "in",)),
        ):
            pass
    assert names(tmp_path) == ["in", "link"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="no such folder"), atomic_output(tmp_path / "a" / "b"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_errors_of_space_are_explained(tmp_path, code):
    with (
        pytest.raises(OutputError, match=r"could not be written, .*; free some space"),
        atomic_output(tmp_path / "out"),
    ):
        raise OSError(code, os.strerror(code))
    with pytest.raises(PermissionError), atomic_output(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(csr, "CHUNK_VALUES", 64)
    monkeypatch.setattr(csr, "CHUNK_ROWS", 16)


@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [50], [0, 60, 60, 119]])
def test_rows_written_in_pieces_are_read_back(counts, tmp_path, small_chunks, cuts):
    bounds = [0, *cuts, counts.shape[0]]
    frames = [pd.DataFrame(index=[f"{k}{i}" for i in range(n)]) for k, n in zip("cg", counts.shape, strict=True)]
    root = new_anndata(tmp_path / "s.zarr", obs=frames[0], var=frames[1])
    with CSRWriter(root, "X", n_columns=40, dtype=np.int32) as writer:
        for start, stop in pairwise(bounds):
            writer.append(counts[start:stop])
    with CSRWriter(root, "layers/empty", n_columns=40) as writer:
        writer.append(sp.csr_matrix((120, 40), dtype=np.float32))
    read = anndata.read_zarr(tmp_path / "s.zarr")
    assert read.X.dtype == np.int32
    assert abs(read.X - counts).sum() == 0
    assert read.layers["empty"].nnz == 0
    data = root["X"]["data"]
    assert data.chunks == (64,)
    assert data.nchunks == -(-counts.nnz // 64)
    assert [missing_chunks(array) for _, array in root["X"].arrays()] == [[], [], []]


def test_an_interrupted_matrix_is_not_marked_whole(counts, tmp_path):
    root = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=2)
    with pytest.raises(KeyboardInterrupt), CSRWriter(root, "X", n_columns=40) as writer:
        writer.append(counts)
        raise KeyboardInterrupt
    assert "encoding-type" not in root["X"].attrs


@pytest.mark.parametrize(("zarr_format", "shards"), [(2, None), (3, None), (3, (4, 6))])
def test_missing_chunks_are_found(tmp_path, zarr_format, shards):
    array = zarr.create_array(
        tmp_path / "a.zarr", data=np.ones((10, 6)), chunks=(2, 3), shards=shards, zarr_format=zarr_format
    )
    assert missing_chunks(array) == []
    name = {2: "1.1", 3: "c/1/1"}[zarr_format] if not shards else "c/1/0"
    Path(tmp_path, "a.zarr", name).unlink()
    assert missing_chunks(zarr.open_array(tmp_path / "a.zarr")) == [(1, 0) if shards else (1, 1)]
