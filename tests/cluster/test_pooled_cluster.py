"""The pooled methods on a cluster of processes give what threads give."""

from __future__ import annotations

import sys
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from pooled_twins import sparse_simulation

from scialm_dask.errors import InputError
from scialm_dask.pooled.als import PooledALS
from scialm_dask.pooled.nuclear import PooledNuclearNorm


@pytest.fixture(scope="module")
def client():
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_same_answers_as_threads(client):
    M, P = sparse_simulation(3, cells=210)
    D = da.from_array(M @ P, chunks=(70, -1))
    methods = PooledALS(4, max_sweeps=10), PooledNuclearNorm(1e-2 * np.linalg.norm(M @ P), tol=1e-2)
    for method in methods:
        result = method.fit(D, P)
        theirs = result.to_dask().compute()
        with dask.config.set(scheduler="threads"):
            ours = method.fit(D, P).to_dask().compute()
        np.testing.assert_allclose(theirs, ours, atol=1e-6 * ours.max())


def test_errors_of_tasks_arrive_as_they_are(client):
    M, P = sparse_simulation(3)
    with pytest.raises(InputError, match="cell 50, pool 0"):
        PooledALS(2).fit(da.from_array(np.where(np.arange(60)[:, None] == 50, np.nan, M @ P), chunks=(20, -1)), P)
