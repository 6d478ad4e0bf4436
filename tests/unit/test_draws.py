"""Choices by column: exact, uniform, and the same for every cut into blocks."""

import math

import numpy as np
import pytest
from scipy import stats

from scialm_dask.linalg import random
from scialm_dask.linalg.random import hidden_entries, thinned

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


def thin(counts, share, seed=0, first_row=0):
    """Thin a dense matrix."""
    counts = np.asarray(counts, np.float32)
    indptr = np.arange(len(counts) + 1) * counts.shape[1]
    indices = np.tile(np.arange(counts.shape[1], dtype=np.int32), len(counts))
    return thinned(indptr, indices, counts.ravel(), first_row=first_row, share=share, seed=seed).reshape(counts.shape)


@pytest.mark.parametrize(
    ("count", "share"),
    [
        (1, 0.8),
        (2, 0.3),
        (7, 0.8),
        (63, 0.5),
        (64, 0.8),
        (64, 0.1),
        (500, 0.01),
        (51, 0.8),
        (300, 0.4),
        (20_000, 0.999),
    ],
)
def test_thinned_counts_are_binomial(count, share):
    """Chi-square over all outcomes, those expected less than five times put together."""
    kept = thin(np.full((200, 1000), count), share, seed=count)
    law = stats.binom(count, share)
    expected = law.pmf(np.arange(count + 1)) * kept.size
    observed = np.bincount(kept.ravel().astype(int), minlength=count + 1)
    often = expected >= 5
    table = [np.append(x[often], x[~often].sum()) for x in (observed, expected)]
    used = table[1] > 0.5
    assert table[0][~used].sum() <= 3
    assert stats.chisquare(table[0][used], table[1][used], sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("count", [2**20, 2**26, 10**9, 10**12, 10**18, 1e30])
@pytest.mark.parametrize("share", [0.8, 0.25, 20 / 2**20])
def test_large_counts_have_the_moments_of_a_binomial(count, share):
    kept = thin(np.full((200, 1000), count), share, seed=3).astype(float)
    count = float(np.float32(count))
    mean, variance, skew, kurtosis = (float(x) for x in stats.binom(count, share).stats("mvsk"))
    step = np.spacing(np.float32(mean)).astype(float)  # of float32: what the result is rounded to
    n = kept.size
    assert abs(kept.mean() - mean) < 5 * np.sqrt(variance / n) + step / 2
    assert np.all(kept == np.rint(kept))
    if variance > 4 * step**2:
        rounding = step**2 / 12 if step > 1 else 0
        assert kept.var() == pytest.approx(variance + rounding, rel=5 * np.sqrt((2 + kurtosis) / n) + 0.01 * (step > 1))
        assert abs(stats.skew(kept.ravel()) - skew) < 5 * np.sqrt(6 / n)
        assert abs(stats.kurtosis(kept.ravel()) - kurtosis) < 5 * np.sqrt(24 / n)
    else:
        assert len(np.unique(kept)) < 20


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_share_and_all(share):
    counts = np.array([[1, 63, 64, 1e9, 1e12, 3e38]], np.float32)
    np.testing.assert_array_equal(thin(counts, share), counts * np.float32(share))


def test_a_draw_knows_its_row_column_and_seed_alone():
    counts = np.random.default_rng(0).choice(np.array([0, 1, 3, 40, 70, 1e5, 1e9], np.float32), (50, 30))
    whole = thin(counts, 0.8, seed=7)
    np.testing.assert_array_equal(np.vstack([thin(counts[i : i + 7], 0.8, 7, i) for i in range(0, 50, 7)]), whole)
    same = thin(np.full((400, 50), 1000.0), 0.5)
    apart = (
        [same[:-1] - 500, same[1:] - 500],
        [same[:, :-1] - 500, same[:, 1:] - 500],
        [same - 500, thin(np.full((400, 50), 1000.0), 0.5, seed=1) - 500],
    )
    for a, b in apart:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize("count", [100, 10**9, 10**12, 10**18, 1e30])
def test_a_draw_takes_no_more_numbers_for_a_larger_count(count, monkeypatch):
    """Trials of the rejection: about 1.4 at a mean of 20, and fewer for larger ones."""
    asked = []
    uniform = random._uniform.py_func
    monkeypatch.setattr(random, "_uniform", lambda x: asked.append(x) or uniform(x))
    monkeypatch.setattr(random, "mixed", lambda x: np.uint64(mixed_twin(int(x))))
    with np.errstate(over="ignore"):
        for seed in range(300):
            random._rejected.py_func(float(count), 0.2, np.uint64(mixed_twin(seed)))
    assert len(asked) / 2 / 300 < 1.5
