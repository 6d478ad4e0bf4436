"""Opening stores, and outputs that appear under their name only when they are complete."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal

import dask
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from scialm_dask.data.remote import RemoteStore, is_url
from scialm_dask.data.remote_output import NewStore, check_new, new_store
from scialm_dask.data.storable import storable
from scialm_dask.errors import InputError, OutputError
from scialm_dask.events import Listener, Note

__all__ = [
    "atomic_output",
    "atomic_store",
    "check_apart",
    "check_output",
    "kept_output",
    "lasting",
    "missing_chunks",
    "new_anndata",
    "open_store",
    "output_error",
    "scratch_folder_for",
    "set_encoding",
]

ZARR_FORMAT: Literal[2] = 2  # what AnnData writes by default: the widest choice of readers


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
    path = _plain(path)
    if is_url(path):
        return _open_url(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder; check the path")
    if os.path.isfile(path):
        return _open_hdf5(path)
    try:
        return zarr.open(path, mode="r")
    except Exception as error:
        raise InputError(
            f"{path}: not a Zarr store ({error.__class__.__name__}); convert other formats with `scialm-dask convert`"
        ) from error


def _plain(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).removeprefix("file://")


def _open_url(url: str) -> Any:
    store = RemoteStore.at(url, read_only=True)
    try:
        root = zarr.open(store, mode="r")
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{url}: no Zarr store that we may read ({error.__class__.__name__}); check the URL, and fetch other "
            "formats before `scialm-dask convert`"
        ) from error
    if isinstance(root, zarr.Group) and not store.supports_listing and root.metadata.consolidated_metadata is None:
        raise InputError(f"{url}: a web server does not list keys; run zarr.consolidate_metadata on the store first")
    return root


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
    encode = array.metadata.encode_chunk_key
    keys = {prefix + encode(position): position for position in product(*grid)}
    present = sync(_present(array.store, prefix, keys))
    return [position for key, position in keys.items() if key not in present]


async def _present(store: Any, prefix: str, keys: Iterable[str]) -> set[str]:
    if store.supports_listing:
        return {key async for key in store.list_prefix(prefix)}
    one_byte, side_by_side = RangeByteRequest(0, 1), asyncio.Semaphore(zarr.config.get("async.concurrency"))

    async def is_there(key: str) -> bool:
        async with side_by_side:
            return await store.get(key, default_buffer_prototype(), one_byte) is not None

    keys = list(keys)
    found = await asyncio.gather(*map(is_there, keys))
    return {key for key, there in zip(keys, found, strict=True) if there}


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
    if is_url(destination := _plain(destination)):
        raise OutputError(f"{destination}: only Zarr stores are written to a URL; give a path")
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


@contextmanager
def kept_output(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: tuple[str | os.PathLike[str], ...] = (),
    listen: Listener,
) -> Iterator[Path]:
    """Give a new folder to write to, as `atomic_output` does, whose pieces are worth something by themselves.

    After an exception (Ctrl-C too) those that were made are kept beside `destination`, in a folder whose name ends with
    ``.unfinished``, and `listen` is told of it.
    """
    with atomic_output(destination, overwrite=overwrite, sources=sources) as partial:
        partial.mkdir()
        try:
            yield partial
        except BaseException:
            if any(partial.iterdir()):
                unfinished = partial.rename(partial.with_name(f"{partial.stem.removeprefix('.')}.unfinished"))
                listen(Note(f"not finished; what was made is kept in {unfinished}"))
            raise


@contextmanager
def atomic_store(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: tuple[str | os.PathLike[str], ...] = (),
) -> Iterator[Path | NewStore]:
    """Give a place for a Zarr store, which is one at `destination`, a path or a URL, once the block ends well.

    See `atomic_output`. What is at a URL is never replaced, for lack of a way to do so in one step.
    """
    destination = _plain(destination)
    if is_url(destination):
        check_apart(destination, sources)
        with new_store(destination) as store:
            yield store
    else:
        with atomic_output(destination, overwrite=overwrite, sources=sources) as partial:
            yield partial


def check_output(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool,
    sources: tuple[str | os.PathLike[str], ...] = (),
) -> None:
    """Raise `OutputError` if `destination` cannot take a result. Leaves nothing there."""
    destination = _plain(destination)
    check_apart(destination, sources)
    if destination.endswith((".h5ad", ".h5", ".hdf5", ".loom")):
        name = destination.rpartition(".")[0]
        raise OutputError(
            f"{destination}: results are Zarr stores; give {name}.zarr, and make an .h5ad of it by "
            "anndata.read_zarr(…).write_h5ad(…)"
        )
    if is_url(destination):
        check_new(destination)
        return
    final = Path(destination).absolute()
    if os.path.lexists(final) and not overwrite:
        raise OutputError(f"{destination}: exists already; choose another path or pass --overwrite")
    if not final.parent.is_dir():
        raise OutputError(f"{final.parent}: no such folder; create it first")
    if not os.access(final.parent, os.W_OK):
        raise OutputError(f"{final.parent}: not writable; choose another folder")


def check_apart(destination: str | os.PathLike[str], sources: tuple[str | os.PathLike[str], ...]) -> None:
    """Raise `OutputError` if an output is, lies within or holds one of the `sources`."""
    final = _place(destination)
    for source in sources:
        origin = _place(source)
        if final == origin or final.startswith(f"{origin}/") or origin.startswith(f"{final}/"):
            raise OutputError(f"{destination}: the output overlaps the input {source}; choose another path")


def _place(path: str | os.PathLike[str]) -> str:
    """One spelling for each place."""
    path = _plain(path)
    if not is_url(path):
        return str(Path(path).resolve())
    protocol, _, rest = path.partition("://")
    return f"{ {'s3a': 's3', 'gcs': 'gs'}.get(protocol, protocol) }://{rest.rstrip('/')}"


def lasting(path: str | os.PathLike[str]) -> str:
    """Spell a path so that it holds in any folder: of workers, and of the next start. A URL is left as it is."""
    path = _plain(path)
    return path if is_url(path) else os.path.abspath(path)


def scratch_folder_for(destination: str | os.PathLike[str] | None) -> str:
    """Where the working state goes by default: beside a local output, else where temporary files do."""
    destination = None if destination is None else _plain(destination)
    if destination is None or is_url(destination):
        return dask.config.get("temporary-directory", None) or tempfile.gettempdir()
    return os.path.dirname(os.path.abspath(destination))


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


def new_anndata(place: str | Path | NewStore, *, obs: Any, var: Any, raw_var: Any = None) -> zarr.Group:
    """Create an AnnData Zarr store with annotation but no matrix yet.

    Parameters
    ----------
    place
        A path, where there must be nothing yet, or what `atomic_store` has given.
    obs, var
        Data frames of cells and genes, index included; see `storable`.
    raw_var
        Genes of ``.raw``, if there is to be one.
    """
    import anndata

    root = zarr.open_group(place, mode="w-", zarr_format=ZARR_FORMAT)
    set_encoding(root, "anndata", "0.1.0")
    for name, value in {"obs": obs, "var": var}.items():
        anndata.io.write_elem(root, name, storable(value, name)[0])
    if raw_var is not None:
        set_encoding(root.create_group("raw"), "raw", "0.1.0")
        anndata.io.write_elem(root["raw"], "var", storable(raw_var, "raw/var")[0])
        set_encoding(root.create_group("raw/varm"), "dict", "0.1.0")
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        set_encoding(root.create_group(name), "dict", "0.1.0")
    return root
