"""The estimator keeps scikit-learn's conventions."""

import anndata
import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from problems import low_rank_counts
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from scialm_dask import IALM, ExpressionMatrix, InputError, impute

NAMES = [f"gene{j}" for j in range(60)]
TRANSDUCTIVE = (
    "fit_transform gives the completed matrix itself; transform solves for each cell anew, with the gene factors alone"
)
FAILING = {"check_transformer_general": TRANSDUCTIVE, "check_transformer_data_not_an_array": TRANSDUCTIVE}


# The checks fit matrices of a dozen entries, from which preset auto has none to spare for knowing when to stop: it
# refuses them, as it should.
@parametrize_with_checks(
    [IALM("paper", max_iterations=6), IALM("paper", observed="finite", max_iterations=6)],
    expected_failed_checks=lambda estimator: FAILING if estimator.observed == "nonzero" else {},
)
def test_conventions(estimator, check):
    with dask.config.set(scheduler="synchronous"):
        check(estimator)


@pytest.fixture(scope="module")
def cells():
    return low_rank_counts(200, 60, rank=3, density=0.5, seed=3)


@pytest.fixture(scope="module")
def estimator():
    return IALM("complete", max_rank=6, max_iterations=8, validation=0.05, random_state=2)


@pytest.fixture(scope="module")
def fitted(cells, estimator):
    return clone(estimator).fit(cells[:160])


def test_a_parameter_without_effect_is_refused(cells):
    with pytest.raises(InputError, match=r"validation has no effect with preset paper \(stop residual\)"):
        IALM("paper", validation=0.05).fit(cells)


def test_it_is_impute(cells, estimator, fitted):
    result = impute(cells[:160], preset="complete", max_rank=6, max_iterations=8, validation=0.05, seed=2)
    filled = clone(estimator).fit_transform(cells[:160])
    assert isinstance(filled, da.Array)
    np.testing.assert_allclose(filled.compute(), result[:, :], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(fitted.components_, result.right.T, rtol=1e-3, atol=1e-3)
    assert fitted.n_iter_ == len(result.history)
    new = fitted.transform(cells[160:])
    assert isinstance(new, da.Array)
    np.testing.assert_allclose(new.compute(), result.transform(cells[160:])[:, :], rtol=1e-3, atol=1e-3)


def test_transforming_is_lazy(cells, fitted, monkeypatch):
    monkeypatch.setattr("scialm_dask.solve.transform._solve_block", lambda *_: pytest.fail("computed"))
    assert fitted.transform(cells[160:]).shape == (40, 60)


@pytest.mark.parametrize(
    "kind", [lambda X: X.tocsc(), lambda X: X.toarray().tolist(), lambda X: da.from_array(X.toarray(), chunks=(50, 20))]
)
def test_cells_of_any_kind(cells, estimator, fitted, kind):
    other = clone(estimator).fit(kind(cells[:160]))
    assert other.n_features_in_ == 60
    np.testing.assert_allclose(other.components_, fitted.components_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(other.transform(kind(cells[160:])), fitted.transform(cells[160:]), rtol=1e-2, atol=1e-2)


def test_names_of_genes(cells, estimator):
    frame = pd.DataFrame(cells.toarray(), columns=NAMES, index=[f"cell{i}" for i in range(200)])
    adata = anndata.AnnData(frame[:160])
    by_frame, by_anndata = clone(estimator).fit(frame[:160]), clone(estimator).fit(adata)
    assert list(by_frame.get_feature_names_out()) == list(by_anndata.get_feature_names_out()) == NAMES
    assert list(adata.obsm) == []
    new = by_anndata.transform(anndata.AnnData(frame[160:][NAMES[::-1]]))
    np.testing.assert_allclose(new, by_frame.transform(frame[160:]), rtol=1e-2, atol=1e-2)
    assert by_frame.imputation_["cell3", "gene7"] == pytest.approx(by_anndata.imputation_[3, 7], rel=1e-3)
    with pytest.raises(ValueError, match="feature names"):
        by_frame.transform(frame[NAMES[::-1]])


def test_names_of_an_earlier_fit_are_forgotten(cells, estimator):
    frame = pd.DataFrame(cells.toarray(), columns=NAMES)
    for unnamed in (da.from_array(cells.toarray(), chunks=(50, 60)), ExpressionMatrix.of(cells)):
        model = clone(estimator).fit(frame)
        assert hasattr(model, "feature_names_in_")
        assert not hasattr(model.fit(unnamed), "feature_names_in_")


def test_a_path(cells, estimator, fitted, store_of):
    other = clone(estimator).fit(store_of(cells[:160]))
    np.testing.assert_allclose(other.components_, fitted.components_, rtol=1e-3, atol=1e-3)
    assert other.feature_names_in_[0] == "gene0"


def test_pandas_output_and_pipelines(cells, estimator):
    from sklearn.preprocessing import FunctionTransformer

    pipe = make_pipeline(clone(estimator).set_output(transform="pandas"), FunctionTransformer(np.log1p))
    frame = pipe.fit(cells[:160]).transform(cells[160:])
    assert frame.shape == (40, 60)


def test_missing_values_may_be_nan_and_zeros_observed():
    rng = np.random.default_rng(0)
    full = rng.normal(size=(80, 2)) @ rng.normal(size=(2, 30))
    holed = np.where(rng.random(full.shape) < 0.2, np.nan, full)
    model = IALM("paper", observed="finite")
    filled = model.fit_transform(holed)
    assert np.linalg.norm(filled - full) < 0.02 * np.linalg.norm(full)
    again = model.transform(holed)
    assert np.linalg.norm(again - full) < 0.1 * np.linalg.norm(full)
    with pytest.raises(ValueError, match="NaN"):
        IALM("paper").fit(holed)


def test_what_cannot_be_done_is_refused(cells):
    with pytest.raises(NotFittedError):
        IALM().transform(cells)
    with pytest.raises(InputError, match="choose one of auto, denoise, complete, paper"):
        IALM("best").fit(cells)


def test_denoise_completes_other_cells_too(cells):
    fitted = IALM(max_rank=5).fit(cells[:-7])
    assert fitted.transform(cells[-7:]).compute().shape == (7, cells.shape[1])
