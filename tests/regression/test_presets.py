"""The presets against a truth: cells sequenced deeply, and the same cells with most of their molecules removed."""

from __future__ import annotations

import anndata
import numpy as np
import pytest

from scialm_dask import ExpressionMatrix, impute
from scialm_dask.config import preset
from scialm_dask.run.cluster import Workers
from scialm_dask.run.plan import forecast


@pytest.fixture(scope="module")
def truth(shared):
    """Cells × genes, every cell scaled to a total of one, and the scale of the cells to impute."""
    deep, sparse = (
        ExpressionMatrix.open(shared / "data" / f"baron_{kind}.h5ad").to_dask().compute().toarray().astype(float)
        for kind in ("reference", "downsampled")
    )
    return deep / deep.sum(axis=1, keepdims=True), sparse.sum(axis=1, keepdims=True)


def compared(imputed, truth):
    deep, totals = truth
    imputed = imputed.compute() / totals
    return relative_error(imputed, deep), imputed.mean() / deep.mean()


def relative_error(imputed, truth):
    return np.linalg.norm(imputed - truth) / np.linalg.norm(truth)


def gene_correlation(imputed, truth):
    """Median over the genes that vary in both."""
    one, other = (X - X.mean(axis=0) for X in (imputed, truth))
    norms = np.linalg.norm(one, axis=0) * np.linalg.norm(other, axis=0)
    vary = norms > 0
    return np.median((one * other).sum(axis=0)[vary] / norms[vary])


def assert_foreseen(result, source, name):
    passes = forecast(ExpressionMatrix.open(source), preset(name), Workers(1, 1, None)).passes
    assert 0.7 < passes / result.summary["passes"] < 1.4


def test_denoise_is_near_the_truth_and_does_not_inflate(shared, truth):
    source = shared / "data" / "baron_downsampled.h5ad"
    result = impute(source, preset="denoise")
    assert_foreseen(result, source, "denoise")
    assert result.summary["passes"] <= 10
    error, inflation = compared(result.to_dask(), truth)
    assert error <= 0.103
    assert 0.97 <= inflation <= 1.03
    assert gene_correlation(result.to_dask().compute() / truth[1], truth[0]) >= 0.36
    assert result.rank <= 64


@pytest.mark.parametrize(
    ("name", "of_counts", "at_most"),
    [("pbmc_facs", 0.588, 0.531), ("mouse_bladder", 0.645, 0.589), ("klein_d2_d4", 0.669, 0.613)],
)
def test_denoise_predicts_a_fifth_of_the_molecules_from_the_others(shared, name, of_counts, at_most):
    counts = ExpressionMatrix.open(shared / "data" / f"{name}.h5ad").to_dask().compute().tocsr()
    unseen, seen = counts.copy(), counts.copy()
    unseen.data = np.random.default_rng(7).binomial(counts.data.astype(int), 0.2).astype(np.float32)
    seen.data -= unseen.data
    seen.eliminate_zeros()
    unseen = unseen.toarray()
    result = impute(seen, preset="denoise")
    assert result.summary["passes"] <= 10
    assert relative_error(seen.toarray() / 4, unseen) == pytest.approx(of_counts, abs=0.003)
    assert relative_error(result.to_dask().compute() / 4, unseen) <= at_most


def test_zeros_that_count_for_nothing_inflate(shared, truth):
    """What the masking test cannot see, and the reason for the preset above."""
    source = shared / "data" / "baron_downsampled.h5ad"
    result = impute(source, preset="complete")
    assert_foreseen(result, source, "complete")
    error, inflation = compared(result.to_dask(), truth)
    assert error > 0.3
    assert inflation > 2


def test_cells_that_were_not_in_the_fit_come_as_near_the_truth(shared, truth, tmp_path):
    source = shared / "data" / "baron_downsampled.h5ad"
    cells = anndata.read_h5ad(source)
    new = np.random.default_rng(0).random(cells.n_obs) < 0.3
    theirs = truth[0][new], truth[1][new]
    fitted, _ = compared(impute(source, preset="denoise").to_dask()[new], theirs)
    transformed, inflation = compared(
        impute(cells[~new].copy(), preset="denoise").transform(cells[new]).to_dask(), theirs
    )
    assert transformed <= 1.1 * fitted
    assert 0.97 <= inflation <= 1.03
