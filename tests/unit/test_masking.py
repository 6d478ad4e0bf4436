import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scialm_dask.data.csr import RowBlocks
from scialm_dask.errors import InputError
from scialm_dask.evaluate.mask import mask
from scialm_dask.linalg.random import n_to_hide


def gene_nonzeros(X):
    return np.bincount(X.indices, minlength=X.shape[1])


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_hides_the_right_number_of_each_gene_and_loses_nothing(counts, store_of, tmp_path, fraction):
    result = mask(store_of(counts), tmp_path / "m.zarr", fraction=fraction, seed=4)
    masked = anndata.read_zarr(tmp_path / "m.zarr")
    held_out = masked.layers["held_out"]
    n = gene_nonzeros(counts)
    np.testing.assert_array_equal(gene_nonzeros(held_out), [int(c * fraction) if c > 3 else 0 for c in n])
    assert abs(masked.X + held_out - counts).sum() == 0
    assert masked.X.multiply(held_out).nnz == 0
    assert masked.X.dtype == held_out.dtype == np.int32
    assert (result["n_observed"], result["n_hidden"]) == (masked.X.nnz, held_out.nnz)
    assert list(masked.obs.columns) == ["batch"]


def test_genes_with_at_most_three_nonzeros_keep_them():
    np.testing.assert_array_equal(n_to_hide(np.arange(7), 0.9), [0, 0, 0, 0, 3, 4, 5])


def test_depends_on_the_seed_alone(counts, store_of, tmp_path, monkeypatch):
    def hidden(form, seed):
        mask(store_of(form), tmp_path / "m.zarr", seed=seed, overwrite=True)
        return anndata.read_zarr(tmp_path / "m.zarr").layers["held_out"]

    first = hidden(counts, 0)
    assert abs(hidden(counts, 1) - first).sum() > 0
    for n_blocks in (1, 3, 7):
        monkeypatch.setattr(
            RowBlocks, "by_nonzeros", lambda indptr, _=None, n=n_blocks: RowBlocks.even(len(indptr) - 1, n)
        )
        for form in (counts, counts.tocsc(), counts.toarray()):
            assert abs(hidden(form, 0) - first).sum() == 0


def test_hidden_entries_are_spread_over_cells(store_of, tmp_path):
    mask(store_of(sp.csr_matrix(np.ones((400, 200)))), tmp_path / "m.zarr")
    per_cell = np.diff(anndata.read_zarr(tmp_path / "m.zarr").layers["held_out"].indptr)
    assert per_cell.sum() == 8000
    expected_sd = np.sqrt(200 * 0.1 * 0.9)
    assert abs(per_cell.std() / expected_sd - 1) < 0.2


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1", "nan"])
def test_a_fraction_that_is_none_is_refused(cli, counts, store_of, tmp_path, fraction):
    result = cli("mask", store_of(counts), tmp_path / "m.zarr", "--fraction", fraction)
    assert result.exit_code == 2
    assert "between 0 and 1" in result.stderr
    assert not (tmp_path / "m.zarr").exists()


def test_matrices_without_enough_nonzeros_are_refused(store_of, tmp_path):
    with pytest.raises(InputError, match="no entry is observed"):
        mask(store_of(sp.csr_matrix((9, 4))), tmp_path / "m.zarr")
    with pytest.raises(InputError, match="no gene has enough non-zeros"):
        mask(store_of(sp.csr_matrix(np.eye(9))), tmp_path / "m.zarr")


def test_as_many_as_in_the_reference(shared, tmp_path):
    """The masked matrices that the published program was run on hide the same number of each gene."""
    reference = anndata.read_h5ad(shared / "reference" / "pbmc_donor_a_mask10.h5ad")
    n_hidden = gene_nonzeros(reference.layers["held_out"])
    np.testing.assert_array_equal(n_to_hide(gene_nonzeros(reference.X) + n_hidden, 0.1), n_hidden)
