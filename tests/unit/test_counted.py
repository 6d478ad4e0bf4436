"""What a run costs whatever the machine: passes per iteration, tasks and reads per pass, whatever the blocks."""

from collections import Counter
from itertools import pairwise

import dask
import numpy as np
import pytest
from dask.callbacks import Callback
from problems import InMemory, completed, low_rank_counts

from scialm_dask.config import preset
from scialm_dask.data.scratch import ZarrScratch
from scialm_dask.linalg.operator import LowRankPlusSparse

COUNTS = low_rank_counts(500, 700, seed=1)


class Tasks(Callback):
    """Counts the tasks that run, by function."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def _pretask(self, key, *_):
        self.counts[str(key).partition("-")[0]] += 1


def cost_of_iterations(folder, n_blocks, threads, **changes):
    """Passes, tasks and reads of each iteration after the first whose A is not zero; the last one is cut short."""
    source = InMemory(COUNTS, n_blocks, np.random.default_rng(0).random(COUNTS.nnz) < 0.02)
    costs = []

    def note(iteration):
        costs.append((iteration.rank, iteration.passes, tasks.counts.copy(), len(source.loads)))

    with dask.config.set(scheduler="threads", num_workers=threads), Tasks() as tasks:
        operator = LowRankPlusSparse(source, ZarrScratch(str(folder)))
        completed(operator, preset("complete", **changes), note)
    costs = [cost for cost in costs if cost[0] > 0]
    return [(after[1] - before[1], after[2] - before[2], after[3] - before[3]) for before, after in pairwise(costs)]


@pytest.mark.parametrize(("n_blocks", "threads"), [(1, 1), (2, 2), (7, 2), (7, 5), (7, 16)])
def test_two_passes_an_iteration_one_task_for_each_thread_a_pass(tmp_path, n_blocks, threads):
    groups = min(n_blocks, threads)
    iterations = cost_of_iterations(tmp_path, n_blocks, threads, max_rank=20, max_iterations=9)
    assert len(iterations) > 3
    for passes, tasks, reads in iterations:
        assert passes == 2
        assert reads == 0
        assert +tasks == +Counter({"run": passes * groups, "add": passes * (groups - 1)})


def test_the_exact_short_side_takes_three_passes(tmp_path):
    iterations = cost_of_iterations(tmp_path, 3, 2, max_iterations=9)
    assert {passes for passes, _, _ in iterations} <= {2, 3}
    assert iterations[-1][0] == 3
    assert len({tasks.total() for passes, tasks, _ in iterations if passes == 3}) == 1
