import dask
import dask.array as da
import numpy as np
import pytest
from pooled_twins import pooled_als, seed_simulation, sparse_simulation

from scialm_dask.errors import InputError
from scialm_dask.evaluate.metrics import gene_scores
from scialm_dask.pooled.als import PooledALS, start_loadings


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads"):
        yield


@pytest.mark.parametrize("seed", range(5))
def test_recovers_the_seed_simulation(seed):
    M, P = seed_simulation(seed)
    result = PooledALS(10, random_state=seed).fit(M @ P, P)
    X = result.to_dask().compute()
    pearson = gene_scores(M, result).pearson
    assert result.converged
    assert X.min() >= 0
    assert np.median(pearson) >= 0.98
    assert pearson.min() >= 0.93
    assert result.feasibility <= 2e-4 * np.linalg.norm(M @ P)


@pytest.mark.parametrize("simulate", [seed_simulation, sparse_simulation])
def test_agrees_with_its_dense_twin(simulate):
    M, P = simulate(1, cells=60, genes=30, pools=10, rank=4)
    noise = np.random.default_rng(0).random((60, 10)) * (M @ P).mean() * 0.1
    D = M @ P + noise
    theirs, history = pooled_als(D, P, start_loadings(30, 4, 7, 0), sweeps=6)
    result = PooledALS(4, 7, max_sweeps=6, tol=0).fit(D, P)
    np.testing.assert_allclose([record["objective"] for record in result.history], history, rtol=1e-6)
    np.testing.assert_allclose(result.to_dask().compute(), theirs, rtol=1e-4, atol=1e-5 * M.mean())


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_objective_never_rises(ridge):
    M, P = sparse_simulation(2, cells=200, genes=60, pools=20)
    D = np.random.default_rng(0).poisson(M @ P)
    result = PooledALS(6, ridge=ridge, max_sweeps=60, tol=0).fit(D, P)
    objective = np.array([record["objective"] for record in result.history])
    assert len(objective) == 60
    assert (np.diff(objective) <= 1e-10 * objective[0]).all()
    U, V = result.left.compute(), result.right
    penalty = ridge * (np.sum(U**2) + np.sum(V**2))
    assert result.objective == pytest.approx(np.sum((U @ V.T @ P - D) ** 2) + penalty)


def test_same_answer_for_any_blocks():
    M, P = sparse_simulation(3, cells=210, genes=40, pools=15)
    D = M @ P
    answers = [
        PooledALS(4, max_sweeps=20).fit(da.from_array(D, chunks=(210 // n, -1)), P).to_dask().compute()
        for n in (1, 3, 7)
    ]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], rtol=1e-5, atol=1e-6)


def test_restarts_keep_the_best():
    M, P = sparse_simulation(4)
    D = np.random.default_rng(0).poisson(M @ P)
    alone = PooledALS(4, max_sweeps=15).fit(D, P)
    best = PooledALS(4, max_sweeps=15, restarts=4).fit(D, P)
    assert best.objective <= alone.objective


def test_transform_measures_new_cells_with_the_learned_loadings():
    M, P = seed_simulation(0, cells=300)
    als = PooledALS(10)
    result = als.fit(M[:200] @ P, P)
    np.testing.assert_array_equal(als.transform(M[:200] @ P).to_dask().compute(), result.to_dask().compute())
    new = als.transform(M[200:] @ P)
    assert new.shape == (100, 100)
    assert np.median(gene_scores(M[200:], new).pearson) >= 0.98


def test_a_sweep_reads_each_block_once():
    M, P = seed_simulation(0, cells=90)
    reads = []

    def read(block, block_info):
        reads.append(block_info[0]["chunk-location"][0])
        return block

    D = da.from_array(M @ P, chunks=(30, -1)).map_blocks(read, dtype=float, meta=np.empty((0, 0)))
    PooledALS(5, max_sweeps=4, tol=0).fit(D, P)
    assert sorted(reads) == sorted([0, 1, 2] * 4)


def test_zarr_store_float32_and_sparse_blocks(tmp_path):
    import scipy.sparse as sp
    import zarr

    M, P = sparse_simulation(1)
    D = np.round(M @ P).astype(np.float32)
    expected = PooledALS(3, max_sweeps=5).fit(D, P).to_dask().compute()
    store = zarr.create_array(str(tmp_path / "D.zarr"), shape=D.shape, chunks=(20, D.shape[1]), dtype="f4")
    store[:] = D
    sparse = da.from_array(D, chunks=(20, -1)).map_blocks(sp.csr_matrix, meta=sp.csr_matrix((0, 0), dtype=np.float32))
    for source in (str(tmp_path / "D.zarr"), sparse):
        np.testing.assert_allclose(PooledALS(3, max_sweeps=5).fit(source, P).to_dask().compute(), expected, rtol=1e-6)


def test_rank_above_the_number_of_pools_warns():
    M, P = sparse_simulation(1)
    with pytest.warns(UserWarning, match="rank 11 is above the number of pools, 10"):
        PooledALS(11, max_sweeps=2).fit(M @ P, P)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0; give a whole number of at least 1"),
        ({"rank": 2, "ridge": -1.0}, "ridge is -1.0; give a number of at least 0"),
        ({"rank": 2, "ridge": np.inf}, "ridge is inf; give a number of at least 0"),
        ({"rank": 2, "restarts": 0}, "restarts is 0; give a whole number of at least 1"),
        ({"rank": 2, "tol": np.nan}, "tol is nan; give a number of at least 0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=f"^{words}$"):
        PooledALS(**settings)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_measurements_are_named(bad):
    M, P = sparse_simulation(1)
    D = M @ P
    D[41, 7] = bad
    with pytest.raises(InputError, match=r"at cell 41, pool 7"):
        PooledALS(3).fit(da.from_array(D, chunks=(20, -1)), P)


def test_shapes_that_do_not_fit():
    M, P = sparse_simulation(1)
    with pytest.raises(InputError, match="9 columns, the design has 10 pools"):
        PooledALS(3).fit((M @ P)[:, :9], P)
    with pytest.raises(InputError, match="shape"):
        PooledALS(3).fit(np.ones(5), P)
    with pytest.raises(InputError, match="not numbers"):
        PooledALS(3).fit((M @ P).astype(str), P)
    with pytest.raises(InputError, match="call fit first"):
        PooledALS(3).transform(M @ P)


def test_cells_without_any_signal_come_out_zero():
    M, P = seed_simulation(0, cells=50)
    D = M @ P
    D[3] = 0
    X = PooledALS(4, max_sweeps=5).fit(D, P).to_dask().compute()
    assert not X[3].any()
    assert not PooledALS(4).fit(np.zeros((5, P.shape[1])), P).to_dask().compute().any()
