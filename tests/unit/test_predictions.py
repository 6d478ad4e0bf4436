"""What methods leave and how it is scored."""

import dask.array as da
import numpy as np
import pytest
from scipy.spatial.distance import cosine
from scipy.stats import pearsonr

from scialm_dask import ExpressionMatrix, impute
from scialm_dask.compare.clustering import embedding_of
from scialm_dask.compare.methods import _keep, read_answer
from scialm_dask.evaluate.metrics import Scores, compare, compare_stored

RNG = np.random.default_rng(3)
LEFT, RIGHT = RNG.normal(size=(120, 5)).astype(np.float32), RNG.normal(size=(40, 5)).astype(np.float32)
WHOLE = np.maximum(LEFT @ RIGHT.T, 0)
RECOVERED = da.from_array(WHOLE, chunks=(50, 40))


@pytest.mark.parametrize("answer", [LEFT @ RIGHT.T, (LEFT, RIGHT)], ids=["dense", "factors"])
def test_what_is_left_is_read_scaled_and_clipped(answer, tmp_path):
    scale = RNG.random(120).astype(np.float32)
    _keep(answer, tmp_path)
    read = read_answer(tmp_path, scale)
    assert (read.shape, read.dtype) == ((120, 40), np.float32)
    np.testing.assert_allclose(read.compute(), scale[:, None] * WHOLE, atol=1e-5)


def test_a_denoised_result_is_read_with_its_share_of_the_counts_and_its_embedding(counts, tmp_path):
    result = impute(counts.astype(np.float32), preset="denoise")
    _keep(result, tmp_path)
    np.testing.assert_allclose(read_answer(tmp_path).compute(), result.to_dask().compute(), atol=1e-5)
    np.testing.assert_allclose(embedding_of(tmp_path), result.embedding.compute(), atol=1e-4)


def test_nothing_found_predicts_zero(tmp_path):
    _keep((np.zeros((120, 0)), np.zeros((40, 0))), tmp_path)
    assert not read_answer(tmp_path).compute().any()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (np.where(WHOLE > 1, np.nan, WHOLE), "not finite"),
        ((LEFT, np.full_like(RIGHT, np.inf)), "not finite"),
        ((LEFT, RIGHT[:, :3]), "factors of 5 and 3 columns"),
    ],
)
def test_what_cannot_be_scored_is_refused(answer, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        _keep(answer, tmp_path)


def test_scores_of_stored_entries_are_equations_9_to_12(counts):
    scores = compare_stored(RECOVERED, ExpressionMatrix.of(counts, blocks=3))
    x, y = WHOLE[counts.nonzero()].astype(float), counts.data.astype(float)
    overall = scores.as_dict()
    assert overall["n"] == counts.nnz
    assert overall["mse"] == pytest.approx(np.mean((x - y) ** 2))
    assert overall["mae"] == pytest.approx(np.mean(np.abs(x - y)))
    assert overall["pearson"] == pytest.approx(pearsonr(x, y)[0])
    assert overall["cosine"] == pytest.approx(1 - cosine(x, y))
    gene = 7
    column = counts[:, gene].toarray().ravel()
    x, y = WHOLE[column > 0, gene].astype(float), column[column > 0].astype(float)
    assert (scores.n[gene], scores.mse[gene]) == (len(x), pytest.approx(np.mean((x - y) ** 2)))
    assert scores.pearson[gene] == pytest.approx(pearsonr(x, y)[0])
    assert np.isnan(scores.mse[0])  # a gene without entries


def test_scores_of_all_entries_and_of_zeros(counts):
    given = counts.multiply(RNG.random(counts.shape) < 0.5).tocsr()
    found = compare(RECOVERED, ExpressionMatrix.of(counts, blocks=2), ExpressionMatrix.of(given, blocks=5))
    truth = counts.toarray()
    assert found.genes.as_dict()["mse"] == pytest.approx(np.mean((WHOLE - truth) ** 2))
    assert found.genes.relative_error == pytest.approx(np.linalg.norm(WHOLE - truth) / np.linalg.norm(truth))
    assert found.genes.mean_ratio == pytest.approx(WHOLE.mean() / truth.mean())
    hidden = given.toarray() == 0
    assert found.zeros.n == hidden.sum()
    assert found.zeros.pearson == pytest.approx(pearsonr(WHOLE[hidden], truth[hidden])[0], abs=1e-6)


def test_correlations_leave_out_the_same_genes_and_cells_for_every_method(counts):
    """What is constant in the target or empty as given says nothing of a method; a constant estimate counts as 0."""
    truth, given = counts.toarray().astype(float), counts.toarray()
    truth[:, 5] = truth[30] = 2.0
    given[:, 6] = given[31] = 0
    constant = WHOLE.copy()
    constant[:, 8] = constant[32] = 3.0
    for answer in (WHOLE, constant):
        recovered = da.from_array(answer, chunks=(50, 40))
        found = compare(recovered, ExpressionMatrix.of(truth), ExpressionMatrix.of(given))
        assert {5, 6} <= set(np.flatnonzero(np.isnan(found.gene_correlation)))
        assert {30, 31} <= set(np.flatnonzero(np.isnan(found.cell_correlation)))
        left_out = np.isnan(found.gene_correlation).sum(), np.isnan(found.cell_correlation).sum()
        assert left_out == ((given.sum(axis=0) == 0).sum() + 1, (given.sum(axis=1) == 0).sum() + 1)
        assert found.gene_correlation[9] == pytest.approx(pearsonr(answer[:, 9], truth[:, 9])[0])
        assert found.cell_correlation[9] == pytest.approx(pearsonr(answer[9], truth[9])[0])
    assert found.gene_correlation[8] == found.cell_correlation[32] == 0


def test_a_constant_correlates_with_nothing():
    X = np.full((50, 2), np.float32(0.1))
    scores = Scores.of_columns(X, RNG.random((50, 2)))
    assert np.isnan(scores.pearson).all()
    assert np.isnan(scores.overall.pearson).all()
    assert (scores.correlation == 0).all()
