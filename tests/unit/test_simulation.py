import anndata
import numpy as np
import pytest
from scipy import stats

from scialm_dask.evaluate import simulate as simulation
from scialm_dask.evaluate.simulate import _alias_tables, simulate


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated") / "s.zarr"
    result = simulate(path, n_cells=1500, n_genes=400, density=0.2, rank=6, seed=3)
    return result, anndata.read_zarr(path)


def test_has_the_shape_and_density_asked_for(simulated):
    result, adata = simulated
    assert adata.shape == (1500, 400)
    assert adata.X.dtype == np.int32
    assert adata.X.has_canonical_format
    assert adata.X.data.min() > 0
    assert result["density"] == adata.X.nnz / 600_000 == pytest.approx(0.2, rel=0.05)
    assert set(adata.obs["cell_type"]) <= {"type0", "type1", "type2"}


def test_counts_are_poisson_about_the_true_product(simulated):
    adata = simulated[1]
    mean = adata.obsm["true_left"].astype(np.float64) @ adata.varm["true_right"].T.astype(np.float64)
    assert np.linalg.matrix_rank(mean) == 6
    X = adata.X.toarray()
    assert mean.min() >= 0
    # Deviations from the mean, entry by entry: standardised, on entries where that is nearly normal.
    large = mean > 5
    z = (X - mean)[large] / np.sqrt(mean[large])
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert z.std() == pytest.approx(1, abs=5 / np.sqrt(2 * z.size))
    # All zeros, and sums by gene and by cell.
    expected_zeros = np.exp(-mean).sum()
    assert abs((X == 0).sum() - expected_zeros) < 5 * np.sqrt(expected_zeros)
    for axis in (0, 1):
        total = mean.sum(axis=axis)
        statistic = ((X.sum(axis=axis) - total) ** 2 / total).sum()
        assert 1e-4 < stats.chi2.sf(statistic, total.size) < 1 - 1e-4


def test_gene_means_and_totals_are_as_uneven_as_real_ones(simulated):
    adata = simulated[1]
    assert 0.3 < np.log(adata.X.sum(axis=1).A1).std() < 0.6
    assert 1.6 < np.log(adata.varm["true_right"].mean(axis=1)).std() < 2.5


def test_cells_depend_on_neither_blocks_nor_their_number(simulated, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "_BLOCK_VALUES", 20_000)
    simulate(tmp_path / "s.zarr", n_cells=700, n_genes=400, density=0.2, rank=6, seed=3)
    again, first = anndata.read_zarr(tmp_path / "s.zarr"), simulated[1][:700]
    assert abs(again.X - first.X).sum() == 0
    np.testing.assert_array_equal(again.obsm["true_left"], first.obsm["true_left"])
    np.testing.assert_array_equal(again.varm["true_right"], first.varm["true_right"])
    assert list(again.obs["cell_type"]) == list(first.obs["cell_type"])
    simulate(tmp_path / "t.zarr", n_cells=700, n_genes=400, density=0.2, rank=6, seed=4)
    other = anndata.read_zarr(tmp_path / "t.zarr")
    assert not np.array_equal(other.obsm["true_left"], first.obsm["true_left"])


def test_alias_tables_hold_the_shares():
    share = np.random.default_rng(0).gamma(0.3, 1, (50, 3)).astype(np.float32)
    tables = _alias_tables(share)
    for k in range(3):
        own = (tables[k, :, 0].astype(np.float64) + 1) / 2**32
        held = own / 50
        np.add.at(held, tables[k, :, 1], (1 - own) / 50)
        np.testing.assert_allclose(held, share[:, k] / share[:, k].sum(dtype=np.float64), atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"--cells": 0}, "cells is 0"),
        ({"--genes": 1}, "genes is 1"),
        ({"--rank": 0}, "rank is 0"),
        ({"--rank": 51}, "no more than the number of genes"),
        ({"--density": 0}, "density is 0.0; give a number between 0 and 1"),
        ({"--density": 0.99999}, "cannot be reached"),
    ],
)
def test_settings_that_make_no_sense_are_refused(cli, tmp_path, settings, message):
    words = {"--cells": 10, "--genes": 50, **settings}
    result = cli("simulate", tmp_path / "s.zarr", *(w for pair in words.items() for w in pair))
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
