"""Opens stores, and writes outputs that appear under their name only when complete."""

from __future__ import annotations

import errno
import functools
import glob
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import ZipStore

from scialm_dask.data.arrays import await_writes
from scialm_dask.data.lease import held_name
from scialm_dask.data.remote import NewStore, RemoteStore, check_new, is_url, new_store
from scialm_dask.errors import InputError, OutputError, ScialmError
from scialm_dask.events import Listener, Note

AnyPath = str | os.PathLike[str]

MARKERS = (".zgroup", ".zarray", "zarr.json")  # of a Zarr group or array
_NO_MEMORY = ("can't start new thread", "memory allocation failed")  # words of Python and HDF5
_DEEPEST = 100  # nested groups of an HDF5 file


def open_store(path: AnyPath) -> Any:
    """Open a store for reading, as a Zarr group or array or an HDF5 file; raises `InputError` if that fails."""
    path = _plain(path)
    if is_url(path):
        return _open_url(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder; {_cut_short(Path(path)) or 'check the path'}")
    if os.path.isfile(path) and not zipfile.is_zipfile(path):
        return _open_hdf5(path)
    with readable(path):
        if os.path.isfile(path):
            return zarr.open(ZipStore(path, mode="r"), mode="r", use_consolidated=False)
        os.scandir(path).close()  # raises PermissionError if it may not be read
        if not any(os.path.exists(os.path.join(path, name)) for name in MARKERS):
            raise InputError(f"{path}: not a Zarr store; convert other formats with `scialm-dask convert`")
        return zarr.open(path, mode="r", use_consolidated=False)  # which may be stale and saves nothing here


@contextmanager
def readable(name: AnyPath) -> Iterator[None]:
    """Raise whatever libraries raise for damaged, locked or missing data as an `InputError` of one line about `name`.

    Exceptions of this package pass unchanged.
    """
    try:
        yield
    except ScialmError:
        raise
    except Exception as error:
        raise InputError(f"{os.fspath(name)}: {_why_unreadable(error)}") from error


def _why_unreadable(error: Exception) -> str:
    cause = " ".join(str(error).split())[:300]
    if isinstance(error, PermissionError):
        return f"no permission to read {error.filename or 'it'}; ask its owner, or give a copy"
    if isinstance(error, BlockingIOError) or "unable to lock file" in cause:
        return "locked by a program that has it open for writing; close that first, or give a copy"
    if isinstance(error, MemoryError) or any(words in cause for words in _NO_MEMORY):
        return "needs more memory than there is, or its sizes are damaged; free some, or write it again"
    if "required filter" in cause or "plugin" in cause:
        return f"compressed by an HDF5 filter that is not installed ({cause}); write it again with gzip"
    if "codec" in f"{type(error).__name__} {cause}".lower() and not isinstance(error, UnicodeError):
        return f"stored by a codec that is not installed ({cause}); write it again with a common one"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename or 'a part'} is gone ({cause}); do not move or replace it meanwhile"
    if isinstance(error, OSError) and error.errno is not None and type(error).__module__ == "builtins":
        return f"cannot be read ({error.strerror or cause}); check the disk or the connection"
    return f"cannot be read ({type(error).__name__}: {cause}); it is damaged, write it again"


def _plain(path: AnyPath) -> str:
    return os.fspath(path).removeprefix("file://")


def _open_url(url: str) -> Any:
    store = RemoteStore.at(url, read_only=True)
    try:
        root = zarr.open(store, mode="r")
    except InputError:
        raise
    except Exception as error:
        remedy = "check the URL, and fetch other formats before `scialm-dask convert`"
        raise InputError(f"{url}: no Zarr store that can be read ({type(error).__name__}); {remedy}") from error
    if isinstance(root, zarr.Group) and not store.supports_listing and root.metadata.consolidated_metadata is None:
        raise InputError(f"{url}: a web server does not list keys; run zarr.consolidate_metadata on the store first")
    return root


def _open_hdf5(path: str) -> Any:
    import h5py

    with readable(path):
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            if "signature not found" not in str(error):
                raise
            raise InputError(f"{path}: not an HDF5 file ({error}); give an AnnData .zarr or .h5ad") from error
        stray = _leads_out(path, os.stat(path).st_mtime_ns)
    if stray:
        file.close()
        raise InputError(f"{path}:{stray}: leads to another file, which is not read; copy the data into one file")
    return file


@functools.lru_cache(maxsize=64)  # each task opens the file
def _leads_out(path: str, _changed: int) -> str | None:
    """Return the first node of an HDF5 file that is stored in another file: by link, externally or virtually."""
    import h5py

    with h5py.File(path, "r") as file:
        waiting, seen = [("", file, 0)], set()
        while waiting:
            place, group, depth = waiting.pop()
            if depth > _DEEPEST:
                raise InputError(f"{path}:{place[:40]}…: groups in groups, more than {_DEEPEST}; take them out first")
            for key in group:
                name, link = f"{place}/{key}".lstrip("/"), group.get(key, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    return name
                node = group[key] if isinstance(link, h5py.HardLink) else None
                if isinstance(node, h5py.Dataset) and (node.external or node.is_virtual):
                    return name
                if isinstance(node, h5py.Group) and node not in seen:
                    seen.add(node)
                    waiting.append((name, node, depth + 1))
    return None


@contextmanager
def atomic_output(
    destination: AnyPath, *, overwrite: bool = False, sources: tuple[AnyPath, ...] = (), keep: Listener | None = None
) -> Iterator[Path]:
    """Yield a path to write to, and move what is there to `destination` when the block succeeds.

    After an exception, Ctrl-C included, the unfinished output is removed and `destination` is unchanged. With `keep` it
    is a folder, and after an exception the pieces in it stay in a folder ``.unfinished`` beside `destination`, and
    `keep` is told. With `overwrite`, what is at `destination`, or at the target of a symbolic link there, is removed
    after the new output is in place. Of two outputs written at once, the first to end gets the name, and the other is
    put beside it. Raises `OutputError` if `destination` exists without `overwrite`, overlaps one of `sources`, cannot
    be written, or the disk is full.
    """
    if is_url(destination := _plain(destination)):
        raise OutputError(f"{destination}: only Zarr stores are written to a URL; give a path")
    check_output(destination, overwrite=overwrite, sources=sources)
    final = _final(destination, overwrite)
    partial = final.with_name(f".{final.name}.{held_name()}.partial")
    try:
        if keep is not None:
            partial.mkdir()
        yield partial
        _put_in_place(partial, final, overwrite)
    except OSError as error:
        raise output_error(final, error) from error
    finally:
        if keep is not None and partial.is_dir() and any(partial.iterdir()):
            unfinished = partial.rename(partial.with_name(f"{partial.stem.removeprefix('.')}.unfinished"))
            keep(Note(f"not finished; what was made is kept in {unfinished}"))
        if os.path.lexists(partial):
            await_writes()
            _remove(partial)


@contextmanager
def atomic_store(
    destination: AnyPath, *, overwrite: bool = False, sources: tuple[AnyPath, ...] = ()
) -> Iterator[Path | NewStore]:
    """Yield a place for a Zarr store that is at `destination`, a path or a URL, when the block succeeds.

    See `atomic_output`. A store at a URL is never replaced, since that takes more than one step.
    """
    if is_url(destination := _plain(destination)):
        check_apart(destination, sources)
        with new_store(destination) as store:
            yield store
    else:
        with atomic_output(destination, overwrite=overwrite, sources=sources) as partial:
            yield partial


def check_output(destination: AnyPath, *, overwrite: bool, sources: tuple[AnyPath, ...] = ()) -> None:
    """Raise `OutputError` if a result cannot be written to `destination`. Leaves nothing there."""
    destination = _plain(destination)
    check_apart(destination, sources)
    if destination.endswith((".h5ad", ".h5", ".hdf5", ".loom")):
        name = destination.rpartition(".")[0]
        remedy = f"give {name}.zarr, and make an .h5ad of it by anndata.read_zarr(…).write_h5ad(…)"
        raise OutputError(f"{destination}: results are Zarr stores; {remedy}")
    if is_url(destination):
        check_new(destination)
        return
    final = _final(destination, overwrite)
    if words := _cut_short(final):
        raise OutputError(f"{destination}: {words}")
    if os.path.lexists(final) and not overwrite:
        raise OutputError(f"{destination}: exists already; choose another path or pass --overwrite")
    if not final.parent.is_dir():
        raise OutputError(f"{final.parent}: no such folder; create it first")
    if not os.access(final.parent, os.W_OK):
        raise OutputError(f"{final.parent}: not writable; choose another folder")


def check_apart(destination: AnyPath, sources: tuple[AnyPath, ...]) -> None:
    """Raise `OutputError` if an output overlaps one of the `sources`."""
    final = _place(destination)
    for source in sources:
        origin = _place(source)
        if final == origin or final.startswith(f"{origin}/") or origin.startswith(f"{final}/"):
            raise OutputError(f"{destination}: the output overlaps the input {source}; choose another path")


def _place(path: AnyPath) -> str:
    """Return the one spelling of a path or URL."""
    path = _plain(path)
    if not is_url(path):
        return str(Path(path).resolve())
    protocol, _, rest = path.partition("://")
    return f"{ {'s3a': 's3', 'gcs': 'gs'}.get(protocol, protocol) }://{rest.rstrip('/')}"


def lasting(path: AnyPath) -> str:
    """Return a path as an absolute one, which workers and later runs understand too. A URL is left as it is."""
    path = _plain(path)
    return path if is_url(path) else os.path.abspath(path)


def _final(destination: AnyPath, overwrite: bool) -> Path:
    """Return the path to write to: with `overwrite` the target of a symbolic link."""
    return Path(os.path.realpath(destination) if overwrite else os.path.abspath(destination))


def _put_in_place(partial: Path, final: Path, overwrite: bool) -> None:
    old = partial.with_suffix(".replaced")
    if overwrite and os.path.lexists(final):
        os.rename(final, old)
    try:
        _rename_to_new(partial, final)
    except OSError as error:
        if not os.path.lexists(final):
            if os.path.lexists(old):
                os.rename(old, final)
            raise
        kept = final.with_name(f"{final.stem}.{partial.suffixes[-2][1:]}{final.suffix}")
        os.rename(partial, kept)
        _remove(old)
        raise OutputError(f"{final}: another program made it meanwhile, and it is left; this one is {kept}") from error
    _remove(old)


def _rename_to_new(path: Path, name: Path) -> None:
    """Rename a file or folder; raises `OSError` if the name exists, but for an empty folder made just now."""
    if os.path.lexists(name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(name))
    if path.is_dir():
        os.rename(path, name)
        return
    try:
        os.link(path, name)
        path.unlink()
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        os.rename(path, name)


def _cut_short(final: Path) -> str:
    """Say where the copies are, if a run was killed between the two renames that replace an output."""
    if os.path.lexists(final):
        return ""
    for old in final.parent.glob(f".{glob.escape(final.name)}.*.replaced"):
        return (
            f"a run was killed as it replaced it; rename the new one, {old.with_suffix('.partial')}, or the old, {old}"
        )
    return ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def output_error(path: AnyPath, error: OSError) -> OSError:
    """Return an `OutputError` about `path` for an error of the operating system that is about space, else the error."""
    if isinstance(error, OutputError | InputError):
        return error
    causes = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "it is too big"}
    if (cause := causes.get(error.errno or 0)) is None:
        return error
    return OutputError(f"{os.fspath(path)}: could not be written, {cause}; free some space or choose another disk")
