import numpy as np
import pytest
import scipy.optimize

from scialm_dask.linalg.least_squares import nnls_gram


@pytest.mark.parametrize(("measurements", "unknowns"), [(25, 10), (25, 24), (10, 20), (4, 1)])
def test_same_fit_as_scipy_row_by_row(measurements, unknowns):
    rng = np.random.default_rng(measurements)
    A, D = rng.random((measurements, unknowns)), rng.random((200, measurements))
    U = nnls_gram(A.T @ A, D @ A)
    theirs = np.array([scipy.optimize.nnls(A, d)[0] for d in D])
    assert (U >= 0).all()
    np.testing.assert_allclose(
        np.linalg.norm(U @ A.T - D, axis=1), np.linalg.norm(theirs @ A.T - D, axis=1), rtol=1e-9, atol=1e-9
    )
    if unknowns <= measurements:
        np.testing.assert_allclose(U, theirs, atol=1e-8)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 2.0])
def test_conditions_of_the_optimum_hold_for_a_nearly_singular_gram(shift):
    rng = np.random.default_rng(0)
    P = (rng.random((60, 15)) < 0.25) * 1.0
    gram = np.eye(60) - P @ np.linalg.inv(P.T @ P + 1e-4 * np.eye(15)) @ P.T
    b = rng.normal(size=(100, 60)) - shift
    u = nnls_gram(gram, b)
    slope = u @ gram - b
    assert (u >= 0).all()
    size = max(1.0, u.max())  # near the null space of the Gram the answer is large
    assert slope.min() > -1e-11 * size
    assert np.abs(u * slope).max() < 1e-11 * size**2


def test_zero_gram_and_zero_rows():
    assert not nnls_gram(np.zeros((3, 3)), np.ones((2, 3))).any()
    assert not nnls_gram(np.eye(3), np.zeros((2, 3))).any()
