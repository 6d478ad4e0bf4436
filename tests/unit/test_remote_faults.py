"""Servers that fail: what passes is tried again, what lasts ends in one line and leaves nothing that looks whole."""

import re

import anndata
import pandas as pd
import pytest
import s3fs
import scipy.sparse as sp
import zarr
from objects import Faults, Proxy, file_server, served
from zarr.storage import FsspecStore

from scialm_dask import ExpressionMatrix
from scialm_dask.data import csr, remote
from scialm_dask.data.annotation import new_anndata
from scialm_dask.data.csr import CSRWriter
from scialm_dask.data.store import open_store
from scialm_dask.errors import InputError
from scialm_dask.evaluate.mask import mask

CHUNKS = r"/(data|indices|indptr)/\d"
SOME = {1: "drop", 3: "500", 5: "503", 7: "drop"}


@pytest.fixture(scope="module")
def source(counts, tmp_path_factory):
    """A store of many chunks."""
    path = tmp_path_factory.mktemp("source") / "counts.zarr"
    obs, var = (
        pd.DataFrame(index=[f"{axis}{i}" for i in range(n)]) for axis, n in zip("cg", counts.shape, strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csr, "CHUNK_VALUES", 300)
        root = new_anndata(path, obs=obs, var=var)
        with CSRWriter(root, "X", n_columns=counts.shape[1]) as rows:
            rows.append(counts)
    zarr.consolidate_metadata(root.store)
    return path


@pytest.fixture
def uploaded(bucket, source):
    s3fs.S3FileSystem(use_listings_cache=False).put(str(source), "s3://bucket/in.zarr", recursive=True)
    bucket.log.clear()
    return "s3://bucket/in.zarr"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


def keys(url):
    return s3fs.S3FileSystem(use_listings_cache=False).find(url)


def whole(matrix):
    return sp.vstack([matrix.read_block(b) for b in range(len(matrix.blocks))]).tocsr()


def same(a, b):
    return a.shape == b.shape and abs(a - b).sum() == 0


def test_reading_goes_on_after_faults(bucket, uploaded, counts):
    bucket.faults = Faults("GET", CHUNKS, at=SOME)
    assert same(whole(ExpressionMatrix.open(uploaded, blocks=4)), counts)
    assert [kind for *_, kind in bucket.faults.made] == list(SOME.values())


def test_a_server_that_falls_silent_is_asked_again(bucket, uploaded, counts, monkeypatch):
    assert remote._options("s3")["config_kwargs"]["read_timeout"] == 20
    monkeypatch.setattr(remote, "_S3_SILENCE", 1)
    bucket.faults = Faults("GET", CHUNKS, at={2: "silence", 5: "silence"})
    assert same(whole(ExpressionMatrix.open(uploaded, blocks=4)), counts)
    assert len(bucket.faults.made) == 2


def test_a_server_that_never_answers_is_given_up(bucket, uploaded, monkeypatch):
    monkeypatch.setattr(remote, "_LONGEST", 2)
    bucket.faults = Faults("GET", CHUNKS, ever_after=(1, "silence"))
    with pytest.raises(
        InputError, match=rf"{uploaded}: X/indptr/0 cannot be read \(TimeoutError\); check the connection"
    ):
        ExpressionMatrix.open(uploaded, blocks=4)


def test_writing_goes_on_after_faults(bucket, source, tmp_path):
    bucket.faults = Faults("PUT", at=SOME | {20: "500", 30: "503", 40: "drop"})
    mask(source, "s3://bucket/masked.zarr", seed=3)
    assert len(bucket.faults.made) == 7
    mask(source, tmp_path / "masked.zarr", seed=3)
    for layer in (None, "held_out"):
        here, there = (ExpressionMatrix.open(p, layer) for p in (tmp_path / "masked.zarr", "s3://bucket/masked.zarr"))
        assert same(whole(here), whole(there))


@pytest.mark.parametrize("kind", ["500", "drop"])
def test_what_cannot_be_read_ends_in_one_line(bucket, uploaded, cli, impatient, kind):
    bucket.faults = Faults("GET", "/X/data/", ever_after=(8, kind))
    result = cli("mask", uploaded, "s3://bucket/out.zarr", "--quiet")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "s3://bucket/in.zarr: X/data/" in result.stderr
    assert "cannot be read (" in result.stderr
    assert keys("s3://bucket/out.zarr") == []


KEYS = ["obs/_index/0", "layers/held_out/data/0", "X/.zattrs", ".zmetadata", ".zgroup"]


@pytest.mark.parametrize(("key", "to_the_end"), [*((key, True) for key in KEYS), (KEYS[1], False), (KEYS[-1], False)])
def test_what_cannot_be_written_does_not_look_whole(bucket, source, cli, impatient, key, to_the_end):
    bucket.faults = Faults("PUT", re.escape(f"out.zarr/{key}"), ever_after=(1, "500"))
    if to_the_end:
        writes = bucket.faults.kind_of
        bucket.faults.kind_of = lambda method, path: (
            writes(method, path) or ("500" if bucket.faults.made and method in ("POST", "DELETE") else None)
        )
    result = cli("mask", source, "s3://bucket/out.zarr", "--quiet")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"s3://bucket/out.zarr: {key} cannot be written (" in result.stderr
    assert "We encountered an internal error" in result.stderr
    assert ("unfinished parts stay there, which do not open: delete them" in result.stderr) == to_the_end
    bucket.reset()
    assert bool(keys("s3://bucket/out.zarr")) == to_the_end
    with pytest.raises(InputError, match="no Zarr store"):
        open_store("s3://bucket/out.zarr")
    store = FsspecStore.from_url("s3://bucket/out.zarr", {"use_listings_cache": False}, read_only=True)
    for read in (zarr.open, zarr.open_group, zarr.open_consolidated, anndata.read_zarr):
        with pytest.raises((FileNotFoundError, KeyError, ValueError)):
            read(store)


def test_a_web_server_is_tried_again(source, counts, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))
    with served(file_server(source.parent)) as server, served(Proxy(server.server_port)) as proxy:
        url = f"{proxy.url}/counts.zarr"
        proxy.faults = Faults(
            "GET", at={number: SOME[kind] for number, kind in zip((2, 20, 30, 40), SOME, strict=True)}
        )
        assert same(whole(ExpressionMatrix.open(url, blocks=4)), counts)
        assert len(proxy.faults.made) == 4
        proxy.faults = Faults("GET", "/X/data/", ever_after=(10, "503"))
        with pytest.raises(InputError, match=rf"{url}: X/data/\d cannot be read \(503, "):
            whole(ExpressionMatrix.open(url, blocks=4))
        assert len(proxy.faults.made) >= 4  # one, and again after each wait
        assert len({path for _, path, _ in proxy.faults.made}) < len(proxy.faults.made)
