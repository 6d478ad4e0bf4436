"""Scratch: the working state of each row block between passes, in memory or in Zarr on disk."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import dask
import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from scialm_dask.data.lease import held_name
from scialm_dask.data.remote import is_url
from scialm_dask.data.rows import MemoryRows, Rows
from scialm_dask.data.store import output_error
from scialm_dask.errors import InputError, OutputError

Array = NDArray[Any]
R = TypeVar("R")  # a dataclass with arrays in some fields
_REMEDY = "check that disk, or put the scratch on another"
_NOTHING = np.zeros((0, 0), np.float32)
_PIECE = 1 << 18  # bytes; read data are still in cache when their checksum is taken
_PLAIN = {"zarr_format": 2, "compressor": None, "filters": None, "fill_value": 0, "order": "C"}


@dataclass(frozen=True)
class MemoryScratch:
    """Scratch in memory: tasks pass on the records themselves, which stay with the worker that made them."""

    durable = False
    path = None

    def put(self, record: R, block: int, version: int, old: R | None = None, kept: R | None = None) -> R:
        """Return the record."""
        return record

    def get(self, kept: R, without: Collection[str] = ()) -> R:
        """Return the record."""
        return kept

    def drop(self, name: str, version: int) -> None:
        """Do nothing, since unused arrays are freed."""


class _OnDisk:
    """An array on disk: its one chunk, shape, dtype and CRC-32. Not a dataclass or tuple, which Dask would traverse."""

    def __init__(self, chunk: str, shape: tuple[int, ...], dtype: str, crc: int) -> None:
        self.chunk, self.shape, self.dtype, self.crc = chunk, shape, dtype, crc

    def read(self) -> Array:
        """Return the array; raises `OutputError` if it is not as written."""
        array = np.empty(self.shape, self.dtype)
        left: Any = array.reshape(-1).view(np.uint8)
        crc = 0
        try:
            with open(self.chunk, "rb", buffering=0) as stream:
                while n_read := stream.readinto(left[:_PIECE]):
                    crc, left = crc32(left[:n_read], crc), left[n_read:]
                whole = not left.size and not stream.read(1)
        except OSError as error:
            raise OutputError(f"{self.chunk}: cannot be read ({error.strerror}); {_REMEDY}") from error
        if not whole or crc != self.crc:
            raise OutputError(f"{self.chunk}: is not what was written there; {_REMEDY}")
        return array


@dataclass(frozen=True)
class ZarrScratch:
    """Scratch on disk: one uncompressed Zarr array per block, so that memory does not depend on the number of cells.

    The path is a folder used for nothing else, on a disk that all workers see. The one chunk of each array is written
    and read directly: the Zarr library takes five times as long, and more threads do not help, since they share its
    event loop. Every read compares the CRC-32, which takes 1 to 3 % of a pass, since kernels would end in a
    segmentation fault at an index that the disk has changed.
    """

    path: str
    durable = True

    def put(self, record: R, block: int, version: int, old: R | None = None, kept: R | None = None) -> R:
        """Write the arrays of a record, but for those shared with `old`, which `kept` has on disk already."""
        places: dict[str, Any] = {}
        for name, value in vars(record).items():
            if old is not None and value is getattr(old, name):
                places[name] = getattr(kept, name)
            elif isinstance(value, np.ndarray):
                places[name] = self._write(name, version, block, value)
        return replace(record, **places)  # type: ignore[type-var]

    def _write(self, name: str, version: int, block: int, array: Array) -> _OnDisk:
        """Write an array under a new name, so that no other call reads or replaces it before it is complete."""
        folder = os.path.join(self.path, f"{name}.{version}", f"{block}-{uuid.uuid4().hex[:12]}")
        os.makedirs(folder)
        metadata = {"shape": array.shape, "chunks": [max(1, n) for n in array.shape], "dtype": array.dtype.str}
        Path(folder, ".zarray").write_text(json.dumps(_PLAIN | metadata))
        chunk = os.path.join(folder, ".".join("0" * array.ndim))
        array = np.ascontiguousarray(array)
        with open(chunk, "wb") as file:
            file.write(array.data.cast("B") if array.size else b"")
        return _OnDisk(chunk, array.shape, array.dtype.str, crc32(array))

    def get(self, kept: R, without: Collection[str] = ()) -> R:
        """Return what `put` wrote, with the arrays in `without` empty; raises `OutputError` if it is not as written."""
        places = {name: value for name, value in vars(kept).items() if isinstance(value, _OnDisk)}
        arrays = {name: _NOTHING if name in without else value.read() for name, value in places.items()}
        return replace(kept, **arrays)  # type: ignore[type-var]

    def drop(self, name: str, version: int) -> None:
        """Delete a version from disk: rename it now, and free it in a thread while the next pass begins."""
        folder, gone = os.path.join(self.path, f"{name}.{version}"), os.path.join(self.path, f".{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, gone)
            threading.Thread(target=shutil.rmtree, args=(gone, True)).start()


@contextlib.contextmanager
def new_scratch(parent: str | os.PathLike[str] | None, rows: Rows) -> Iterator[MemoryScratch | ZarrScratch]:
    """Open scratch in a new folder below `parent`, or in memory if that is None.

    The folder is removed if the block fails, else when nothing refers to the scratch any more. Every task that reads
    from it does, as lazy factors may outlive their result. `rows` are kept as long, since what a lost worker held is
    computed from them again, and they may be a temporary copy. Raises `InputError` if `parent` does not exist,
    `OutputError` if it cannot be written or the disk is full.
    """
    store: MemoryScratch | ZarrScratch = MemoryScratch()
    if parent is not None:
        if not os.path.isdir(parent):
            raise InputError(f"{os.fspath(parent)}: no such folder for scratch; create it first")
        try:
            store = ZarrScratch(tempfile.mkdtemp(prefix=f"scialm-{held_name()}-", dir=os.path.abspath(parent)))
        except OSError as error:
            raise OutputError(
                f"{os.fspath(parent)}: not writable ({error.strerror}); choose another folder for scratch"
            ) from error
        weakref.finalize(store, shutil.rmtree, store.path, ignore_errors=True)
    if not isinstance(rows, MemoryRows):
        weakref.finalize(store, lambda _: None, rows)
    try:
        yield store
    except BaseException as error:
        if store.path is not None:
            shutil.rmtree(store.path, ignore_errors=True)
            # Tasks under way may write once more; when the process ends no thread does.
            atexit.register(shutil.rmtree, store.path, ignore_errors=True)
            if isinstance(error, OSError):
                raise output_error(store.path, error) from error
        raise


def scratch_folder_for(destination: str | os.PathLike[str] | None) -> str:
    """Return the default folder for scratch: beside a local output, else that of temporary files."""
    path = "" if destination is None else os.fspath(destination).removeprefix("file://")
    if not path or is_url(path):
        return dask.config.get("temporary-directory", None) or tempfile.gettempdir()
    return os.path.dirname(os.path.abspath(path))
