import anndata
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scialm_dask.errors import InputError
from scialm_dask.pooled.design import balanced_pools, check_pools, measure, pool_report, random_pools


def test_random_pools_leave_out_no_gene_and_do_not_depend_on_the_number_of_genes():
    P = random_pools(200, 25, random_state=3)
    assert P.shape == (200, 25)
    assert P.any(axis=1).all()
    assert 0.23 < P.mean() < 0.27
    np.testing.assert_array_equal(random_pools(80, 25, random_state=3), P[:80])


@pytest.mark.parametrize(("genes", "pools", "per_gene"), [(100, 25, 6), (37, 8, 3), (5, 5, 1)])
def test_balanced_pools_are_balanced(genes, pools, per_gene):
    P = balanced_pools(genes, pools, per_gene=per_gene)
    assert (P.sum(axis=1) == per_gene).all()
    assert np.ptp(P.sum(axis=0)) <= 1


def test_balanced_pools_are_less_coherent_than_random_ones():
    balanced = pool_report(balanced_pools(100, 25, per_gene=6))
    chance = pool_report(random_pools(100, 25, density=6 / 25))
    assert balanced.coherence < chance.coherence
    assert balanced.condition < chance.condition


def test_report_counts_what_cannot_be_told_apart():
    P = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]])
    report = pool_report(P)
    assert (report.genes, report.pools, report.rank) == (4, 3, 2)
    assert report.alike == 2
    assert report.coherence == pytest.approx(1.0)
    assert report.pools_per_gene == (1, 3)
    assert report.genes_per_pool == (2, 3)
    assert "2 genes measured like another" in str(report)


@pytest.mark.parametrize(
    ("pools", "words"),
    [
        (np.ones(3), "shape"),
        (np.ones((0, 3)), "shape"),
        (np.full((4, 2), 0.5), "other than 0 and 1"),
        (np.array([[1.0, np.nan]]), "other than 0 and 1"),
        (np.array([["a"]]), "other than 0 and 1"),
        (np.array([[1, 0], [1, 0]]), "1 pools are empty, first pool 1"),
        (np.array([[1, 1], [0, 0]]), "1 genes are in no pool, first gene 1"),
    ],
)
def test_bad_designs(pools, words):
    with pytest.raises(InputError, match=words):
        check_pools(pools)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: random_pools(0, 3), "genes is 0; give a whole number of at least 1"),
        (lambda: random_pools(3, 3, density=0), "density 0.0 is outside"),
        (lambda: random_pools(2, 30, density=0.01), "pools are empty"),
        (lambda: balanced_pools(10, 5, per_gene=6), "per_gene is 6; give no more than the number of pools, 5"),
        (lambda: balanced_pools(2, 5, per_gene=1), "leave some of 5 pools empty"),
    ],
)
def test_designs_that_cannot_be(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_measure_dense_and_sparse_blocks():
    rng = np.random.default_rng(0)
    M = rng.poisson(0.5, (20, 12)).astype(np.float32)
    P = random_pools(12, 5, density=0.4)
    dense = da.from_array(M, chunks=(7, 5))
    sparse = da.from_array(M, chunks=(7, 12)).map_blocks(sp.csr_matrix, meta=sp.csr_matrix((0, 0), dtype=np.float32))
    for array in (dense, sparse):
        assert measure(array, P).chunks[0] == (7, 7, 6)
    for given in (dense, sparse, M, M.tolist(), pd.DataFrame(M), sp.csc_matrix(M), sp.csr_array(M), anndata.AnnData(M)):
        np.testing.assert_allclose(measure(given, P).compute(scheduler="threads"), M @ P)
    with pytest.raises(InputError, match="12 genes, the matrix has 11"):
        measure(dense[:, :11], P)
    for wrong, message in (
        (np.ones(12), r"shape \(12,\)"),
        ([["a"] * 12], "not numbers"),
        (dense[dense[:, 0] > 0], "known size"),
    ):
        with pytest.raises(InputError, match=f"expression: .*{message}"):
            measure(wrong, P)
