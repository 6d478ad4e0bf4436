"""General matrices, of which zeros are values and only NaN is missing."""

import numpy as np
import pytest

from scialm_dask import InputError, impute
from scialm_dask.report.diagnostics import warnings_of


def test_centred_data_have_no_ratio_of_means():
    """It would be a quotient of two numbers next to nothing."""
    rng = np.random.default_rng(0)
    full = rng.standard_normal((80, 3)) @ rng.standard_normal((3, 50))
    holes = rng.random(full.shape) < 0.2
    full -= full[~holes].mean()  # so that observed values sum to nothing
    result = impute(np.where(holes, np.nan, full), observed="finite", preset="paper")
    assert np.linalg.norm((result[:, :] - full)[holes]) < 0.1 * np.linalg.norm(full[holes])
    assert "mean_imputed_over_observed" not in result.summary
    assert not [words for words, _ in warnings_of(result) if "inflated" in words]


@pytest.mark.parametrize("preset", ["complete", "paper"])
def test_zeros_alone_are_refused(preset):
    with pytest.raises(InputError, match="matrix: every observed entry is zero; there is nothing to complete"):
        impute(np.zeros((60, 30)), observed="finite", preset=preset)


def test_values_must_be_on_both_sides_of_the_validation():
    """One value among zeros is hidden or it is not; either way nothing can be validated."""
    shares = set()
    for cell in range(8):
        matrix = np.zeros((20, 30))
        matrix[cell, 0] = 1
        with pytest.raises(InputError, match=r"which hides (all|none) of the observed entries other than zero") as told:
            impute(matrix, observed="finite", validation=0.5)
        shares |= {"all", "none"} & set(str(told.value).split())
    assert shares == {"all", "none"}
