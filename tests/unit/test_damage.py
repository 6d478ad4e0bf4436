"""Nothing wrong goes unseen: what is damaged, lost, locked, changed or lies about its size is one line, or no harm."""

import os
from pathlib import Path

import anndata
import numpy as np
import pytest
import zarr

from scialm_dask import ExpressionMatrix, InputError, impute
from scialm_dask.data.annotation import StoredAnnotation, read_annotation
from scialm_dask.data.arrays import missing_chunks
from scialm_dask.data.ingest import convert
from scialm_dask.data.qc import quality_control
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
    for chunk in [chunk for name in arrays_of(path) for chunk in (path / name).glob("[0-9]*")]:
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
    Path(path, axis, "_index", "0" if zarr_format == 2 else "c/0").unlink()
    with pytest.raises(InputError, match=rf"{axis}: chunk \(0,\) of _index is missing"):
        read_annotation(StoredAnnotation(path), axis, counts.shape[axis == "var"])


def test_columns_of_zeros_that_others_do_not_write_are_read(counts, store_of):
    path = store_of(counts)
    root = zarr.open_group(path)
    root["obs/batch/codes"][:] = 0
    assert missing_chunks(root["obs/batch/codes"]) == [(0,)]
    assert set(read_annotation(StoredAnnotation(path), "obs", counts.shape[0])["batch"]) == {"a"}


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
