"""Conversion: every format gives the same store; bad ones, full disks and Ctrl-C leave nothing."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import zarr

from scialm_dask.data import csr, temporary, text
from scialm_dask.data.ingest import convert
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.qc import quality_control
from scialm_dask.errors import InputError
from scialm_dask.evaluate.mask import mask
from scialm_dask.events import Advanced, Stage


def read(path):
    return anndata.read_zarr(path)


def same(a, b):
    return a.shape == b.shape and abs(a - b).sum() == 0


@pytest.fixture
def small_pieces(monkeypatch):
    """Sizes at which a small matrix takes many blocks, pieces, buckets and chunks."""
    for module, name, value in (
        (csr, "_LEAST_NONZEROS", 100),
        (csr, "CHUNK_VALUES", 512),
        (csr, "CHUNK_ROWS", 50),
        (temporary, "_PIECE", 100),
        (temporary, "_BUCKET", 200),
        (text, "_PIECE", 100),
    ):
        monkeypatch.setattr(module, name, value)


FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda m: m.toarray()}


@pytest.mark.parametrize("name", ["s.zarr", "s.h5ad"])
@pytest.mark.parametrize("form", list(FORMS))
def test_anndata_of_any_form(cli, counts, store_of, tmp_path, small_pieces, form, name):
    path = store_of(FORMS[form](counts), name, scaled=FORMS[form](counts * -0.5))
    result = cli("convert", path, tmp_path / "out.zarr", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["n_cells"], summary["n_genes"], summary["n_observed"]) == (120, 40, counts.nnz)
    assert summary["layers"] == ["scaled"]
    got, source = read(tmp_path / "out.zarr"), ExpressionMatrix.open(path)
    assert same(got.X, counts)
    assert got.X.dtype == np.int32
    assert got.X.has_canonical_format
    assert same(got.layers["scaled"], counts * -0.5)
    # Names are Python strings here, and what pandas makes of them where AnnData reads them.
    pd.testing.assert_frame_equal(got.obs, source.obs, check_index_type=False)
    pd.testing.assert_frame_equal(got.var, source.var, check_index_type=False, check_column_type=False)
    assert result.stderr == ""


def test_a_bare_array_and_what_zarr_left_out(cli, counts, tmp_path):
    dense = counts.toarray()
    dense[50:] = 0
    zarr.create_array(tmp_path / "bare.zarr", data=dense, chunks=(50, 17))
    result = cli("convert", tmp_path / "bare.zarr", tmp_path / "out.zarr")
    assert result.exit_code == 2
    assert "6 of 9 chunks" in result.stderr
    assert "--missing-chunks-are-zeros" in result.stderr
    result = cli("convert", tmp_path / "bare.zarr", tmp_path / "out.zarr", "--missing-chunks-are-zeros")
    assert result.exit_code == 0, result.output
    assert same(read(tmp_path / "out.zarr").X, sp.csr_matrix(dense))


def test_what_is_left_behind_is_said(cli, counts, tmp_path):
    adata = anndata.AnnData(counts, obsm={"X_pca": np.ones((120, 2))})
    adata.var_names = ["a", "a", "b", "a", *map(str, range(36))]
    adata.write_h5ad(tmp_path / "s.h5ad")
    result = cli("convert", tmp_path / "s.h5ad", tmp_path / "out.zarr")
    assert result.exit_code == 0, result.output
    assert "note: not carried over: obsm" in result.stderr
    assert "note: 2 repeated gene names" in result.stderr
    adata.var_names_make_unique()
    assert list(read(tmp_path / "out.zarr").var_names) == list(adata.var_names)


def test_a_layer_alone_where_x_is_scaled(cli, counts, store_of, tmp_path):
    path = store_of(counts - 1 * (counts > 2).astype(np.int32) * 5, raw=counts.tocsc(), other=counts)
    assert cli("convert", path, tmp_path / "out.zarr").exit_code == 2
    assert cli("convert", path, tmp_path / "out.zarr", "--layer", "raw").exit_code == 0
    got = read(tmp_path / "out.zarr")
    assert same(got.X, counts)
    assert not got.layers
    mex = write_mex(tmp_path / "mex", counts, compress=True)
    result = cli("convert", mex, tmp_path / "mex.zarr", "--layer", "raw")
    assert result.exit_code == 2
    assert "have no layer 'raw'" in result.stderr


# 10x .h5


def write_10x_h5(path, counts, *, legacy=False, types=None, genomes=("hg",)):
    names = [f"gene{j}" for j in range(counts.shape[1])]
    names[4] = names[3]
    with h5py.File(path, "w") as file:
        for genome in genomes if legacy else ("matrix",):
            group = file.create_group(genome)
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(counts, part)
            group["shape"] = np.array(counts.shape[::-1])
            group["barcodes"] = [f"cell{i}" for i in range(counts.shape[0])]
            ids = [f"ENSG{j}" for j in range(counts.shape[1])]
            if legacy:
                group["genes"], group["gene_names"] = ids, names
            else:
                features = group.create_group("features")
                features["id"], features["name"] = ids, names
                features["feature_type"] = types or ["Gene Expression"] * len(ids)
                features["genome"] = [genomes[j % len(genomes)] for j in range(len(ids))]
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_10x_h5(counts, tmp_path, small_pieces, legacy):
    types = None if legacy else ["Gene Expression"] * 38 + ["Antibody Capture"] * 2
    path = write_10x_h5(tmp_path / "f.h5", counts, legacy=legacy, types=types)
    notes = convert(path, tmp_path / "out.zarr")["notes"]
    got, oracle = read(tmp_path / "out.zarr"), read_10x_h5_by_scanpy(path)
    assert same(got.X, oracle.X.astype(np.int32))
    assert got.X.dtype == np.int32
    assert list(got.var_names) == list(oracle.var_names)
    assert list(got.obs_names) == list(oracle.obs_names)
    assert list(got.var["gene_ids"]) == list(oracle.var["gene_ids"])
    assert any("repeated gene names" in note for note in notes)
    assert any("left out 2 features" in note for note in notes) is not legacy


def read_10x_h5_by_scanpy(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = sc.read_10x_h5(path)
    adata.var_names_make_unique()
    return adata


def test_10x_h5_of_several_genomes(cli, counts, tmp_path):
    old = write_10x_h5(tmp_path / "old.h5", counts, legacy=True, genomes=("hg", "mm"))
    new = write_10x_h5(tmp_path / "new.h5", counts, genomes=("hg", "mm"))
    result = cli("convert", old, tmp_path / "out.zarr")
    assert result.exit_code == 2
    assert "holds the genomes hg, mm; choose one by `scialm-dask convert --genome`" in result.stderr
    for path in (old, new):
        result = cli("convert", path, tmp_path / "out.zarr", "--genome", "rat")
        assert result.exit_code == 2
        assert "no genome rat" in result.stderr
    convert(old, tmp_path / "old.zarr", genome="mm")
    convert(new, tmp_path / "new.zarr", genome="mm")
    assert same(read(tmp_path / "old.zarr").X, counts)
    assert same(read(tmp_path / "new.zarr").X, counts[:, 1::2])
    assert same(convert(new, tmp_path / "both.zarr") and read(tmp_path / "both.zarr").X, counts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file["matrix"].pop("features/name"), "matrix: has no features/name; the file is damaged"),
        (lambda file: file["matrix"].pop("indptr"), "has no indptr; the file is damaged"),
        (lambda file: replaced(file, "barcodes", ["a", "b"]), "2 barcodes, but the matrix has 120; fetch"),
        (lambda file: replaced(file, "features/id", ["a"]), "1 features/id, but the matrix has 40; fetch"),
        (lambda file: replaced(file, "barcodes", np.arange(120)), "barcodes cannot be read"),
        (lambda file: unwritten(file, "data"), "chunks of data are missing; the store is damaged"),
        (lambda file: replaced(file, "shape", [40, 10**12]), "120 barcodes, but the matrix has 1000000000000"),
        (lambda file: replaced(file, "shape", 40), r"shape \(40,\); a matrix of at least one cell and gene is needed"),
    ],
)
def test_bad_10x_h5(counts, tmp_path, change, message):
    path = write_10x_h5(tmp_path / "f.h5", counts)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(InputError, match=message):
        convert(path, tmp_path / "out.zarr")
    assert os.listdir(tmp_path) == ["f.h5"]


def unwritten(file, name):
    length, dtype = file["matrix"][name].shape, file["matrix"][name].dtype
    del file["matrix"][name]
    file["matrix"].create_dataset(name, length, dtype, chunks=(100,))


def replaced(file, name, value):
    del file["matrix"][name]
    file["matrix"][name] = value


def test_a_10x_h5_with_a_dataset_beside_the_matrix(counts, tmp_path):
    path = write_10x_h5(tmp_path / "f.h5", counts)
    with h5py.File(path, "r+") as file:
        file["library_ids"] = ["barcodes", "a"]
    convert(path, tmp_path / "out.zarr")
    assert same(read(tmp_path / "out.zarr").X, counts)


# 10x MEX


def write_mex(folder, counts, *, compress, order=None, types=None, legacy=False, text=None):
    folder.mkdir()

    def put(name, content):
        with gzip.open(folder / f"{name}.gz", "wt") if compress else (folder / name).open("w") as file:
            file.write(content)

    coo = counts.T.tocoo()
    order = np.lexsort((coo.row, coo.col)) if order is None else order(coo)
    lines = [f"{r + 1} {c + 1} {v}" for r, c, v in zip(coo.row[order], coo.col[order], coo.data[order], strict=True)]
    kind = "integer" if counts.dtype.kind == "i" else "real"
    header = [
        f"%%MatrixMarket matrix coordinate {kind} general",
        "% a comment",
        f"{coo.shape[0]} {coo.shape[1]} {len(lines)}",
    ]
    put("matrix.mtx", "\n".join(header + lines) + "\n" if text is None else text)
    put("barcodes.tsv", "".join(f"cell{i}\n" for i in range(counts.shape[0])))
    names = [f"gene{j}" for j in range(counts.shape[1])]
    names[4] = names[3]
    types = [""] * len(names) if legacy else [f"\t{t}" for t in types or ["Gene Expression"] * len(names)]
    rows = [f"ENSG{j}\t{n}{t}\n" for j, (n, t) in enumerate(zip(names, types, strict=True))]
    put("genes.tsv" if legacy else "features.tsv", "".join(rows))
    return folder


@pytest.mark.parametrize(("compress", "legacy"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_mex(counts, tmp_path, small_pieces, compress, legacy, dtype):
    types = ["Gene Expression"] * 30 + ["CRISPR Guide Capture"] * 10
    folder = write_mex(tmp_path / "mex", counts.astype(dtype), compress=compress, legacy=legacy, types=types)
    convert(folder, tmp_path / "out.zarr")
    got, oracle = read(tmp_path / "out.zarr"), sc.read_10x_mtx(folder)
    assert same(got.X, oracle.X)
    assert got.X.dtype == (np.int32 if dtype == np.int32 else np.float32)
    assert list(got.var_names) == list(oracle.var_names)
    assert list(got.obs_names) == list(oracle.obs_names)
    pd.testing.assert_frame_equal(got.var, oracle.var, check_categorical=False, check_dtype=False)


@pytest.mark.parametrize(
    "order",
    [
        lambda coo: np.lexsort((coo.col, coo.row)),
        lambda coo: np.random.default_rng(0).permutation(coo.nnz),
        lambda coo: np.r_[np.lexsort((coo.row, coo.col))[1:], np.lexsort((coo.row, coo.col))[:1]],  # but the last
        lambda coo: np.repeat(np.lexsort((-coo.row, coo.col)), 2),  # everything twice, genes falling
    ],
)
def test_mex_in_any_order(counts, tmp_path, small_pieces, order):
    folder = write_mex(tmp_path / "mex", counts, compress=False, order=order)
    convert(folder, tmp_path / "out.zarr")
    times = len(order(counts.T.tocoo())) // counts.nnz
    got = read(tmp_path / "out.zarr").X
    assert same(got, counts * times)
    assert got.has_canonical_format


HEADER = "%%MatrixMarket matrix coordinate integer general\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a Matrix Market file"),
        ("hello\n", "not a Matrix Market file"),
        (HEADER + "40 120\n", "not a Matrix Market file"),
        ("%%MatrixMarket matrix array real general\n40 120 0\n", "its first line is"),
        (HEADER + "40 120 2\n1 1 5\n", "1 entries, 2 announced"),
        (HEADER + "40 120 1\n1 1 5\n2 2 6\n", "2 entries, 1 announced"),
        (HEADER + "40 120 1\n", "0 entries, 1 announced"),
        (HEADER + "40 120 1\n41 1 5\n", "gene 41 is outside 1 to 40"),
        (HEADER + "40 120 1\n1 0 5\n", "cell 0 is outside 1 to 120"),
        (HEADER + "40 120 1\n1 1 x\n", "cannot be read after entry 0"),
        (HEADER + "40 120 1\n1 1\n", "cannot be read after entry 0"),
        (HEADER + "40 120 1\n1 1 5 6\n", "cannot be read after entry 0 (a line of more than 3 numbers)"),
        (HEADER + "40 120 2\n1 1 5\n2 2 6 7\n", "saw 4); fetch it again"),
        (HEADER + "40 120 1\n1 1 -5\n", "value -5 at cell 0, gene 0"),
        (HEADER + "40 120 1\n1 1 3000000000\n", "count 3000000000 is too large"),
        (HEADER + "40 0 0\n", "at least one cell"),
        (HEADER + "40 121 1\n1 1 5\n", "120 lines, but the matrix has 121"),
    ],
)
def test_bad_mex(cli, counts, tmp_path, text, message):
    folder = write_mex(tmp_path / "mex", counts, compress=False, text=text)
    result = cli("convert", folder, tmp_path / "out.zarr", "--quiet")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["mex"]


def test_mex_files_that_are_cut_or_absent(cli, counts, tmp_path):
    folder = write_mex(tmp_path / "mex", counts, compress=True)
    matrix = folder / "matrix.mtx.gz"
    matrix.write_bytes(matrix.read_bytes()[:-20])
    result = cli("convert", folder, tmp_path / "out.zarr")
    assert result.exit_code == 2
    assert "matrix.mtx.gz: not a Matrix Market file (Compressed file ended before" in result.stderr
    matrix.unlink()
    result = cli("convert", folder, tmp_path / "out.zarr")
    assert result.exit_code == 2
    assert "has no matrix.mtx, plain or .gz" in result.stderr


def test_a_table_of_names_whose_lines_differ_in_length(cli, counts, tmp_path):
    folder = write_mex(tmp_path / "mex", counts, compress=False)
    features = folder / "features.tsv"
    lines = features.read_text().splitlines()
    lines[6] = lines[6].replace("\t", " ", 1)
    features.write_text("\n".join(lines) + "\n")
    result = cli("convert", folder, tmp_path / "out.zarr")
    assert result.exit_code == 2
    assert "features.tsv: line 7 has 2 columns, and the first 3; fetch it again" in result.stderr


# What must leave nothing behind


@pytest.mark.parametrize("command", [("convert",), ("qc",), ("mask",)])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: with_value(m, np.nan), "value nan at cell 60, gene 7"),
        (lambda m: with_value(m, np.inf), "value inf at cell 60, gene 7"),
        (lambda m: with_value(m, -2), "value -2.0 at cell 60, gene 7"),
        (lambda m: m[:0], "at least one cell"),
        (lambda m: np.full((3, 3), "a"), "not as numbers"),
    ],
)
def test_bad_matrices(cli, counts, store_of, tmp_path, command, spoil, message):
    path = store_of(spoil(counts))
    result = cli(*command, path, tmp_path / "out.zarr", "--quiet")
    assert result.exit_code == 2
    assert message in result.stderr
    assert path in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["source.zarr"]


def with_value(matrix, value):
    changed = matrix.astype(np.float64).tolil()
    changed[60, 7] = value
    return changed.tocsr()


@pytest.mark.parametrize("command", ["convert", "qc", "mask"])
def test_destinations_that_cannot_be(cli, counts, store_of, tmp_path, command):
    path = store_of(counts)
    (tmp_path / "old.zarr").mkdir()
    for destination, message in (
        (path, "overlaps the input"),
        (f"{path}/inside", "overlaps the input"),
        (tmp_path / "old.zarr", "exists already"),
        (tmp_path / "no" / "out.zarr", "no such folder"),
    ):
        result = cli(command, path, destination)
        assert result.exit_code == 2
        assert message in result.stderr
    assert cli(command, path, tmp_path / "old.zarr", "--overwrite").exit_code == 0
    assert read(tmp_path / "old.zarr").shape == counts.shape
    assert sorted(os.listdir(tmp_path)) == ["old.zarr", "source.zarr"]
    assert same(read(path).X, counts)


def run(code, *args, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs
    )


@pytest.mark.parametrize(("command", "form"), [("convert", "csr"), ("convert", "csc"), ("mask", "csc")])
def test_a_full_disk(store_of, tmp_path, form, command):
    """The system refuses files of more than 64 kB, which chunks of random values exceed."""
    X = sp.random(400, 1000, 0.5, random_state=0, format=form)
    path = store_of(X)
    (tmp_path / "tmp").mkdir()
    result = run(
        "from scialm_dask.__main__ import main; main()",
        command, path, tmp_path / "out.zarr", "--quiet",
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr
    assert "free some space" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["source.zarr", "tmp"]
    assert os.listdir(tmp_path / "tmp") == []


INTERRUPT = """
import os, signal, sys
from scialm_dask.__main__ import main
from scialm_dask.data import csr
csr._LEAST_NONZEROS = 100
append, calls = csr.CSRWriter.append, []
def interrupted(self, rows):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    append(self, rows)
csr.CSRWriter.append = interrupted
main()
"""


@pytest.mark.parametrize(("sent", "word"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
@pytest.mark.parametrize(("command", "form"), [("convert", "csr"), ("qc", "csr"), ("mask", "csc")])
def test_ctrl_c_and_sigterm(counts, store_of, tmp_path, form, command, sent, word):
    path = store_of(FORMS[form](counts))
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    code = INTERRUPT.replace("== 4", "== 1") if form == "csc" else INTERRUPT
    result = run(code.replace("SIGINT", sent), command, path, tmp_path / "out.zarr", "--quiet", env=env)
    assert result.returncode == 128 + signal.Signals[sent], result.stderr
    assert result.stderr == f"scialm-dask: {word}; nothing was written\n"
    assert sorted(os.listdir(tmp_path)) == ["source.zarr", "tmp"]
    assert os.listdir(tmp_path / "tmp") == []


@pytest.mark.parametrize("source", ["csr", "csc", "dense", "mex", "mixed mex"])
def test_progress_adds_up(counts, store_of, tmp_path, small_pieces, source):
    events = []
    if "mex" in source:
        order = (lambda coo: np.lexsort((coo.col, coo.row))) if source == "mixed mex" else None
        path = write_mex(tmp_path / "mex", counts, compress=True, order=order)
    else:
        path = store_of(FORMS[source](counts), again=FORMS[source](counts))
    for command in (convert, quality_control, mask) if source == "csr" else (convert,):
        events.clear()
        command(path, tmp_path / f"{command.__name__}.zarr", listen=events.append)
        stage, *shares = events
        assert isinstance(stage, Stage)
        done = [event.done for event in shares if isinstance(event, Advanced)]
        assert len(done) > 1
        assert done == sorted(done)
        assert done[-1] == pytest.approx(1)


# Memory


@pytest.mark.parametrize("form", ["csr", "csc", "mex"])
def test_memory_does_not_grow_with_cells(tmp_path, monkeypatch, store_of, form):
    monkeypatch.setattr(csr, "_MOST_NONZEROS", 50_000)
    monkeypatch.setattr(csr, "_LEAST_NONZEROS", 50_000)
    monkeypatch.setattr(temporary, "_PIECE", 50_000)
    monkeypatch.setattr(temporary, "_BUCKET", 100_000)
    monkeypatch.setattr(text, "_PIECE", 50_000)
    monkeypatch.setattr(csr, "CHUNK_VALUES", 50_000)  # several chunks are written at once, also of the smaller

    def peak(n_cells):
        X = sp.random(n_cells, 500, 0.1, random_state=0, format="csr", dtype=np.float32)
        X.data = np.ceil(10 * X.data).astype(np.int32)
        if form == "mex":
            source = write_mex(tmp_path / f"mex{n_cells}", X, compress=False)
        else:
            source = store_of(FORMS[form](X), f"s{n_cells}.h5ad")
        del X
        tracemalloc.start()
        try:
            convert(source, tmp_path / f"{n_cells}.zarr")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1000)  # what is imported and kept
    small, large = peak(16_000), peak(24_000)  # in both, every buffer is full
    assert large - small < 8_000 * 300  # names and row pointers, for 8,000 cells more
    assert large < 12 * 16_000 * 50 + 12_000 * 300


def test_reading_by_cells_again_needs_no_more_than_a_bucket(counts, store_of, small_pieces):
    """One row range that holds nearly everything is dealt out again and again."""
    X = sp.csc_matrix(sp.vstack([sp.csr_matrix((500, 40)), counts[:3], sp.csr_matrix((500, 40))]))
    assert same(next(ExpressionMatrix.open(store_of(X), blocks=1).stream()), X.tocsr())


def test_real_cells(shared, tmp_path):
    source = shared / "data" / "klein_d2_d4.h5ad"
    convert(source, tmp_path / "k.zarr")
    got, expected = read(tmp_path / "k.zarr"), anndata.read_h5ad(source)
    assert same(got.X, expected.X)
    pd.testing.assert_frame_equal(got.obs, expected.obs)
    with pytest.raises(InputError, match=r"no layers/none"):
        ExpressionMatrix.open(tmp_path / "k.zarr", "none")
