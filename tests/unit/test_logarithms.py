"""Logarithms are told by their values, whatever marks them; counts and normalised counts are not taken for them."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, InputError, impute
from scialm_dask.data.annotated import evidence_of_logarithms, some_cells
from scialm_dask.data.ingest import convert

SETTINGS = {"preset": "complete", "max_rank": 4, "validation": 0.05, "max_iterations": 4}


@pytest.fixture(scope="module")
def drawn():
    return low_rank_counts(300, 90, rank=3, density=0.4, seed=1)


def to_total(counts, total):
    return counts.multiply(total / np.maximum(counts.sum(axis=1), 1)).tocsr().astype(np.float32)


def tpm(counts):
    lengths = np.random.default_rng(0).lognormal(0, 1, counts.shape[1])
    return to_total(counts.multiply(1 / lengths).tocsr(), 1e4)


LOGARITHMS = {
    "of counts": lambda c: c.astype(np.float32).log1p(),
    "of normalised counts": lambda c: to_total(c, 1e4).log1p(),
    "of some of the genes": lambda c: to_total(c, 1e4).log1p()[:, ::2],
    "to base 2": lambda c: to_total(c, 1e4).log1p() / np.float32(np.log(2)),
    "to base 10": lambda c: to_total(c, 1e6).log1p() / np.float32(np.log(10)),
    "of what is normalised by the lengths of genes": lambda c: tpm(c).log1p(),
}
OTHERS = {
    "counts": lambda c: c,
    "normalised": lambda c: to_total(c, 1e4),
    "shares": lambda c: to_total(c, 1),
    "normalised to a small total": lambda c: to_total(c, 20),
    "by the lengths of genes": tpm,
    "without ambient RNA": lambda c: c.multiply(np.random.default_rng(0).uniform(0.8, 1, c.shape)).tocsr(),
    "roots": lambda c: c.astype(np.float64).sqrt(),
    "random": lambda c: sp.random(200, 50, 0.3, format="csr", random_state=0) * 5,
}


@pytest.mark.parametrize("name", LOGARITHMS)
def test_logarithms_are_refused_with_the_remedy(drawn, name):
    with pytest.raises(InputError, match=r"holds logarithms, as .*; give counts, or undo the logarithm"):
        impute(LOGARITHMS[name](drawn), **SETTINGS)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_taken_for_logarithms(drawn, name):
    assert evidence_of_logarithms(some_cells(ExpressionMatrix.of(OTHERS[name](drawn)).rows)) is None


@pytest.mark.parametrize("name", ["baron_reference", "klein_d2_d4", "mouse_bladder", "pbmc_facs"])
def test_real_cells(shared, name):
    counts = anndata.read_h5ad(shared / "data" / f"{name}.h5ad").X
    for make in (OTHERS["counts"], OTHERS["normalised"]):
        assert evidence_of_logarithms(some_cells(ExpressionMatrix.of(make(counts)).rows)) is None
    for kind, undone in {"of normalised counts": "expm1(x) ", "to base 2": "2**x - 1 "}.items():
        told = evidence_of_logarithms(some_cells(ExpressionMatrix.of(LOGARITHMS[kind](counts)).rows))
        assert told.startswith(undone)


@pytest.fixture
def discovered(drawn, tmp_path):
    """A file as CELLxGENE Discover gives: logarithms in X, counts of more genes in raw, symbols beside IDs."""
    names = [f"MT-{j}" if j < 5 else f"SYMBOL{j}" for j in range(90)]
    var = pd.DataFrame({"feature_name": pd.Categorical(names)}, index=[f"ENSG{j}" for j in range(90)])
    adata = anndata.AnnData(drawn.astype(np.float32), var=var)
    adata.obs_names = [f"cell{i}" for i in range(300)]
    adata.raw = adata
    adata = adata[:, :80].copy()
    adata.X = LOGARITHMS["of normalised counts"](adata.X)
    adata.write_h5ad(tmp_path / "discovered.h5ad")
    return tmp_path / "discovered.h5ad"


def test_the_counts_in_raw_are_read_with_their_genes(discovered, drawn, tmp_path):
    with pytest.raises(InputError, match=r"holds logarithms, .*; give the layer that holds counts, of: raw"):
        impute(discovered, **SETTINGS)
    of_file = impute(discovered, layer="raw", **SETTINGS)
    assert list(of_file.var.index) == [f"ENSG{j}" for j in range(90)]
    assert of_file.summary["raw_counts"]
    adata = anndata.read_h5ad(discovered)
    backed = anndata.read_h5ad(discovered, backed="r")
    for given in (adata, backed):
        result = impute(given, layer="raw", key_added=None, **SETTINGS)
        np.testing.assert_allclose(result[:, :], of_file[:, :], rtol=1e-3, atol=1e-4)
        assert list(result.var.index) == list(of_file.var.index)
        with pytest.raises(InputError, match=r"has 90 genes, the AnnData 80; give adata\.raw\.to_adata"):
            impute(given, layer="raw", **SETTINGS)
    backed.file.close()


def test_convert_carries_raw(discovered, drawn, tmp_path):
    assert convert(discovered, tmp_path / "c.zarr")["layers"] == ["raw"]
    got = anndata.read_zarr(tmp_path / "c.zarr")
    assert got.shape == (300, 80)
    assert (drawn != got.raw.X).nnz == 0
    assert list(got.raw.var["feature_name"])[:6] == ["MT-0", "MT-1", "MT-2", "MT-3", "MT-4", "SYMBOL5"]
    convert(tmp_path / "c.zarr", tmp_path / "again.zarr", layer="raw")
    again = anndata.read_zarr(tmp_path / "again.zarr")
    assert (drawn != again.X).nnz == 0
    assert list(again.var_names) == [f"ENSG{j}" for j in range(90)]


def test_mitochondrial_genes_are_looked_for_among_the_symbols(cli, discovered, tmp_path):
    result = cli("qc", discovered, tmp_path / "q.zarr", "--layer", "raw", "--max-mito", "50")
    assert result.exit_code == 0, result.output
    assert "mito genes             5" in result.stdout
    result = cli("qc", discovered, tmp_path / "r.zarr", "--layer", "raw", "--max-mito", "5", "--mito-prefix", "Mito")
    assert result.exit_code == 2
    assert "no gene name or symbol begins with 'Mito' (the first are ENSG0, ENSG1, ENSG2)" in result.stderr


def test_new_cells_as_logarithms_are_refused(drawn):
    fit = impute(OTHERS["normalised"](drawn), **SETTINGS)
    with pytest.raises(InputError, match="holds logarithms"):
        fit.transform(LOGARITHMS["of normalised counts"](drawn))


def test_qc_says_that_what_are_no_counts_is_not_kept(cli, drawn, tmp_path):
    anndata.AnnData(OTHERS["without ambient RNA"](drawn)).write_h5ad(tmp_path / "a.h5ad")
    result = cli("qc", tmp_path / "a.h5ad", tmp_path / "q.zarr")
    assert result.exit_code == 0, result.output
    assert "not whole numbers, so no layer counts is kept, which preset denoise would need" in result.stderr


def test_totals_in_words_are_refused(drawn):
    obs = pd.DataFrame({"total_counts": ["many"] * 300}, index=[f"c{i}" for i in range(300)])
    with pytest.raises(InputError, match=r"obs\['total_counts'\] holds no numbers .*many"):
        impute(anndata.AnnData(OTHERS["normalised"](drawn), obs=obs), **SETTINGS)
