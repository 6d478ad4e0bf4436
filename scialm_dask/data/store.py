"""Opening stores, and outputs that appear under their name only when they are complete."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from zarr.core.sync import sync

from scialm_dask.errors import InputError, OutputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["CSRWriter", "atomic_output", "missing_chunks", "new_anndata", "open_store", "output_error", "set_encoding"]

ZARR_FORMAT: Literal[2] = 2  # what AnnData writes by default: the widest choice of readers
_CHUNK_VALUES = 1 << 18  # values in one chunk of `data` or `indices`; a block reads few values it does not want
_CHUNK_ROWS = 1 << 16


def open_store(path: str | os.PathLike[str]) -> Any:
    """Open an AnnData store, or a bare array, for reading.

    Returns
    -------
    zarr.Group, zarr.Array or h5py.File

    Raises
    ------
    InputError
        If there is nothing at `path`, or it is neither Zarr nor HDF5.
    """
    path = os.fspath(path)
    if "://" not in path and not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder; check the path")
    if os.path.isfile(path):
        return _open_hdf5(path)
    try:
        return zarr.open(path, mode="r")
    except Exception as error:
        raise InputError(
            f"{path}: not a Zarr store ({error.__class__.__name__}); convert other formats with `scialm-dask convert`"
        ) from error


def _open_hdf5(path: str) -> Any:
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"{path}: not an HDF5 file ({error}); give an AnnData .zarr or .h5ad, or convert it first"
        ) from error
    stray = _leads_out(path, os.stat(path).st_mtime_ns)
    if stray:
        file.close()
        raise InputError(f"{path}:{stray}: leads to another file, which is not read; copy the data into one file")
    return file


@functools.lru_cache(maxsize=64)  # tasks open the same file again and again
def _leads_out(path: str, _changed: int) -> str | None:
    """Name the first node of an HDF5 file that lies in another: by a link, as raw storage or as a virtual dataset."""
    import h5py

    def look(name: str, link: Any) -> str | None:
        if isinstance(link, h5py.ExternalLink):
            return name
        node = file[name] if isinstance(link, h5py.HardLink) else None
        return name if isinstance(node, h5py.Dataset) and (node.external or node.is_virtual) else None

    with h5py.File(path, "r") as file:
        return file.visititems_links(look)  # type: ignore[no-any-return]


def missing_chunks(array: zarr.Array[Any]) -> list[tuple[int, ...]]:
    """Grid positions of the chunks (or shards) of `array` that are not in its store.

    Zarr reads an absent chunk as the fill value, so a lost file looks like zeros.
    """
    grid_step = array.shards or array.chunks
    grid = [range(-(-size // step)) for size, step in zip(array.shape, grid_step, strict=True)]
    prefix = f"{array.path}/" if array.path else ""
    present = sync(_keys(array.store, prefix))
    encode = array.metadata.encode_chunk_key
    return [position for position in product(*grid) if prefix + encode(position) not in present]


async def _keys(store: Any, prefix: str) -> set[str]:
    return {key async for key in store.list_prefix(prefix)}


@contextmanager
def atomic_output(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: tuple[str | os.PathLike[str], ...] = (),
) -> Iterator[Path]:
    """Give a path to write to, and move what is there to `destination` once the block ends well.

    After an exception (Ctrl-C too) the unfinished output is removed and `destination` is as it was.

    Parameters
    ----------
    destination
        The final path.
    overwrite
        Replace what is at `destination`. The old one is removed only after the new one is in place.
    sources
        Paths that are read meanwhile, which `destination` must not be or lie within.

    Raises
    ------
    OutputError
        If `destination` exists (and not `overwrite`), is one of `sources`, cannot be written, or the disk is full.
    """
    final = Path(destination).absolute()
    check_output(final, overwrite=overwrite, sources=sources)
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        _replace(partial, final)
    except OSError as error:
        raise output_error(final, error) from error
    finally:
        _remove(partial)


def check_output(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool,
    sources: tuple[str | os.PathLike[str], ...] = (),
) -> None:
    """Raise `OutputError` if `destination` cannot take a result. Writes nothing."""
    final = Path(destination).absolute()
    for source in sources:
        origin = Path(source).resolve()
        if final.resolve() == origin or origin in final.resolve().parents or final.resolve() in origin.parents:
            raise OutputError(f"{destination}: the output overlaps the input {source}; choose another path")
    if os.path.lexists(final) and not overwrite:
        raise OutputError(f"{destination}: exists already; choose another path or pass --overwrite")
    if not final.parent.is_dir():
        raise OutputError(f"{final.parent}: no such folder; create it first")
    if not os.access(final.parent, os.W_OK):
        raise OutputError(f"{final.parent}: not writable; choose another folder")


def _replace(partial: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.replaced")
    if os.path.lexists(final):
        os.rename(final, old)
    try:
        os.rename(partial, final)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, final)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def output_error(path: str | os.PathLike[str], error: OSError) -> OSError:
    """Turn an error of the operating system while writing `path` into an `OutputError`, if space is the cause."""
    if isinstance(error, OutputError | InputError):
        return error
    reason = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "it is too big",
    }
    cause = reason.get(error.errno or 0)
    if cause is None:
        return error
    return OutputError(f"{os.fspath(path)}: could not be written, {cause}; free some space or choose another disk")


def set_encoding(node: Any, kind: str, version: str, **attributes: Any) -> None:
    """Mark a Zarr node with its AnnData encoding."""
    node.attrs.update({"encoding-type": kind, "encoding-version": version, **attributes})


def new_anndata(path: str | os.PathLike[str], *, obs: Any, var: Any) -> zarr.Group:
    """Create an AnnData Zarr store with annotation but no matrix yet.

    Parameters
    ----------
    path
        Where; must not exist.
    obs, var
        Data frames of cells and genes, index included.
    """
    import anndata

    root = zarr.open_group(os.fspath(path), mode="w-", zarr_format=ZARR_FORMAT)
    set_encoding(root, "anndata", "0.1.0")
    for name, value in {"obs": obs, "var": var}.items():
        anndata.io.write_elem(root, name, value)
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        set_encoding(root.create_group(name), "dict", "0.1.0")
    return root


class CSRWriter:
    """Writes a CSR matrix into an AnnData Zarr store, rows in order, whole chunks at a time.

    Memory is a few chunks, whatever the number of rows. Use as a context manager; the matrix is whole only
    after it has been left.

    Parameters
    ----------
    parent
        Zarr group to write under.
    name
        Name of the element, ``"X"`` or ``"layers/…"``.
    n_columns
        Number of columns (genes).
    dtype
        Of the values.
    """

    def __init__(self, parent: zarr.Group, name: str, *, n_columns: int, dtype: Any = np.float32) -> None:
        self._group = parent.create_group(name)
        self._columns = n_columns
        self._rows = 0
        self._stored = 0
        self._data = _Appender(self._group, "data", np.dtype(dtype), _CHUNK_VALUES)
        self._indices = _Appender(self._group, "indices", np.dtype(np.int32), _CHUNK_VALUES)
        self._indptr = _Appender(self._group, "indptr", np.dtype(np.int64), _CHUNK_ROWS)
        self._indptr.append(np.zeros(1, np.int64))

    def append(self, rows: csr_matrix) -> None:
        """Add the next rows, a CSR matrix with `n_columns` columns."""
        self._data.append(rows.data)
        self._indices.append(rows.indices)
        self._indptr.append(rows.indptr[1:].astype(np.int64) - int(rows.indptr[0]) + self._stored)
        self._stored += int(rows.nnz)
        self._rows += rows.shape[0]

    def __enter__(self) -> CSRWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for appender in (self._data, self._indices, self._indptr):
                appender.close()
            if self._stored <= np.iinfo(np.int32).max:
                self._narrow_indptr()
            set_encoding(self._group, "csr_matrix", "0.1.0", shape=[self._rows, self._columns])

    def _narrow_indptr(self) -> None:
        """Give indptr the type of the indices: SciPy fails on a matrix that has two, as AnnData would read it."""
        wide: Any = self._group["indptr"]
        values = wide[...]
        narrow = _Appender(self._group, "indptr", np.dtype(np.int32), _CHUNK_ROWS)
        narrow.append(values)
        narrow.close()


class _Appender:
    """A 1-D Zarr array that grows by whole chunks; what does not fill one waits in memory."""

    def __init__(self, group: zarr.Group, name: str, dtype: np.dtype[Any], chunk: int) -> None:
        # An absent chunk must mean a lost chunk, so chunks of zeros are written too.
        self._array = group.create_array(
            name, shape=(0,), chunks=(chunk,), dtype=dtype, config={"write_empty_chunks": True}, overwrite=True
        )
        set_encoding(self._array, "array", "0.2.0")
        self._chunk = chunk
        self._waiting: list[np.ndarray[Any, Any]] = []
        self._n_waiting = 0

    def append(self, values: np.ndarray[Any, Any]) -> None:
        self._waiting.append(np.array(values, dtype=self._array.dtype))
        self._n_waiting += len(values)
        if self._n_waiting >= self._chunk:
            self._write(self._n_waiting - self._n_waiting % self._chunk)

    def close(self) -> None:
        self._write(self._n_waiting)

    def _write(self, count: int) -> None:
        values = np.concatenate(self._waiting) if self._waiting else np.empty(0, self._array.dtype)
        if count:
            start = self._array.shape[0]
            self._array.resize((start + count,))
            self._array[start : start + count] = values[:count]
        self._waiting = [values[count:].copy()]
        self._n_waiting -= count
