"""Random choices keyed by row, column and seed, so that they do not depend on blocks, threads or workers."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from scialm_dask.linalg.sparse_products import compiled

_NEVER_HIDDEN = 3  # columns with at most this many entries keep them all

# Two rounds leave about n**-0.5 of any bias in pairs of entries, so small n need more of them.
_SMALL = np.uint64(256)
_ROUND_PAIRS, _ROUND_PAIRS_SMALL = 4, 12
_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S12, _S27, _S30 = np.uint64(12), np.uint64(27), np.uint64(30)
_S31, _S32, _S56 = np.uint64(31), np.uint64(32), np.uint64(56)
_ZERO, _ONE = np.uint64(0), np.uint64(1)


@compiled()
def mixed(x: np.uint64) -> np.uint64:
    """Return a bijective hash of 64 bits, the output function of SplitMix64."""
    x = (x ^ (x >> _S30)) * _MIX_1
    x = (x ^ (x >> _S27)) * _MIX_2
    return x ^ (x >> _S31)


@compiled()
def _permuted(x: np.uint64, n: np.uint64, n_left: np.uint64, n_right: np.uint64, key: np.uint64) -> np.uint64:
    """Return the image of `x` under a pseudo-random permutation of 0 … n - 1.

    This is a Feistel network on pairs (left, right) below (n_left, n_right), where n_left · n_right is n or slightly
    more. Results of n or more are permuted again until they fall below n (cycle walking).
    """
    while True:
        left, right, k = x // n_right, x % n_right, key
        for _ in range(_ROUND_PAIRS_SMALL if n < _SMALL else _ROUND_PAIRS):
            k += _GOLDEN
            left += ((mixed(k ^ right) >> _S32) * n_left) >> _S32
            left -= n_left if left >= n_left else _ZERO
            k += _GOLDEN
            right += ((mixed(k ^ left) >> _S32) * n_right) >> _S32
            right -= n_right if right >= n_right else _ZERO
        x = left * n_right + right
        if x < n:
            return x


@compiled()
def _hide(
    indices: NDArray[np.int32],
    seen: NDArray[np.int64],
    counts: NDArray[np.int64],
    n_hidden: NDArray[np.int64],
    seed: np.uint64,
    hidden: NDArray[np.bool_],
) -> None:
    n_columns = len(counts)
    keys = np.empty(n_columns, np.uint64)
    lefts, rights = np.empty_like(keys), np.empty_like(keys)
    for j in range(n_columns):
        keys[j] = mixed(mixed(seed) + np.uint64(j) * _GOLDEN + _ONE)
        n_left = max(np.int64(1), np.int64(np.ceil(np.sqrt(counts[j]))))
        lefts[j], rights[j] = n_left, max(np.int64(1), (counts[j] + n_left - 1) // n_left)
    for p in range(len(indices)):
        j = indices[p]
        ordinal = seen[j]
        seen[j] += 1
        if n_hidden[j] > 0:
            x = _permuted(np.uint64(ordinal), np.uint64(counts[j]), lefts[j], rights[j], keys[j])
            hidden[p] = x < np.uint64(n_hidden[j])


def hidden_entries(
    indices: NDArray[np.int32],
    first_ordinal: NDArray[np.int64],
    counts: NDArray[np.int64],
    n_hidden: NDArray[np.int64],
    seed: int,
) -> NDArray[np.bool_]:
    """Choose entries of a sparse matrix, column by column, uniformly and without replacement.

    Entry number `o` of column `j`, in row order, is chosen if a pseudo-random permutation keyed by seed and column maps
    it below ``n_hidden[j]``. So exactly ``n_hidden[j]`` entries are chosen, and a block needs to know only the counts
    of the blocks before it.

    `indices` has the column of each entry of a block of rows, as in CSR. For each column, `first_ordinal`, `counts` and
    `n_hidden` have the number of entries in the blocks before, in the whole matrix, below 2**62, and to choose. The low
    64 bits of the seed are used. Returns a mask of the chosen entries. Raises `ValueError` if a column has more
    entries, in the blocks before and this one, than `counts` says.
    """
    hidden = np.zeros(len(indices), dtype=np.bool_)
    seen = np.array(first_ordinal, dtype=np.int64)
    counts, n_hidden = (np.ascontiguousarray(values, dtype=np.int64) for values in (counts, n_hidden))
    if len(indices) and np.any(seen + np.bincount(indices, minlength=len(counts)) > counts):
        raise ValueError("a column has more entries than its count")
    _hide(indices, seen, counts, n_hidden, np.uint64(seed & _MASK), hidden)
    return hidden


def n_to_hide(counts: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """Return how many entries of each column to hide: ``int(count * fraction)``, none if `count` is at most three."""
    hidden: NDArray[np.int64] = (counts * fraction).astype(np.int64)
    return np.where(counts > _NEVER_HIDDEN, hidden, 0)


@compiled()
def _uniform(x: np.uint64) -> float:
    """Return a number in the open interval (0, 1) from the upper 52 bits of `x`."""
    return (np.float64(x >> _S12) + 0.5) * 2.0**-52


@compiled()
def _stirling(x: float) -> float:
    """Return the error of Stirling's formula for log x!."""
    y = x + 1
    if x < 10:
        return math.lgamma(y) - (x + 0.5) * math.log(y) + y - 0.5 * math.log(2 * math.pi)
    return (1 / 12 - (1 / 360 - 1 / 1260 / (y * y)) / (y * y)) / y


@compiled()
def _inverted(n: float, p: float, u: float) -> float:
    """Draw from Binomial(n, p) by inversion, in time proportional to the mean."""
    k, last, odds = 0.0, min(n, n * p + 10 * math.sqrt(n * p + 1)), p / (1 - p)
    f = math.exp(n * math.log1p(-p))
    while u >= f and k < last:
        u -= f
        f *= odds * (n - k) / (k + 1)
        k += 1
    return k


@compiled()
def _rejected(n: float, p: float, key: np.uint64) -> Any:
    """Draw from Binomial(n, p) in constant time, for np ≥ 10 and p ≤ ½ (BTRS of Hörmann 1993)."""
    sd, mode, odds = math.sqrt(n * p * (1 - p)), np.floor((n + 1) * p), p / (1 - p)
    b = 1.15 + 2.53 * sd
    a = -0.0873 + 0.0248 * b + 0.01 * p
    while True:
        key += _GOLDEN
        u = _uniform(mixed(key)) - 0.5
        key += _GOLDEN
        v = _uniform(mixed(key))
        near = 0.5 - abs(u)
        k = np.floor((2 * a / near + b) * u + n * p + 0.5)
        if near >= 0.07 and v <= 0.92 - 4.2 / b:
            return k
        if k < 0 or k > n:
            continue
        d = k - mode  # log of P(k) / P(mode), from terms of the size of d, so that it is exact for n = 1e12 too
        ratio = d * math.log(odds * (n - k + 1) / (k + 1)) + _stirling(mode) + _stirling(n - mode)
        ratio -= (mode + 0.5) * math.log1p(d / (mode + 1)) + (n - mode + 0.5) * math.log1p(-d / (n - mode + 1))
        if math.log(v * (2.83 + 5.1 / b) * sd / (a / (near * near) + b)) <= ratio - _stirling(k) - _stirling(n - k):
            return k


@lru_cache
def _small_binomials(p: float) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Return P(at most m of n) for n < 64, and where to start the search for a uniform number, by its upper 8 bits."""
    n, m = np.arange(64)[:, None], np.arange(64)
    below = np.where(m < n, bdtr(np.minimum(m, n), n, p), 1.0)
    return below, np.sum(below[:, None] <= np.arange(256)[:, None] / 256, axis=2, dtype=np.uint8)


@compiled()
def _thin(
    indptr: Any, indices: Any, counts: Any, first_row: np.uint64, share: float, seed: np.uint64,
    below: Any, guide: Any, kept: Any
) -> None:  # fmt: skip
    p = min(share, 1 - share)  # of the smaller part
    for i in range(len(indptr) - 1):
        row = mixed(mixed(seed) + (first_row + np.uint64(i)) * _GOLDEN + _ONE)
        for k in range(indptr[i], indptr[i + 1]):
            key = mixed(row + np.uint64(indices[k]) * _GOLDEN)
            n = np.float64(counts[k])
            if n < len(below):
                small = np.int64(n)
                u, m = _uniform(key), np.int64(guide[small, key >> _S56])
                while u >= below[small, m]:
                    m += 1
                part = np.float64(m)
            elif n * p < 10:
                part = _inverted(n, p, _uniform(key))
            else:
                part = _rejected(n, p, key)
            kept[k] = part if share <= 0.5 else n - part


def thinned(
    indptr: NDArray[np.integer],
    indices: NDArray[np.int32],
    counts: NDArray[np.float32],
    *,
    first_row: int,
    share: float,
    seed: int,
) -> NDArray[np.float32]:
    """Keep each molecule with probability `share`, in time that does not grow with the counts.

    The counts, whole numbers of any size, are a block of rows in CSR that starts at row `first_row` of the matrix. The
    low 64 bits of the seed are used. Returns the numbers of kept molecules, float32.
    """
    kept = np.empty_like(counts)
    tables = _small_binomials(min(share, 1 - share))
    _thin(indptr, indices, counts, np.uint64(first_row), share, np.uint64(seed & _MASK), *tables, kept)
    return kept
