"""The working state of each row block between passes: in memory, or in Zarr on local disk."""

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
R = TypeVar("R")  # a dataclass, of which some fields are arrays
_NOTHING = np.zeros((0, 0), np.float32)
_PIECE = 1 << 18  # bytes: what was read is still in cache when its checksum is taken


@dataclass(frozen=True)
class MemoryScratch:
    """Records themselves are what tasks give one another, and stay with the worker that made them."""

    durable = False
    path = None

    def put(self, record: R, block: int, version: int, old: R | None = None, kept: R | None = None) -> R:
        """Keep a record of arrays."""
        return record

    def get(self, kept: R, without: Collection[str] = ()) -> R:
        """Return what `put` kept."""
        return kept

    def drop(self, name: str, version: int) -> None:
        """Do nothing: arrays that nobody refers to are gone."""


class _OnDisk:
    """The one chunk of an array, and what its metadata say. Dask does not look into it, as it does into dataclasses."""

    def __init__(self, chunk: str, shape: tuple[int, ...], dtype: str, crc: int) -> None:
        self.chunk, self.shape, self.dtype, self.crc = chunk, shape, dtype, crc

    def read(self) -> Array:
        """Read the array; raises `OutputError` if that is no longer what is there."""
        array = np.empty(self.shape, self.dtype)
        left: Any = array.reshape(-1).view(np.uint8)
        crc = 0
        try:
            with open(self.chunk, "rb", buffering=0) as stream:
                while n_read := stream.readinto(left[:_PIECE]):
                    crc, left = crc32(left[:n_read], crc), left[n_read:]
                whole = not left.size and not stream.read(1)
        except OSError as error:
            raise OutputError(
                f"{self.chunk}: cannot be read ({error.strerror}); check that disk, or put the scratch on another"
            ) from error
        if not whole or crc != self.crc:
            raise OutputError(
                f"{self.chunk}: is not what was written there; check that disk, or put the scratch on another"
            )
        return array


@dataclass(frozen=True)
class ZarrScratch:
    """Arrays on disk, uncompressed, one Zarr array for each block: memory does not depend on the number of cells.

    The path is a folder of our own, on a disk that all workers see. The one chunk of an array is written and read as it
    is. By way of the Zarr library that took five times as long, and more threads did not help, since they take turns at
    its event loop. Its CRC-32 is compared each time, for 1 to 3 % of a pass: an index that a disk has changed would end
    in a segmentation fault.
    """

    path: str
    durable = True

    def put(self, record: R, block: int, version: int, old: R | None = None, kept: R | None = None) -> R:
        """Write the arrays of a record; those that it shares with `old` stay where `kept` has them."""
        places: dict[str, Any] = {}
        for name, value in vars(record).items():
            if old is not None and value is getattr(old, name):
                places[name] = getattr(kept, name)
            elif isinstance(value, np.ndarray):
                places[name] = self._write(name, version, block, value)
        return replace(record, **places)  # type: ignore[type-var]

    def _write(self, name: str, version: int, block: int, array: Array) -> _OnDisk:
        """Write an array, under a name that no other call gives: one that is under way is never read or replaced."""
        folder = os.path.join(self.path, f"{name}.{version}", f"{block}-{uuid.uuid4().hex[:12]}")
        os.makedirs(folder)
        metadata = {
            "zarr_format": 2,
            "shape": array.shape,
            "chunks": [max(1, n) for n in array.shape],
            "dtype": array.dtype.str,
            "compressor": None,
            "filters": None,
            "fill_value": 0,
            "order": "C",
        }
        Path(folder, ".zarray").write_text(json.dumps(metadata))
        chunk = os.path.join(folder, ".".join("0" * array.ndim))
        array = np.ascontiguousarray(array)
        with open(chunk, "wb") as file:
            file.write(array.data.cast("B") if array.size else b"")
        return _OnDisk(chunk, array.shape, array.dtype.str, crc32(array))

    def get(self, kept: R, without: Collection[str] = ()) -> R:
        """Read what `put` wrote, but for the arrays named in `without`; raises `OutputError` if it is not there."""
        places = {name: value for name, value in vars(kept).items() if isinstance(value, _OnDisk)}
        arrays = {name: _NOTHING if name in without else value.read() for name, value in places.items()}
        return replace(kept, **arrays)  # type: ignore[type-var]

    def drop(self, name: str, version: int) -> None:
        """Delete a version from disk: out of the way at once, gone a little later."""
        folder, gone = os.path.join(self.path, f"{name}.{version}"), os.path.join(self.path, f".{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, gone)
            # Freeing gigabytes takes a while, in which the next pass can begin.
            threading.Thread(target=shutil.rmtree, args=(gone, True)).start()


@contextlib.contextmanager
def new_scratch(parent: str | os.PathLike[str] | None, rows: Rows) -> Iterator[MemoryScratch | ZarrScratch]:
    """Open scratch in a new folder below `parent`, or in memory if that is None.

    If the block fails the folder is removed. Else it stays as long as the scratch itself, which every task that reads
    from there holds: lazy factors may outlive the result that they came with. What a lost worker held is made anew from
    `rows`, so a temporary copy stays as long, too. Raises `InputError` if `parent` is not there, `OutputError` if it
    cannot be written, or the disk is full.
    """
    if parent is None:
        memory = MemoryScratch()
        _keep(rows, memory)
        yield memory
        return
    if not os.path.isdir(parent):
        raise InputError(f"{os.fspath(parent)}: no such folder for scratch; create it first")
    try:
        folder = tempfile.mkdtemp(prefix=f"scialm-{held_name()}-", dir=os.path.abspath(parent))
    except OSError as error:
        raise OutputError(
            f"{os.fspath(parent)}: not writable ({error.strerror}); choose another folder for scratch"
        ) from error
    store = ZarrScratch(folder)
    _keep(rows, store)
    weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    try:
        yield store
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        # Tasks that were under way may write once more; no thread does when the process ends.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise output_error(folder, error) from error
        raise


def _keep(rows: Rows, store: object) -> None:
    """Keep the rows of a store as long as the scratch; those in memory are not made anew from anything."""
    if not isinstance(rows, MemoryRows):
        weakref.finalize(store, _let_go, rows)


def _let_go(_: object) -> None:
    """Hold something until called."""


def scratch_folder_for(destination: str | os.PathLike[str] | None) -> str:
    """Where the working state goes by default: beside a local output, else where temporary files do."""
    path = "" if destination is None else os.fspath(destination).removeprefix("file://")
    if not path or is_url(path):
        return dask.config.get("temporary-directory", None) or tempfile.gettempdir()
    return os.path.dirname(os.path.abspath(path))
