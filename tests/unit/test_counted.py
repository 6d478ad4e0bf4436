"""What a run costs whatever the machine: passes per iteration, tasks and reads per pass."""

from collections import Counter
from itertools import pairwise

import dask
import numpy as np
import pytest
from dask.callbacks import Callback
from problems import InMemory, low_rank_counts

from scialm_dask.config import preset
from scialm_dask.data.scratch import ZarrScratch
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.solve.ialm import complete

COUNTS = low_rank_counts(500, 700, seed=1)


class Tasks(Callback):
    """Counts the tasks that run, by function."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def _pretask(self, key, *_):
        self.counts[str(key).partition("-")[0]] += 1


def cost_of_iterations(folder, n_blocks, **changes):
    """Passes, tasks and reads of each iteration after the first whose A is not zero; the last one is cut short."""
    source = InMemory(COUNTS, n_blocks, np.random.default_rng(0).random(COUNTS.nnz) < 0.02)
    costs = []

    def note(iteration):
        costs.append((iteration.rank, iteration.passes, tasks.counts.copy(), len(source.loads)))

    with dask.config.set(scheduler="synchronous"), Tasks() as tasks:
        operator = LowRankPlusSparse(source, ZarrScratch(str(folder)))
        complete(operator, preset("complete", **changes), note)
    costs = [cost for cost in costs if cost[0] > 0]
    return [(after[1] - before[1], after[2] - before[2], after[3] - before[3]) for before, after in pairwise(costs)]


@pytest.mark.parametrize("n_blocks", [1, 2, 7])
def test_two_passes_an_iteration_one_visit_of_each_block_a_pass(tmp_path, n_blocks):
    iterations = cost_of_iterations(tmp_path, n_blocks, max_rank=20, max_iterations=9)
    assert len(iterations) > 3
    for passes, tasks, reads in iterations:
        assert passes == 2
        assert reads == 0
        assert tasks["visit"] == passes * n_blocks
        assert tasks.keys() <= {"visit", "getitem", "add_sums", "without_sketch"}
        # state and sums of each block are picked; then a tree's n − 1 sums
        assert tasks["getitem"] + tasks["add_sums"] == passes * (2 * n_blocks + n_blocks - 1)
        assert tasks["without_sketch"] <= n_blocks


def test_the_exact_short_side_takes_three_passes(tmp_path):
    iterations = cost_of_iterations(tmp_path, 3, max_iterations=9)
    assert {passes for passes, _, _ in iterations} <= {2, 3}
    assert iterations[-1][0] == 3
    assert len({tasks.total() - tasks["without_sketch"] for passes, tasks, _ in iterations if passes == 3}) == 1
