"""The three products of sparse blocks with tall matrices, against SciPy, with tiles and without."""

import numpy as np
import pytest
import scipy.sparse as sp
from numba.core.runtime import rtsys
from numba.core.runtime._nrt_python import memsys_disable_stats, memsys_enable_stats

from scialm_dask.linalg.sparse_products import sddmm, spmm, spmm_t

M, N = 60, 1500
FEW, MANY = 0.1, 0.35  # under and over 16 entries for each row of Q; many take two tiles


@pytest.fixture(scope="module", params=[FEW, MANY])
def sparse(request):
    made = sp.random_array((M, N), density=request.param, rng=np.random.default_rng(0), format="csr", dtype=np.float32)
    made.sort_indices()
    return made


@pytest.mark.parametrize("width", [1, 16, 40, 64, 130])
def test_products_are_those_of_scipy(sparse, width):
    rng = np.random.default_rng(1)
    rows, columns = (rng.standard_normal((n, width), dtype=np.float32) for n in (M, N))
    pattern = sparse.indptr, sparse.indices
    to_rows, to_columns = rows.copy(), columns.copy()
    spmm(*pattern, sparse.data, columns, to_rows)
    spmm_t(*pattern, sparse.data, rows, to_columns)
    wide = sparse.astype(np.float64)
    np.testing.assert_allclose(to_rows, rows + wide @ columns, rtol=0, atol=3e-4)
    np.testing.assert_allclose(to_columns, columns + wide.T @ rows, rtol=0, atol=3e-4)
    i, j = np.repeat(np.arange(M), np.diff(sparse.indptr)), sparse.indices
    np.testing.assert_allclose(sddmm(*pattern, rows, columns), np.einsum("kt,kt->k", rows[i], columns[j]), atol=3e-5)


def test_no_tiles_are_made_where_entries_are_few(sparse):
    rows, columns = np.ones((M, 70), np.float32), np.ones((N, 70), np.float32)
    memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats().alloc
        spmm(sparse.indptr, sparse.indices, sparse.data, columns, rows)
        made = rtsys.get_allocation_stats().alloc - before
    finally:
        memsys_disable_stats()
    # One for each argument; then where each row goes on, and twice, for 64 columns and for 6, some tiles.
    assert made == 6 if sparse.nnz < 16 * N else made >= 6 + 1 + 2 * 2
