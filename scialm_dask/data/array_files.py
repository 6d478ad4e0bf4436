"""Arrays as files of a folder, on disk or behind a URL, each with its size and checksum."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from scialm_dask.data.remote import RemoteStore, is_url
from scialm_dask.errors import CheckpointError

__all__ = ["ArrayFile", "ArrayFolder", "RemoteFolder", "folder_at", "sync_file"]

_PIECE = 8 << 20
_BYTES = default_buffer_prototype()


class ArrayFile(NamedTuple):
    """An array of a checkpoint: the name of its file, its bytes and their SHA-256."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class ArrayFolder:
    """Writes and reads the arrays of one checkpoint, in whichever process; small, to be sent to workers.

    Parameters
    ----------
    path
        A folder on a disk that all workers see.
    """

    path: str

    def put(self, name: str, block: int, array: NDArray[Any]) -> ArrayFile:
        """Write an array and sync it. The same call again, even at once, does no harm."""
        final = os.path.join(self.path, f"{name}.{block}.npy")
        aside = f"{final}.{uuid.uuid4().hex[:8]}"
        with open(aside, "wb") as file:
            writer = _Hashing(file)
            np.lib.format.write_array(writer, array, allow_pickle=False)
            sync_file(file)
        os.replace(aside, final)
        return ArrayFile(os.path.basename(final), writer.n_bytes, writer.digest.hexdigest())

    def get(self, file: ArrayFile) -> NDArray[Any]:
        """Read what `put` wrote; raises `CheckpointError` if that is no longer what is there."""
        content = self.read(file.name)
        self._compare(file, len(content), hashlib.sha256(content).hexdigest())
        array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
        return array

    def read(self, name: str) -> bytes:
        """Read a file; raises `CheckpointError` if there is none."""
        try:
            with open(os.path.join(self.path, name), "rb") as opened:
                return opened.read()
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: {name} is missing") from None

    def verify(self, file: ArrayFile) -> None:
        """Raise `CheckpointError` if the file is not as it was written. Takes next to no memory."""
        path, digest = os.path.join(self.path, file.name), hashlib.sha256()
        try:
            self._compare(file, os.path.getsize(path), None)
            with open(path, "rb") as opened:
                while piece := opened.read(_PIECE):
                    digest.update(piece)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: {file.name} is missing") from None
        self._compare(file, file.n_bytes, digest.hexdigest())

    def _compare(self, file: ArrayFile, n_bytes: int, sha256: str | None) -> None:
        if n_bytes != file.n_bytes:
            raise CheckpointError(f"{self.path}: {file.name} has {n_bytes} bytes of {file.n_bytes}; it is truncated")
        if sha256 not in (None, file.sha256):
            raise CheckpointError(f"{self.path}: {file.name} is not what was written; it is damaged or edited")


class RemoteFolder(ArrayFolder):
    """The same behind a URL, which all workers must reach. A key is there whole or not at all."""

    def put(self, name: str, block: int, array: NDArray[Any]) -> ArrayFile:
        """Write an array."""
        content = io.BytesIO()
        np.lib.format.write_array(content, array, allow_pickle=False)
        file = f"{name}.{block}.npy"
        self.write(file, content.getbuffer())
        return ArrayFile(file, content.tell(), hashlib.sha256(content.getbuffer()).hexdigest())

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file."""
        sync(self._store().set(name, _BYTES.buffer.from_bytes(content)))

    def read(self, name: str) -> bytes:
        """Read a file; raises `CheckpointError` if there is none."""
        return self._piece(name, None)

    def verify(self, file: ArrayFile) -> None:
        """Raise `CheckpointError` if the file is not as it was written. Takes next to no memory."""
        n_bytes, digest = 0, hashlib.sha256()
        while len(piece := self._piece(file.name, RangeByteRequest(n_bytes, n_bytes + _PIECE))):
            n_bytes += len(piece)
            digest.update(piece)
            if len(piece) < _PIECE:
                break
        self._compare(file, n_bytes, digest.hexdigest())

    def _piece(self, name: str, span: RangeByteRequest | None) -> bytes:
        content = sync(self._store().get(name, _BYTES, span))
        if content is None:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return content.to_bytes()

    def _store(self) -> RemoteStore:
        return RemoteStore.at(self.path, read_only=False)


def folder_at(path: str) -> ArrayFolder:
    """Give the folder at a path or a URL."""
    return RemoteFolder(path) if is_url(path) else ArrayFolder(path)


class _Hashing:
    """Passes on what is written, and its digest and length."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.n_bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.n_bytes += len(data)
        return self._file.write(data)


def sync_file(file: IO[Any]) -> None:
    """Have what was written on the disk itself."""
    file.flush()
    os.fsync(file.fileno())
