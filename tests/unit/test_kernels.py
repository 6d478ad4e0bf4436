"""Every kernel against NumPy, on sparse and on dense blocks."""

import copy

import numpy as np
import pytest
import scipy.sparse as sp

from scialm_dask.linalg import kernels, tasks
from scialm_dask.linalg.kernels import Block, BlockState, PassInputs, Update

M, N = 23, 17
RANKS = [0, 1, 5, 13]


def rough(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(params=["sparse", "dense"])
def block(request, monkeypatch):
    """Rows of 0, 1, 2, ... entries; what is dense is cut into several panels."""
    rng = np.random.default_rng(3)
    least, most = (0, 4) if request.param == "sparse" else (N - 3, N)
    counts = np.r_[np.arange(most + 1), rng.integers(least, most + 1, M - most - 1)]
    counts[-1] = 0
    rows = [np.sort(rng.choice(N - 1, min(c, N - 1), replace=False)) for c in counts]  # the last column stays empty
    indptr = np.r_[0, np.cumsum([len(r) for r in rows])]
    indices = np.concatenate(rows).astype(np.int32)
    made = Block(indptr, indices, 1 + rng.gamma(1, 3, len(indices)).astype(np.float32), N)
    assert made.is_dense == (request.param == "dense")
    monkeypatch.setattr(kernels, "PANEL_VALUES", 5 * N)
    return made


def state_of(block, rank, width=3, n_hidden=7, seed=0):
    rng = np.random.default_rng(seed)
    estimate = block.observed + rough(rng, len(block.indices))
    estimate[rng.choice(len(estimate), n_hidden, replace=False)] = np.nan
    return BlockState(estimate, rough(rng, block.n_rows, rank), rough(rng, block.n_rows, width))


def view_of(right, basis=None, step=None):
    """W = U Vᵀ + S."""
    return PassInputs(right, basis=basis, overlap=None if basis is None else right.T @ basis, step=step)


def dense_of(block, values):
    rows = np.repeat(np.arange(block.n_rows), np.diff(block.indptr))
    return sp.csr_matrix((values, (rows, block.indices)), shape=(block.n_rows, block.n_columns)).toarray()


def sparse_part(block, state, right):
    """S = P_Ω(w − a), zero where held out, in float64."""
    A = state.left.astype(np.float64) @ right.T
    known = np.isfinite(state.estimate)
    S = dense_of(block, np.where(known, state.estimate, 0).astype(np.float64))
    return np.where(dense_of(block, known), S - A, 0), A


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * max(1, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("rank", RANKS)
def test_sampled_product(block, rank):
    rng = np.random.default_rng(0)
    left, right = rough(rng, M, rank), rough(rng, N, rank)
    rows = np.repeat(np.arange(M), np.diff(block.indptr))
    got = kernels.sampled_product(block, left, right)
    assert got.dtype == np.float32
    close(got, (left.astype(np.float64) @ right.T)[rows, block.indices])


def test_given_back_entries_are_estimated_as_if_a_had_always_been_as_it_is(block):
    """Against the multiplier update, repeated; the others stay as they are."""
    rng = np.random.default_rng(2)
    state, right, basis = state_of(block, 3), rough(rng, N, 3), rough(rng, N, 4)
    ratio, steps = 0.8, 5
    weight = sum(ratio**k for k in range(steps + 1))
    view = PassInputs(right, basis, right.T @ basis, release=weight)
    a = kernels.sampled_product(block, state.left, right).astype(np.float64)
    w = block.observed.astype(np.float64)
    for _ in range(steps):
        w = block.observed + ratio * (w - a)
    hidden = np.isnan(state.estimate)
    before = state.estimate.copy()
    new, sums = kernels.visit(block, state, view)
    close(new.estimate[hidden], w[hidden])
    np.testing.assert_array_equal(new.estimate[~hidden], before[~hidden])
    np.testing.assert_array_equal(state.estimate, before)
    S = dense_of(block, new.estimate - a)
    close(new.sketch, (S + state.left.astype(np.float64) @ right.T) @ basis)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("width", [1, 6, 16])
def test_visit_without_a_step(block, rank, width):
    rng = np.random.default_rng(1)
    state, right, basis = state_of(block, rank), rough(rng, N, rank), rough(rng, N, width)
    new, sums = kernels.visit(block, state, view_of(right, basis))
    S, A = sparse_part(block, state, right)
    sketch = (A + S) @ basis
    assert new.estimate is state.estimate
    assert new.left is state.left
    close(new.sketch, sketch)
    close(sums.sparse_cross, S.T @ sketch)
    close(sums.left_cross, state.left.T @ sketch)
    close(sums.gram, sketch.T @ sketch)
    assert (sums.misfit, sums.held_out) == (0, 0)
    # so the caller can make WᵀWQ of the sums of all blocks
    close(sums.sparse_cross + right @ sums.left_cross, (A + S).T @ sketch)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("growth", [1.0, 1.7])
@pytest.mark.parametrize("with_basis", [True, False])
def test_visit_with_a_step(block, rank, growth, with_basis):
    """Line 9 of Algorithm 3 on Ω: w ← d + (w − a)/ρ; held-out entries are scored and stay unknown."""
    rng = np.random.default_rng(2)
    state, rotation, right, basis = state_of(block, 2), rough(rng, 3, rank), rough(rng, N, rank), rough(rng, N, 6)
    step = Update(rotation, 1 / 1.3, growth)
    new, sums = kernels.visit(block, state, view_of(right, basis if with_basis else None, step))
    close(new.left, state.sketch @ rotation)
    a = kernels.sampled_product(block, new.left, right).astype(np.float64)
    w = growth * state.estimate.astype(np.float64)
    hidden = np.isnan(w)
    assert hidden.sum() == 7
    close(new.estimate[~hidden], (block.observed + (w - a) / 1.3)[~hidden])
    assert np.isnan(new.estimate[hidden]).all()
    gaps = (block.observed - a) ** 2
    np.testing.assert_allclose([sums.misfit, sums.held_out], [gaps[~hidden].sum(), gaps[hidden].sum()], rtol=1e-5)
    if with_basis:
        S, A = sparse_part(block, new, right)
        close(new.sketch, (A + S) @ basis)
        close(sums.sparse_cross, S.T @ ((A + S) @ basis))
    else:
        assert new.sketch is state.sketch
        assert sums.sparse_cross.size == sums.left_cross.size == sums.gram.size == 0


def test_visit_leaves_its_arguments_alone(block):
    """A task that a lost worker ran half may be run again."""
    rng = np.random.default_rng(4)
    state, view = state_of(block, 2), view_of(rough(rng, N, 4), rough(rng, N, 5), Update(rough(rng, 3, 4), 0.8, 1.1))
    before = copy.deepcopy((block, state, view))
    first, second = (kernels.visit(block, state, view) for _ in range(2))
    for old, new in zip(before, (block, state, view), strict=True):
        for name, value in vars(old).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, getattr(new, name))
    np.testing.assert_array_equal(first[0].estimate, second[0].estimate)
    np.testing.assert_array_equal(first[1].gram, second[1].gram)


def test_sums_are_added_in_float64(block):
    rng = np.random.default_rng(5)
    state, view = state_of(block, 2), view_of(rough(rng, N, 2), rough(rng, N, 5))
    _, sums = kernels.visit(block, state, view)
    assert sums.gram.dtype == sums.left_cross.dtype == np.float64
    assert sums.sparse_cross.dtype == np.float32
    double = tasks.add(sums, sums)
    for one, two in zip(sums, double, strict=True):
        np.testing.assert_array_equal(np.asarray(two), 2 * np.asarray(one))
    _, again = kernels.visit(block, state, view, sums)
    assert again.sparse_cross is sums.sparse_cross  # added to in place
    for one, two in zip(again, double, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5 * np.abs(two).max())


def test_small_misfits_are_not_lost_beside_large_ones():
    """In float32, 2**24 and ones would add up to 2**24."""
    n = 1001
    observed = np.r_[np.float32(4096), np.ones(n - 1, np.float32)]
    block = Block(np.array([0, n]), np.arange(n, dtype=np.int32), observed, 8 * n)
    assert not block.is_dense
    state = BlockState(observed, np.zeros((1, 0), np.float32), np.zeros((1, 1), np.float32))
    view = view_of(np.zeros((8 * n, 1), np.float32), None, Update(np.zeros((1, 1), np.float32), 0.9))
    assert kernels.visit(block, state, view)[1].misfit == 4096**2 + n - 1


@pytest.mark.parametrize("rank", RANKS)
def test_project_and_grams(block, rank):
    rng = np.random.default_rng(6)
    state, right = state_of(block, rank), rough(rng, N, rank)
    S, A = sparse_part(block, state, right)
    left, sparse = state.left, kernels.sparse_part(block, state, view_of(right))
    close(dense_of(block, sparse), S)
    cross, left_cross = kernels.project(block, left, sparse, state.sketch)
    assert (cross.dtype, left_cross.dtype) == (np.float32, np.float64)
    close(cross, S.T @ state.sketch)
    close(left_cross, state.left.T @ state.sketch)
    left_gram, cross, gram = kernels.column_gram(block, state, view_of(right))
    assert left_gram.dtype == cross.dtype == gram.dtype == np.float64
    close(left_gram, state.left.T @ state.left)
    close(cross, state.left.T @ S)
    close(gram, S.T @ S)
    half = kernels.row_half(block, state, view_of(right), right.T.astype(np.float64) @ right)
    got = kernels.row_gram((block, block), (half, half))
    assert got.dtype == np.float64
    close(got, (A + S) @ (A + S).T)


@pytest.mark.parametrize("rank", RANKS)
def test_row_gram_of_two_blocks(block, rank):
    rng = np.random.default_rng(7)
    cut = 9
    at = int(block.indptr[cut])
    blocks = (
        Block(block.indptr[: cut + 1], block.indices[:at], block.observed[:at], N),
        Block(block.indptr[cut:] - at, block.indices[at:], block.observed[at:], N),
    )
    states = tuple(state_of(b, rank, n_hidden=3, seed=k) for k, b in enumerate(blocks))
    right = rough(rng, N, rank)
    one, two = (sum(sparse_part(b, s, right)) for b, s in zip(blocks, states, strict=True))
    core = right.T.astype(np.float64) @ right
    halves = tuple(kernels.row_half(b, s, view_of(right), core) for b, s in zip(blocks, states, strict=True))
    close(kernels.row_gram(blocks, halves), one @ two.T)
