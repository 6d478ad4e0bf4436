"""Confidence in zeros: the operator, the refit and count splitting against what they mean, written out densely."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scialm_dask import ExpressionMatrix, InputError, Settings, impute
from scialm_dask.config import preset
from scialm_dask.data.scratch import MemoryScratch
from scialm_dask.events import Iteration, Stage
from scialm_dask.linalg.kernels import Update
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.random import thinned
from scialm_dask.linalg.svd import short_side_svd
from scialm_dask.run.checkpointing import Job
from scialm_dask.run.job import run
from scialm_dask.solve.scaling import Confidence, Molecules, prepare, survey
from scialm_dask.solve.zeros import choose_zeros, refit

M, N = 60, 45


def confidence_of(kind):
    rng = np.random.default_rng(3)
    beta = np.full(N, 0.3, np.float32) if kind == "uniform" else rng.random(N, dtype=np.float32)
    return Confidence(beta, None if kind == "uniform" else rng.random(M, dtype=np.float32))


def omega_of(confidence):
    alpha = np.ones(M) if confidence.cell is None else confidence.cell
    return np.outer(alpha, confidence.gene)


@pytest.fixture(params=["uniform", "rank one"])
def problem(request):
    """An operator after one step, with a share held out, and all that it stands for as dense matrices."""
    rng = np.random.default_rng(1)
    D = rng.poisson(rng.gamma(1, 2, (M, 3)) @ rng.gamma(0.3, 1, (3, N))).astype(float)
    matrix = ExpressionMatrix.of(sp.csr_matrix(D), blocks=3)
    confidence = confidence_of(request.param)
    settings = Settings(scaling=(0.0, 0.0), validation=0.1)
    blocks = prepare(matrix, survey(matrix), settings, confidence=confidence)
    operator = LowRankPlusSparse(blocks, MemoryScratch())
    basis, right = (rng.standard_normal((N, k)).astype(np.float32) for k in (6, 2))
    first = operator.multiply(basis)
    hidden = np.zeros((M, N), bool)
    for b, (start, stop) in enumerate(matrix.blocks):
        loaded = blocks.load(b)
        rows = start + np.repeat(np.arange(stop - start), np.diff(loaded.indptr))
        hidden[rows, loaded.indices] = blocks.held_out(b, loaded)
    rotation = (0.1 * rng.standard_normal((6, 2))).astype(np.float32)
    operator.multiply(None, Update(rotation, 0.8), right)
    seen = (D > 0) & ~hidden
    W0 = np.where(seen, D, 0)
    A = W0 @ basis @ rotation @ right.T
    omega = omega_of(confidence)
    W = np.where(seen, D + (1 - omega) * (W0 - A) * 0.8, (1 - omega) * A)
    W[hidden] = A[hidden]
    assert hidden.sum() > 20
    np.testing.assert_allclose(first.gram, (W0 @ basis).T @ (W0 @ basis), rtol=1e-4)
    return operator, D, A, W, omega, hidden, right


def test_w_is_what_it_stands_for(problem):
    operator, _, _, W, *_ = problem
    basis = np.random.default_rng(2).standard_normal((N, 5)).astype(np.float32)
    product = operator.multiply(basis)
    np.testing.assert_allclose(product.cross, W.T @ (W @ basis), rtol=1e-4, atol=1e-3 * np.abs(W).max())
    np.testing.assert_allclose(operator.column_gram(), W.T @ W, rtol=1e-3, atol=1e-3 * np.abs(W).max())
    np.testing.assert_allclose(operator.row_gram(), W @ W.T, rtol=1e-3, atol=1e-3 * np.abs(W).max())


def test_the_short_side_of_it(problem):
    operator, _, _, W, *_ = problem
    svd = short_side_svd(operator, 5, 0.0)
    np.testing.assert_allclose(svd.values, np.linalg.svd(W, compute_uv=False)[:5], rtol=1e-4)


def test_refit_is_weighted_least_squares(problem):
    """Over all entries of Ω, held out or not, with weight 1, and over the rest with weight ω and target 0."""
    operator, D, _, _, omega, _, right = problem
    lefts, _ = operator.factors()
    left = np.vstack([part.compute() for part in lefts]).astype(float)
    weight = np.sqrt(np.where(D > 0, 1, omega)).ravel()
    terms = np.stack([np.outer(left[:, i], right[:, i]).ravel() for i in range(2)], axis=1)
    expected = np.linalg.lstsq(weight[:, None] * terms, weight * D.ravel(), rcond=None)[0]
    np.testing.assert_allclose(refit(operator), expected, rtol=1e-4)


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_same_answer_for_any_blocks(counts, blocks):
    whole = run(Job(ExpressionMatrix.of(counts, blocks=1), preset("denoise")))
    cut = run(Job(ExpressionMatrix.of(counts, blocks=blocks), preset("denoise")))
    a, b = whole.to_dask().compute(), cut.to_dask().compute()
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)
    assert cut.summary["zeros"] == whole.summary["zeros"]


def test_all_zeros_trusted_and_refitted_is_a_truncated_svd():
    """At ω = 1, s_i = u_iᵀ D v_i: what undoes the shrinkage."""
    rng = np.random.default_rng(4)
    D = rng.poisson(rng.gamma(1, 2, (80, 4)) @ rng.gamma(1, 1, (4, 50))).astype(float)
    result = impute(
        D, preset="auto", stop="residual", zeros=1.0, scaling="none", max_rank=4, max_iterations=25, svd_passes=8
    )
    U, s, Vt = np.linalg.svd(D)
    expected = np.maximum((U[:, :4] * s[:4]) @ Vt[:4], 0)
    np.testing.assert_allclose(result.to_dask().compute(), expected, atol=2e-3 * expected.max())


def test_thinning_keeps_the_share_and_does_not_know_of_blocks(counts):
    csr = sp.csr_matrix(sp.vstack([counts] * 20), dtype=np.float32)
    kept = thinned(csr.indptr, csr.indices, csr.data, first_row=0, share=0.8, seed=1)
    total = csr.data.sum()
    assert abs(kept.sum() - 0.8 * total) < 5 * np.sqrt(0.16 * total)
    assert np.all(kept <= csr.data)
    cut = csr[700:]
    part = thinned(cut.indptr, cut.indices, cut.data, first_row=700, share=0.8, seed=1)
    np.testing.assert_array_equal(part, kept[csr.indptr[700] :])
    assert np.any(thinned(csr.indptr, csr.indices, csr.data, first_row=0, share=0.8, seed=2) != kept)


def test_the_two_parts_make_the_whole(counts):
    csr = sp.csr_matrix(counts, dtype=np.float32)
    train, test = (Molecules(0.8, rest, 5).of(csr, 0) for rest in (False, True))
    assert abs(train + test - csr).max() == 0
    spread = np.corrcoef((train - 0.8 * csr).toarray().ravel(), (test - 0.2 * csr).toarray().ravel())[0, 1]
    assert spread < -0.99  # given the counts; over them the two are independent


@pytest.mark.parametrize(
    ("zeros", "words"), [(1.5, "between 0 and 1"), (-0.1, "between 0 and 1"), ("much", "number or auto")]
)
def test_confidence_that_cannot_be(zeros, words):
    with pytest.raises(InputError, match=words):
        preset("auto", zeros=zeros)


def test_confidence_of_cells_and_genes_must_lie_between_0_and_1():
    with pytest.raises(InputError, match="give 0 to 1"):
        Confidence(np.array([0.2, 1.2], np.float32))


@pytest.mark.parametrize(
    ("genes", "cells", "words"), [(7, None, r"of genes has shape \(7,\), and matrix has 40"), (40, 7, "of cells has")]
)
def test_confidence_must_be_of_these_cells_and_genes(genes, cells, words):
    confidence = Confidence(np.ones(genes, np.float32), None if cells is None else np.ones(cells, np.float32))
    with pytest.raises(InputError, match=f"confidence in zeros {words}"):
        impute(np.ones((30, 40)), confidence=confidence)


def test_one_confidence_is_given(counts):
    confidence = Confidence(np.ones(counts.shape[1], np.float32))
    with pytest.raises(InputError, match=r"zeros is 0\.3 beside a confidence.*give one of them"):
        impute(counts, zeros=0.3, confidence=confidence)


def test_confidence_may_differ_by_cell_and_gene(counts):
    """Genes whose zeros are trusted are not filled; the others are as if no zero were."""
    trusted = np.arange(counts.shape[1]) < 20
    confidence = Confidence(trusted.astype(np.float32), np.ones(counts.shape[0], np.float32))
    zero = counts.toarray() == 0
    plain, told = (
        impute(counts, stop="residual", max_iterations=8, max_rank=5, scaling="none", confidence=c).to_dask().compute()
        for c in (None, confidence)
    )
    assert told[:, trusted][zero[:, trusted]].mean() < 0.7 * plain[:, trusted][zero[:, trusted]].mean()


def test_count_splitting_needs_counts(counts):
    with pytest.raises(InputError, match="raw counts"):
        impute(counts / 3, preset="denoise")


def test_a_number_is_kept_and_only_the_threshold_chosen(counts):
    matrix = ExpressionMatrix.of(counts)
    settings = preset("denoise", zeros=0.3)
    tried = []
    choice = choose_zeros(
        matrix,
        survey(matrix),
        settings,
        lambda blocks: tried.append(blocks.confidence.gene[0]) or LowRankPlusSparse(blocks, MemoryScratch()),
        lambda _: None,
    )
    assert (choice.omega, choice.gene_exponent, tried) == (0.3, 0.5, [np.float32(0.3)])


def test_what_was_tried_is_kept(counts):
    """The table has every fit, and the lowest error marks the one that was chosen, with its path."""
    fits = []
    result = impute(
        counts, preset="denoise", listen=lambda event: fits.append(event.detail) if isinstance(event, Stage) else None
    )
    told = result.summary["count_splitting"]
    names = [f"confidence {fit['zeros']:g}, gene exponent {fit['gene_exponent']:g}" for fit in told["tried"]]
    assert names == [detail for detail in fits if detail]
    best = min(told["tried"], key=lambda fit: fit["error"])
    assert [fit["chosen"] for fit in told["tried"]] == [fit is best for fit in told["tried"]]
    assert (best["zeros"], best["cell_exponent"]) == (result.summary["zeros"], 0.5)
    assert best["iterations"] == len(told["errors"]) == len(told["ranks"])
    assert best["error"] == min(told["errors"]) == told["errors"][best["chosen_iteration"] - 1]
    assert [error == 1 for error in told["errors"]] == [rank == 0 for rank in told["ranks"]]
    assert f"threshold {result.history['threshold'].iloc[-1]:.4g} " in result.summary["stop_reason"]
    assert result.history["threshold"].iloc[-1] <= best["threshold"] < result.history["threshold"].iloc[-2]


def test_errors_on_unseen_molecules_are_those_of_the_dense_matrices():
    """All entries of the part that was not fitted, predicted by the best fit of the other at ω = 1: a truncated SVD."""
    rng = np.random.default_rng(4)
    D = sp.csr_matrix(rng.poisson(rng.gamma(1, 2, (80, 4)) @ rng.gamma(1, 1, (4, 50))), dtype=np.float32)
    result = impute(D, preset="denoise", zeros=1.0, scaling="none", max_rank=4, svd_passes=8)
    told = result.summary["count_splitting"]
    train, test = (Molecules(0.8, rest, 0).of(D, 0).toarray().astype(float) for rest in (False, True))
    U, s, Vt = np.linalg.svd(train)
    for rank in set(told["ranks"]) - {0}:
        predicted = 0.25 * (U[:, :rank] * s[:rank]) @ Vt[:rank]
        last = max(i for i, r in enumerate(told["ranks"]) if r == rank)
        assert told["errors"][last] == pytest.approx(np.linalg.norm(predicted - test) / np.linalg.norm(test), rel=1e-2)


def test_a_rank_that_stays_for_a_while_does_not_end_the_search():
    """What all cells have in common is far larger than what differs, so at first the threshold falls at rank one."""
    rng = np.random.default_rng(0)
    base, kind, programs = rng.gamma(1, 1, 600), rng.integers(0, 4, 1000), np.ones((4, 600))
    for program in programs[1:]:
        program[rng.choice(600, 60, replace=False)] = 3
    counts = rng.poisson(0.1 * programs[kind] * base).astype(np.float32)
    ranks = []
    result = impute(
        sp.csr_matrix(counts),
        preset="denoise",
        zeros=1.0,
        listen=lambda event: ranks.append(event.rank) if isinstance(event, Iteration) else None,
    )
    first = ranks[ranks.index(1) :]
    assert first[: Settings().patience + 2] == [1] * (Settings().patience + 2)
    assert result.rank >= 4
