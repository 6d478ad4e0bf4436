"""The small things that are done to CSR blocks."""

import numpy as np
import pytest

from scialm_dask.data.csr import RowBlocks, entries_where, row_of, scaled_rows


def test_rows_of_entries(counts):
    assert row_of(counts).tolist() == counts.tocoo().row.tolist()


def test_chosen_entries_stay_in_place(counts):
    chosen = np.arange(counts.nnz) % 3 == 0
    kept, left = entries_where(counts, chosen), entries_where(counts, ~chosen)
    assert kept.nnz == chosen.sum()
    assert (kept + left != counts).nnz == 0
    assert kept.multiply(left).nnz == 0


def test_scaled_rows_are_float32_and_leave_the_block_alone(counts):
    before, factors = counts.copy(), np.linspace(0, 2, counts.shape[0])
    scaled = scaled_rows(counts, factors)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.toarray(), counts.toarray() * factors[:, None], rtol=1e-6)
    assert (counts != before).nnz == 0


@pytest.mark.parametrize(("most_bytes", "sizes"), [(1, (1,) * 5), (88, (2, 2, 1)), (10**9, (5,))])
def test_panels_of_which_the_dense_form_is_small(most_bytes, sizes):
    assert RowBlocks.panels(5, 10, most_bytes).sizes == sizes
