"""Checkpoints behind URLs, where nothing can be renamed or locked: the manifest, put last, makes one whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from zarr.core.sync import sync

from scialm_dask.data.array_files import ArrayFolder, RemoteFolder
from scialm_dask.data.checkpoint import KEPT, MANIFEST, NUMBERED, Arrays, Checkpoint, Checkpoints, manifest_of
from scialm_dask.data.remote import RemoteStore, is_url
from scialm_dask.errors import OutputError

__all__ = ["RemoteCheckpoints", "checkpoints_at"]


class RemoteCheckpoints(Checkpoints):
    """The checkpoints of one run behind a URL, which all workers must reach.

    Nothing keeps a second run from writing there too: what the two would mix up, checksums tell.

    Parameters
    ----------
    url
        Of this run alone.

    Raises
    ------
    OutputError
        If it is of a web server.
    """

    def __init__(self, url: str) -> None:
        self.folder = url.rstrip("/")
        self._store = RemoteStore.at(self.folder, read_only=False)
        self._refused: set[str] = set()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def names(self) -> list[str]:
        """Names of all that were completed, newest first; those refused are left out."""
        return self._whole(self._keys())

    def begin(self) -> ArrayFolder:
        """Choose a folder for the arrays of a new one, after all that are there, whole or not."""
        newest = max((int(name) for name in _numbered(self._keys())), default=0)
        return RemoteFolder(f"{self.folder}/{newest + 1:06d}")

    def abandon(self, files: ArrayFolder) -> None:
        """Remove one that was begun and cannot be completed."""
        with contextlib.suppress(Exception):
            sync(self._store.delete_dir(os.path.basename(files.path)))

    def commit(self, files: ArrayFolder, notes: Mapping[str, Any], arrays: Arrays) -> Checkpoint:
        """Complete what was begun, and drop all older ones but one.

        Raises
        ------
        OutputError
            If it cannot be written, or workers wrote elsewhere.
        """
        assert isinstance(files, RemoteFolder)
        name, keys = os.path.basename(files.path), self._keys()
        for file in (file for group in arrays.values() for file in group):
            if f"{name}/{file.name}" not in keys:
                raise OutputError(
                    f"{self.folder}: {file.name}, which a worker has written, is not there; give all workers the same "
                    "configuration of fsspec"
                )
        files.write(MANIFEST, manifest_of(notes, arrays).encode())
        kept = self._whole(keys | {f"{name}/{MANIFEST}"})[:KEPT]
        for older in _numbered(keys) - self._refused - set(kept):
            if int(older) < int(kept[-1]):  # those that were never completed go too
                self.remove(older)
        return Checkpoint(files.path, dict(notes), {name: tuple(group) for name, group in arrays.items()})

    def own(self, folder: str | None) -> None:
        """Do nothing: what a bucket says is no reason to remove a folder of this machine."""

    def clear(self) -> None:
        """Remove all checkpoints."""
        for name in _numbered(self._keys()) - self._refused:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove one: first its manifest, so that it never looks torn."""
        sync(self._store.delete(f"{name}/{MANIFEST}"))
        with contextlib.suppress(Exception):
            sync(self._store.delete_dir(name))

    def _keys(self) -> set[str]:
        return set(sync(self._store.all_keys()))

    def _whole(self, keys: set[str]) -> list[str]:
        whole = {name for name in _numbered(keys) if f"{name}/{MANIFEST}" in keys}
        return sorted(whole - self._refused, key=int, reverse=True)


def _numbered(keys: set[str]) -> set[str]:
    return {name for name in (key.partition("/")[0] for key in keys) if NUMBERED.fullmatch(name)}


def checkpoints_at(folder: str | os.PathLike[str]) -> Checkpoints:
    """Open the checkpoints of a run, in a folder or behind a URL; see `Checkpoints`."""
    return RemoteCheckpoints(os.fspath(folder)) if is_url(folder) else Checkpoints(folder)
