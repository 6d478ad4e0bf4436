"""The benchmark of the pooled methods, at sizes that take no time."""

from __future__ import annotations

import dask
import numpy as np
import pytest
from bench_pooled import compare_sweeps, one_pass, simulated


def test_both_sweeps_fit_alike():
    result = compare_sweeps(cells=40)
    assert result["misfit"]["own"] == pytest.approx(result["misfit"]["notebook"], rel=0.05)


@pytest.mark.parametrize("method", ["als", "nuclear"])
def test_passes_run(method):
    with dask.config.set(scheduler="threads"):
        assert one_pass(method, cells=400, block=150)["passes"] == 4


def test_cells_do_not_depend_on_blocks():
    answers = [simulated(300, block)[0].compute(scheduler="threads") for block in (70, 300)]
    np.testing.assert_allclose(*answers)
    assert answers[0].min() >= 0
