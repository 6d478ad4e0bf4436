"""Annotation of any kind is kept, in a form that can be written; what cannot be is refused before the work."""

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr

from scialm_dask import ExpressionMatrix, Imputation, InputError, impute
from scialm_dask.data.annotation import storable
from scialm_dask.data.ingest import convert
from scialm_dask.data.qc import quality_control
from scialm_dask.evaluate.mask import mask
from scialm_dask.events import Note

SETTINGS = {"preset": "complete", "max_rank": 4, "validation": 0.05, "max_iterations": 4}
NAMES = ["x", "y", "z"]

FORMS = {
    "text": (["a", "b", "c"], ["a", "b", "c"]),
    "text with gaps": (["a", None, "c"], ["a", np.nan, "c"]),
    "strings": (pd.array(["a", None, "c"], dtype="string"), ["a", np.nan, "c"]),
    "strings without gaps": (pd.array(["a", "b", "c"], dtype="string"), ["a", "b", "c"]),
    "dates": (
        pd.to_datetime(["2020-01-01 10:00", "2020-02-01 00:00", None]),
        ["2020-01-01 10:00:00", "2020-02-01 00:00:00", np.nan],
    ),
    "days": (pd.period_range("2020", periods=3, freq="D"), ["2020-01-01", "2020-01-02", "2020-01-03"]),
    "intervals": (pd.cut([1, 2, 3], [0, 1, 3]), ["(0, 1]", "(1, 3]", "(1, 3]"]),
    "categories of dates": (pd.Categorical(pd.to_datetime(["2020-01-01"] * 3)), ["2020-01-01 00:00:00"] * 3),
    "categories of numbers": (pd.Categorical([1, 2, 1]), [1, 2, 1]),
    "categories with gaps": (pd.Categorical(["a", None, "a"]), ["a", np.nan, "a"]),
    "whole numbers with gaps": (pd.array([1, None, 3], dtype="Int64"), [1, pd.NA, 3]),
    "numbers with gaps": (pd.array([1.5, None, 3], dtype="Float64"), [1.5, np.nan, 3]),
    "truth with gaps": (pd.array([True, None, False], dtype="boolean"), [True, pd.NA, False]),
    "mixed": ([1, "a", None], ["1", "a", np.nan]),
    "bytes": ([b"a", b"b", b"c"], ["a", "b", "c"]),
    "sparse": (pd.arrays.SparseArray([0, 0, 1.0]), [0, 0, 1]),
    "long doubles": (np.array([1, 2, 3], np.longdouble), [1, 2, 3]),
}


@pytest.mark.parametrize("kind", FORMS)
def test_values_of_every_kind_can_be_written_and_read(tmp_path, kind):
    given, expected = FORMS[kind]
    frame, notes = storable(pd.DataFrame({"v": given}, index=NAMES), "obs")
    anndata.io.write_elem(zarr.open_group(tmp_path / "f.zarr", zarr_format=2), "obs", frame)
    back = anndata.io.read_elem(zarr.open_group(tmp_path / "f.zarr", mode="r")["obs"])
    pd.testing.assert_series_equal(
        back["v"].astype(object),
        pd.Series(expected, index=NAMES, dtype=object),
        check_names=False,
        check_index_type=False,
    )
    said = kind in ("dates", "days", "intervals", "categories of dates", "mixed")
    assert notes == ["obs['v'] is kept as text"] * said
    assert storable(frame, "obs")[1] == []


def test_names_of_every_kind(tmp_path):
    names = ["a/b", "a_b", "", ".", "..", "_index", ".zattrs", 5, "n" * 300, "a b"]
    frame = pd.DataFrame([range(10)] * 3, index=pd.Index([1, 2, 3], name="a/b"), columns=names)
    kept, notes = storable(frame, "var")
    root = zarr.open_group(tmp_path / "f.zarr", zarr_format=2)
    anndata.io.write_elem(root, "var", kept)
    back = anndata.io.read_elem(root["var"])
    assert list(back.columns) == [
        "a_b", "a_b_1", "column", "column.", "column..", "column_index", "column.zattrs", "5", "n" * 200, "a b",
    ]  # fmt: skip
    assert list(back.iloc[0]) == list(range(10))
    assert list(back.index) == ["1", "2", "3"]
    assert notes[0] == "var['a/b'] is kept as 'a_b'"


@pytest.fixture
def awkward(counts):
    """AnnData whose annotation the writer of AnnData refuses."""
    obs = pd.DataFrame({"day": pd.to_datetime(["2020-01-01"] * 120), "part/whole": np.arange(120)})
    obs.index = pd.Index([f"cell{i}" for i in range(120)], dtype="string")
    with pytest.warns(anndata.ImplicitModificationWarning):
        return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=range(40)))


def test_a_run_keeps_awkward_annotation(awkward, tmp_path):
    events = []
    result = impute(awkward, key_added=None, listen=events.append, **SETTINGS)
    assert [str(e.words) for e in events if isinstance(e, Note)][:2] == [
        "AnnData:X: obs['day'] is kept as text",
        "AnnData:X: obs['part/whole'] is kept as 'part_whole'",
    ]
    assert next(n for n, e in enumerate(events) if type(e).__name__ == "Pass") > 1
    result.to_zarr(tmp_path / "r.zarr")
    opened = Imputation.open(tmp_path / "r.zarr")
    assert list(opened.obs["day"])[:2] == ["2020-01-01 00:00:00"] * 2
    assert list(opened.obs["part_whole"]) == list(range(120))
    assert opened["cell3", "5"] == pytest.approx(result[3, 5])


def test_columns_of_hdf5_whose_names_have_a_slash(cli, counts, store_of, tmp_path):
    """AnnData wrote them as groups in groups until 0.13, and reads them."""
    with h5py.File(path := store_of(counts, "s.h5ad"), "r+") as file:
        anndata.io.write_elem(file["obs"], "whole", np.arange(120))
        file.move("obs/whole", "obs/part/whole")
        file.move("obs/batch", "obs/part/batch")
        file["obs"].attrs["column-order"] = ["part/whole", "part/batch"]
    for command in ("convert", "qc", "mask", "impute"):
        result = cli(command, path, tmp_path / f"{command}.zarr")
        assert result.exit_code == 0, result.stderr
        assert "obs['part/whole'] is kept as 'part_whole'" in result.stderr
        obs = anndata.read_zarr(tmp_path / f"{command}.zarr").obs
        assert list(obs["part_whole"]) == list(range(120))
        assert list(obs["part_batch"][:4]) == ["b", "a", "a", "b"]


def nullable(counts, path):
    """A store as pandas 3 and AnnData 0.13 write it: names as nullable strings."""
    frames = {"obs": pd.DataFrame({"batch": ["a"] * 120}), "var": pd.DataFrame(index=range(40))}
    root = zarr.open_group(path, mode="w", zarr_format=2)
    with anndata.settings.override(allow_write_nullable_strings=True):
        for name, frame in frames.items():
            frame.index = pd.Index([f"{name}{i}" for i in range(len(frame))], dtype="string")
            anndata.io.write_elem(root, name, frame)
    anndata.io.write_elem(root, "X", counts)
    return path


@pytest.mark.parametrize("command", [convert, quality_control, mask, lambda s, d: impute(s, **SETTINGS).to_zarr(d)])
def test_names_that_are_nullable_strings(counts, tmp_path, command):
    command(nullable(counts, tmp_path / "s.zarr"), tmp_path / "d.zarr")
    got = anndata.read_zarr(tmp_path / "d.zarr")
    assert list(got.obs_names[:2]) == ["obs0", "obs1"]
    assert list(got.var_names[:2]) == ["var0", "var1"]
    assert list(got.obs["batch"]) == ["a"] * 120


def short(root):
    frame = anndata.io.read_elem(root["obs"])
    del root["obs"]
    anndata.io.write_elem(root, "obs", frame[:100])


def unknown(root):
    root["obs/batch"].attrs["encoding-type"] = "of tomorrow"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (short, r"has \(100,\) rows, the matrix 120; write the store again"),
        (lambda root: root.__delitem__("var"), "has no var; write the store again, with names of cells and genes"),
        (unknown, "obs: cannot be read"),
    ],
)
@pytest.mark.parametrize("command", [convert, quality_control, mask, lambda s, d: impute(s, **SETTINGS).to_zarr(d)])
def test_annotation_that_cannot_be_read_is_refused_before_anything_is_read(
    counts, store_of, tmp_path, monkeypatch, command, spoil, message
):
    path = store_of(counts)
    spoil(zarr.open_group(path, mode="r+", use_consolidated=False))
    monkeypatch.setattr(ExpressionMatrix, "read_block", lambda *_, **__: pytest.fail("a block was read"))
    with pytest.raises(InputError, match=message):
        command(path, tmp_path / "d.zarr")
    assert [p.name for p in Path(tmp_path).iterdir()] == ["source.zarr"]


@pytest.mark.parametrize("command", ["impute", "convert", "qc", "mask"])
def test_results_are_zarr_and_a_name_of_hdf5_is_refused(cli, counts, store_of, tmp_path, command):
    result = cli(command, store_of(counts), tmp_path / "out.h5ad")
    assert result.exit_code == 2
    assert f"give {tmp_path / 'out'}.zarr, and make an .h5ad of it by anndata.read_zarr" in result.stderr
    with pytest.raises(OSError, match="results are Zarr stores"):
        impute(counts, **SETTINGS).to_zarr(tmp_path / "out.h5ad")


def test_repeated_names_are_made_unique_by_convert(cli, counts, tmp_path):
    adata = anndata.AnnData(counts)
    adata.obs_names = ["a", "a", *map(str, range(118))]
    adata.write_h5ad(tmp_path / "s.h5ad")
    result = cli("convert", tmp_path / "s.h5ad", tmp_path / "d.zarr", "--json")
    assert "1 repeated cell names were made unique with -1, -2, …" in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["n_cells"] == 120
    assert list(anndata.read_zarr(tmp_path / "d.zarr").obs_names[:3]) == ["a", "a-1", "0"]
