"""Workers that come late get blocks, and what a run puts on a scheduler goes with it and leaves others' tasks alone."""

import gc
import time

import dask
import faults
import numpy as np
import pytest
from dask.distributed import Client, LocalCluster
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, impute
from scialm_dask.data.scratch import MemoryScratch
from scialm_dask.events import Iteration
from scialm_dask.reduction import Placement

COUNTS = low_rank_counts(240, 180, density=0.3, seed=3)
RUN = {"preset": "complete", "validation": 0.05, "max_iterations": 10, "max_rank": 8}
VISIT = "scialm_dask.linalg.kernels:visit"


@pytest.fixture
def cluster():
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as started:
        yield started


@pytest.fixture
def client(cluster):
    with Client(cluster) as connected:
        yield connected


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def plugins(client):
    names = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins))
    return [name for name in names if name.startswith("scialm")]


@pytest.mark.parametrize("kind", ["memory", pytest.param("zarr", marks=pytest.mark.slow)])
def test_a_worker_that_comes_late_gets_half_the_blocks(cluster, client, store_of, tmp_path, kind):
    matrix = ExpressionMatrix.open(store_of(COUNTS), blocks=6)
    client.register_plugin(faults.Faults(VISIT, tmp_path / "calls", {}, each=True))

    def listen(event):
        if isinstance(event, Iteration) and event.iteration == 4:
            cluster.scale(2)
            client.wait_for_workers(2, timeout=60)

    result = impute(matrix, scratch=kind if kind == "memory" else f"zarr:{tmp_path}", listen=listen, **RUN)
    early, late = (path.stat().st_size for path in sorted(tmp_path.glob("calls.*")))
    last = int(result.history["passes"].iloc[-1]) - int(result.history["passes"].iloc[4])
    assert late >= 3 * last > 0  # of six blocks in each of the passes that followed
    assert (early + late) % 6 == 0  # each block once in every pass that multiplies
    assert early + late <= 6 * (result.summary["passes"] - 1)
    left = result.left.compute()
    with dask.config.set(scheduler="synchronous"):
        expected = impute(matrix, **RUN).left.compute()
    assert np.linalg.norm(left - expected) <= 1e-4 * np.linalg.norm(expected)


def test_what_a_run_puts_on_the_scheduler_goes_with_its_result(client, store_of):
    result = impute(ExpressionMatrix.open(store_of(COUNTS), blocks=2), scratch="memory", **RUN)
    assert len(plugins(client)) == 1  # what a lost worker held of the result may have to be made again
    del result
    gc.collect()
    until(lambda: not plugins(client))


def test_tasks_of_others_are_left_alone(cluster, client):
    """A task that waits for its home goes on waiting, whatever runs of ours go on."""
    store = MemoryScratch()
    Placement(store)([1, 1])
    assert len(plugins(client)) == 1
    (home,) = client.scheduler_info()["workers"]
    cluster.scale(0)
    until(lambda: not client.scheduler_info()["workers"])
    others = client.submit(abs, -1, workers=[home], allow_other_workers=True, pure=False)
    until(lambda: client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.unrunnable)) == 1)

    def restrictions(dask_scheduler, key=others.key):
        return dask_scheduler.tasks[key].worker_restrictions

    before = client.run_on_scheduler(restrictions)
    cluster.scale(1)
    client.wait_for_workers(1, timeout=60)
    assert client.run_on_scheduler(restrictions) == before
