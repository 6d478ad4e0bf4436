"""The loop against its dense twin with exact SVDs, and its corners."""

import numpy as np
import pytest
from dense_ialm import ialm_dense
from problems import completed, low_rank_counts, operator_of, product_of

from scialm_dask.config import preset
from scialm_dask.errors import InputError
from scialm_dask.linalg.svd import PartialSVD
from scialm_dask.solve.ialm import first_penalty, singular_value_thresholding, zero_iterations

PROBLEMS = [(80, 60, 0.3, 0), (50, 95, 0.15, 1), (64, 64, 0.6, 2)]
EXACT = {"svd_passes": 60, "svd_tolerance": 1e-6}


def run(matrix, settings, *, hidden=None, n_blocks=3):
    operator = operator_of(matrix, n_blocks, hidden=hidden)
    completion = completed(operator, settings)
    return completion, product_of(*operator.factors())


def twin(matrix, settings, hidden=None):
    D = matrix.toarray()
    mask = None
    if hidden is not None:
        mask = np.zeros(D.shape, bool)
        mask[np.nonzero(D)] = hidden  # CSR holds its entries in the same order
    return ialm_dense(D, D != 0, settings, mask)


def hide(matrix, share, seed):
    """Entries to hold out, none of which is the last one of a row or column."""
    rng = np.random.default_rng(seed)
    return rng.random(matrix.nnz) < share


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_paper_preset_follows_the_twin(problem):
    m, n, density, seed = problem
    matrix = low_rank_counts(m, n, density=density, seed=seed)
    settings = preset("paper", increment=10, **EXACT)
    completion, A = run(matrix, settings)
    expected = twin(matrix, settings)
    assert completion.converged
    assert completion.chosen == expected.chosen == len(expected.ranks) == len(completion.history)
    assert [i.rank for i in completion.history] == list(expected.ranks)
    np.testing.assert_allclose([i.residual for i in completion.history], expected.residuals, rtol=1e-3, atol=1e-6)
    assert np.linalg.norm(A - expected.A) < 1e-3 * np.linalg.norm(expected.A)
    np.testing.assert_allclose(
        completion.values, np.linalg.svd(A, compute_uv=False)[: len(completion.values)], rtol=1e-3
    )


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_adaptive_rank_follows_the_twin(problem):
    m, n, density, seed = problem
    matrix = low_rank_counts(m, n, density=density, seed=seed)
    settings = preset("paper", rank_policy="adaptive", **EXACT)
    completion, A = run(matrix, settings)
    expected = twin(matrix, settings)
    assert [i.rank for i in completion.history] == list(expected.ranks)
    assert np.linalg.norm(A - expected.A) < 1e-3 * np.linalg.norm(expected.A)


@pytest.mark.parametrize(
    ("m", "n", "density", "dispersion"), [(64, 64, 0.8, 2), (120, 100, 0.5, 5), (100, 140, 0.4, 5)]
)
def test_the_held_out_stop_follows_the_twin_and_returns_its_best(m, n, density, dispersion):
    seed = {64: 2, 120: 0, 100: 1}[m]
    matrix = low_rank_counts(m, n, density=density, seed=seed, dispersion=dispersion)
    hidden = hide(matrix, 0.1, seed)
    settings = preset("complete", scaling="none", **EXACT)
    completion, A = run(matrix, settings, hidden=hidden)
    expected = twin(matrix, settings, hidden)
    errors = [i.held_out for i in completion.history]
    assert completion.converged
    assert completion.chosen == expected.chosen == 1 + int(np.argmin(errors)) == len(errors) - settings.patience
    assert [i.rank for i in completion.history] == list(expected.ranks)
    np.testing.assert_allclose(errors, expected.held_out, rtol=1e-3)
    assert np.linalg.norm(A - expected.A) < 1e-3 * np.linalg.norm(expected.A)
    # so A is not the last one, and has seen the entries that were held out
    D, mask = matrix.toarray(), np.zeros(matrix.shape, bool)
    mask[np.nonzero(D)] = hidden
    error_on_hidden = [np.linalg.norm((X - D)[mask]) / np.linalg.norm(D[mask]) for X in (expected.before, A)]
    assert error_on_hidden[0] == pytest.approx(min(errors), rel=1e-3)
    assert error_on_hidden[1] < 0.9 * error_on_hidden[0]
    observed = matrix.data - A[matrix.nonzero()]
    assert completion.returned.residual == pytest.approx(np.linalg.norm(observed) / np.linalg.norm(D), rel=1e-4)
    assert completion.returned.rank == len(completion.values) <= completion.history[completion.chosen - 1].rank


def test_two_passes_come_close_to_exact_svds():
    """The default makes two passes for each SVD: the error they leave must not show in the result."""
    matrix = low_rank_counts(80, 60, seed=3)
    hidden = hide(matrix, 0.1, 0)
    settings = preset("complete", scaling="none")
    completion, _ = run(matrix, settings, hidden=hidden)
    expected = twin(matrix, settings, hidden)
    best = min(i.held_out for i in completion.history)
    assert best < 1.01 * min(expected.held_out)
    assert abs(completion.chosen - expected.chosen) <= 1


def test_zero_iterations_are_made_in_closed_form():
    """Against the twin, which makes them one by one."""
    matrix = low_rank_counts(40, 30, seed=4)
    operator = operator_of(matrix)
    sigma = np.linalg.norm(matrix.toarray(), 2)
    for density in (matrix.nnz / matrix.shape[0] / matrix.shape[1], 1e-4, 1.0):
        penalty = first_penalty(sigma, density)
        assert penalty.mu == 0.3 / sigma
        assert penalty.rho == 1.1 + 2.5 * density
        iterations, growth = zero_iterations(sigma, penalty, operator.passes)
        w, mu = sigma, penalty.mu
        for iteration in iterations:
            assert w <= 1 / mu
            assert iteration.threshold == pytest.approx(1 / mu)
            assert (iteration.rank, iteration.residual, iteration.passes) == (0, 1.0, operator.passes)
            w, mu = sigma + w / penalty.rho, mu * penalty.rho
        assert w > 1 / mu
        assert growth == pytest.approx(w / sigma)
    settings = preset("paper", increment=10)
    completion, _ = run(matrix, settings)
    expected = twin(matrix, settings)
    n_zero = expected.ranks.count(0)
    assert n_zero > 0
    assert [i.rank for i in completion.history][: n_zero + 1] == list(expected.ranks)[: n_zero + 1]


def test_thresholds_fall_by_rho():
    matrix = low_rank_counts(40, 30, seed=5)
    completion, _ = run(matrix, preset("paper"))
    thresholds = np.array([i.threshold for i in completion.history])
    rho = 1.1 + 2.5 * matrix.nnz / (40 * 30)
    np.testing.assert_allclose(thresholds[:-1] / thresholds[1:], rho, rtol=1e-12)
    residuals = [i.residual for i in completion.history]
    assert residuals == sorted(residuals, reverse=True)


def test_thresholding_keeps_what_is_over_and_no_more_than_the_limit():
    values = np.array([5.0, 3.0, 2.0, 1.0])
    svd = PartialSVD(values, np.eye(6, 4, dtype=np.float32), np.diag(1 / values))
    rotation, right, kept = singular_value_thresholding(svd, 1.5, limit=9)
    assert kept == (3.5, 1.5, 0.5)
    assert right.shape == (6, 3)
    np.testing.assert_allclose(rotation, np.diag([3.5 / 5, 1.5 / 3, 0.5 / 2, 0])[:, :3])
    assert singular_value_thresholding(svd, 1.5, limit=2)[2] == (3.5, 1.5)
    assert len(singular_value_thresholding(svd, 2.0, limit=9)[2]) == 2  # over, not at
    assert singular_value_thresholding(svd, 9.0, limit=9)[2] == ()


def test_the_most_iterations_and_the_largest_rank_are_kept():
    matrix = low_rank_counts(80, 60, seed=6)
    completion, _ = run(matrix, preset("paper", max_iterations=6, max_rank=3))
    assert len(completion.history) == completion.chosen == 6
    assert not completion.converged
    assert completion.reason == "6 iterations made, the most allowed"
    assert max(i.rank for i in completion.history) == len(completion.values) == 3
    expected = twin(matrix, preset("paper", max_iterations=6, max_rank=3))
    assert [i.rank for i in completion.history] == list(expected.ranks)


def test_fewer_iterations_than_there_are_zeros():
    """A result of rank 0 is refused, and the number told that is too small by one."""
    matrix = low_rank_counts(40, 30, density=0.1, seed=7)
    assert twin(matrix, preset("paper", max_iterations=3)).ranks == (0, 0, 1)
    with pytest.raises(InputError, match=r"max_iterations is 2, .* zero; raise --max-iterations, to more than 2$"):
        run(matrix, preset("paper", max_iterations=2))
    completion, _ = run(matrix, preset("paper", max_iterations=3))
    assert [i.rank for i in completion.history] == [0, 0, 1]


@pytest.mark.parametrize("name", ["paper", "complete"])
def test_blocks_do_not_change_the_answer(name):
    """1, 3 and 7 blocks: the same factors to 1e-4."""
    matrix = low_rank_counts(90, 70, seed=9)
    hidden = hide(matrix, 0.05, 0) if name == "complete" else None
    settings = preset(name, scaling="none", max_iterations=12)
    results = []
    for n_blocks in (1, 3, 7):
        operator = operator_of(matrix, n_blocks, hidden=hidden)
        completion = completed(operator, settings)
        lefts, right = operator.factors()
        results.append((completion, np.vstack([left.compute() for left in lefts]), right))
    for completion, left, right in results[1:]:
        assert [i.rank for i in completion.history] == [i.rank for i in results[0][0].history]
        assert np.linalg.norm(left - results[0][1]) < 1e-4 * np.linalg.norm(left)
        assert np.linalg.norm(right - results[0][2]) < 1e-4 * np.linalg.norm(right)


def test_each_iteration_is_told_as_it_is_made():
    told = []
    operator = operator_of(low_rank_counts(40, 30), 2)
    completion = completed(operator, preset("paper", max_iterations=7), told.append)
    assert tuple(told) == completion.history
    assert [i.iteration for i in told] == list(range(1, 8))
    passes = [i.passes for i in told]
    assert passes == sorted(passes)
    assert passes[-1] == operator.passes


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (2, 2), (1, 1)])
def test_matrices_of_next_to_nothing(shape):
    matrix = low_rank_counts(*shape, density=0.9)
    settings = preset("paper")
    completion, A = run(matrix, settings, n_blocks=1)
    expected = twin(matrix, settings)
    assert completion.converged
    assert abs(len(completion.history) - len(expected.ranks)) <= 1
    assert np.linalg.norm(A - expected.A) < 1e-3 * np.linalg.norm(expected.A)
