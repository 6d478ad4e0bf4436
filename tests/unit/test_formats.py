"""Formats beside AnnData: 10x .h5 wherever a path is taken, MEX of any layout, loom, Matrix Market, tables, samples."""

import gzip
import json
import tracemalloc

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
import scipy.sparse as sp

from scialm_dask import ExpressionMatrix, Imputation, InputError, impute
from scialm_dask.data import text
from scialm_dask.data.ingest import convert, sample_names

SETTINGS = {"preset": "complete", "max_rank": 4, "validation": 0.05, "max_iterations": 4}
CELLS = [f"{''.join(np.random.default_rng(i).choice(list('ACGT'), 16))}-1" for i in range(120)]
GENES = [f"ENSG{j:011d}" for j in range(40)]


def read(path):
    return anndata.read_zarr(path)


def same(a, b):
    return a.shape == b.shape and abs(a - b).sum() == 0


def write_10x_h5(path, counts, types=None, cells=CELLS):
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(counts, part)
        group["shape"] = np.array(counts.shape[::-1])
        group["barcodes"] = cells[: counts.shape[0]]
        names = [f"MT-{j}" if j < 3 else f"S{j}" for j in range(counts.shape[1])]
        for part, values in {"id": GENES, "name": names, "feature_type": types or ["Gene Expression"] * 40}.items():
            group[f"features/{part}"] = values[: counts.shape[1]]
    return path


@pytest.mark.parametrize("command", ["impute", "qc", "mask", "plan"])
def test_10x_h5_works_wherever_a_path_is_taken(cli, counts, tmp_path, command):
    types = ["Gene Expression"] * 20 + ["Antibody Capture"] * 5 + ["Gene Expression"] * 15
    path = write_10x_h5(tmp_path / "f.h5", counts, types)
    words = [] if command == "plan" else [tmp_path / "d.zarr"]
    words += ["--max-mito", "60"] if command == "qc" else []
    result = cli(command, path, *words, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["n_genes"] == 35
    matrix = ExpressionMatrix.open(path)
    genes = [j for j in range(40) if not 20 <= j < 25]
    assert same(sp.vstack(list(matrix.stream())), counts[:, genes])
    assert list(matrix.var.index[18:22]) == ["S18", "S19", "S25", "S26"]
    assert list(matrix.obs.index) == CELLS
    if command == "impute":
        assert list(Imputation.open(tmp_path / "d.zarr").var.index) == list(matrix.var.index)


def write_mex(folder, counts, prefix="", compress=False, names=True):
    folder.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if compress else open
    files = {
        "barcodes.tsv": "\n".join(CELLS[: counts.shape[0]]),
        "features.tsv": "\n".join(f"{g}\tS{j}\tGene Expression" for j, g in enumerate(GENES)),
    }
    for name, content in files.items() if names else ():
        with opened(folder / f"{prefix}{name}{'.gz' * compress}", "wt") as file:
            file.write(content + "\n")
    path = folder / f"{prefix}matrix.mtx{'.gz' * compress}"
    with opened(path, "wb") as file:
        scipy.io.mmwrite(file, counts.T.tocoo(), field="integer")
    return path


def test_mex_with_prefixes_of_geo(cli, counts, tmp_path):
    first = write_mex(tmp_path / "geo", counts, "GSM1_a_", compress=True)
    convert(tmp_path / "geo", tmp_path / "alone.zarr")  # there is one only
    write_mex(tmp_path / "geo", counts[:50], "GSM2_b_", compress=True)
    result = cli("convert", tmp_path / "geo", tmp_path / "d.zarr")
    assert result.exit_code == 2
    assert "holds several matrices; give one of --prefix GSM1_a_ or --prefix GSM2_b_" in result.stderr
    convert(tmp_path / "geo", tmp_path / "d.zarr", prefix="GSM2_b_")
    assert same(read(tmp_path / "d.zarr").X, counts[:50])
    convert(first, tmp_path / "file.zarr")
    for name in ("alone.zarr", "file.zarr"):
        got = read(tmp_path / name)
        assert same(got.X, counts)
        assert list(got.obs_names) == CELLS
        assert list(got.var["gene_ids"]) == GENES


def test_folders_of_starsolo(counts, tmp_path):
    write_mex(tmp_path / "Solo.out" / "Gene" / "raw", counts)
    convert(tmp_path / "Solo.out", tmp_path / "raw.zarr")
    assert same(read(tmp_path / "raw.zarr").X, counts)
    write_mex(tmp_path / "Solo.out" / "Gene" / "filtered", counts[:30])
    with pytest.raises(InputError, match=r"several matrices; give one of .*Gene/filtered, .*Gene/raw"):
        convert(tmp_path / "Solo.out", tmp_path / "d.zarr")
    convert(tmp_path / "Solo.out" / "Gene" / "filtered", tmp_path / "d.zarr")
    assert same(read(tmp_path / "d.zarr").X, counts[:30])


@pytest.mark.parametrize("rows", ["genes", "cells"])
def test_one_file_of_matrix_market(cli, counts, tmp_path, rows):
    scipy.io.mmwrite(tmp_path / "m.mtx", (counts.T if rows == "genes" else counts).tocoo(), field="integer")
    result = cli("convert", tmp_path / "m.mtx", tmp_path / "d.zarr")
    assert result.exit_code == 2
    assert "has no names, so its rows may be cells or genes; say which by --rows" in result.stderr
    assert cli("convert", tmp_path / "m.mtx", tmp_path / "d.zarr", "--rows", rows).exit_code == 0
    assert same(read(tmp_path / "d.zarr").X, counts)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text, "_PIECE", 130)


@pytest.mark.parametrize("rows", ["genes", "cells"])
@pytest.mark.parametrize("corner", [True, False])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv.gz", "t.txt"])
def test_tables(counts, tmp_path, small_pieces, rows, corner, name):
    values = counts.multiply(0.5).tocsr() if name == "t.txt" else counts
    frame = pd.DataFrame(values.toarray(), index=CELLS, columns=GENES)
    frame = frame if rows == "cells" else frame.T
    content = frame.to_csv(sep="," if "csv" in name else "\t", quoting=2 if "csv" in name and not corner else 0)
    content = content if corner else content[content.index("," if "csv" in name else "\t") + 1 :]
    opened = gzip.open if name.endswith("gz") else open
    with opened(tmp_path / name, "wt") as file:
        file.write(content.replace('"0"', "0"))
    convert(tmp_path / name, tmp_path / "d.zarr")
    got = read(tmp_path / "d.zarr")
    assert same(got.X, values)
    assert got.X.dtype == (np.float32 if name == "t.txt" else np.int32)
    assert list(got.obs_names) == CELLS
    assert list(got.var_names) == GENES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cell,ENSG00000000001,ENSG00000000002\na,1,2\nb,1\n", "line 3, of 'b', holds no 2 numbers"),
        ("cell,ENSG00000000001,ENSG00000000002\na,1,2\nb,1,NA\nc,1,1\n", "line 3, of 'b', holds no 2 numbers .*NA"),
        ("cell,ENSG00000000001,ENSG00000000002\na,1,-2\n", "value -2 at cell 0, gene 1"),
        ("cell,ENSG00000000001\na,9999999999\n", "line 2, of 'a', holds no 1 numbers"),
        ("", "not a table with names"),
        ("a,b\nc,1\n", "its rows may be cells or genes .* say which by --rows"),
    ],
)
def test_bad_tables(cli, tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "t.csv", tmp_path / "d.zarr")
    assert not (tmp_path / "d.zarr").exists()


def test_a_line_without_end_takes_no_memory(tmp_path):
    folder = tmp_path / "mex"
    write_mex(folder, sp.csr_matrix(np.eye(40, dtype=np.int32)))
    for name, start in (
        ("matrix.mtx", "%%MatrixMarket matrix coordinate integer general\n40 40 1\n"),
        ("matrix.mtx", ""),
    ):
        (folder / name).unlink(missing_ok=True)
        with gzip.open(folder / f"{name}.gz", "wb", compresslevel=1) as file:
            file.write(start.encode())
            for _ in range(100):
                file.write(b" " * (1 << 20))
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match=r"has a line of more than 1,048,576 bytes"):
                convert(folder, tmp_path / "d.zarr")
            assert tracemalloc.get_traced_memory()[1] < 30 << 20
        finally:
            tracemalloc.stop()


def test_loom(cli, counts, tmp_path):
    path = tmp_path / "f.loom"
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=counts.T.toarray(), chunks=(7, 11), compression="gzip")
        file.create_dataset("layers/spliced", data=counts.T.toarray() * 2, chunks=(7, 11))
        file["row_attrs/Gene"], file["row_attrs/Accession"] = [f"S{j % 39}" for j in range(40)], GENES
        file["col_attrs/CellID"], file["col_attrs/n"] = CELLS, np.arange(120)
    result = cli("convert", path, tmp_path / "d.zarr")
    assert result.exit_code == 0, result.output
    got = read(tmp_path / "d.zarr")
    assert same(got.X, counts)
    assert same(got.layers["spliced"], counts * 2)
    assert list(got.obs_names) == CELLS
    assert list(got.obs["n"]) == list(range(120))
    assert list(got.var["Accession"]) == GENES
    assert list(got.var_names[[0, 38, 39]]) == ["S0", "S38", "S0-1"]
    assert same(sp.vstack(list(ExpressionMatrix.open(path, "spliced", blocks=7).stream())), counts * 2)
    with pytest.raises(InputError, match="has no layers/x; its layers are: spliced"):
        impute(path, layer="x")


def test_samples_are_joined(cli, counts, store_of, tmp_path):
    """Against AnnData's own concatenation, of an .h5ad, a 10x .h5 and a folder of text."""
    names = [f"S{j}" for j in range(5, 45)]
    a = store_of(counts, "a.h5ad", names=names)
    b = write_10x_h5(tmp_path / "b.h5", counts[:60])
    write_mex(tmp_path / "c", counts[30:90], compress=True)
    result = cli("convert", a, b, tmp_path / "c", tmp_path / "inner.zarr", "--json")
    assert result.exit_code == 0, result.output
    assert "3 samples in obs['sample']; 35 genes that all have, the largest has 40" in result.stderr
    convert([a, b, tmp_path / "c"], tmp_path / "outer.zarr", join="outer", sample_key="donor")
    parts = {"a": anndata.read_h5ad(a), "b": sc.read_10x_h5(b), "c": sc.read_10x_mtx(tmp_path / "c")}
    for join, key in (("inner", "sample"), ("outer", "donor")):
        expected = anndata.concat(parts, label=key, join=join, index_unique="-")
        got = read(tmp_path / f"{join}.zarr")
        assert list(got.obs_names) == list(expected.obs_names)
        assert list(got.obs[key]) == list(expected.obs[key])
        assert set(got.var_names) == set(expected.var_names)
        assert same(got[:, expected.var_names].X, expected.X.astype(np.int64))
        assert got.X.has_sorted_indices


def test_samples_that_cannot_be_joined(counts, store_of, tmp_path):
    a, b = store_of(counts, "a.zarr"), store_of(counts, "b.zarr", names=GENES)
    with pytest.raises(InputError, match=r"no gene is in all samples \(they begin with gene0 and ENSG00000000000\)"):
        convert([a, b], tmp_path / "d.zarr")
    with pytest.raises(InputError, match="is given twice"):
        convert([a, a], tmp_path / "d.zarr")
    with pytest.raises(InputError, match="obs has a column 'batch' already; give another name by --sample-key"):
        convert([a, b], tmp_path / "d.zarr", sample_key="batch")


def test_names_of_samples():
    paths = ["runs/s1/outs/filtered_feature_bc_matrix.h5", "runs/s2/outs/filtered_feature_bc_matrix.h5"]
    assert sample_names(paths) == ["s1", "s2"]
    assert sample_names(["x/GSM1_matrix.mtx.gz", "x/GSM2_matrix.mtx.gz"]) == ["GSM1_matrix", "GSM2_matrix"]
    assert sample_names(["/d/a.h5ad", "b.h5ad", "/e/f"]) == ["d_a", "b", "e_f"]


def test_genes_by_cells_is_said(cli, counts, tmp_path):
    adata = anndata.AnnData(counts.T.tocsr())
    adata.obs_names, adata.var_names = GENES, CELLS
    adata.write_h5ad(tmp_path / "s.h5ad")
    for command in ("convert", "qc"):
        result = cli(command, tmp_path / "s.h5ad", tmp_path / f"{command}.zarr")
        assert result.exit_code == 0
        words = f"cells are called {GENES[0]}, … and genes {CELLS[0]}, …: if this is genes × cells, give its transpose"
        assert words in result.stderr
