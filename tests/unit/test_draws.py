"""Choices by column: exact, uniform, and the same for every cut into blocks."""

import math

import numpy as np
import pytest
from scipy import stats

from scialm_dask.linalg.random import hidden_entries

MASK = (1 << 64) - 1


def mixed_twin(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def hidden_twin(indices, first_ordinal, counts, n_hidden, seed):
    """The same in Python integers, written from the definition."""
    golden = 0x9E3779B97F4A7C15
    seen = [int(o) for o in first_ordinal]
    result = []
    for j in (int(j) for j in indices):
        n = int(counts[j])
        key = mixed_twin((mixed_twin(seed & MASK) + j * golden + 1) & MASK)
        a = math.isqrt(n - 1) + 1
        b = -(-n // a)
        x, seen[j] = seen[j], seen[j] + 1
        while True:
            left, right, k = x // b, x % b, key
            for _ in range(12 if n < 256 else 4):
                k = k + golden & MASK
                left = (left + ((mixed_twin(k ^ right) >> 32) * a >> 32)) % a
                k = k + golden & MASK
                right = (right + ((mixed_twin(k ^ left) >> 32) * b >> 32)) % b
            x = left * b + right
            if x < n:
                break
        result.append(x < n_hidden[j])
    return np.array(result, dtype=bool)


def block(n_columns, count):
    """A block in which every column has `count` entries; its rows are full."""
    return np.tile(np.arange(n_columns, dtype=np.int32), count)


def choose(n_columns, count, n_hidden, seed=0):
    """Which ordinals are chosen, one row for each column."""
    full = np.full(n_columns, count)
    chosen = hidden_entries(block(n_columns, count), np.zeros(n_columns, int), full, np.full(n_columns, n_hidden), seed)
    return chosen.reshape(count, n_columns).T


def test_matches_its_twin():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 400, 30)
    indices = rng.permutation(np.repeat(np.arange(30, dtype=np.int32), counts))
    n_hidden = counts // 3
    for seed in (0, -1, 12345678901234567890123):
        got = hidden_entries(indices, np.zeros(30, int), counts, n_hidden, seed)
        np.testing.assert_array_equal(got, hidden_twin(indices, np.zeros(30, int), counts, n_hidden, seed))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 17, 99, 1000, 4097])
def test_chooses_exactly_as_many_as_asked(count):
    for n_hidden in {0, 1, count // 10, count // 2, count}:
        np.testing.assert_array_equal(choose(50, count, n_hidden).sum(axis=1), n_hidden)


def test_does_not_depend_on_the_blocks():
    rng = np.random.default_rng(1)
    n_columns = 40
    indices = rng.integers(0, n_columns, 5000).astype(np.int32)
    counts = np.bincount(indices, minlength=n_columns)
    n_hidden = counts // 10
    whole = hidden_entries(indices, np.zeros(n_columns, int), counts, n_hidden, 3)
    np.testing.assert_array_equal(np.bincount(indices[whole], minlength=n_columns), n_hidden)
    for n_blocks in (2, 7, 5000):
        first, parts = np.zeros(n_columns, int), []
        for part in np.array_split(indices, n_blocks):
            parts.append(hidden_entries(part, first, counts, n_hidden, 3))
            first = first + np.bincount(part, minlength=n_columns)
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("count", "n_hidden"), [(4, 1), (4, 2), (5, 2), (10, 1), (12, 6), (37, 3), (100, 10), (256, 25)]
)
def test_every_entry_and_every_pair_is_as_likely(count, n_hidden):
    n_columns = 200_000 // count * 4
    chosen = choose(n_columns, count, n_hidden, seed=11).astype(np.float64)
    share = n_hidden / count
    # Sum of squared deviations of the marginals, in the covariance of sampling without replacement: chi-squared.
    deviation = chosen.sum(axis=0) - n_columns * share
    statistic = (deviation**2).sum() / (n_columns * share * (1 - share) * count / (count - 1))
    assert 1e-4 < stats.chi2.sf(statistic, count - 1) < 1 - 1e-4
    both = (chosen.T @ chosen)[np.triu_indices(count, 1)] / n_columns
    expected = share * (n_hidden - 1) / (count - 1)
    tolerance = 5 * np.sqrt(max(expected * (1 - expected), 1e-12) / n_columns)
    assert np.abs(both - expected).max() <= tolerance


def test_columns_and_seeds_are_independent():
    a, b = choose(2000, 100, 30, seed=0), choose(2000, 100, 30, seed=1)
    n = a.size
    for x, y in [(a, b), (a[:-1], a[1:]), (a[:, :-1], b[:, 1:]), (a[:-1], b[1:])]:
        correlation = np.corrcoef(x.ravel(), y.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(n)


def test_more_entries_than_counted_are_refused():
    with pytest.raises(ValueError, match="more entries"):
        hidden_entries(np.zeros(3, np.int32), np.zeros(1, int), np.array([2]), np.array([1]), 0)
