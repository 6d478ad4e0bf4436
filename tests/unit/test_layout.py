import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scialm_dask.data.csr import RowBlocks


def covers(blocks, n_rows):
    rows = [row for start, stop in blocks for row in range(start, stop)]
    return rows == list(range(n_rows)) and min(blocks.sizes) > 0


@given(n_rows=st.integers(1, 300), n_blocks=st.integers(1, 400))
def test_even_blocks_cover_every_row_once(n_rows, n_blocks):
    blocks = RowBlocks.even(n_rows, n_blocks)
    assert covers(blocks, n_rows)
    assert len(blocks) == min(n_rows, n_blocks)
    assert max(blocks.sizes) - min(blocks.sizes) <= 1


@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=60))
def test_blocks_by_nonzeros_cover_every_row_once_and_are_not_too_large(row_sizes):
    indptr = np.concatenate([[0], np.cumsum(row_sizes)])
    blocks = RowBlocks.by_nonzeros(indptr)
    assert covers(blocks, len(row_sizes))
    assert all(indptr[stop] - indptr[start] < 4_000_001 + max(row_sizes) for start, stop in blocks)


@given(n_rows=st.integers(1, 3000), width=st.integers(1, 100_000), chunk=st.integers(1, 3000))
def test_dense_blocks_are_whole_chunks(n_rows, width, chunk):
    blocks = RowBlocks.by_width(n_rows, width, chunk)
    assert covers(blocks, n_rows)
    if chunk * width <= 200_000:
        assert all(start % chunk == 0 for start, _ in blocks)


def test_rows_without_values_are_cut_too():
    assert RowBlocks.by_nonzeros(np.zeros(200_001, np.int64)).sizes == (50_000,) * 4


@pytest.mark.parametrize("bounds", [(0,), (1, 2), (0, 2, 2), (0, 3, 1)])
def test_bounds_must_rise_from_zero(bounds):
    with pytest.raises(ValueError, match="rise from 0"):
        RowBlocks(bounds)


def test_blocks_that_are_asked_for_hold_as_many_values():
    lengths = np.r_[np.full(990, 10), np.full(10, 9900)]
    indptr = np.r_[0, np.cumsum(lengths)]
    blocks = RowBlocks.by_nonzeros(indptr, 10)
    assert len(blocks) == 10
    values = np.diff(indptr[list(blocks.bounds)])
    assert values.max() < 2.5 * values.mean()
    assert set(RowBlocks.by_nonzeros(np.zeros(101, np.int64), 7).sizes) == {14, 15}
    assert len(RowBlocks.by_nonzeros(np.array([0, 1, 1000, 1001]), 3)) <= 3
    assert len(RowBlocks.by_nonzeros(np.array([0, 4, 8]), 9)) == 2
