import dask
import dask.array as da
import numpy as np
import pytest
from pooled_twins import pooled_nuclear_norm, seed_simulation, sparse_simulation

from scialm_dask.errors import InputError
from scialm_dask.evaluate.metrics import gene_scores
from scialm_dask.pooled.nuclear import PooledNuclearNorm


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads"):
        yield


def checked(result, D, P, delta):
    """What every answer must be: feasible, non-negative, and what it reports."""
    X = result.to_dask().compute()
    misfit = np.linalg.norm(X @ P - D)
    assert X.min() >= 0
    assert misfit <= max(delta, 2e-10 * np.linalg.norm(D))
    assert result.feasibility == pytest.approx(misfit, abs=1e-10 * np.linalg.norm(D))
    assert result.objective == pytest.approx(np.linalg.norm(X, "nuc"), rel=1e-6)
    return X


@pytest.mark.parametrize("seed", range(5))
def test_recovers_the_seed_simulation(seed):
    M, P = seed_simulation(seed)
    D = M @ P
    delta = 1e-7 * len(D) * len(P)
    result = PooledNuclearNorm(delta).fit(D, P)
    checked(result, D, P, delta)
    assert result.certificate <= 1e-4 * result.objective
    assert np.median(gene_scores(M, result).pearson) >= 0.98


@pytest.mark.parametrize(("seed", "share"), [(0, 1e-4), (1, 0.05), (2, 1e-3), (6, 0.01), (4, 0.3)])
def test_agrees_with_cvxpy(seed, share):
    M, P = sparse_simulation(seed, cells=30, genes=16, pools=6, rank=3)
    D = M @ P
    delta = share * np.linalg.norm(D)
    _, optimum = pooled_nuclear_norm(D, P, delta)
    result = PooledNuclearNorm(delta).fit(D, P)
    checked(result, D, P, delta)
    assert result.converged
    assert result.objective == pytest.approx(optimum, rel=1e-4)
    assert result.objective - result.certificate <= optimum * (1 + 1e-6)
    assert result.certificate <= 5e-3 * optimum


def test_non_negativity_binds_and_the_closed_form_is_not_the_answer():
    M, P = sparse_simulation(0, cells=40, genes=20, pools=8)
    D = M @ P
    delta = 1e-4 * np.linalg.norm(D)
    closed = D @ np.linalg.pinv(P)
    theirs, optimum = pooled_nuclear_norm(D, P, delta)
    result = PooledNuclearNorm(delta, tol=1e-5).fit(D, P)
    X = checked(result, D, P, delta)
    assert closed.min() < -0.05 * M.mean()
    assert np.linalg.norm(closed, "nuc") < 0.97 * optimum
    assert result.objective == pytest.approx(optimum, rel=2e-5)
    assert np.linalg.norm(X - theirs) <= 0.02 * np.linalg.norm(theirs)
    assert len(result.history) > 1


@pytest.mark.parametrize("seed", [3, 5])
def test_equality_is_certified_optimal(seed):
    """CVXPY's solvers do not converge on these; the dual bound stands in for them."""
    M, P = sparse_simulation(seed)
    result = PooledNuclearNorm(0.0).fit(M @ P, P)
    checked(result, M @ P, P, 0.0)
    assert result.converged
    assert len(result.history) > 1
    assert 0 <= result.certificate <= 3e-4 * result.objective


def test_closed_form_takes_two_passes_where_it_is_the_answer():
    M, P = seed_simulation(0, cells=90)
    reads = []

    def read(block, block_info):
        reads.append(block_info[0]["chunk-location"][0])
        return block

    D = da.from_array(M @ P, chunks=(30, -1)).map_blocks(read, dtype=float, meta=np.empty((0, 0)))
    result = PooledNuclearNorm(0.0).fit(D, P)
    assert sorted(reads) == sorted([0, 1, 2] * 2)
    np.testing.assert_allclose(result.to_dask().compute(), M @ P @ np.linalg.pinv(P), rtol=1e-8)


def test_wide_ball_without_binding_entries_is_solved_on_the_driver():
    M, P = seed_simulation(0, cells=40, genes=20, pools=8, rank=5)
    D = M @ P
    delta = 0.02 * np.linalg.norm(D)
    _, optimum = pooled_nuclear_norm(D, P, delta)
    result = PooledNuclearNorm(delta).fit(D, P)
    checked(result, D, P, delta)
    assert len(result.history) == 1
    assert result.objective == pytest.approx(optimum, rel=1e-4)
    assert result.left.shape[1] <= 8


def test_same_answer_for_any_blocks():
    M, P = sparse_simulation(3, cells=210)
    D = M @ P
    delta = 1e-3 * np.linalg.norm(D)
    results = [PooledNuclearNorm(delta).fit(da.from_array(D, chunks=(210 // n, -1)), P) for n in (1, 3, 7)]
    answers = [result.to_dask().compute() for result in results]
    for result, answer in zip(results[1:], answers[1:], strict=True):
        assert len(result.history) == len(results[0].history)
        np.testing.assert_allclose(answer, answers[0], atol=1e-5 * answers[0].max())


def test_start_from_another_answer():
    M, P = sparse_simulation(2)
    D = M @ P
    size = np.linalg.norm(D)
    first = PooledNuclearNorm(2e-3 * size).fit(D, P)
    cold = PooledNuclearNorm(1.9e-3 * size).fit(D, P)
    warm = PooledNuclearNorm(1.9e-3 * size).fit(da.from_array(D, chunks=(25, -1)), P, start=first)
    assert warm.objective == pytest.approx(cold.objective, rel=1e-4)
    assert warm.history[0]["objective"] == pytest.approx(cold.objective, rel=0.01)
    assert cold.history[0]["objective"] > 1.05 * cold.objective


def test_delta_above_the_norm_of_the_measurements_gives_zero():
    M, P = sparse_simulation(1)
    D = M @ P
    result = PooledNuclearNorm(2 * np.linalg.norm(D)).fit(D, P)
    assert not result.to_dask().compute().any()
    assert (result.objective, result.certificate) == (0.0, 0.0)


def test_delta_that_no_expression_can_meet_is_refused_with_the_least_one():
    P = np.array([[1, 1], [1, 0], [1, 0]])  # pool 0 holds pool 1 and more, so no cell may read more in pool 1
    D = np.array([[1.0, 2.0], [3.0, 1.0], [5.0, 2.0]])
    with pytest.raises(InputError, match=r"nearer to D than about 0\.7071"):
        PooledNuclearNorm(0.1).fit(D, P)
    result = PooledNuclearNorm(0.75).fit(D, P)
    checked(result, D, P, 0.75)


@pytest.mark.parametrize(("iterations", "share"), [(3, 1e-3), (1, 0.3)])  # the latter with nothing for a lower bound
def test_iterations_that_run_out_warn_and_still_give_a_feasible_answer(iterations, share):
    M, P = sparse_simulation(0)
    D = M @ P
    delta = share * np.linalg.norm(D)
    with pytest.warns(UserWarning, match=f"not converged after {iterations} iterations: objective"):
        result = PooledNuclearNorm(delta, max_iterations=iterations).fit(D, P)
    assert not result.converged
    X = checked(result, D, P, delta)
    assert result.certificate >= 0
    assert X.shape == M.shape


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"delta": -1.0}, "delta is -1.0; give a number of at least 0"),
        ({"delta": np.nan}, "delta is nan; give a number of at least 0"),
        ({"delta": 1.0, "tol": 0.0}, "tol is 0.0; give a number between 0 and 1"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=f"^{words}$"):
        PooledNuclearNorm(**settings)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_measurements_are_named(bad):
    M, P = sparse_simulation(1)
    D = M @ P
    D[41, 7] = bad
    with pytest.raises(InputError, match=r"at cell 41, pool 7"):
        PooledNuclearNorm(1.0).fit(da.from_array(D, chunks=(20, -1)), P)
