"""What SECURITY.md promises, beside who is let in to a cluster (tests/cluster/test_cluster_options.py)."""

from __future__ import annotations

import ast
import json
import os
import pickle
import stat
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from problems import names_in

import scialm_dask

PACKAGE = Path(scialm_dask.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
RUN_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def named(path):
    return str(path.relative_to(PACKAGE))


# Reading runs no code


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_file_reads_pickles_or_runs_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.partition(".")[0] for name in names} & RUN_CODE
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in (
            "eval",
            "exec",
            "os.system",
            "os.popen",
            "yaml.load",
            "yaml.unsafe_load",
            "pd.read_pickle",
        )
        assert called not in ("shutil.unpack_archive", "extractall", "tempfile.mktemp")
        assert options.get("shell", "False") == "False"
        assert options.get("allow_pickle", "False") == "False"
        if called in ("np.load", "numpy.load"):
            assert "allow_pickle" in options  # said, not left to the default of some version


class Intruder:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_an_array_file_is_refused(cli, counts, store_of, tmp_path):
    mark = tmp_path / "mark"
    np.save(tmp_path / "P.npy", np.array([[Intruder(mark)]], dtype=object), allow_pickle=True)
    done = cli("unpool", store_of(counts), tmp_path / "r.zarr", "--pools", tmp_path / "P.npy")
    assert done.exit_code == 2
    assert "P.npy: cannot be read as a design" in done.stderr
    assert not mark.exists()


@pytest.mark.parametrize("name", ["X/data", "obs/batch/codes", "names"])
def test_a_pickle_in_a_chunk_is_refused(cli, counts, store_of, tmp_path, name):
    source, mark = Path(store_of(counts)), tmp_path / "mark"
    array = names_in(source, "obs") if name == "names" else source / name
    metadata = json.loads((array / ".zarray").read_text())
    filters = [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 4}]
    metadata |= {"dtype": "|O", "filters": filters, "compressor": None, "fill_value": "", "chunks": metadata["shape"]}
    (array / ".zarray").write_text(json.dumps(metadata))
    (source / ".zmetadata").unlink(missing_ok=True)
    (array / "0").write_bytes(pickle.dumps(Intruder(mark)))
    done = cli("impute", source, tmp_path / "r.zarr")
    assert not mark.exists()
    assert done.exit_code == 2, done.output
    assert done.stderr.strip().splitlines()[-1].startswith("scialm-dask: error: ")
    assert not (tmp_path / "r.zarr").exists()


# Nothing leads out of a store


def outside(tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["X"] = np.ones((120, 40), np.float32)
    return other


@pytest.mark.parametrize("kind", ["link", "link to a column", "raw", "virtual"])
def test_hdf5_that_leads_to_other_files_is_refused(cli, counts, store_of, tmp_path, kind):
    source, other = store_of(counts.toarray(), "source.h5ad"), outside(tmp_path)
    with h5py.File(source, "a") as file:
        if kind == "link to a column":
            file["obs/other"] = h5py.ExternalLink(str(other), "X")
        else:
            del file["X"]
        if kind == "link":
            file["X"] = h5py.ExternalLink(str(other), "X")
        elif kind == "raw":
            file.create_dataset("X", (120, 40), "f4", external=[(str(other), 0, h5py.h5f.UNLIMITED)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((120, 40), "f4")
            layout[...] = h5py.VirtualSource(str(other), "X", (120, 40))
            file.create_virtual_dataset("X", layout)
    for command in ("impute", "convert"):
        done = cli(command, source, tmp_path / "r.zarr")
        assert done.exit_code == 2, done.output
        assert "leads to another file" in done.stderr
        assert not (tmp_path / "r.zarr").exists()


@pytest.mark.parametrize("layer", ["../../other", "../X", "/etc", ".."])
def test_the_name_of_a_layer_does_not_lead_out(cli, counts, store_of, tmp_path, layer):
    store_of(counts, "other")
    done = cli("impute", store_of(counts), tmp_path / "r.zarr", "--layer", layer)
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "r.zarr").exists()


@pytest.mark.parametrize("place", ["obs", "layers"])
def test_names_in_a_source_do_not_lead_out_of_the_result(cli, counts, store_of, tmp_path, place):
    source = store_of(counts.toarray().astype(np.float32), "source.h5ad", extra=counts.toarray().astype(np.float32))
    with h5py.File(source, "a") as file:
        if place == "obs":
            file["obs"].move("batch", "..")
            file["obs"].attrs["column-order"] = [".."]
        else:
            file["layers"].move("extra", "..")
    (tmp_path / "results").mkdir()
    done = cli("convert", source, tmp_path / "results" / "r.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "source.h5ad"]
    assert {path.name for path in (tmp_path / "results").iterdir()} <= {"r.zarr"}
    if done.exit_code == 0:
        zarr.open(tmp_path / "results" / "r.zarr", mode="r")


# Files are the user's


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077], ids=oct)
def test_files_have_the_users_umask(cli, counts, store_of, tmp_path, mask):
    source = store_of(counts)
    words_of_checkpoint = ("--preset", "paper", "--max-iterations", "3", "--checkpoint", tmp_path / "checkpoint.zarr")
    before = os.umask(mask)
    try:
        for words in (
            ("convert", source, tmp_path / "cells.zarr"),
            ("mask", tmp_path / "cells.zarr", tmp_path / "masked.zarr"),
            ("impute", tmp_path / "masked.zarr", tmp_path / "r.zarr", "--write", "dense", *words_of_checkpoint),
        ):
            done = cli(*words, "--quiet")
            assert done.exit_code == 0, done.output
    finally:
        os.umask(before)
    written = [
        path
        for name in ("cells", "masked", "r", "checkpoint")
        for path in [tmp_path / f"{name}.zarr", *(tmp_path / f"{name}.zarr").rglob("*")]
    ]
    assert len(written) > 50
    for path in written:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path


def test_nothing_written_holds_what_the_environment_keeps_secret(cli, counts, store_of, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-environment")
    source = store_of(counts)
    words = (
        "--preset",
        "paper",
        "--max-iterations",
        "4",
        "--checkpoint",
        tmp_path / "checkpoint",
        "--checkpoint-every",
        "1",
        "--log-json",
    )
    done = cli("impute", source, tmp_path / "r.zarr", *words)
    assert done.exit_code == 0, done.output
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"checkpoint", "r.zarr"} <= {path.relative_to(tmp_path).parts[0] for path in written}
    assert [path for path in written if b"secret-of-the-environment" in path.read_bytes()] == []
    assert "secret-of-the-environment" not in done.output
