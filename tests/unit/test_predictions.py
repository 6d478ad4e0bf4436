import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cosine
from scipy.stats import pearsonr

from scialm_dask import ExpressionMatrix
from scialm_dask.evaluate.metrics import Moments, compare_all, compare_stored
from scialm_dask.evaluate.predictions import Dense, Factors, Given, as_dask, read_prediction, write_prediction

RNG = np.random.default_rng(3)
LEFT, RIGHT = RNG.normal(size=(120, 5)).astype(np.float32), RNG.normal(size=(40, 5)).astype(np.float32)
WHOLE = np.maximum(LEFT @ RIGHT.T, 0)


@pytest.mark.parametrize("prediction", [Dense(LEFT @ RIGHT.T), Factors(LEFT, RIGHT)], ids=["dense", "factors"])
def test_rows_entries_and_dask_are_the_same_matrix(prediction, counts):
    assert prediction.shape == (120, 40)
    np.testing.assert_allclose(prediction.rows(5, 90), WHOLE[5:90], atol=1e-5)
    block = counts[30:70]
    expected = WHOLE[30:70][block.nonzero()]
    block = sp.csr_matrix((block.data.astype(np.float32), block.indices, block.indptr), shape=block.shape)
    np.testing.assert_allclose(prediction.at(block, 30), expected, atol=1e-5)
    np.testing.assert_allclose(as_dask(prediction).compute(scheduler="threads"), WHOLE, atol=1e-5)


def test_the_matrix_itself_as_a_prediction(counts):
    given = Given(ExpressionMatrix.of(counts, blocks=3))
    np.testing.assert_array_equal(given.rows(17, 120), counts[17:].toarray())
    assert compare_stored(given, given.matrix).overall.mse == 0


@pytest.mark.parametrize("answer", [WHOLE, (LEFT, RIGHT)], ids=["dense", "factors"])
def test_what_is_written_is_read(answer, tmp_path):
    scale = RNG.random(120).astype(np.float32)
    write_prediction(answer, tmp_path, scale)
    np.testing.assert_allclose(read_prediction(tmp_path).rows(0, 120), scale[:, None] * WHOLE, atol=1e-5)


def test_nothing_found_predicts_zero(tmp_path):
    write_prediction((np.zeros((120, 0)), np.zeros((40, 0))), tmp_path, None)
    assert not read_prediction(tmp_path).rows(0, 120).any()


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
        write_prediction(answer, tmp_path, None)


def test_scores_of_stored_entries_are_equations_9_to_12(counts):
    target = ExpressionMatrix.of(counts, blocks=3)
    moments = compare_stored(Dense(WHOLE), target)
    x, y = WHOLE[counts.nonzero()].astype(float), counts.data.astype(float)
    overall = moments.overall
    assert overall.n == counts.nnz
    assert overall.mse == pytest.approx(np.mean((x - y) ** 2))
    assert overall.mae == pytest.approx(np.mean(np.abs(x - y)))
    assert overall.pearson == pytest.approx(pearsonr(x, y)[0])
    assert overall.cosine == pytest.approx(1 - cosine(x, y))
    gene = 7
    column = counts[:, gene].toarray().ravel()
    x, y = WHOLE[column > 0, gene].astype(float), column[column > 0].astype(float)
    by_gene = moments.by_gene
    assert (by_gene.n[gene], by_gene.mse[gene]) == (len(x), pytest.approx(np.mean((x - y) ** 2)))
    assert by_gene.pearson[gene] == pytest.approx(pearsonr(x, y)[0])
    assert np.isnan(by_gene.mse[0])  # a gene without entries


def test_scores_of_all_entries_and_of_zeros(counts):
    given = counts.multiply(RNG.random(counts.shape) < 0.5).tocsr()
    target = ExpressionMatrix.of(counts, blocks=2)
    everything, zeros = compare_all(Dense(WHOLE), target, ExpressionMatrix.of(given, blocks=5))
    truth = counts.toarray()
    assert everything.overall.mse == pytest.approx(np.mean((WHOLE - truth) ** 2))
    assert everything.relative_error == pytest.approx(np.linalg.norm(WHOLE - truth) / np.linalg.norm(truth))
    assert everything.mean_ratio == pytest.approx(WHOLE.mean() / truth.mean())
    hidden = given.toarray() == 0
    assert zeros.overall.n == hidden.sum()
    assert zeros.overall.pearson == pytest.approx(pearsonr(WHOLE[hidden], truth[hidden])[0], abs=1e-6)


def test_a_constant_correlates_with_nothing():
    X = np.full((50, 2), np.float32(0.1))
    moments = Moments.of_rows(X, RNG.random((50, 2)))
    assert np.isnan(moments.by_gene.pearson).all()
    assert np.isnan(moments.overall.pearson)
