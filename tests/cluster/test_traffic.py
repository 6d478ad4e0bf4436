"""What travels between the workers of a cluster, and what its scheduler is asked to do, by their own counters."""

import dask
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
from scialm_dask.reduction import Group, Placement, balanced, stretches
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


@pytest.mark.parametrize(("scheduler", "groups"), [("threads", 3), ("synchronous", 1)])
def test_without_a_cluster_there_is_a_group_for_each_thread(scheduler, groups):
    with dask.config.set(scheduler=scheduler, num_workers=3):
        shared = Placement(MemoryScratch())([1] * 7)
    assert [group.home for group in shared] == [None] * groups
    assert sorted(b for group in shared for b in group.blocks) == list(range(7))


def test_blocks_are_shared_out_by_weight():
    groups = stretches([1, 1, 1, 1, 8, 4], ["a", "b", "c"])
    assert groups == (Group("a", (0, 1, 2, 3)), Group("b", (4,)), Group("c", (5,)))
    assert stretches([1, 1], ["a", "b", "c", "d"]) == (Group("b", (0,)), Group("d", (1,)))


def test_blocks_stay_at_home_until_their_worker_is_lost_or_one_comes():
    threads = {"a": 1, "b": 2, "c": 1}
    groups = stretches([1] * 8, ["a", "b", "b", "c"])
    assert groups == (Group("a", (0, 1)), Group("b", (2, 3)), Group("b", (4, 5)), Group("c", (6, 7)))
    assert balanced(groups, [1] * 8, threads) == groups
    after = balanced(groups, [1] * 8, {"a": 1, "c": 1})
    assert [group.home for group in after] == ["a", "c"]
    assert [len(group.blocks) for group in after] == [4, 4]
    assert {0, 1} < set(after[0].blocks)
    assert {6, 7} < set(after[1].blocks)
    more = balanced(groups, [1] * 8, threads | {"d": 1})
    assert [(group.home, len(group.blocks)) for group in more[3:]] == [("c", 2), ("d", 1)]
    assert sorted(b for group in more for b in group.blocks) == list(range(8))
    moved = {b for old, new in zip(groups, more, strict=False) for b in set(old.blocks) - set(new.blocks)}
    assert moved == set(more[4].blocks)  # nothing else moves


def test_a_worker_that_comes_late_gets_its_share():
    groups = balanced(stretches([1] * 100, ["a", "b", "c", "d"]), [1] * 100, dict.fromkeys("abcde", 1))
    assert [len(group.blocks) for group in groups] == [20] * 5


def test_a_worker_that_takes_the_place_of_another_gets_its_blocks():
    groups = stretches([1] * 6, ["a", "b"])
    assert balanced(groups, [1] * 6, {"b": 1, "c": 1}) == (Group("b", (3, 4, 5)), Group("c", (0, 1, 2)))


@pytest.mark.parametrize("kind", ["memory", "zarr"])
def test_tasks_and_traffic_of_a_pass_do_not_depend_on_the_blocks(four, counts_path, tmp_path, kind):
    """V comes with each task, one sum goes from each worker, and the total to the client."""
    sent, made = {}, {}
    for n_blocks in (8, 40):
        store = MemoryScratch() if kind == "memory" else ZarrScratch(str(tmp_path))
        matrix = ExpressionMatrix.open(counts_path, blocks=n_blocks)
        blocks = prepare(matrix, survey(matrix), preset("complete"))
        operator = LowRankPlusSparse(blocks, store, placement=Placement(store))
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
    sums = VALUE * GENES * WIDTH + 8 * (RANK + WIDTH) * WIDTH
    for each in [*sent[8], *sent[40]]:
        assert each < 1.02 * WORKERS * sums
    assert made[40] == made[8]
    assert max(made[40]) <= (4 if kind == "memory" else 2) * WORKERS


def test_groups_follow_the_workers(four):
    store = MemoryScratch()
    placement = Placement(store)
    first = placement([1] * 9)
    assert {group.home for group in first} == set(four.scheduler_info(n_workers=-1)["workers"])
    assert placement([1] * 9) == first
