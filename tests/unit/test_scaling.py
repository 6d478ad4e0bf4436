"""What the matrix looks like to the loop: surveyed, scaled, a share held out; and the factors scaled back."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scialm_dask import ExpressionMatrix, impute
from scialm_dask.config import Settings
from scialm_dask.errors import InputError
from scialm_dask.linalg.random import n_to_hide
from scialm_dask.solve.scaling import prepare, scales_of, survey


def with_totals(matrix, totals):
    """The matrix with these raw totals in its obs."""
    matrix.__dict__["obs"] = pd.DataFrame({"total_counts": totals}, index=map(str, range(matrix.shape[0])))
    return matrix


def normalised(counts):
    totals = counts.sum(axis=1).A1
    factor = np.divide(np.median(totals), totals, out=np.zeros_like(totals, float), where=totals > 0)
    return sp.csr_matrix(sp.diags(factor) @ counts), totals


def gene_means(matrix):
    counts = matrix.getnnz(axis=0)
    return np.divide(matrix.sum(axis=0).A1, counts, out=np.ones(matrix.shape[1]), where=counts > 0)


def relative(factor, expected):
    """Scales of cells count up to a common factor, which is fixed by their geometric mean."""
    used = expected > 0
    return factor[used] / expected[used]


@pytest.mark.parametrize("n_blocks", [1, 3, 7])
def test_the_survey_counts_and_sums(counts, n_blocks):
    found = survey(ExpressionMatrix.of(counts, blocks=n_blocks))
    assert found.block_gene_counts.shape == (n_blocks, 40)
    np.testing.assert_array_equal(found.gene_counts, counts.getnnz(axis=0))
    np.testing.assert_array_equal(found.cell_counts, counts.getnnz(axis=1))
    np.testing.assert_allclose(found.gene_sums, counts.sum(axis=0).A1)
    np.testing.assert_allclose(found.cell_sums, counts.sum(axis=1).A1)
    assert found.n_observed == counts.nnz
    assert found.integer
    assert not survey(ExpressionMatrix.of(counts * 0.5)).integer


def test_a_matrix_of_zeros_is_refused():
    with pytest.raises(InputError, match="no entry is observed"):
        survey(ExpressionMatrix.of(sp.csr_matrix((5, 4))))


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (0.75, 0.25), (1.0, 1.0)])
def test_raw_counts_go_by_their_own_totals(counts, exponents):
    matrix = with_totals(ExpressionMatrix.of(counts), np.full(120, 7.0))  # which must not count
    scales = scales_of(matrix, survey(matrix), exponents)
    np.testing.assert_allclose(scales.gene, gene_means(counts) ** -exponents[0], rtol=1e-5)
    totals = counts.sum(axis=1).A1.astype(float)
    ratio = relative(scales.cell, np.where(totals > 0, np.maximum(totals, 1) ** -exponents[1], 0))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    used = totals > 0
    assert np.log(scales.cell[used]).mean() == pytest.approx(0, abs=1e-5)
    np.testing.assert_array_equal(scales.cell[~used], 1)
    assert "raw counts" in scales.note


def test_normalised_counts_go_by_what_they_were_multiplied_with(counts):
    X, totals = normalised(counts)
    matrix = with_totals(ExpressionMatrix.of(X), totals)
    scales = scales_of(matrix, survey(matrix), (0.5, 0.5))
    np.testing.assert_allclose(scales.gene, gene_means(X) ** -0.5, rtol=1e-5)
    ratio = relative(scales.cell, np.sqrt(totals.astype(float)))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert "obs['total_counts']" in scales.note


def test_normalised_counts_without_totals_scale_genes_alone(counts):
    X, _ = normalised(counts)
    matrix = ExpressionMatrix.of(X)
    scales = scales_of(matrix, survey(matrix), (0.5, 0.5))
    np.testing.assert_allclose(scales.gene, gene_means(X) ** -0.5, rtol=1e-5)
    assert scales.cell is None
    assert "obs has no total_counts" in scales.note


def test_nothing_is_scaled_where_it_is_not_asked_for_or_means_nothing(counts):
    matrix = ExpressionMatrix.of(counts)
    finite = ExpressionMatrix.of(counts, observed="finite")
    for case, exponents in [(matrix, (0.0, 0.0)), (finite, (0.5, 0.5))]:
        scales = scales_of(case, survey(case), exponents)
        assert (scales.cell, scales.gene, scales.note) == (None, None, "not scaled")
    assert scales_of(matrix, survey(matrix), (0.5, 0.0)).cell is None


def test_scaling_makes_the_noise_of_counts_even():
    """Poisson counts of rank one in genes and depths: after scaling, entries vary alike whatever gene and cell."""
    rng = np.random.default_rng(0)
    depth, level = rng.gamma(4, 1, 400), rng.gamma(2, 40, 30) + 20
    counts = sp.csr_matrix(rng.poisson(np.outer(depth, level)))
    X, totals = normalised(counts)
    matrix = with_totals(ExpressionMatrix.of(X), totals)
    scales = scales_of(matrix, survey(matrix), (0.5, 0.5))
    noise = (X.toarray() - np.outer(np.ones(400), X.mean(axis=0).A1)) * scales.cell[:, None] * scales.gene
    spread = noise.std(axis=0)
    assert spread.max() / spread.min() < 1.3
    unscaled = (X.toarray() - X.mean(axis=0).A1).std(axis=0)
    assert unscaled.max() / unscaled.min() > 2
    few, many = np.argsort(totals)[:100], np.argsort(totals)[-100:]
    assert noise[few].std() / noise[many].std() < 1.3


@pytest.mark.parametrize("n_blocks", [1, 4])
def test_blocks_are_loaded_scaled(counts, n_blocks):
    matrix = ExpressionMatrix.of(counts, blocks=n_blocks)
    blocks = prepare(matrix, survey(matrix), Settings(validation=0.2))
    expected = counts.toarray() * blocks.scales.gene * blocks.scales.cell[:, None]
    for b, (start, stop) in enumerate(matrix.blocks):
        loaded = blocks.load(b)
        assert loaded.observed.dtype == np.float32
        got = sp.csr_matrix((loaded.observed, loaded.indices, loaded.indptr), shape=(stop - start, 40)).toarray()
        np.testing.assert_allclose(got, expected[start:stop], rtol=1e-5)


def hidden_positions(counts, n_blocks, seed=0):
    matrix = ExpressionMatrix.of(counts, blocks=n_blocks)
    blocks = prepare(matrix, survey(matrix), Settings(validation=0.2, seed=seed))
    return np.concatenate([blocks.held_out(b, blocks.load(b)) for b in range(len(matrix.blocks))])


def test_what_is_held_out_belongs_to_seed_and_gene_not_to_blocks(counts):
    whole = hidden_positions(counts, 1)
    np.testing.assert_array_equal(
        np.bincount(counts.indices[whole], minlength=40), n_to_hide(counts.getnnz(axis=0), 0.2)
    )
    for n_blocks in (3, 7):
        np.testing.assert_array_equal(hidden_positions(counts, n_blocks), whole)
    assert (hidden_positions(counts, 1, seed=1) != whole).any()


def test_a_part_has_the_counts_of_its_blocks_alone_and_holds_the_same_out(counts):
    matrix = ExpressionMatrix.of(counts, blocks=20)
    blocks = prepare(matrix, survey(matrix), Settings(validation=0.2))
    part = blocks.part((3, 4, 11))
    for b in (3, 4, 11):
        np.testing.assert_array_equal(part.held_out(b, part.load(b)), blocks.held_out(b, blocks.load(b)))
    assert part.block_gene_counts is None
    assert sorted(part.entries_before[0]) == [3, 4, 11]
    nothing_held_out = prepare(matrix, survey(matrix), Settings(stop="residual")).part((3, 4, 11))
    assert nothing_held_out.block_gene_counts is nothing_held_out.entries_before is None


def test_nothing_is_held_out_when_the_residual_stops(counts):
    matrix = ExpressionMatrix.of(counts)
    blocks = prepare(matrix, survey(matrix), Settings(stop="residual"))
    assert blocks.held_out(0, blocks.load(0)) is None


def test_factors_are_scaled_back(counts):
    """At a small ε A meets the observed entries, so it is on the scale of the input whatever the scaling was."""
    used = counts[counts.getnnz(axis=1) > 0]
    for scaling in ("none", "poisson", "0.75,0.5"):
        result = impute(used, preset="paper", rank_policy="adaptive", scaling=scaling, epsilon=1e-5)
        dense = used.toarray()
        error = (result.to_dask().compute() - dense)[dense > 0]
        assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(dense)


def test_cells_that_must_be_scaled_need_totals(counts):
    """The default makes do without them, and says so; who asks for the exponent is told."""
    normalised = counts / 3
    with pytest.raises(InputError, match=r"obs has no total_counts.*--scaling 0.5,0"):
        impute(normalised, scaling="poisson", validation=0.2)
    result = impute(normalised, validation=0.2)
    assert result.summary["scaling"] == "genes scaled; cells not, as obs has no total_counts"
