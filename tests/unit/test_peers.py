"""Peers at toy size, against what their papers say they do."""

import os

import numpy as np
import pytest
import scipy.sparse as sp
from problems import low_rank_counts

from scialm_dask.compare import peers
from scialm_dask.compare.peers import Task, soft_impute


@pytest.fixture
def task(store_of):
    def task(matrix, **kwargs):
        return Task(store_of(sp.csr_matrix(matrix)), seed=0, zeros_matter=kwargs.get("zeros_matter", False))

    return task


def two_kinds(cells=60, genes=30, seed=0):
    """Counts of two kinds of cells that share no gene, and their rates."""
    rates = np.zeros((cells, genes))
    rates[: cells // 2, : genes // 2] = rates[cells // 2 :, genes // 2 :] = 3.0
    return np.random.default_rng(seed).poisson(rates).astype(np.float32), rates


def test_gene_means_over_non_zeros_or_over_cells(counts, task):
    dense = counts.toarray().astype(float)
    left, right = peers.gene_mean(task(counts))
    seen = np.maximum((dense > 0).sum(axis=0), 1)
    np.testing.assert_allclose(left @ right.T, np.tile(dense.sum(axis=0) / seen, (len(dense), 1)), rtol=1e-6)
    left, right = peers.gene_mean(task(counts, zeros_matter=True))
    np.testing.assert_allclose(left @ right.T, np.tile(dense.mean(axis=0), (len(dense), 1)), rtol=1e-6)


def test_knn_averages_over_cells_of_the_same_kind_and_keeps_totals(task):
    X, rates = two_kinds()
    smoothed = peers.knn(task(X))
    np.testing.assert_allclose(smoothed.sum(axis=1), X.sum(axis=1), rtol=1e-5)
    assert not smoothed[rates == 0].any()
    assert np.square(smoothed - rates).mean() < np.square(X - rates).mean() / 4


def test_alra_completes_expressed_genes_and_leaves_the_others_zero(task):
    X, rates = two_kinds(cells=120, genes=80)
    completed = peers.alra(task(X))
    assert (completed[X > 0] > 0).all()
    assert (completed[(X == 0) & (rates == 0)] == 0).mean() > 0.99
    assert (completed[(X == 0) & (rates > 0)] > 0).mean() > 0.9


def test_alra_matches_the_moments_of_the_non_zeros_of_genes():
    rng = np.random.default_rng(0)
    observed = np.where(rng.random((200, 4)) < 0.4, rng.gamma(9, 0.2, (200, 4)), 0).astype(np.float32)
    low_rank = rng.normal(0.5, 0.2, (200, 4)).astype(np.float32)
    kept = peers._adjusted(low_rank, observed)
    for gene in range(4):
        imputed = kept[(kept[:, gene] > 0), gene]
        assert imputed.mean() == pytest.approx(observed[observed[:, gene] > 0, gene].mean(), rel=0.05)


def test_soft_impute_recovers_a_matrix_of_low_rank():
    rng = np.random.default_rng(1)
    truth = (rng.gamma(2, 1, (150, 3)) @ rng.gamma(2, 1, (3, 80))).astype(np.float32)
    seen = rng.random(truth.shape) < 0.5
    left, right = soft_impute(sp.csr_matrix(np.where(seen, truth, 0)), seed=0)
    completed = left @ right.T
    assert left.shape[1] < 20
    assert np.linalg.norm((completed - truth)[~seen]) < 0.05 * np.linalg.norm(truth[~seen])
    again = soft_impute(sp.csr_matrix(np.where(seen, truth, 0)), seed=0)
    np.testing.assert_array_equal(left, again[0])


def test_soft_impute_has_the_optimum_of_the_convex_problem():
    """With factors wide enough, the answer at one λ is that of the nuclear norm."""
    import cvxpy as cp

    from scialm_dask.compare.peers import _minimise

    D = low_rank_counts(14, 10, rank=2, density=0.6).astype(np.float32)
    seen, lam = (D.toarray() > 0).astype(float), 20.0
    X = cp.Variable(D.shape)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(cp.multiply(seen, X - D.toarray())) + lam * cp.normNuc(X)))
    problem.solve(solver="CLARABEL")
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(14, 10)).astype(np.float32), np.zeros((10, 10), np.float32)
    for _ in range(40):
        A, B = _minimise(D, A, B, lam)
    np.testing.assert_allclose(A @ B.T, X.value, atol=0.02 * np.abs(X.value).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["magic", "scvi"])
@pytest.mark.filterwarnings("ignore")
def test_heavy_peers_smooth_within_kinds(task, name):
    """MAGIC must be there in CI. scVI is not: see CONTRIBUTING.md for the size of what it needs, and how to run this."""
    if name == "scvi" or os.environ.get("CI") != "true":
        pytest.importorskip(name, reason="needs the extra [bench]", exc_type=ImportError)
    X, rates = two_kinds(cells=300, genes=150)
    completed = getattr(peers, name)(task(X))
    assert completed.shape == X.shape
    assert np.square(completed - rates).mean() < np.square(X - rates).mean() / 2
