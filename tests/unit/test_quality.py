"""Quality control, against scanpy."""

import anndata
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp

from scialm_dask.data.qc import Thresholds, quality_control
from scialm_dask.errors import InputError

NAMES = [*(f"MT-{j}" for j in range(3)), "mt-x", *(f"gene{j}" for j in range(36))]


def oracle(path, min_genes, max_genes, max_mito, min_cells):
    """The same by scanpy: cells by their genes and mitochondrial share, then genes, then totals."""
    adata = anndata.read_zarr(path) if path.endswith(".zarr") else anndata.read_h5ad(path)
    adata.var["mito"] = adata.var_names.str.upper().str.startswith("MT-")
    sc.pp.calculate_qc_metrics(adata, qc_vars=["mito"], percent_top=None, log1p=False, inplace=True)
    keep = (adata.obs.n_genes_by_counts <= max_genes) & ~(adata.obs.pct_counts_mito > max_mito)
    adata = adata[keep].copy()
    sc.pp.filter_cells(adata, min_genes=min_genes)
    sc.pp.filter_genes(adata, min_cells=min_cells)
    adata.obs["raw"] = adata.X.sum(axis=1).A1
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.astype(np.float64)
    sc.pp.normalize_total(adata)
    return adata


def compare(got, expected):
    assert list(got.obs_names) == list(expected.obs_names)
    assert list(got.var_names) == list(expected.var_names)
    np.testing.assert_array_equal(got.obs["total_counts"], expected.obs["raw"])
    np.testing.assert_array_equal(got.obs["n_genes"], expected.obs["n_genes"])
    np.testing.assert_allclose(got.obs["pct_mito"], expected.obs["pct_counts_mito"], rtol=1e-6)
    assert got.X.dtype == np.float32
    assert got.X.nnz == expected.X.nnz
    np.testing.assert_allclose(got.X.toarray(), expected.X.toarray(), rtol=1e-6)
    assert (got.layers["counts"] != expected.layers["counts"]).nnz == 0


def test_agrees_with_scanpy(cli, counts, store_of, tmp_path):
    path = store_of(counts, names=NAMES)
    limits = {"min_genes": 8, "max_genes": 20, "max_mito": 15, "min_cells": 25}
    words = [word for key, value in limits.items() for word in (f"--{key.replace('_', '-')}", value)]
    result = cli("qc", path, tmp_path / "q.zarr", *words)
    assert result.exit_code == 0, result.output
    got, expected = anndata.read_zarr(tmp_path / "q.zarr"), oracle(path, **limits)
    assert 20 < got.n_obs < 110
    assert 10 < got.n_vars < 38
    compare(got, expected)


def test_takes_the_paper_cells_to_the_size_of_its_table_2(shared, tmp_path):
    path = str(shared / "data" / "pbmc_donor_a.h5ad")
    result = quality_control(path, tmp_path / "q.zarr", Thresholds(200, 1999, 5, "MT-", 3))
    assert (result["n_cells"], result["n_genes"]) == (2843, 13003)
    got = anndata.read_zarr(tmp_path / "q.zarr")
    compare(got, oracle(path, 200, 1999, 5, 3))
    reference = anndata.read_h5ad(shared / "reference" / "pbmc_donor_a_mask10.h5ad")
    whole = reference.X + reference.layers["held_out"]
    np.testing.assert_allclose(got.X.data, whole[:, :].sorted_indices().data, rtol=1e-6)
    np.testing.assert_array_equal(got.obs["total_counts"], reference.obs["total_counts"])


def test_by_default_everything_is_kept_and_empty_cells_are_counted(counts, store_of, tmp_path):
    result = quality_control(store_of(counts), tmp_path / "q.zarr")
    got = anndata.read_zarr(tmp_path / "q.zarr").X
    assert got.shape == counts.shape
    totals = got.sum(axis=1).A1
    n_empty = (counts.sum(axis=1).A1 == 0).sum()
    assert result["empty_cells"] == n_empty >= 2
    np.testing.assert_allclose(totals[totals > 0], result["median_total"], rtol=1e-6)
    assert (totals == 0).sum() == n_empty
    assert result["cells_dropped"] == result["genes_dropped"] == 0


def test_a_cell_left_without_counts_stays_empty(store_of, tmp_path):
    X = np.ones((6, 4), np.int32)
    X[0] = [0, 0, 0, 5]
    X[1:, 3] = 0
    result = quality_control(store_of(X), tmp_path / "q.zarr", Thresholds(min_cells=2))
    assert (result["n_genes"], result["empty_cells"]) == (3, 1)
    assert np.isfinite(anndata.read_zarr(tmp_path / "q.zarr").X.data).all()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_genes": 41}, "no cell passes"),
        ({"min_cells": 121}, "no gene passes"),
        ({"max_genes": 0}, "no counts are left"),
        ({"max_mito": 101}, "max_mito is 101; give a number from 0 to 100 or None"),
        ({"max_mito": float("nan")}, "max_mito is nan; give a number from 0 to 100"),
        ({"min_genes": -1}, "min_genes is -1; give a whole number of at least 0 or None"),
    ],
)
def test_thresholds_that_leave_nothing_are_refused(counts, store_of, tmp_path, limits, message):
    with pytest.raises(InputError, match=message):
        quality_control(store_of(counts), tmp_path / "q.zarr", Thresholds(**limits))
    assert not (tmp_path / "q.zarr").exists()


def test_a_matrix_without_counts_is_refused(store_of, tmp_path):
    with pytest.raises(InputError, match="no entry is observed"):
        quality_control(store_of(sp.csr_matrix((9, 4))), tmp_path / "q.zarr")


def test_what_is_no_count_is_not_kept_as_counts(counts, store_of, tmp_path):
    quality_control(store_of(counts * np.float32(0.7)), tmp_path / "q.zarr")
    assert "counts" not in anndata.read_zarr(tmp_path / "q.zarr").layers


def test_cells_can_be_denoised_after_it(cli, store_of, tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(2, 1, (150, 2)) @ rng.gamma(2, 0.3, (2, 60)))
    quality_control(store_of(sp.csr_matrix(counts)), tmp_path / "q.zarr")
    refused = cli("impute", tmp_path / "q.zarr", tmp_path / "r.zarr", "--preset", "denoise")
    assert refused.exit_code == 2
    assert "layer counts" in refused.stderr
    done = cli("impute", tmp_path / "q.zarr", tmp_path / "r.zarr", "--preset", "denoise", "--layer", "counts")
    assert done.exit_code == 0, done.stderr
