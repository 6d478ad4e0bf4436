import numpy as np
import pytest
import scipy.sparse as sp

from scialm_dask.linalg.kernels import column_minima
from scialm_dask.linalg.least_squares import RowProblems, leave_one_out, solve_rows

RANK = 3


@pytest.fixture
def problem():
    rng = np.random.default_rng(1)
    right = rng.standard_normal((31, RANK)).astype(np.float32)
    pattern = rng.random((9, 31)) < 0.4
    pattern[4] = False
    values = sp.csr_matrix(np.where(pattern, rng.random((9, 31)) + 0.1, 0).astype(np.float32))
    root = rng.standard_normal((RANK, RANK))
    return (
        RowProblems(values.indptr, values.indices, values.data),
        right,
        root @ root.T + np.eye(RANK),
        rng.random(RANK),
    )


def row_of(rows, right, i):
    span = slice(rows.indptr[i], rows.indptr[i + 1])
    return right[rows.indices[span]].astype(np.float64), rows.values[span].astype(np.float64)


def test_rows_are_the_regularised_least_squares(problem):
    rows, right, precision, mean = problem
    left = solve_rows(rows, right, precision, mean)
    assert left.dtype == np.float32
    for i, u in enumerate(left):
        v, d = row_of(rows, right, i)
        expected = np.linalg.solve(v.T @ v + precision, v.T @ d + precision @ mean)
        np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-6)


def test_a_row_without_entries_is_the_mean_of_the_prior(problem):
    rows, right, precision, mean = problem
    np.testing.assert_allclose(solve_rows(rows, right, precision, mean)[4], mean, rtol=1e-6)


def test_leave_one_out_is_leaving_one_out(problem):
    rows, right, precision, mean = problem
    total = 0.0
    for i in range(9):
        v, d = row_of(rows, right, i)
        for k in range(len(d)):
            others = np.arange(len(d)) != k
            w, e = v[others], d[others]
            u = np.linalg.solve(w.T @ w + precision, w.T @ e + precision @ mean)
            total += (d[k] - u @ v[k]) ** 2
    assert leave_one_out(rows, right, precision, mean) == pytest.approx(total, rel=1e-6)


def test_column_minima_do_not_depend_on_panels(monkeypatch):
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((20, 4)).astype("f4"), rng.standard_normal((7, 4)).astype("f4")
    monkeypatch.setattr("scialm_dask.linalg.kernels.PANEL_VALUES", 21)
    np.testing.assert_allclose(column_minima(left, right), (left @ right.T).min(axis=0), rtol=1e-5)
