"""`evaluate` on real cells gives the figures that were found by other ways."""

from __future__ import annotations

import pytest

from scialm_dask import evaluate_imputation
from scialm_dask.data.qc import Thresholds, quality_control


@pytest.mark.slow
def test_against_a_truth(shared):
    """Denoising is nearer to the truth than the cells as observed and than peers, in error and in genes."""
    found = evaluate_imputation(
        shared / "data" / "baron_downsampled.h5ad",
        methods=["denoise", "complete", "knn", "alra"],
        shares=[],
        split=False,
        reference=shared / "data" / "baron_reference.h5ad",
    )
    scores = found.scores.set_index("method")
    assert scores.loc["as observed", "relative_error"] == pytest.approx(0.169, abs=5e-4)
    assert scores.loc["as observed", "gene_correlation"] == pytest.approx(0.365, abs=5e-4)
    assert scores["relative_error"].idxmin() == scores["gene_correlation"].idxmax() == "denoise"
    assert scores.loc["denoise", "relative_error"] <= 0.103
    assert scores.loc["denoise", "gene_correlation"] >= 0.36
    assert 0.97 <= scores.loc["denoise", "mean_ratio"] <= 1.03
    assert scores.loc["complete", "relative_error"] > 0.3
    assert scores.loc["complete", "mean_ratio"] > 2


@pytest.mark.slow
def test_on_hidden_entries(shared, tmp_path):
    """The publication's PBMC with other tenths hidden than in the reference: the same errors, nearly."""
    thresholds = Thresholds(min_genes=200, max_genes=2000, max_mito=5, min_cells=3)
    quality_control(shared / "data" / "pbmc_donor_a.h5ad", tmp_path / "pbmc.zarr", thresholds)
    found = evaluate_imputation(tmp_path / "pbmc.zarr", methods=["complete"], split=False)
    scores = found.scores.set_index("method")
    assert scores.loc["gene-mean", "mse"] == pytest.approx(5.112, rel=0.06)
    assert scores.loc["complete", "mse"] == pytest.approx(2.907, rel=0.06)
    assert scores.loc["complete", "pearson"] > 0.94
