import json
from dataclasses import replace

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from scialm_dask import ExpressionMatrix, Imputation, InputError, biological_zeros, impute
from scialm_dask.data.csr import RowBlocks
from scialm_dask.report.diagnostics import compare, warnings_of
from scialm_dask.solve.biological_zeros import spectral_gap_rank

M, N = 300, 120


@pytest.fixture(scope="module")
def two_types():
    """Half of the cells express the first half of the genes, the others the second; the rest are true zeros."""
    rng = np.random.default_rng(0)
    expressed = (np.arange(M)[:, None] < M // 2) == (np.arange(N) < N // 2)
    counts = rng.poisson(np.where(expressed, rng.uniform(1, 3, N), 0.0))
    return sp.csr_matrix(counts.astype(np.float32)), expressed


def test_zeros_of_the_other_type_stay(two_types):
    X, expressed = two_types
    allowed = biological_zeros(ExpressionMatrix.of(X)).expressed(0, M)
    assert allowed[~expressed].mean() < 0.02
    assert allowed[expressed].mean() > 0.9


def test_rule_is_that_of_the_dense_matrix(two_types):
    detected = (two_types[0].toarray() > 0).astype(np.float64)
    left, values, right = np.linalg.svd(detected, full_matrices=False)
    k = spectral_gap_rank(values[:100])
    dense = (left[:, :k] * values[:k]) @ right[:k]
    zeros = biological_zeros(ExpressionMatrix.of(two_types[0]))
    assert zeros.rank == k
    np.testing.assert_allclose(zeros.thresholds, np.maximum(-dense.min(axis=0), 0), atol=1e-3)


def test_blocks_and_scratch_change_nothing_but_rounding(two_types, tmp_path):
    matrix = ExpressionMatrix.of(two_types[0])
    whole = biological_zeros(matrix.with_blocks(RowBlocks((0, M))))
    cut = biological_zeros(matrix.with_blocks(RowBlocks((0, 70, 200, M))), scratch_folder=str(tmp_path))
    np.testing.assert_allclose(whole.left.compute() @ whole.right.T, cut.left.compute() @ cut.right.T, atol=1e-3)
    del cut
    assert not list(tmp_path.iterdir())


def test_spectral_gap_rank():
    values = np.concatenate([[50.0, 40.0, 30.0], np.linspace(10, 9, 97) + 1e-3 * np.sin(np.arange(97))])
    assert spectral_gap_rank(values) == 3


def test_sparse_result(two_types, tmp_path):
    X, _ = two_types
    result = impute(X)
    matrix = ExpressionMatrix.of(X)
    zeros = biological_zeros(matrix)
    told = result.to_zarr(tmp_path / "a.zarr", preserve_zeros=zeros)["X"]
    written = anndata.read_zarr(tmp_path / "a.zarr").X
    assert sp.issparse(written)
    ratio = pytest.approx(written.mean() / X.mean(), rel=1e-5)
    assert told == {
        "written": "preserve_zeros",
        "rank": zeros.rank,
        "keep_observed": False,
        "mean_over_observed": ratio,
    }
    with threadpool_limits(1, user_api="blas"):  # as in the tasks that write
        dense, imputed, seen = written.toarray(), result[:, :], X.toarray() > 0
    assert not dense[~zeros.expressed(0, M) & ~seen].any()
    assert (dense[seen] > 0).all()
    kept = zeros.expressed(0, M) & ~seen
    np.testing.assert_array_equal(dense[kept], imputed[kept])
    result.to_zarr(tmp_path / "b.zarr", preserve_zeros=zeros, keep_observed=matrix)
    np.testing.assert_array_equal(anndata.read_zarr(tmp_path / "b.zarr").X.toarray()[seen], X.toarray()[seen])


def test_unusable_matrices_are_refused(two_types):
    with pytest.raises(InputError, match="zeros are observed values"):
        biological_zeros(ExpressionMatrix.of(two_types[0], observed="finite"))
    with pytest.raises(InputError, match="at least 20 of both"):
        biological_zeros(ExpressionMatrix.of(two_types[0][:19]))


def test_a_rule_of_another_matrix_is_refused(two_types, tmp_path):
    zeros = biological_zeros(ExpressionMatrix.of(two_types[0][:100]))
    with pytest.raises(InputError, match="100 cells × 120 genes, but 300 × 120 are expected"):
        impute(two_types[0]).to_zarr(tmp_path / "a.zarr", preserve_zeros=zeros)
    assert not (tmp_path / "a.zarr").exists()


def test_score_and_report_are_of_what_was_written(cli, store_of, two_types, tmp_path):
    """Some molecules strayed to the cells of the other type: X has zeros there, and the factors have not."""
    rng = np.random.default_rng(1)
    source = store_of(sp.csr_matrix(two_types[0] + rng.poisson(0.03, (M, N)), dtype=np.float32))
    masked, plain, kept = (tmp_path / f"{name}.zarr" for name in ("masked", "plain", "kept"))
    assert cli("mask", source, masked, "--fraction", "0.2").exit_code == 0
    assert cli("impute", masked, plain, "--preset", "complete").exit_code == 0
    told = json.loads(
        cli("impute", masked, kept, "--preset", "complete", "--preserve-zeros", "--json", "--quiet").stdout
    )
    scores = [json.loads(cli("score", r, "--held-out", masked, "--json", "--quiet").stdout) for r in (plain, kept)]
    X, hidden = anndata.read_zarr(kept).X, anndata.read_zarr(masked).layers["held_out"].tocoo()
    error = np.asarray(X[hidden.row, hidden.col]).ravel() - hidden.data
    assert [score["scored"] for score in scores] == ["factors", "X"]
    assert scores[1]["mse"] == pytest.approx(np.square(error).mean(), rel=1e-5)
    assert scores[1]["mse"] > 1.0002 * scores[0]["mse"]
    assert scores[1]["gene_mean_mse"] == pytest.approx(scores[0]["gene_mean_mse"], rel=1e-6)

    opened, observed = Imputation.open(kept), ExpressionMatrix.open(masked)
    assert opened.summary["X"] == told["X"]
    compared = compare(opened, observed)
    np.testing.assert_allclose(compared.genes["mean_imputed"], np.asarray(X.mean(axis=0)).ravel(), rtol=1e-5)
    assert cli("report", kept, "-o", tmp_path / "r.html").exit_code == 0
    assert f"The written X has {opened.mean_ratio:.3g} times" in (tmp_path / "r.html").read_text()
    assert opened.mean_ratio < 2
    for result, of_factors in ((Imputation.open(plain), True), (opened, False)):
        result.summary["mean_imputed_over_observed"] = 5.0
        warnings = warnings_of(result, replace(compared, filled=0.2))
        assert any("--preserve-zeros" in remedy for _, remedy in warnings) == of_factors
        assert any("is inflated" in what for what, _ in warnings) == of_factors


def test_command(cli, store_of, two_types, tmp_path):
    source = store_of(two_types[0])
    done = cli("impute", source, tmp_path / "out.zarr", "--preserve-zeros", "--scratch", f"zarr:{tmp_path}")
    assert done.exit_code == 0, done.output
    assert sp.issparse(anndata.read_zarr(tmp_path / "out.zarr").X)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr", "source.zarr"]
    assert cli("impute", source, tmp_path / "b.zarr", "--preserve-zeros", "--write", "dense").exit_code == 2


def test_genes_that_were_never_seen_change_nothing(two_types):
    """The pattern has fewer singular values than genes, and they are found all the same."""
    X = two_types[0].tolil()[:, :60]
    X[:, 3], X[:, 7] = 0, X[:, 8]
    few = sp.csr_matrix(X)
    there = np.delete(np.arange(60), 3)
    zeros = biological_zeros(ExpressionMatrix.of(few))
    assert not zeros.expressed(0, M)[:, 3].any()
    expected = biological_zeros(ExpressionMatrix.of(few[:, there]))
    assert zeros.rank == expected.rank
    np.testing.assert_allclose(zeros.thresholds[there], expected.thresholds, atol=1e-3)


def test_a_pattern_of_rank_one_is_all_signal():
    zeros = biological_zeros(ExpressionMatrix.of(np.ones((30, 25), np.float32)))
    assert zeros.rank == 1
    assert zeros.expressed(0, 30).all()
