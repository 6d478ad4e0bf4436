"""Stores behind URLs give what local ones give, and appear whole or not at all."""

import subprocess
import sys
import warnings

import anndata
import fsspec
import numpy as np
import pandas as pd
import pytest
import s3fs
import scipy.sparse as sp
import zarr
from objects import Faults, file_server, served

from scialm_dask import ExpressionMatrix, Imputation, impute
from scialm_dask.data.annotation import new_anndata
from scialm_dask.data.csr import CSRWriter
from scialm_dask.data.ingest import convert
from scialm_dask.data.qc import quality_control
from scialm_dask.data.remote import RemoteStore
from scialm_dask.data.store import atomic_output, atomic_store, check_output, open_store
from scialm_dask.errors import InputError, OutputError
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.simulate import simulate


def upload(path, url):
    s3fs.S3FileSystem(use_listings_cache=False).put(path, url, recursive=True)


def keys(url="s3://bucket"):
    return s3fs.S3FileSystem(use_listings_cache=False).find(url)


def consolidate(path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")  # of the standard of format 3
        zarr.consolidate_metadata(path)


def whole(matrix):
    return sp.vstack([matrix.read_block(b) for b in range(len(matrix.blocks))]).tocsr()


def same(a, b):
    return a.shape == b.shape and abs(a - b).sum() == 0


# Reading


@pytest.mark.parametrize(
    ("form", "zarr_format"),
    [(sp.csr_matrix, 2), (sp.csc_matrix, 3), (sp.csr_matrix.toarray, 3)],
    ids=["csr", "csc", "dense"],
)
def test_a_store_is_read_by_its_url(bucket, counts, store_of, form, zarr_format):
    upload(store_of(form(counts), zarr_format=zarr_format, twice=form(counts * 2)), "s3://bucket/a/b.zarr")
    matrix = ExpressionMatrix.open("s3://bucket/a/b.zarr/", blocks=3)
    assert same(whole(matrix), counts)
    assert same(whole(ExpressionMatrix.open("s3://bucket/a/b.zarr", "twice")), counts * 2)
    assert list(matrix.obs["batch"][:2]) == ["b", "a"]
    assert list(matrix.var.index[:2]) == ["gene0", "gene1"]


def test_any_protocol_of_fsspec_will_do(counts, store_of):
    path = store_of(counts)
    fsspec.filesystem("memory").put(path, "/here/a.zarr", recursive=True)
    assert same(whole(ExpressionMatrix.open("memory://here/a.zarr")), counts)
    assert same(whole(ExpressionMatrix.open(f"file://{path}")), counts)


def test_a_chunk_is_one_request(bucket, counts, store_of):
    consolidate(path := store_of(counts))
    upload(path, "s3://bucket/a.zarr")
    matrix = ExpressionMatrix.open("s3://bucket/a.zarr")
    bucket.log.clear()
    matrix.read_block(0)
    assert len(bucket.requests("GET", r"X/\w+/\d")) == 3
    assert len(bucket.log) == 10  # seven to open


def test_missing_chunks_are_found_behind_a_url(bucket, counts, store_of):
    upload(store_of(counts), "s3://bucket/a.zarr")
    s3fs.S3FileSystem().rm("bucket/a.zarr/X/data/0")
    with pytest.raises(InputError, match=r"s3://bucket/a.zarr:X: 1 of 1 chunks of data are missing"):
        ExpressionMatrix.open("s3://bucket/a.zarr")


@pytest.fixture
def web(tmp_path):
    with served(file_server(tmp_path)) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_web_server_is_read(web, counts, store_of, tmp_path, zarr_format):
    path = store_of(counts, zarr_format=zarr_format)
    with pytest.raises(InputError, match=r"does not list keys; run zarr.consolidate_metadata"):
        ExpressionMatrix.open(f"{web}/source.zarr")
    consolidate(path)
    matrix = ExpressionMatrix.open(f"{web}/source.zarr")
    assert same(whole(matrix), counts)
    assert list(matrix.var.index[:2]) == ["gene0", "gene1"]
    assert convert(f"{web}/source.zarr", tmp_path / "out.zarr")["n_observed"] == counts.nnz
    next((tmp_path / "source.zarr" / "X" / "indices").rglob("0")).unlink()
    with pytest.raises(InputError, match=r"1 of 1 chunks of indices are missing"):
        ExpressionMatrix.open(f"{web}/source.zarr")


PEAK = """
import sys, tracemalloc
from scialm_dask import ExpressionMatrix
for path in sys.argv[1:]:
    matrix = ExpressionMatrix.open(path, blocks=2)
    matrix.read_block(0)
    tracemalloc.start()
    matrix.read_block(1)
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def test_a_block_takes_no_more_memory_than_from_disk(web, tmp_path):
    simulate(tmp_path / "big.zarr", n_cells=6000, n_genes=1000, density=0.3)  # 13 chunks of values
    command = [sys.executable, "-c", PEAK, str(tmp_path / "big.zarr"), f"{web}/big.zarr"]
    disk, network = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert disk > 8 * 0.3 * 6000 * 1000 / 2 * 0.8  # it is the block that is measured
    assert network < 1.1 * disk


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/no.zarr", "no Zarr store that can be read"),
        ("s3://nowhere/no.zarr", "no Zarr store that can be read"),
        ("nonsense://x/y", "Protocol not known: nonsense"),
        ("gs://bucket/x", r"pip install 'scialm-dask\[gs\]'"),
        ("https://me:secret@host/x.zarr", r"https://…@host: a URL with credentials"),
        ("zip://x.zarr::s3://bucket/x.zip", "archives and chained URLs are not read"),
        ("zip://x.zarr", "archives and chained URLs are not read"),
        ("https://host/x.zarr?token=1", r"without \? and #"),
        ("s3://bucket/a/../x", r"without \. and \.\."),
        ("s3://[x", "not a URL"),
        ("s3:///x", r"spell it s3://BUCKET/NAME"),
    ],
)
def test_urls_that_cannot_be_read(bucket, monkeypatch, url, message):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_may_not_list_is_refused_absent_keys_but_reads_those_there(bucket, counts, store_of):
    """Without the right to list, S3 says 403 of a key that is not there, as zarr.json in a store of format 2."""
    upload(store_of(counts), "s3://bucket/a.zarr")
    bucket.faults = Faults("GET", r"zarr\.json", ever_after=(1, "403"))
    assert same(whole(ExpressionMatrix.open("s3://bucket/a.zarr")), counts)
    bucket.faults = Faults("GET", "X/data/0", ever_after=(1, "403"))
    with pytest.raises(InputError, match=r"s3://bucket/a.zarr: X/data/0 cannot be read \(Access Denied\)"):
        ExpressionMatrix.open("s3://bucket/a.zarr").read_block(0)


@pytest.mark.parametrize("layer", ["..", "../X", "a/../../obs", "/X", "."])
def test_a_layer_lies_within_its_store(counts, store_of, layer):
    path = store_of(counts)
    with pytest.raises(InputError, match="a layer cannot be named"):
        ExpressionMatrix.open(path, layer)


# Writing


def test_every_output_can_be_a_url(bucket, counts, store_of, tmp_path):
    local = [tmp_path / f"{name}.zarr" for name in ("counts", "clean", "masked", "simulated")]
    remote = [f"s3://bucket/{path.name}" for path in local]
    source = store_of(counts)
    for a, b, c, d in (local, remote):
        convert(source, a)
        quality_control(a, b)
        mask(b, c, fraction=0.2)
        simulate(d, n_cells=50, n_genes=20, rank=3)
        result = impute(c, preset="paper", max_iterations=5)
        result.to_zarr(str(c).replace("masked", "imputed"), dense=True)
    for path in (*local, tmp_path / "imputed.zarr"):
        here, there = (anndata.io.read_elem(open_store(p)) for p in (path, f"s3://bucket/{path.name}"))
        assert same(sp.csr_matrix(here.X), sp.csr_matrix(there.X))
        assert here.obs.equals(there.obs)
        assert here.layers.keys() == there.layers.keys()
    opened = Imputation.open("s3://bucket/imputed.zarr")
    np.testing.assert_array_equal(opened.left.compute(), result.left.compute())
    assert opened.summary["source"] == "s3://bucket/masked.zarr:X"
    assert not [key for key in keys() if "partial" in key]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["source.zarr", "imputed.zarr", *(path.name for path in local)]
    )


def fill(place, counts):
    obs, var = (
        pd.DataFrame(index=[f"{axis}{i}" for i in range(n)]) for axis, n in zip("cg", counts.shape, strict=True)
    )
    root = new_anndata(place, obs=obs, var=var)
    with CSRWriter(root, "X", n_columns=counts.shape[1]) as writer:
        writer.append(counts)
    return root


def test_the_root_is_put_last(bucket, counts):
    with atomic_store("s3://bucket/out.zarr") as place:
        zarr.consolidate_metadata(fill(place, counts).store)
        assert "bucket/out.zarr/X/data/0" in keys()
        assert not [key for key in keys() if ".z" in key.removeprefix("bucket/out.zarr")]
        for path in ("out.zarr", "out.zarr/X", "out.zarr/X/data"):
            with pytest.raises(InputError, match="no Zarr store"):
                open_store(f"s3://bucket/{path}")
    assert bucket.requests("PUT")[-1] == "/bucket/out.zarr/.zgroup"
    assert same(whole(ExpressionMatrix.open("s3://bucket/out.zarr")), counts)
    metadata = bucket.requests("PUT", r"/\.z")
    assert len(metadata) == len(set(metadata))  # not with every chunk


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_replaced(bucket, overwrite):
    with s3fs.S3FileSystem().open("bucket/out/old", "w") as file:
        file.write("old")
    for attempt in (check_output, lambda *args, **kwargs: atomic_store(*args, **kwargs).__enter__()):
        with pytest.raises(OutputError, match=r"s3://bucket/out: exists already, .*; delete it first or choose"):
            attempt("s3://bucket/out", overwrite=overwrite)
    assert keys() == ["bucket/out/old"]
    check_output("s3://bucket/ou", overwrite=overwrite)
    assert keys() == ["bucket/out/old"]


@pytest.mark.parametrize(("method", "path"), [("PUT", ""), ("GET", "list-type"), ("HEAD", "")])
def test_what_is_there_outlives_a_failure_to_look(bucket, monkeypatch, method, path):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem().pipe({"bucket/out/old": b"old", "bucket/file": b"old"})
    bucket.faults = Faults(method, path, ever_after=(1, "500"))
    for url in ("s3://bucket/out", "s3://bucket/file"):
        with pytest.raises((InputError, OutputError), match=url), atomic_store(url):
            pass
    bucket.reset()
    with pytest.raises(OutputError, match="exists already"), atomic_store("s3://bucket/file"):
        pass
    assert keys() == ["bucket/file", "bucket/out/old"]


def test_a_bucket_that_lets_nothing_be_deleted_is_refused(bucket, monkeypatch):
    bucket.faults = Faults("POST|DELETE", ever_after=(1, "403"))
    with pytest.raises(OutputError, match=r"\.partial cannot be deleted \(Access Denied\)"):
        check_output("s3://bucket/out", overwrite=False)


def test_of_two_runs_one_goes_on(bucket):
    with atomic_store("s3://bucket/out"):
        with pytest.raises(OutputError, match="exists already"), atomic_store("s3://bucket/out"):
            pass
        assert len(keys()) == 1  # that of the first
    assert keys() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, InputError])
def test_a_failure_leaves_nothing(bucket, counts, error):
    with pytest.raises(error), atomic_store("s3://bucket/out") as place:
        fill(place, counts)
        raise error("in the middle")
    assert keys() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/x.zarr", r"https is only read; write to a folder, s3:// or gs://"),
        ("s3://nowhere/x.zarr", r"cannot be written \(The specified bucket does not exist\)"),
        ("s3://bucket/in.zarr/out.zarr", "the output overlaps the input"),
        ("s3a://bucket/in.zarr", "the output overlaps the input"),
    ],
)
def test_urls_that_cannot_be_written(bucket, url, message):
    with pytest.raises(OutputError, match=message):
        check_output(url, overwrite=False, sources=("s3://bucket/in.zarr",))
    with pytest.raises(OutputError, match=message), atomic_store(url, sources=("s3://bucket/in.zarr",)):
        pass


def test_only_stores_are_written_to_a_url():
    with pytest.raises(OutputError, match="only Zarr stores are written to a URL"), atomic_output("s3://bucket/p.csv"):
        pass


def test_what_the_user_configures_goes_before_ours(bucket, monkeypatch):
    def retries():
        return RemoteStore.at("s3://bucket/x", read_only=True)._store.fs.config_kwargs.get("retries")

    assert retries() == {"mode": "standard", "total_max_attempts": 6}
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    assert retries() is None
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"mode": "adaptive"}}})
    assert retries() == {"mode": "adaptive"}
