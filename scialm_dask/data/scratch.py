"""The working state of each row block between passes: in memory, or in Zarr on local disk."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray

__all__ = ["MemoryScratch", "Scratch", "ZarrScratch"]

Array = NDArray[Any]


class Scratch(Protocol):
    """Keeps arrays by name, version and block. What `put` returns is all that travels between tasks."""

    @property
    def durable(self) -> bool:
        """Whether what `put` returns is small and outlives the process that made it."""
        ...

    def put(self, name: str, version: int, block: int, array: Array) -> Any:
        """Keep `array`. The same call again does no harm, so that a task can be run twice, even at once."""
        ...

    def get(self, reference: Any) -> Array:
        """Give back what `put` kept."""
        ...

    def drop(self, name: str, version: int) -> None:
        """Forget a version in all blocks."""
        ...


@dataclass(frozen=True)
class MemoryScratch:
    """The arrays themselves travel between tasks, and stay with the worker that made them."""

    durable = False

    def put(self, name: str, version: int, block: int, array: Array) -> Any:
        """Keep `array`."""
        return array

    def get(self, reference: Any) -> Array:
        """Give back what `put` kept."""
        return reference  # type: ignore[no-any-return]

    def drop(self, name: str, version: int) -> None:
        """Do nothing: arrays that nobody refers to are gone."""


@dataclass(frozen=True)
class ZarrScratch:
    """Arrays on disk, uncompressed, one Zarr array for each block: memory does not depend on the number of cells.

    Parameters
    ----------
    path
        A folder of our own, on a disk that all workers see.
    """

    path: str
    durable = True

    def put(self, name: str, version: int, block: int, array: Array) -> tuple[str, str]:
        """Write `array`, under a name that no other call gives: one that is under way is never read or replaced."""
        folder, own = os.path.join(self.path, f"{name}.{version}"), f"{block}-{uuid.uuid4().hex[:12]}"
        chunks = tuple(max(1, n) for n in array.shape)
        target = zarr.create_array(
            folder,
            name=own,
            shape=array.shape,
            chunks=chunks,
            dtype=array.dtype,
            compressors=None,
        )
        target[...] = array
        return folder, own

    def get(self, reference: Any) -> Array:
        """Read what `put` wrote."""
        folder, own = reference
        return np.asarray(zarr.open_array(folder, path=own, mode="r")[...])

    def drop(self, name: str, version: int) -> None:
        """Delete a version from disk."""
        shutil.rmtree(Path(self.path) / f"{name}.{version}", ignore_errors=True)
