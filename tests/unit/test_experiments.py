import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scialm_dask import ExpressionMatrix, InputError
from scialm_dask.compare.experiments import against_truth, check_truth, count_split, masked, open_source
from scialm_dask.data.qc import quality_control
from scialm_dask.solve.scaling import Molecules


def whole(path):
    return anndata.read_zarr(path).X.toarray()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_counts_are_normalised_to_the_median_total(counts, store_of, folder):
    source = open_source(store_of(counts), folder)
    totals = counts.sum(axis=1).A1
    normalised = whole(source.normalised)
    np.testing.assert_allclose(normalised.sum(axis=1)[totals > 0], np.median(totals[totals > 0]), rtol=1e-5)
    np.testing.assert_array_equal(whole(source.counts), counts.toarray())
    np.testing.assert_allclose(counts.toarray() * source.factors[:, None], normalised, rtol=1e-5)


def test_counts_are_restored_from_what_qc_leaves(counts, store_of, tmp_path, folder):
    quality_control(store_of(counts), tmp_path / "clean.zarr")
    source = open_source(tmp_path / "clean.zarr", folder)
    np.testing.assert_array_equal(whole(source.counts), counts.toarray())


def test_counts_that_do_not_come_out_whole_are_not_known(counts, store_of, tmp_path, folder):
    quality_control(store_of(counts), tmp_path / "clean.zarr")
    clean = anndata.read_zarr(tmp_path / "clean.zarr")
    clean.X = clean.X.sqrt()
    clean.write_h5ad(tmp_path / "roots.h5ad")
    source = open_source(tmp_path / "roots.h5ad", folder)
    assert source.counts is None
    with pytest.raises(InputError, match="no raw counts"):
        count_split(source, 0, folder)


def test_both_views_hide_the_same_entries(counts, store_of, folder):
    source = open_source(store_of(counts), folder)
    (folder / "e").mkdir()
    made = masked(source, 0.3, 1, folder / "e")
    np.testing.assert_allclose(
        whole(made.given.counts) * source.factors[:, None], whole(made.given.normalised), rtol=1e-5
    )
    hidden = made.target.to_dask().compute().toarray()
    np.testing.assert_allclose(hidden + whole(made.given.normalised), whole(source.normalised), rtol=1e-6)


def test_molecules_are_split_and_none_is_lost(counts, store_of, folder):
    source = open_source(store_of(counts), folder)
    (folder / "e").mkdir()
    made = count_split(source, 0, folder / "e")
    train = whole(made.given.counts)
    test = made.target.to_dask().compute().toarray() * 0.2 / np.where(source.factors, source.factors, 1)[:, None]
    np.testing.assert_allclose(train + test, counts.toarray(), atol=1e-4)
    np.testing.assert_allclose(whole(made.given.normalised), train * made.given.factors[:, None], rtol=1e-5)
    totals = anndata.read_zarr(made.given.normalised).obs["total_counts"]
    np.testing.assert_array_equal(totals, train.sum(axis=1))


def test_molecules_are_split_by_draws_that_methods_do_not_repeat(store_of, folder):
    """Else single molecules that were kept would be kept again, and a method could learn nothing by splitting them."""
    source = open_source(store_of(sp.csr_matrix(np.ones((100, 50)))), folder)
    (folder / "e").mkdir()
    given = ExpressionMatrix.open(count_split(source, 3, folder / "e").given.counts).to_dask().compute()
    assert given.nnz / 5000 == pytest.approx(0.8, abs=0.03)
    assert Molecules(0.8, False, 3).of(given, 0).nnz / given.nnz == pytest.approx(0.8, abs=0.03)


def test_a_truth_is_scaled_to_the_same_totals(counts, store_of, folder):
    source = open_source(store_of(counts), folder)
    deep = store_of(counts * 10, "deep.zarr")
    made = against_truth(source, ExpressionMatrix.open(deep), 0, folder)
    np.testing.assert_allclose(made.target.to_dask().compute().toarray(), whole(source.normalised), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda X, names: (X[:50], names), "50 cells"),
        (lambda X, names: (X, ["other", *names[1:]]), "gene 0 is 'other' where 'gene0' is expected"),
    ],
)
def test_a_truth_of_other_cells_or_genes_is_refused(counts, store_of, change, words):
    names = [f"gene{j}" for j in range(counts.shape[1])]
    X, others = change(counts, names)
    deep = ExpressionMatrix.open(store_of(sp.csr_matrix(X), "deep.zarr", names=others))
    with pytest.raises(InputError, match=words):
        check_truth(deep, ExpressionMatrix.open(store_of(counts)))


def test_a_truth_in_another_order_is_matched_by_names(counts, store_of, folder):
    order = np.random.default_rng(0).permutation(counts.shape[1])
    source = open_source(store_of(counts), folder)
    deep = store_of(sp.csr_matrix(counts[:, order]), "deep.zarr", names=[f"gene{j}" for j in order])
    truth = check_truth(ExpressionMatrix.open(deep), source.matrix)
    np.testing.assert_array_equal(truth.to_dask().compute().toarray(), counts.toarray())


def test_any_matrix_can_be_taken_as_normalised(counts, store_of, folder):
    source = open_source(store_of(counts * 0.3), folder)
    assert source.counts is None
    np.testing.assert_allclose(whole(source.normalised), counts.toarray() * 0.3, rtol=1e-6)
