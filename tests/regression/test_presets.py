"""The presets against a truth: cells sequenced deeply, and the same cells with most of their molecules removed."""

from __future__ import annotations

import numpy as np
import pytest

from scialm_dask import ExpressionMatrix, impute


@pytest.fixture(scope="module")
def truth(shared):
    """Cells × genes, every cell scaled to a total of one, and the scale of the cells to impute."""
    deep, sparse = (
        ExpressionMatrix.open(shared / "data" / f"baron_{kind}.h5ad").to_dask().compute().toarray().astype(float)
        for kind in ("reference", "downsampled")
    )
    return deep / deep.sum(axis=1, keepdims=True), sparse.sum(axis=1, keepdims=True)


def compared(result, truth):
    deep, totals = truth
    imputed = result.to_dask().compute() / totals
    return np.linalg.norm(imputed - deep) / np.linalg.norm(deep), imputed.mean() / deep.mean()


def test_denoise_is_near_the_truth_and_does_not_inflate(shared, truth):
    result = impute(shared / "data" / "baron_downsampled.h5ad", preset="denoise")
    error, inflation = compared(result, truth)
    assert error <= 0.14
    assert 0.9 <= inflation <= 1.2
    assert result.rank <= 64


def test_zeros_that_count_for_nothing_inflate(shared, truth):
    """What the masking test cannot see, and the reason for the preset above."""
    error, inflation = compared(impute(shared / "data" / "baron_downsampled.h5ad"), truth)
    assert error > 0.3
    assert inflation > 2
