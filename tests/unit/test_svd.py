"""The SVD of low rank plus sparse, against LAPACK and ARPACK."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from problems import low_rank_counts, operator_of, product_of
from scipy.sparse.linalg import LinearOperator, svds

from scialm_dask.linalg.kernels import Update
from scialm_dask.linalg.operator import Product
from scialm_dask.linalg.svd import extended_basis, leading_triplets, rayleigh_ritz, short_side_svd

SHAPES = [(90, 61), (61, 90)]


def operator_in_flight(m, n, n_blocks=3):
    """An operator two steps into the loop, so that both its parts count, and W written out in float64."""
    matrix = low_rank_counts(m, n, seed=m)
    operator = operator_of(matrix, n_blocks)
    basis = extended_basis(np.zeros((n, 0), np.float32), 12, 0)
    w, A = matrix.astype(np.float32).astype(np.float64), None
    for rank in (2, 3):
        svd = rayleigh_ritz(operator.multiply(basis))
        values = svd.values[:rank] * 0.7
        step = Update((svd.to_left[:, :rank] * values).astype(np.float32), 1 / 1.4)
        operator.multiply(None, step, svd.right[:, :rank].copy())
        operator.keep()
        A = product_of(*operator.factors())
        on_omega = sp.csr_matrix(matrix != 0)
        w = matrix + (w - on_omega.multiply(A)) / 1.4
        basis = extended_basis(svd.right, 12, 1)
    return operator, A + np.where(on_omega.toarray(), w.toarray() - A, 0)


def left_of(operator, svd):
    """U of a `PartialSVD`: the last sketch times `to_left`, taken by a step that does nothing else."""
    operator.multiply(None, Update(svd.to_left.astype(np.float32), 1.0), np.zeros_like(svd.right))
    operator.keep()
    return np.vstack([left.compute() for left in operator.factors()[0]])


def check_triplets(W, values, left, right, exact, tolerance):
    """Orthogonal, and W v = σ u, Wᵀ u = σ v: by Weyl and Davis-Kahan no more is needed to bound every error."""
    scale = exact[0]
    count = len(values)
    np.testing.assert_allclose(left.T @ left, np.eye(count), atol=2e-5)
    np.testing.assert_allclose(right.T @ right, np.eye(count), atol=2e-5)
    assert np.linalg.norm(W @ right - left * values, axis=0).max() < tolerance * scale
    assert np.linalg.norm(W.T @ left - right * values, axis=0).max() < tolerance * scale
    np.testing.assert_allclose(values, exact[:count], atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_triplets_agree_with_arpack(shape):
    operator, W = operator_in_flight(*shape)
    implicit = LinearOperator(shape, matvec=lambda x: W @ x, rmatvec=lambda x: W.T @ x, dtype=np.float64)
    values = svds(implicit, k=10, return_singular_vectors=False, tol=1e-10)[::-1]
    product = operator.multiply(extended_basis(np.zeros((shape[1], 0), np.float32), 24, 0))
    threshold = (values[7] + values[8]) / 2
    svd = leading_triplets(operator, product, limit=24, threshold=threshold, passes=60, tolerance=1e-7, seed=0)
    keep = svd.values > threshold
    assert keep.sum() == 8
    left = left_of(operator, svd)[:, keep]
    check_triplets(W, svd.values[keep], left, svd.right[:, keep], values, 2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_basis_that_was_too_narrow_is_widened(shape):
    operator, W = operator_in_flight(*shape)
    exact = np.linalg.svd(W, compute_uv=False)
    threshold = (exact[19] + exact[20]) / 2
    product = operator.multiply(extended_basis(np.zeros((shape[1], 0), np.float32), 3, 0))
    svd = leading_triplets(operator, product, limit=60, threshold=threshold, passes=40, tolerance=0, seed=0)
    assert np.count_nonzero(svd.values > threshold) == 20
    assert len(svd.values) == 24  # 3, doubled until one fell under the threshold
    np.testing.assert_allclose(svd.values[:20], exact[:20], rtol=1e-4)


def test_widening_ends_when_there_is_no_more():
    """Columns of zeros, and one twice: fewer triplets than the limit asks for."""
    matrix = low_rank_counts(90, 20, seed=3).toarray()
    matrix[:, [2, 7]] = 0
    matrix[:, 5] = matrix[:, 4]
    operator = operator_of(matrix, 2)
    product = operator.multiply(extended_basis(np.zeros((20, 0), np.float32), 6, 0))
    svd = leading_triplets(operator, product, limit=20, threshold=0.0, passes=20, tolerance=0, seed=0)
    exact = np.linalg.svd(matrix, compute_uv=False)
    assert len(svd.values) == 17
    np.testing.assert_allclose(svd.values, exact[:17], rtol=1e-4)


@pytest.mark.parametrize("limit", [1, 7])
def test_no_more_is_computed_than_the_limit_asks(limit):
    operator, _ = operator_in_flight(90, 61)
    product = operator.multiply(extended_basis(np.zeros((61, 0), np.float32), 8, 0))
    before = operator.passes
    svd = leading_triplets(operator, product, limit=limit, threshold=0.0, passes=3, tolerance=0, seed=0)
    assert len(svd.values) == 8
    assert operator.passes == before + 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_blocks", [1, 4])
def test_short_side_agrees_with_lapack(shape, n_blocks):
    operator, W = operator_in_flight(*shape, n_blocks)
    exact = np.linalg.svd(W, compute_uv=False)
    threshold = (exact[29] + exact[30]) / 2
    before = operator.passes
    svd = short_side_svd(operator, 61, threshold)
    assert len(svd.values) == 30
    assert operator.passes == before + 2
    check_triplets(W, svd.values, left_of(operator, svd), svd.right, exact, 2e-5)
    assert len(short_side_svd(operator, 5, threshold).values) == 5
    assert len(short_side_svd(operator, 61, 2 * exact[0]).values) == 1  # the largest one, to know how far off it is


def test_left_vectors_are_projected_some_at_a_time(monkeypatch):
    operator, W = operator_in_flight(60, 90, 4)
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 11)))[0].astype(np.float32)
    whole = operator.project(vectors)
    before = operator.passes
    monkeypatch.setattr("scialm_dask.linalg.operator.PANEL_COLUMNS", 4)
    np.testing.assert_allclose(operator.project(vectors), whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
    assert operator.passes == before + 1
    np.testing.assert_allclose(whole, W.T @ vectors, rtol=1e-4, atol=1e-5 * np.abs(W).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_give_the_same_signs(shape):
    operator, _ = operator_in_flight(*shape)
    product = operator.multiply(extended_basis(np.zeros((shape[1], 0), np.float32), 24, 0))
    iterated = leading_triplets(operator, product, limit=24, threshold=0.0, passes=60, tolerance=0, seed=0)
    exact = short_side_svd(operator, 6, 0.0)
    for svd in (iterated, exact):
        largest = np.abs(svd.right).argmax(axis=0)
        assert (svd.right[largest, np.arange(svd.right.shape[1])] > 0).all()
    assert ((iterated.right[:, :6] * exact.right).sum(axis=0) > 0.999).all()


def product_with(W, Q):
    Y = W @ Q
    return Product(W.T @ Y, Y.T @ Y, 0.0, 0.0)


def test_rayleigh_ritz_is_exact_on_an_invariant_subspace():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((40, 30))
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    mixing = rng.standard_normal((6, 6))
    Q = Vt[:6].T @ mixing
    svd = rayleigh_ritz(product_with(W, Q))
    np.testing.assert_allclose(svd.values, S[:6], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum((W @ Q @ svd.to_left) * U[:, :6], axis=0)), 1, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(svd.right * Vt[:6].T, axis=0)), 1, rtol=1e-6)


def test_rayleigh_ritz_leaves_out_what_depends_on_the_rest():
    rng = np.random.default_rng(1)
    W = rng.standard_normal((40, 4)) @ rng.standard_normal((4, 30))
    Q = rng.standard_normal((30, 9))
    Q[:, 3], Q[:, 5], Q[:, 7] = 0, Q[:, 0], 1e-6 * Q[:, 1]
    svd = rayleigh_ritz(product_with(W, Q))
    np.testing.assert_allclose(svd.values, np.linalg.svd(W, compute_uv=False)[:4], rtol=1e-9)
    np.testing.assert_allclose((W @ Q @ svd.to_left).T @ (W @ Q @ svd.to_left), np.eye(4), atol=1e-6)


def test_rayleigh_ritz_sees_four_orders_of_magnitude():
    rng = np.random.default_rng(2)
    U, V = (np.linalg.qr(rng.standard_normal((n, 12)))[0] for n in (50, 40))
    S = np.geomspace(1e4, 1, 12)
    svd = rayleigh_ritz(product_with((U * S) @ V.T, V))
    np.testing.assert_allclose(svd.values, S, rtol=1e-6)


@given(st.integers(1, 60), st.data())
def test_extended_basis_is_orthonormal_and_keeps_what_is_known(n, data):
    width = data.draw(st.integers(1, n))
    have = data.draw(st.integers(0, width))
    known = np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0][:, :have].astype(np.float32)
    basis = extended_basis(known, width, seed=data.draw(st.integers(0, 5)))
    assert basis.shape == (n, width)
    assert basis.dtype == np.float32
    np.testing.assert_array_equal(basis[:, :have], known)
    np.testing.assert_allclose(basis.T @ basis, np.eye(width), atol=1e-5)


def test_extended_basis_draws_by_column_and_row():
    nothing = np.zeros((30, 0), np.float32)
    one, same, other = (extended_basis(nothing, 8, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_allclose(extended_basis(nothing, 5, 0), one[:, :5], atol=1e-6)
    np.testing.assert_array_equal(extended_basis(one, 3, 9), one[:, :3])
