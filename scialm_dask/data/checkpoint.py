"""Checkpoints, in a folder or behind a URL: a numbered group of Zarr arrays and a manifest each.

The manifest is written last and completes a checkpoint. It holds its own SHA-256, and every chunk has a checksum, so
that nothing damaged is used. The last two checkpoints are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore

from scialm_dask.config import short_repr
from scialm_dask.data.arrays import all_of, missing_chunks
from scialm_dask.data.lease import Lease
from scialm_dask.data.remote import RemoteStore, is_url
from scialm_dask.data.store import output_error
from scialm_dask.errors import CheckpointError, InputError, OutputError

FORMAT = 2
_KIND = "scialm-dask checkpoint"
_KEPT = 2
_MANIFEST = "manifest.json"
_OWNED = ".scratch"
_CHUNK = 32 << 20  # bytes; a chunk or two are in memory beside the array itself
_NUMBERED = re.compile(r"\d{6,}")
_ARRAY_NAME = re.compile(r"[a-z_]+\.\d+")  # none leads out of the folder
_BYTES = default_buffer_prototype()


class Piece(NamedTuple):
    """Name, shape and dtype of an array of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str


Arrays = Mapping[str, Sequence[Piece]]


@dataclass(frozen=True)
class ArrayFolder:
    """The arrays of one checkpoint, in a folder or at a URL that all workers see. Small enough for tasks."""

    path: str

    def put(self, name: str, block: int, array: NDArray[Any]) -> Piece:
        """Write an array. Repeated calls, even at the same time, write the same."""
        piece = Piece(f"{name}.{block}", array.shape, array.dtype.str)
        rows = max(1, _CHUNK // max(1, array[:1].nbytes))
        store = _store_at(self.path)
        try:
            written = zarr.create_array(
                store,
                name=piece.name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=tuple(max(1, n) for n in (min(rows, array.shape[0]), *array.shape[1:])),
                compressors=Crc32cCodec(),
                zarr_format=3,
                config={"write_empty_chunks": True},
            )
        except ContainsArrayError:  # an earlier call wrote it: each chunk is replaced, in one step, by the same
            written = zarr.open_array(store, path=piece.name, mode="r+")
        written[...] = np.ascontiguousarray(array)
        return piece

    def get(self, piece: Piece) -> NDArray[Any]:
        """Return an array; raises `CheckpointError` if it is not as `put` wrote it."""
        with self._opened(piece) as array:
            return np.asarray(array[...])

    def verify(self, piece: Piece) -> None:
        """Raise `CheckpointError` if an array is not as `put` wrote it. Reads a chunk at a time."""
        with self._opened(piece) as array:
            for start in range(0, array.shape[0] if array.size else 0, array.chunks[0]):
                array[start : start + array.chunks[0]]

    @contextlib.contextmanager
    def _opened(self, piece: Piece) -> Iterator[zarr.Array[Any]]:
        try:
            array = zarr.open_array(_store_at(self.path), path=piece.name, mode="r")
            if (array.shape, array.dtype.str) != piece[1:] or missing_chunks(array):
                raise CheckpointError(f"{self.path}: {piece.name} is not whole, or not what was written")
            yield array
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: {piece.name} is missing") from None
        except (InputError, PermissionError):
            raise
        except Exception as error:  # whatever codecs and parsers raise
            raise CheckpointError(f"{self.path}: {piece.name} is damaged ({short_repr(error)})") from error


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: plain values, and arrays by name, one for each block or a single one."""

    path: str
    notes: dict[str, Any]
    arrays: dict[str, tuple[Piece, ...]]

    @property
    def files(self) -> ArrayFolder:
        """Reader of the arrays."""
        return ArrayFolder(self.path)


class Checkpoints:
    """The checkpoints of one run, in a folder that all workers see or at a URL, locked until the block ends.

    The folder is made if it is not there, but not its parent. Raises `OutputError` if that fails, the folder cannot be
    written, or another run uses it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = os.fspath(folder)
        self.folder = folder.rstrip("/") if is_url(folder) else os.path.abspath(folder)
        self._store, self._refused = _store_at(self.folder), set[str]()
        self._cleared = not is_url(folder) and not os.path.exists(self.folder)
        try:
            if not is_url(folder):
                if not os.path.isdir(parent := os.path.dirname(self.folder)):
                    raise OutputError(f"{parent}: no such folder; create it first")
                os.makedirs(self.folder, exist_ok=True)
            self._lease = Lease(self._store, self.folder)
        except OSError as error:
            self._tidy()
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.folder}: not writable ({error.strerror}); choose another folder") from error
        for name in set(self._numbered()) - set(self.names()):  # never completed
            self._delete(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.end()
        self._tidy()

    def _tidy(self) -> None:
        """Remove the folder, if it was made or cleared here, unless it holds anything."""
        if self._cleared and not is_url(self.folder):
            with contextlib.suppress(OSError):
                os.rmdir(self.folder)

    def names(self) -> list[str]:
        """Return the names of complete checkpoints, newest first, without those refused."""
        whole = (name for name in self._numbered() if sync(self._store.exists(f"{name}/{_MANIFEST}")))
        return sorted((name for name in whole if name not in self._refused), key=int, reverse=True)

    def read(self, name: str) -> Checkpoint:
        """Return a checkpoint; raises `CheckpointError` if its manifest or an array is not as it was written."""
        found = self._manifest(name)
        every = [piece for group in found.arrays.values() for piece in group]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(found.files.verify, every))
        return found

    def notes(self) -> dict[str, Any]:
        """Return the notes of the last checkpoint with a readable manifest."""
        refusal = ""
        for name in self.names():
            try:
                return self._manifest(name).notes
            except CheckpointError as error:
                refusal = refusal or f" ({error})"
        raise InputError(f"{self.folder}: holds no checkpoint that can be read{refusal}; check the path")

    def refuse(self, name: str) -> None:
        """Leave a checkpoint out of `names` from now on, without deleting it."""
        self._refused.add(name)

    def begin(self) -> ArrayFolder:
        """Return a new folder for the arrays of the next checkpoint."""
        newest = max(map(int, self._numbered()), default=0)
        return ArrayFolder(f"{self.folder}/{newest + 1:06d}")

    def abandon(self, files: ArrayFolder) -> None:
        """Delete a checkpoint that cannot be completed."""
        self._delete(os.path.basename(files.path))

    def commit(self, files: ArrayFolder, notes: Mapping[str, Any], arrays: Arrays) -> Checkpoint:
        """Complete a checkpoint, and delete all older ones but one.

        Raises `OutputError` if it cannot be written, this process does not see what workers wrote, or another run has
        taken over.
        """
        name = os.path.basename(files.path)
        for piece in (piece for group in arrays.values() for piece in group):
            if not sync(self._store.exists(f"{name}/{piece.name}/zarr.json")):
                raise OutputError(
                    f"{self.folder}: {piece.name}, which a worker has written, is not there; choose a folder on a disk "
                    "that all workers share, or give all the same configuration of fsspec"
                )
        self._lease.check()
        content = _BYTES.buffer.from_bytes(_manifest_of(notes, arrays).encode())
        sync(self._store.set(f"{name}/{_MANIFEST}", content))
        for older in self.names()[_KEPT:]:
            self.remove(older)
        return Checkpoint(files.path, dict(notes), {name: tuple(group) for name, group in arrays.items()})

    def own(self, folder: str | None) -> None:
        """Take charge of a folder of temporary files, and remove the one before, which a killed run has left.

        Both sides hold the same token, so that no folder is removed just because somebody named it here.
        """
        if is_url(self.folder):
            return
        path = Path(self.folder, _OWNED)
        if path.exists():
            token, _, before = path.read_text().partition(" ")
            with contextlib.suppress(OSError):
                if Path(before, _OWNED).read_text() == token:
                    shutil.rmtree(before, ignore_errors=True)
            path.unlink()
        if folder is not None:
            token = uuid.uuid4().hex
            Path(folder, _OWNED).write_text(token)
            path.write_text(f"{token} {folder}")

    def clear(self) -> None:
        """Remove all checkpoints, and on exit the folder, unless it holds anything else."""
        self._cleared = True
        self.own(None)
        for name in self.names():
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first, so that it never looks damaged."""
        sync(self._store.delete(f"{name}/{_MANIFEST}"))
        self._delete(name)

    def error(self, error: OSError) -> OSError:
        """Return the `OutputError` for an error in writing a checkpoint, if its cause is known, else the error."""
        if isinstance(error, FileNotFoundError | PermissionError):
            return OutputError(f"{self.folder}: a worker cannot write there; choose a folder that all workers share")
        return output_error(self.folder, error)

    def _numbered(self) -> list[str]:
        return [name for name in sync(all_of(self._store.list_dir(""))) if _NUMBERED.fullmatch(name)]

    def _delete(self, name: str) -> None:
        with contextlib.suppress(Exception):  # without a manifest it is not used, and deleted the next time
            sync(self._store.delete_dir(name))

    def _manifest(self, name: str) -> Checkpoint:
        """Return a checkpoint without looking at its arrays."""
        path, written = f"{self.folder}/{name}", sync(self._store.get(f"{name}/{_MANIFEST}", _BYTES))
        if written is None:
            raise CheckpointError(f"{path}: has no {_MANIFEST}; it is incomplete")
        try:
            content = json.loads(written.to_bytes())
            kind, version = content["kind"], int(content["format"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: {_MANIFEST} is damaged ({short_repr(error)})") from error
        if kind != _KIND or version != FORMAT:
            remedy = "continue with the scialm-dask that wrote it, or start again"
            raise CheckpointError(f"{path}: of format {version}, and this program reads format {FORMAT}; {remedy}")
        if content.pop("sha256", None) != _digest(content):
            raise CheckpointError(f"{path}: {_MANIFEST} is not what was written; it is damaged or edited")
        try:
            arrays = {
                name: tuple(Piece(str(piece), tuple(map(int, shape)), str(dtype)) for piece, shape, dtype in group)
                for name, group in content["arrays"].items()
            }
            notes = dict(content["notes"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: {_MANIFEST} is not what a run writes ({short_repr(error)})") from error
        for piece in (piece.name for group in arrays.values() for piece in group):
            if not _ARRAY_NAME.fullmatch(piece):
                raise CheckpointError(f"{path}: names a file {piece!r}, which is no array of a checkpoint")
        return Checkpoint(path, notes, arrays)


def _store_at(path: str) -> Any:
    return RemoteStore.at(path, read_only=False) if is_url(path) else LocalStore(path)


def _manifest_of(notes: Mapping[str, Any], arrays: Arrays) -> str:
    content = {"kind": _KIND, "format": FORMAT, "notes": notes, "arrays": arrays}
    return json.dumps(content | {"sha256": _digest(content)}, indent=1)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
