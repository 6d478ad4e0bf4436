"""Worker processes read and write object stores by themselves, by their URLs."""

import json

import cloudpickle
import dask
import fsspec
import numpy as np
import pytest
from dask.distributed import Client, LocalCluster
from objects import Faults
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, Imputation, impute
from scialm_dask.data.ingest import convert

SETTINGS = {"preset": "paper", "max_iterations": 6}


@pytest.fixture
def client(bucket, monkeypatch):
    """Two processes that know the key of the bucket as this one does: from fsspec's configuration."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    options = {"key": "somebody", "secret": "hush-hush"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setenv("FSSPEC_S3", json.dumps(options))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.mark.slow
def test_processes_share_a_bucket_that_fails(client, bucket, store_of, tmp_path):
    path = store_of(low_rank_counts(160, 90, density=0.5, seed=3))
    convert(path, "s3://bucket/in.zarr")
    bucket.faults = Faults("GET", r"/X/(data|indices|indptr)/\d", at={3: "500", 8: "503", 12: "drop"})
    matrix = ExpressionMatrix.open("s3://bucket/in.zarr", blocks=5)
    with client.as_current():
        impute(matrix, **SETTINGS).to_zarr("s3://bucket/out.zarr")
        assert len(bucket.faults.made) == 3
        result = Imputation.open("s3://bucket/out.zarr")
        left = result.left.compute()
    with dask.config.set(scheduler="threads"):
        expected = impute(ExpressionMatrix.open(path, blocks=5), **SETTINGS)
        product = expected.left.compute() @ expected.right.T
    assert np.linalg.norm(left @ result.right.T - product) < 1e-4 * np.linalg.norm(product)
    shipped = cloudpickle.dumps((matrix, dict(result.left.__dask_graph__())))
    assert b"s3://bucket/out.zarr" in shipped
    assert not [word for word in (b"hush-hush", b"somebody", b"FsspecStore", b"s3fs") if word in shipped]
    s3 = fsspec.filesystem("s3", use_listings_cache=False)
    stored = s3.cat(s3.find("bucket/out.zarr"))
    assert "bucket/out.zarr/.zgroup" in stored
    assert not [key for key, value in stored.items() if b"hush-hush" in key.encode() + value]
