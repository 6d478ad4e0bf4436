"""Products by panels of rows are the products, whatever the number of rows."""

import numpy as np
import pytest

from scialm_dask.linalg import kernels


@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 2500])
def test_products_by_panels(n):
    rng = np.random.default_rng(n)
    T, M = rng.standard_normal((n, 5)).astype(np.float32), rng.standard_normal((5, 3))
    double = T.astype(np.float64)
    assert kernels.gram(T).dtype == np.float64
    np.testing.assert_allclose(kernels.gram(T), double.T @ double, rtol=1e-12, atol=1e-10)
    total = np.ones((n, 3))
    kernels.add_product(total, T, M)
    np.testing.assert_allclose(total, 1 + double @ M, rtol=1e-12, atol=1e-12)
    assert kernels.product(double, M).dtype == np.float32
    np.testing.assert_allclose(kernels.product(double, M), double @ M, rtol=1e-6, atol=1e-6)
