import dask
import dask.array as da
import numpy as np
import pytest
import scipy.sparse as sp

from scialm_dask.errors import InputError
from scialm_dask.evaluate.metrics import gene_scores


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads"):
        yield


def test_agrees_with_numpy_for_any_blocks():
    rng = np.random.default_rng(0)
    M = rng.poisson(2.0, (50, 6)) * 1.0
    M[:, 4] = 3.0
    X = M + rng.normal(0, 1, M.shape) + 1e4
    with np.errstate(invalid="ignore"):
        expected = np.array([np.corrcoef(m, x)[0, 1] if m.std() else np.nan for m, x in zip(M.T, X.T, strict=True)])
    sparse = da.from_array(M, chunks=(11, 6)).map_blocks(sp.csr_matrix, meta=sp.csr_matrix((0, 0)))
    for truth in (M, sp.csr_matrix(M), da.from_array(M, chunks=(7, 4)), sparse):
        scores = gene_scores(truth, da.from_array(X, chunks=(20, 3)))
        np.testing.assert_allclose(scores.pearson, expected, rtol=1e-9)
        assert scores.relative_error == pytest.approx(np.linalg.norm(X - M) / np.linalg.norm(M))


def test_shapes_must_agree():
    with pytest.raises(InputError, match="same cells and genes"):
        gene_scores(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(InputError, match="truth: values are of type"):
        gene_scores([["a", "b"]], np.ones((1, 2)))
