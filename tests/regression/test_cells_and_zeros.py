"""New cells and biological zeros, on real data."""

import json

import anndata
import numpy as np
import pytest

from scialm_dask import ExpressionMatrix, Imputation, biological_zeros, impute
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.metrics import score_held_out


def squared_error(imputed, held_out):
    return float(np.square(imputed - held_out.data, dtype=np.float64).mean())


def entries_of(csr):
    return np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr)), csr.indices


@pytest.mark.parametrize("seed", [0, 1])
def test_transformed_cells_score_like_fitted_ones(shared, tmp_path, seed):
    source = shared / "reference" / "pbmc_donor_a_mask10.h5ad"
    cells = anndata.read_h5ad(source)
    new = np.random.default_rng(seed).random(cells.n_obs) < 0.2
    cells[~new].write_h5ad(tmp_path / "train.h5ad")
    cells[new].write_h5ad(tmp_path / "new.h5ad")
    held_out = cells[new].layers["held_out"].tocsr()
    entries = entries_of(held_out)
    fitted = squared_error(impute(source)[new, :][entries], held_out)
    transformed = impute(tmp_path / "train.h5ad").transform(tmp_path / "new.h5ad")
    assert squared_error(transformed[:, :][entries], held_out) < 1.03 * fitted


@pytest.mark.slow
def test_markers_of_other_lineages_stay_zero(shared, tmp_path, cli):
    source, masked = tmp_path / "qc.zarr", tmp_path / "masked.zarr"
    assert cli("qc", shared / "data" / "pbmc_facs.h5ad", source, "--min-cells", 3, "--quiet").exit_code == 0
    mask(source, masked)
    result = impute(masked)
    result.to_zarr(tmp_path / "out.zarr", preserve_zeros=biological_zeros(ExpressionMatrix.open(masked)))
    written, true = anndata.read_zarr(tmp_path / "out.zarr"), anndata.read_zarr(source)
    cell_type = true.obs["cell_type"].astype(str)
    t_cells = cell_type.str.contains("CD4|CD8").to_numpy()
    for gene, others in {
        "CD19": t_cells,
        "MS4A1": t_cells,
        "CD3D": cell_type.isin(["CD19+ B", "CD14+ Monocyte"]).to_numpy(),
    }.items():
        zero = others & (true[:, gene].X.toarray().ravel() == 0)
        stays = written[zero, gene].X.toarray() == 0
        assert stays.mean() > 0.9, gene
    held_out = anndata.read_zarr(masked).layers["held_out"]
    entries = entries_of(held_out)
    before = squared_error(result[:, :][entries], held_out)
    error = squared_error(written.X.toarray()[entries], held_out)
    assert before < error < 1.1 * before
    scored = json.loads(cli("score", tmp_path / "out.zarr", "--held-out", masked, "--json", "--quiet").stdout)
    assert scored["mse"] == pytest.approx(error, rel=1e-5)
    factors = score_held_out(result, ExpressionMatrix.open(masked, "held_out"), ExpressionMatrix.open(masked))
    assert factors["mse"] == pytest.approx(before, rel=1e-5)
    ratio = written.X.mean() / anndata.read_zarr(masked).X.mean()
    assert Imputation.open(tmp_path / "out.zarr").mean_ratio == pytest.approx(ratio, rel=1e-5)
    assert ratio < 0.8 * result.mean_ratio
    assert written.X.nnz < 0.5 * written.X.shape[0] * written.X.shape[1]
