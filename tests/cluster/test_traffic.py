"""What travels between the workers of a cluster, and what its scheduler is asked to do, by their own counters."""

import numpy as np
import pytest
from distributed import Client, LocalCluster
from distributed.diagnostics.plugin import SchedulerPlugin

from scialm_dask import ExpressionMatrix
from scialm_dask.config import preset
from scialm_dask.data.scratch import MemoryScratch, ZarrScratch
from scialm_dask.evaluate.simulate import simulate
from scialm_dask.linalg.kernels import Update
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.svd import extended_basis, rayleigh_ritz
from scialm_dask.run.placement import Placement, _shares, _without_the_lost
from scialm_dask.solve.scaling import prepare, survey

GENES, WIDTH, RANK, WORKERS = 1500, 64, 48, 4
VALUE = 4  # bytes of a float32


@pytest.fixture(scope="module")
def counts_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("traffic") / "counts.zarr"
    simulate(path, n_cells=2400, n_genes=GENES, density=0.05, rank=5, seed=0)
    return path


@pytest.fixture(scope="module")
def four():
    with (
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(Made())
        yield client


def bytes_sent(client):
    return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())


class Made(SchedulerPlugin):
    """Counts tasks that were computed."""

    name = "made"
    count = 0

    def transition(self, key, start, finish, *args, **kwargs):
        self.count += (start, finish) == ("processing", "memory")


def tasks_made(client):
    return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["made"].count)


def test_without_a_cluster_nobody_is_at_home():
    assert Placement()(3) == (None, None, None)


def test_blocks_stay_at_home_until_their_worker_is_lost():
    threads = {"a": 1, "b": 2, "c": 1}
    homes = _shares(8, threads)
    assert homes == ("a", "a", "b", "b", "b", "b", "c", "c")
    assert _without_the_lost(homes, threads) == homes
    after = _without_the_lost(homes, {"a": 1, "c": 1})
    assert [one for one, home in zip(after, homes, strict=True) if home != "b"] == ["a", "a", "c", "c"]
    assert sorted(one for one, home in zip(after, homes, strict=True) if home == "b") == ["a", "a", "c", "c"]


@pytest.mark.parametrize("kind", ["memory", "zarr"])
def test_traffic_of_a_pass_does_not_depend_on_the_blocks(four, counts_path, tmp_path, kind):
    """V goes to each worker once, one sum comes from each; the scheduler has a constant number of tasks per pass."""
    sent, made = {}, {}
    for n_blocks in (8, 40):
        store = MemoryScratch() if kind == "memory" else ZarrScratch(str(tmp_path))
        matrix = ExpressionMatrix.open(counts_path, blocks=n_blocks)
        blocks = prepare(matrix, survey(matrix), preset("auto"))
        operator = LowRankPlusSparse(blocks, store, homes=Placement())
        svd = rayleigh_ritz(operator.multiply(extended_basis(np.zeros((GENES, 0), np.float32), WIDTH, 0)))
        passes = []
        for _ in range(3):
            before = bytes_sent(four), tasks_made(four)
            rotation = (svd.to_left[:, :RANK] * svd.values[:RANK]).astype(np.float32)
            right = np.ascontiguousarray(svd.right[:, :RANK])
            svd = rayleigh_ritz(operator.multiply(svd.right, Update(rotation, 0.8), right))
            passes.append((bytes_sent(four) - before[0], tasks_made(four) - before[1]))
        sent[n_blocks] = [each for each, _ in passes]
        made[n_blocks] = {count for _, count in passes}
        operator.release()
    view, sums = VALUE * GENES * (RANK + WIDTH), VALUE * GENES * WIDTH + 8 * (RANK + WIDTH) * WIDTH
    for each in [*sent[8], *sent[40]]:  # V to the others, their sums to one worker, and what that has to the client
        assert each < 1.1 * ((WORKERS - 1) * view + WORKERS * sums)
    assert max(sent[40]) < 1.05 * max(sent[8])
    assert all(len(counts) == 1 for counts in made.values())
    assert max(made[40]) < 5 * max(made[8]) + 10


def test_homes_follow_the_workers(four):
    homes = Placement()
    first = homes(9)
    assert set(first) == set(four.scheduler_info(n_workers=-1)["workers"])
    assert homes(9) == first == tuple(sorted(first))
