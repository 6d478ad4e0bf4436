"""What lies beside a matrix in its store goes with the result: embeddings, layers, notes."""

from __future__ import annotations

import anndata
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scialm_dask
from scialm_dask.data.annotation import place_of

pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")


@pytest.fixture
def cells(counts):
    rng, (m, n) = np.random.default_rng(0), counts.shape
    adata = anndata.AnnData(
        counts.astype(np.float32),
        obs=pd.DataFrame({"type": pd.Categorical(["a", "b"] * (m // 2))}, index=[f"c{i}" for i in range(m)]),
        var=pd.DataFrame({"feature_name": [f"S{j}" for j in range(n)]}, index=[f"ENSG{j:011}" for j in range(n)]),
        obsm={"X_umap": rng.normal(size=(m, 2))},
        layers={"spliced": sp.csr_matrix(counts), "dense": counts.toarray()},
        uns={"neighbors": {"params": {"k": 15}}},
    )
    adata.obsm["scores"] = pd.DataFrame({"s": np.arange(m)}, index=adata.obs_names)
    return adata


@pytest.fixture(params=["cells.h5ad", "cells.zarr"])
def source(request, cells, tmp_path):
    return written(cells, tmp_path / request.param)


def written(cells, path):
    (cells.write_h5ad if path.suffix == ".h5ad" else cells.write_zarr)(path)
    return path


def test_a_result_has_what_lies_beside_its_source(source, cells, tmp_path):
    result = scialm_dask.impute(source)
    result.to_zarr(tmp_path / "result.zarr")
    for each in (result, scialm_dask.Imputation.open(tmp_path / "result.zarr")):
        adata = each.to_anndata()
        lazy = [adata.X, adata.obsm["X_umap"], adata.obsm["X_scialm"], *adata.layers.values()]
        assert all(isinstance(array, da.Array) for array in lazy)
        some = adata[10:30].to_memory()
        np.testing.assert_array_equal(some.obsm["X_umap"], cells.obsm["X_umap"][10:30])
        np.testing.assert_array_equal(some.obsm["scores"]["s"], np.arange(10, 30))
        assert abs(some.layers["spliced"] - cells.layers["spliced"][10:30]).nnz == 0
        np.testing.assert_array_equal(some.layers["dense"], cells.layers["dense"][10:30])
        assert adata.uns["neighbors"]["params"]["k"] == 15
        assert "scialm" in adata.uns
        np.testing.assert_allclose(some.X, each[10:30], rtol=1e-5)


def test_cells_that_are_others_by_now_are_left_where_they_are(source, cells):
    result = scialm_dask.impute(source, preset="complete")
    cells.obs_names = [f"other{i}" for i in range(cells.n_obs)]
    written(cells, source)
    assert not [name for name in result.to_anndata().layers if name]  # AnnData 0.13 counts X among them, as None
    assert list(result.to_anndata().obsm) == ["scialm_factors", "X_scialm"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("s3://b/c.zarr:X", ("s3://b/c.zarr", None)),
        ("a:b.h5ad:layers/counts", ("a:b.h5ad", "counts")),
        ("c.h5ad:raw/X", ("c.h5ad", "raw")),
        ("AnnData:X", ("AnnData", None)),
        ("counts.zarr", ("counts.zarr", None)),
    ],
)
def test_a_name_tells_path_and_layer(name, place):
    assert place_of(name) == place


def test_genes_are_called_by_id_or_by_symbol(cells):
    cells.var.loc[cells.var_names[5], "feature_name"] = "S4"
    result = scialm_dask.impute(cells)
    expected = result[:, [2, 7]]
    for names in (["S2", "S7"], ["ENSG00000000002", "ENSG00000000007"]):
        np.testing.assert_array_equal(result[:, names], expected)
    assert result["c3", "S7"] == result[3, 7]
    with pytest.raises(scialm_dask.InputError, match="several genes are named 'S4'"):
        result[:, ["S4"]]
    with pytest.raises(scialm_dask.InputError, match="no gene is named 'S99'; the first ones are ENSG"):
        result[:, ["S99"]]


def test_scanpy_takes_the_lazy_layer(cells):
    """Its t-test as it is; its Wilcoxon test once the layer is computed."""
    import scanpy as sc

    cells.layers["scialm"] = scialm_dask.impute(cells).to_dask()
    sc.tl.rank_genes_groups(cells, "type", layer="scialm", method="t-test")
    cells.layers["scialm"] = cells.layers["scialm"].compute()
    sc.tl.rank_genes_groups(cells, "type", layer="scialm", method="wilcoxon")
    assert np.isfinite(cells.uns["rank_genes_groups"]["scores"]["a"]).all()
