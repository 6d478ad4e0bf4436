"""No dense cells × genes array at any moment. What a whole process takes is in `regression/test_published.py`."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp

from scialm_dask import ExpressionMatrix, Imputation, impute
from scialm_dask.evaluate.metrics import score_held_out

M, N = 2000, 16_000
DENSE = M * N  # bytes of the smallest possible one, of booleans
SMALL = {"max_rank": 5, "max_iterations": 6, "svd_passes": 3}
PRESETS = {"complete": {"preset": "complete", "validation": 0.2}, "paper": {"preset": "paper"}}


@pytest.fixture(scope="module")
def wide():
    """Counts of rank one in 0.5 % of 2000 × 16000 entries."""
    rng = np.random.default_rng(0)
    nnz = DENSE // 200
    rows, columns = rng.integers(0, M, nnz), rng.integers(0, N, nnz)
    counts = sp.csr_matrix((rng.poisson(3 + 20 * rng.random(M)[rows]) + 1.0, (rows, columns)), shape=(M, N))
    impute(
        counts[:50, :50] + sp.eye_array(50), preset="paper", max_iterations=3
    )  # so that all is imported and compiled
    return counts[counts.getnnz(axis=1) > 3]


def peak_of(work):
    """Most bytes that were held at once by Python and NumPy while some work was done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("scratch", ["memory", "zarr"])
def test_completing_allocates_no_dense_matrix(wide, tmp_path, preset, scratch):
    """All that is held at once is less than a dense matrix of a byte each, so none of it is one."""
    where = "memory" if scratch == "memory" else f"zarr:{tmp_path}"

    def work():
        result = impute(wide, scratch=where, **SMALL, **PRESETS[preset])
        assert result.rank > 0
        result.to_zarr(tmp_path / "result.zarr")

    assert peak_of(work) < DENSE


def test_using_the_result_allocates_no_dense_matrix(wide, tmp_path):
    impute(wide, **SMALL, **PRESETS["complete"]).to_zarr(tmp_path / "result.zarr")

    def work():
        result = Imputation.open(tmp_path / "result.zarr")
        assert result.to_dask()[:50, :7].compute().shape == (50, 7)
        assert result[:10, ["5", "77"]].shape == (10, 2)
        matrix = ExpressionMatrix.of(wide)
        assert score_held_out(result, matrix, matrix)["n"] == wide.nnz

    assert peak_of(work) < DENSE


def test_writing_the_dense_matrix_goes_by_rows(wide, tmp_path):
    result = impute(wide, **SMALL, **PRESETS["complete"])
    kept = ExpressionMatrix.of(wide)
    assert peak_of(lambda: result.to_zarr(tmp_path / "r.zarr", dense=True, keep_observed=kept)) < DENSE


def test_the_measure_sees_a_dense_allocation(wide, monkeypatch):
    from scialm_dask.linalg import kernels

    honest = kernels.visit

    def wasteful(block, state, view, total):
        np.ones((M, N), np.bool_)
        return honest(block, state, view, total)

    monkeypatch.setattr(kernels, "visit", wasteful)
    assert peak_of(lambda: impute(wide, **SMALL, **PRESETS["complete"])) > DENSE
