"""How many singular values are kept and computed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scialm_dask.config import Settings, preset
from scialm_dask.solve.ialm import RankRule, basis_width, prefers_short_side


def limits(rule, ranks):
    seen = [rule.limit]
    for rank in ranks:
        rule.update(rank)
        seen.append(rule.limit)
    return seen


def test_equation_13():
    """The first iterations of the trace of PBMC: one more than svp, or 200 more where svp met sv."""
    rule = RankRule(preset("paper"), 2843)
    assert limits(rule, [0, 0, 1, 1, 1, 1, 1, 2, 3, 3]) == [5, 1, 1, 201, 2, 2, 2, 2, 202, 4, 4]


def test_no_more_than_the_short_side_or_the_largest_rank():
    assert limits(RankRule(preset("paper", increment=30), 12), [5, 12]) == [5, 12, 12]
    assert limits(RankRule(preset("paper", first_rank=50), 12), []) == [12]
    assert limits(RankRule(preset("paper", max_rank=7), 12), [5, 7, 3]) == [5, 7, 7, 4]


def test_the_adaptive_rule_only_knows_the_most():
    assert limits(RankRule(Settings(), 12), [3, 9]) == [12, 12, 12]
    assert limits(RankRule(Settings(max_rank=7), 12), [3, 7]) == [7, 7, 7]


@given(st.integers(1, 400), st.floats(0.01, 3), st.floats(1e-6, 1), st.integers(1, 300))
def test_the_basis_is_wide_enough_and_no_wider_than_useful(count, fall, threshold, limit):
    values = np.exp(-fall * np.arange(count) / 10)
    width = basis_width(values, threshold, limit)
    over = min(np.count_nonzero(values > threshold), limit)
    assert width % 16 == 0
    assert width >= over + 8  # at least eight spare ones
    assert width <= 1.125 * min(limit, 3 * count) + 8 + 16


@pytest.mark.parametrize("n", [1, 2, 5])
def test_where_all_values_are_over_their_fall_goes_on(n):
    values = np.exp(-0.05 * np.arange(40 * n))
    assert basis_width(values, float(values[-1]) * 0.2, 10_000) > 40 * n + 30  # a fall to a fifth is 32 more
    assert basis_width(np.ones(40 * n), 0.5, 10_000) >= 120 * n  # no fall at all: as many again, twice


def test_a_threshold_of_zero_asks_for_the_limit():
    assert basis_width(np.zeros(5), 0.0, 5) == 16
    assert basis_width(np.array([3.0, 2.0]), 0.0, 4) == 16


def test_the_short_side_is_taken_when_it_is_short_and_the_basis_wide():
    assert prefers_short_side(300, (2843, 13003))
    assert not prefers_short_side(64, (2843, 13003))
    assert prefers_short_side(300, (13003, 2843))
    assert not prefers_short_side(3000, (50_000, 20_000))
