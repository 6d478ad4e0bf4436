"""Denoising against its steps written out densely, in any number of blocks; its result on disk and without its counts."""

import os
import shutil

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from problems import low_rank_counts
from scipy.optimize import isotonic_regression

from scialm_dask import ExpressionMatrix, Imputation, InputError, impute
from scialm_dask.evaluate.metrics import score_held_out
from scialm_dask.events import Note, Pass
from scialm_dask.linalg.random import thinned

COUNTS = low_rank_counts(300, 120, rank=3, density=0.4, seed=3, dispersion=6.0)
L = 12


def denoised(C, seed=0, width=L):
    """Steps 1 to 5, with exact SVDs: the imputed matrix, weights of components and of residuals, and errors."""
    t, n_seen = C.sum(axis=1), np.count_nonzero(C, axis=0)
    a = np.where(t > 0, t / np.exp(np.log(t[t > 0]).mean()), 1) ** -0.5
    b = np.where(n_seen > 0, C.sum(axis=0) / np.maximum(n_seen, 1), 1) ** -0.5
    csr = sp.csr_matrix(C, dtype=np.float32)
    kept = thinned(csr.indptr, csr.indices, csr.data, first_row=0, share=0.8, seed=seed)
    C1 = sp.csr_matrix((kept, csr.indices, csr.indptr), csr.shape).toarray()
    T = (C - C1) * 4
    scaled = lambda X: a[:, None] * X * b  # noqa: E731
    U, s, Vt = (
        part[:, :width] if n == 0 else part[:width]
        for n, part in enumerate(np.linalg.svd(scaled(C1), full_matrices=False))
    )
    c = np.einsum("ir,ij,rj->r", U, scaled(T), Vt)
    signal = np.maximum(isotonic_regression(c, increasing=False).x, 0)
    w = np.minimum(1, signal / s)
    M = U * signal @ Vt
    missed, other = scaled(C1) - M, scaled(T) - M
    residual = np.clip((missed * other).sum(axis=0) / np.maximum((missed**2).sum(axis=0), 1e-12), 0, 1)
    error = lambda P: np.linalg.norm(scaled(T) - P) / np.linalg.norm(scaled(T))  # noqa: E731
    h = 1 / a[:, None]
    errors = {
        "observed": error(scaled(C1)),
        "gene_mean": error(h * (h * scaled(C1)).sum(axis=0) / (h**2).sum()),
        "imputed": error(M + residual * missed) * np.sqrt(1 + 2 * (np.count_nonzero(residual) + width) / C.size),
    }
    U, s, Vt = np.linalg.svd(scaled(C), full_matrices=False)
    A = (U[:, :width] * (w * s[:width]) @ Vt[:width]) / a[:, None] / b
    return np.maximum(A * (1 - residual) + C * residual, 0), w, residual, errors


@pytest.fixture(scope="module")
def twin():
    return denoised(COUNTS.toarray())


def test_it_is_what_its_steps_say(twin):
    """Where the passes are so many that the SVDs are exact."""
    X, w, residual, errors = twin
    result = impute(COUNTS, preset="denoise", max_rank=L, svd_passes=99)
    kept = np.count_nonzero(w)
    np.testing.assert_allclose(result.summary["weights"], w[:kept], atol=0.02)
    np.testing.assert_allclose(result.residual_weight, residual, atol=0.02)
    assert np.linalg.norm(result[:, :] - X) < 5e-3 * np.linalg.norm(X)
    for name, error in errors.items():
        assert result.summary["unseen"][name] == pytest.approx(error, rel=3e-3)
    assert result.rank == result.summary["rank"] == kept
    assert result.summary["residual_share"] == np.mean(result.residual_weight > 0)


def test_two_passes_are_near_that(twin):
    X = twin[0]
    assert np.linalg.norm(impute(COUNTS, preset="denoise", max_rank=L)[:, :] - X) < 0.1 * np.linalg.norm(X)


def test_ten_passes_are_made(store_of):
    passes = []
    result = impute(store_of(COUNTS), listen=lambda event: passes.append(event) if isinstance(event, Pass) else None)
    assert result.summary["passes"] == 1 + len(passes) <= 10


@pytest.mark.parametrize("blocks", [1, 3, 7])
@pytest.mark.parametrize("scratch", ["memory", "zarr"])
def test_blocks_and_scratch_change_nothing(store_of, tmp_path, blocks, scratch):
    expected = impute(COUNTS, preset="denoise", max_rank=L)[:, :]
    where = {"memory": "memory", "zarr": f"zarr:{tmp_path}"}[scratch]
    matrix = ExpressionMatrix.open(store_of(COUNTS), blocks=blocks)
    result = impute(matrix, preset="denoise", max_rank=L, scratch=where)
    assert np.linalg.norm(result[:, :] - expected) < 1e-4 * np.linalg.norm(expected)


def test_auto_denoises_counts_and_completes_what_is_none(cli, store_of):
    told = []
    weight = impute(COUNTS, preset="denoise").residual_weight
    np.testing.assert_array_equal(impute(COUNTS, listen=told.append).residual_weight, weight)
    normalised = COUNTS * 0.37
    assert impute(normalised, listen=told.append, validation=0.1).residual_weight is None
    beside = impute(store_of(normalised, counts=COUNTS), listen=told.append)
    assert beside.summary["source"].endswith("layers/counts")
    words = [event.words for event in told if isinstance(event, Note)]
    assert [line.split(",")[0] for line in words] == [
        "preset denoise",
        "preset complete",
        "preset denoise",
    ]


@pytest.fixture
def written(store_of, tmp_path):
    """A result on disk, and what it holds."""
    result = impute(store_of(COUNTS), max_rank=L)
    result.to_zarr(tmp_path / "r.zarr")
    return tmp_path / "r.zarr", result[:, :]


def test_what_is_opened_takes_the_counts_from_where_they_are(written):
    path, dense = written
    opened = Imputation.open(path)
    np.testing.assert_allclose(opened[:, :], dense, rtol=1e-5)
    np.testing.assert_allclose(opened.to_dask().compute(), dense, rtol=1e-5)
    np.testing.assert_allclose(opened[["cell5", "cell2"], "gene7"], dense[[5, 2], 7], rtol=1e-5)
    cells = anndata.read_zarr(path)
    assert cells.var["scialm_residual"].between(0, 1).all()
    assert "counts" not in cells.layers
    np.testing.assert_allclose(cells.obsm["X_scialm"], opened.embedding.compute(), rtol=1e-3, atol=1e-3)


def test_counts_that_were_in_memory_are_written_beside(tmp_path):
    result = impute(COUNTS, max_rank=L)
    result.to_zarr(tmp_path / "r.zarr")
    opened = Imputation.open(tmp_path / "r.zarr")
    np.testing.assert_allclose(opened[:, :], result[:, :], rtol=1e-5)
    opened.to_zarr(tmp_path / "copy.zarr")
    opened.to_zarr(tmp_path / "r.zarr", overwrite=True)
    shutil.move(tmp_path / "r.zarr", tmp_path / "moved.zarr")
    for name in ("moved.zarr", "copy.zarr"):
        np.testing.assert_allclose(Imputation.open(tmp_path / name)[:, :], result[:, :], rtol=1e-5)


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_without_its_counts_a_result_gives_the_low_rank_part(written, tmp_path, what):
    path, dense = written
    source = tmp_path / "source.zarr"
    shutil.move(source, tmp_path / "elsewhere.zarr")
    if what == "changed":
        shutil.copytree(tmp_path / "elsewhere.zarr", source)
        os.utime(next((source / "X" / "data").glob("[0-9]*")), (1, 1))
    with pytest.warns(UserWarning, match="the values of the low-rank part") as caught:
        opened = Imputation.open(path)
    assert "\n" not in str(caught[0].message)
    np.testing.assert_allclose(
        opened[:, :], np.maximum(opened.left.compute() @ opened.right.T, 0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(Imputation.open(path, counts=tmp_path / "elsewhere.zarr")[:, :], dense, rtol=1e-5)


def test_the_embedding_is_the_pca_of_the_matrix_written_out():
    result = impute(COUNTS, max_rank=L)
    X = result[:, :].astype(np.float64)
    log = np.log1p(X / X.sum(axis=1, keepdims=True) * 1e4)
    U, s, _ = np.linalg.svd(log - log.mean(axis=0), full_matrices=False)
    ours = result.embedding.compute()
    exact = (U * s)[:, :4]
    spanned = ours @ np.linalg.lstsq(ours, exact, rcond=None)[0]
    assert np.linalg.norm(spanned - exact) < 0.05 * np.linalg.norm(exact)
    np.testing.assert_allclose(np.linalg.norm(ours[:, :3], axis=0), s[:3], rtol=0.02)
    assert np.abs(ours.mean(axis=0)).max() < 1e-2 * s[0] / np.sqrt(len(X))


def test_values_that_are_no_whole_numbers_are_named(store_of):
    C = COUNTS.astype(np.float64)
    C.data[1000] = 1.5
    row = int(np.searchsorted(C.indptr, 1000, side="right")) - 1
    with pytest.raises(
        InputError, match=rf"1\.5 of gene gene{C.indices[1000]} in cell cell{row} is not a whole number"
    ):
        impute(store_of(C), preset="denoise")


def noise(m, n, depth=1.0, seed=0):
    return np.random.default_rng(seed).poisson(depth, (m, n)).astype(float)


def with_(X, *changes):
    for at, value in changes:
        X[at] = value
    return X


def answer_of(X, seed):
    try:
        return impute(X, preset="denoise", seed=seed)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    "X",
    [
        with_(noise(60, 40), (3, 0), ((3, 5), 1)),  # a cell of one molecule
        with_(noise(60, 40), ((slice(None), 7), 0), ((11, 7), 2)),  # a gene seen in one cell
        np.tile(noise(1, 30, 4.0), (50, 1)),  # equal rows
        np.array([[9.0, 4.0], [5.0, 30.0]]),
        np.eye(200)[:, np.random.default_rng(1).permutation(200) % 20 * 10],  # one molecule for each cell
        np.full((2, 2), 1e9),
        np.ones((30, 3)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_poor_counts_give_an_answer_or_one_line(X, seed):
    result = answer_of(X, seed)
    if isinstance(result, str):
        assert "\n" not in result
        return
    assert np.isfinite(result[:, :]).all()
    assert np.isfinite(result.embedding.compute()).all()
    assert np.isfinite(list(result.summary["unseen"].values())).all()


def test_noise_without_structure_gets_a_plain_no():
    result = impute(noise(400, 200, 2.0), preset="denoise")
    assert result.summary["verdict"].startswith("No")
    assert impute(COUNTS).summary["verdict"].startswith("Yes")


def test_a_seed_fixes_the_result():
    one, again, other = (impute(COUNTS, seed=seed)[:, :] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("dense", [False, True])
def test_entries_are_scored_as_they_are_imputed(store_of, tmp_path, dense):
    """With their share of the counts, wherever these are."""
    source = ExpressionMatrix.open(store_of(COUNTS))
    result = impute(source, preset="denoise")
    assert result.residual_weight.any()
    result.to_zarr(tmp_path / "result.zarr", dense=dense)
    asked = sp.random(*COUNTS.shape, density=0.3, format="csr", dtype=np.float32, random_state=1)
    scores = score_held_out(Imputation.open(tmp_path / "result.zarr"), ExpressionMatrix.of(asked, blocks=3), source)
    imputed = result.to_dask().compute()[asked.nonzero()]
    assert scores["mse"] == pytest.approx(np.mean((imputed - asked.data) ** 2), rel=1e-5)
