"""Nothing wrong goes unseen: what is damaged, lost, locked, changed or lies about its size is one line, or no harm."""

import fcntl
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import damaged
import faults
import h5py
import numpy as np
import pytest
import zarr
from problems import names_in

from scialm_dask import ExpressionMatrix, InputError, impute
from scialm_dask.data.annotation import StoredAnnotation, read_annotation
from scialm_dask.data.arrays import missing_chunks
from scialm_dask.data.ingest import convert
from scialm_dask.data.qc import quality_control
from scialm_dask.data.store import readable
from scialm_dask.errors import OutputError
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.simulate import simulate
from scialm_dask.imputation import Imputation


@pytest.fixture(scope="module")
def result(counts):
    return impute(counts, preset="paper", max_iterations=4)


def written(what, counts, store_of, result, path):
    """Write by each of the ways in which this package writes a store."""
    if what == "result":
        result.to_zarr(path, dense=True)
    elif what == "simulation":
        simulate(path, n_cells=60, n_genes=30, density=0.2, rank=3)
    else:
        source = store_of(counts, "source.zarr", extra=counts)
        {"convert": convert, "mask": mask, "qc": quality_control}[what](source, path)
    return path


def arrays_of(path):
    members = zarr.open_group(path, mode="r").members(max_depth=None)
    return {name: node for name, node in members if isinstance(node, zarr.Array)}


# What we write, we can check


@pytest.mark.parametrize("what", ["result", "simulation", "convert", "mask", "qc"])
def test_every_chunk_is_written_and_has_a_checksum_that_plain_zarr_compares(counts, store_of, result, tmp_path, what):
    path = written(what, counts, store_of, result, tmp_path / "r.zarr")
    anndata.read_zarr(path)
    for name, array in arrays_of(path).items():
        assert missing_chunks(array) == [], name
        assert array.compressors[0].checksum, name
        for chunk in (path / name).glob("[0-9]*"):
            whole = chunk.read_bytes()
            chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the checksum itself
            with pytest.raises(RuntimeError, match="Zstd"):
                array[...]
            chunk.write_bytes(whole)


def read_all(path):
    """Read whatever is in a store that this package has written."""
    layers = list(zarr.open_group(path)["layers"])
    if "scialm" in zarr.open_group(path)["uns"]:
        opened = Imputation.open(path)
        opened.left.compute()
        matrices = [opened.X]
    else:
        matrices = [ExpressionMatrix.open(path, layer) for layer in (None, *layers)]
    for matrix in matrices:
        assert [len(matrix.obs), len(matrix.var)] == list(matrix.shape)
        list(matrix.stream())


@pytest.mark.parametrize("what", ["result", "convert", "mask", "qc"])
@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_no_chunk_is_lost_or_changed_without_a_word(counts, store_of, result, tmp_path, what, damage):
    path = written(what, counts, store_of, result, tmp_path / "r.zarr")
    read_all(path)
    read = arrays_of(path).keys() - {"obsm/X_scialm"}  # the embedding is for others
    for chunk in [chunk for name in sorted(read) for chunk in (path / name).glob("[0-9]*")]:
        whole = chunk.read_bytes()
        chunk.unlink() if damage == "lost" else chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(InputError, match=rf"^{path}.*(missing|cannot be read).*") as error:
            read_all(path)
        assert "\n" not in str(error.value), chunk
        chunk.write_bytes(whole)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("axis", ["obs", "var"])
def test_lost_names_of_any_store_are_missed(counts, store_of, axis, zarr_format):
    path = store_of(counts, zarr_format=zarr_format)
    Path(names_in(path, axis), "0" if zarr_format == 2 else "c/0").unlink()
    with pytest.raises(InputError, match=rf"{axis}: chunk \(0,\) of _index(/values)? is missing"):
        read_annotation(StoredAnnotation(path), axis, counts.shape[axis == "var"])


def test_columns_of_zeros_that_others_do_not_write_are_read(counts, store_of):
    path = store_of(counts)
    root = zarr.open_group(path)
    root["obs/batch/codes"][:] = 0
    assert missing_chunks(root["obs/batch/codes"]) == [(0,)]
    assert set(read_annotation(StoredAnnotation(path), "obs", counts.shape[0])["batch"]) == {"a"}


def test_whichever_write_meets_a_full_disk_there_is_no_result(result, tmp_path):
    """The last one too."""
    (tmp_path / "r").mkdir()

    def attempt(name, at):
        repair = faults.inject("zarr.storage:LocalStore.set", tmp_path / name, at)
        try:
            result.to_zarr(tmp_path / "r" / f"{name}.zarr")
        except OutputError as error:
            return str(error)
        finally:
            repair()

    assert attempt("whole", {}) is None
    n_writes = (tmp_path / "whole").stat().st_size
    for number in {*range(1, n_writes, 9), n_writes - 1, n_writes}:
        assert "could not be written, the disk is full" in attempt(f"{number}", {number: faults.fill_disk}), number
    assert os.listdir(tmp_path / "r") == ["whole.zarr"]


# What changes while it is read


@pytest.mark.parametrize("work", [convert, mask, quality_control])
@pytest.mark.parametrize("name", ["source.zarr", "source.h5ad"])
def test_a_source_that_is_rewritten_meanwhile_gives_nothing(counts, store_of, tmp_path, work, name):
    source = Path(store_of(counts.astype(np.float32), name))
    touched = source / "X" / "data" / "0" if name.endswith(".zarr") else source
    with pytest.raises(InputError, match=rf"{source}: was changed while it was read; begin again"):
        work(source, tmp_path / "r.zarr", listen=lambda _: os.utime(touched))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_source_that_is_rewritten_while_observed_entries_are_kept_gives_nothing(counts, store_of, result, tmp_path):
    matrix = ExpressionMatrix.open(source := store_of(counts))
    os.utime(Path(source, "X/data/0"))
    with pytest.raises(InputError, match=rf"{source}: was changed while it was read"):
        result.to_zarr(tmp_path / "r.zarr", dense=True, keep_observed=matrix)
    assert not (tmp_path / "r.zarr").exists()
    result.to_zarr(tmp_path / "r.zarr", dense=True)  # the factors are worth something


# Sizes that lie


def edited(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def nested(path, depth=3000):
    with h5py.File(path, "a") as file:
        group = file.require_group("uns")
        for _ in range(depth):
            group = group.create_group("a")


def unwritten(path):
    with h5py.File(path, "a") as file:
        for name in ("data", "indices"):
            dtype = file["X"][name].dtype
            del file["X"][name]
            file["X"].create_dataset(name, (10**13,), dtype, chunks=(1000,))


MUCH = 10**12
LIES = {
    "shape": lambda s: (edited(s / "X/indptr/.zarray", shape=[MUCH + 1]), edited(s / "X/.zattrs", shape=[MUCH, 40])),
    "shape of text": lambda s: edited(s / "X/.zattrs", shape="many"),
    "shape of null": lambda s: edited(s / "X/.zattrs", shape=None),
    "negative shape": lambda s: edited(s / "X/.zattrs", shape=[-5, 40]),
    "too many genes": lambda s: edited(s / "X/.zattrs", shape=[120, 2**31]),
    "indptr": lambda s: edited(s / "X/indptr/.zarray", shape=[MUCH]),
    "indptr in one chunk": lambda s: edited(s / "X/indptr/.zarray", shape=[MUCH], chunks=[MUCH]),
    "data": lambda s: [edited(s / f"X/{name}/.zarray", shape=[10 * MUCH]) for name in ("data", "indices")],
    "chunk": lambda s: edited(s / "X/data/.zarray", chunks=[MUCH]),
    "type of values": lambda s: edited(s / "X/data/.zarray", dtype="<f8"),
    "complex values": lambda s: edited(s / "X/data/.zarray", dtype="<c8", fill_value=[0, 0]),
    "fractional indices": lambda s: edited(s / "X/indices/.zarray", dtype="<f4", fill_value=0),
    "unknown codec": lambda s: edited(s / "X/data/.zarray", compressor={"id": "none-such"}),
    "attributes": lambda s: (s / "X/.zattrs").write_text("{"),
    "deep attributes": lambda s: (s / "X/.zattrs").write_text("[" * 100_000 + "]" * 100_000),
    "nested groups": nested,
    "values that were never written": unwritten,
}


@pytest.mark.parametrize("lie", LIES)
def test_what_lies_about_itself_is_refused_in_one_line(cli, counts, store_of, tmp_path, lie):
    source = Path(store_of(counts, "source.h5ad" if LIES[lie] in (nested, unwritten) else "source.zarr"))
    LIES[lie](source)
    for command in (["convert", source, tmp_path / "r.zarr", "--quiet"], ["plan", source, "--quiet"]):
        done = cli(*command)
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith(f"scialm-dask: error: {source}")
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("options", [[], ["--missing-chunks-are-zeros"]])
def test_an_empty_array_that_claims_to_be_huge_is_refused(cli, tmp_path, options):
    zarr.create_array(tmp_path / "a.zarr", shape=(MUCH, MUCH), chunks=(1000, 1000), dtype="f4")
    for command in (["convert", tmp_path / "a.zarr", tmp_path / "r.zarr"], ["plan", tmp_path / "a.zarr"]):
        done = cli(*command, "--quiet", *options)
        assert done.exit_code == 2, done.output
        assert "GB are free" in done.stderr


def test_names_that_claim_to_be_many_are_refused_before_they_are_read(counts, store_of):
    source = Path(store_of(counts))
    edited(names_in(source, "obs") / ".zarray", shape=[MUCH], chunks=[MUCH])
    with pytest.raises(InputError, match=r"obs/_index: has \(1000000000000,\) rows, the matrix 120"):
        read_annotation(StoredAnnotation(str(source)), "obs", 120)


# What is not damaged is not called so


def test_a_locked_file_is_said_to_be_locked(counts, store_of):
    source = store_of(counts, "source.h5ad")
    with open(source, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="locked by a program that has it open for writing"):
            ExpressionMatrix.open(source)
    ExpressionMatrix.open(source)


def test_a_filter_that_is_not_installed_is_named(counts, store_of):
    source = store_of(counts.toarray(), "source.h5ad")
    with h5py.File(source, "a") as file:
        del file["X"]
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((120, 40))
        plan.set_filter(32004, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((120, 40))
        made = h5py.Dataset(h5py.h5d.create(file.id, b"X", h5py.h5t.NATIVE_FLOAT, space, plan))
        made.id.write_direct_chunk((0, 0), b"packed by others")
    with pytest.raises(InputError, match="an HDF5 filter that is not installed"):
        list(ExpressionMatrix.open(source).stream())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "a/X"), "no permission to read a/X"),
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\); check the disk"),
        (MemoryError(), "needs more memory than there is"),
        (RuntimeError("can't start new thread"), "needs more memory than there is"),
        (OSError("Can't synchronously read data (memory allocation failed)"), "needs more memory than there is"),
        (FileNotFoundError(2, "No such file", "a/X/0"), "a/X/0 is gone"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "bad"), "it is damaged, write it again"),
        (RecursionError("too deep\nby far"), r"\(RecursionError: too deep by far\); it is damaged"),
        (SystemError("odd"), "it is damaged"),
    ],
)
def test_each_kind_of_trouble_has_words_of_its_own(error, words):
    with pytest.raises(InputError, match=f"^a: .*{words}"), readable("a"):
        raise error


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_stale_consolidated_metadata_do_not_matter(counts, store_of, zarr_format):
    source = store_of(counts, zarr_format=zarr_format)
    with warnings.catch_warnings(action="ignore"):  # of what is to change in zarr and anndata
        zarr.consolidate_metadata(source)
        anndata.io.write_elem(zarr.open_group(source, use_consolidated=False), "X", counts[:, ::2].toarray())
    with pytest.raises(InputError, match=r"var/_index: has \(40,\) rows, the matrix 20"):
        _ = ExpressionMatrix.open(source).var
    assert ExpressionMatrix.open(source).shape == (120, 20)


@pytest.mark.parametrize(
    ("torn", "preset"),
    [("layers/counts/.zattrs", "auto"), ("uns/log1p/.zgroup", "complete"), ("obs/.zattrs", "auto")],
)
def test_torn_metadata_of_what_is_looked_at_beside_the_matrix_are_said_in_one_line(counts, store_of, torn, preset):
    source = Path(store_of(counts * 0.25, counts=counts))
    zarr.open_group(source).create_group("uns/log1p")
    (source / torn).write_text('{"a')
    with pytest.raises(InputError, match=rf"{source}.*it is damaged, write it again") as error:
        impute(source, preset=preset)
    assert "\n" not in str(error.value)


# Whatever happens to a file


@pytest.mark.slow
@pytest.mark.parametrize("kind", damaged.KINDS)
# a trial takes a fifth of a second, but half a minute where HDF5 hangs: 50 of each of sixteen kinds take minutes
@pytest.mark.parametrize(("first", "stop"), [(0, 50)])
def test_random_damage_is_refused_or_does_no_harm(kind, first, stop):
    """Or, where a store of others has no checksums, is read as they read it."""
    done = subprocess.CompletedProcess([], 1)
    while first < stop and done.returncode != 0:
        words = [sys.executable, damaged.__file__, kind, str(first), str(stop - first)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert "WRONG" not in done.stdout, done.stdout
        if done.returncode != 0:  # some files make HDF5's own library crash, or run for ever
            innermost = done.stderr.rpartition("(most recent call first):\n")[2].partition("\n")[0]
            assert "/h5py/" in innermost, done.stderr
        first += max(1, len(done.stdout.splitlines()))
    assert first >= stop
