"""`evaluate` on real cells gives the figures that were found by other ways."""

from __future__ import annotations

import pytest

from scialm_dask import evaluate_imputation
from scialm_dask.data.qc import Thresholds, quality_control


@pytest.mark.slow
def test_against_a_truth(shared):
    """Relative errors as `test_presets` computes them from dense matrices."""
    found = evaluate_imputation(
        shared / "data" / "baron_downsampled.h5ad",
        methods=["denoise", "auto"],
        shares=[],
        split=False,
        seeds=[0],
        reference=shared / "data" / "baron_reference.h5ad",
    )
    scores = found.scores.set_index("method")
    assert scores.loc["as observed", "relative_error"] == pytest.approx(0.169, abs=5e-4)
    assert scores.loc["denoise", "relative_error"] <= 0.12
    assert 0.95 <= scores.loc["denoise", "mean_ratio"] <= 1.1
    assert scores.loc["auto", "relative_error"] > 0.3
    assert scores.loc["auto", "mean_ratio"] > 2


@pytest.mark.slow
def test_on_hidden_entries(shared, tmp_path):
    """The publication's PBMC with other tenths hidden than in the reference: the same errors, nearly."""
    thresholds = Thresholds(min_genes=200, max_genes=2000, max_mito=5, min_cells=3)
    quality_control(shared / "data" / "pbmc_donor_a.h5ad", tmp_path / "pbmc.zarr", thresholds)
    found = evaluate_imputation(tmp_path / "pbmc.zarr", methods=["auto"], seeds=[0], split=False)
    scores = found.scores.set_index("method")
    assert scores.loc["gene-mean", "mse"] == pytest.approx(5.112, rel=0.06)
    assert scores.loc["auto", "mse"] == pytest.approx(2.907, rel=0.06)
    assert scores.loc["auto", "pearson"] > 0.94
