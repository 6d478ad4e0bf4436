"""Checkpoints on disk: for each a numbered folder of plain arrays and a manifest. Knows nothing of what they mean.

One is written aside, synced, and renamed when it is whole. The manifest, which is written last, tells the size and the
SHA-256 of every array and of itself, and nothing is used before it was compared. The last two are kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from scialm_dask.data.array_files import ArrayFile, ArrayFolder, folder_at, sync_file
from scialm_dask.data.store import output_error
from scialm_dask.errors import CheckpointError, InputError, OutputError

__all__ = ["Arrays", "Checkpoint", "Checkpoints", "manifest_of", "read_checkpoint", "read_manifest"]

FORMAT = 1
_KIND = "scialm-dask checkpoint"
KEPT = 2
MANIFEST = "manifest.json"
_LOCK = ".lock"
_OWNED = ".scratch"
_PARTIAL = ".partial"
NUMBERED = re.compile(r"\d{6,}")
_ARRAY_NAME = re.compile(r"[a-z_]+\.\d+\.npy")  # so that none leads out of the folder
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # some network disks have none


Arrays = Mapping[str, Sequence[ArrayFile]]


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole.

    Parameters
    ----------
    path
        Its folder.
    notes
        Plain values.
    arrays
        Files of arrays, one for each block or just one, by what they hold.
    """

    path: str
    notes: dict[str, Any]
    arrays: dict[str, tuple[ArrayFile, ...]]

    @property
    def files(self) -> ArrayFolder:
        """What reads them."""
        return folder_at(self.path)


class Checkpoints:
    """The checkpoints of one run, in a folder of their own that is locked while this is open.

    Parameters
    ----------
    folder
        On a disk that all workers see. Made if it is not there, but not its parent.

    Raises
    ------
    OutputError
        If the folder cannot be made or written, or another run uses it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.path.abspath(folder)
        if not os.path.isdir(os.path.dirname(self.folder)):
            raise OutputError(f"{os.path.dirname(self.folder)}: no such folder; create it first")
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._lock = _locked(self.folder)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.folder}: not writable ({error.strerror}); choose another folder") from error
        self._refused: set[str] = set()
        for name in os.listdir(self.folder):
            if name.endswith(_PARTIAL):
                shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.close()

    def names(self) -> list[str]:
        """Names of all that were completed, newest first; those refused are left out."""
        there = (name for name in os.listdir(self.folder) if NUMBERED.fullmatch(name))
        return sorted((name for name in there if name not in self._refused), key=int, reverse=True)

    def read(self, name: str) -> Checkpoint:
        """Read the manifest of one, and see that all its arrays are as they were written.

        Raises
        ------
        CheckpointError
            If it is torn, truncated, edited, or of a newer version of this program.
        """
        return read_checkpoint(os.path.join(self.folder, name))

    def notes(self) -> dict[str, Any]:
        """Give the notes of the last one that can be read; see `read` for what that does not check."""
        for name in self.names():
            with contextlib.suppress(CheckpointError):
                return read_manifest(os.path.join(self.folder, name)).notes
        raise InputError(f"{self.folder}: holds no checkpoint that can be read; check the path")

    def refuse(self, name: str) -> None:
        """Leave one out from now on. It is not deleted."""
        self._refused.add(name)

    def begin(self) -> ArrayFolder:
        """Make a folder for the arrays of a new one."""
        path = os.path.join(self.folder, f".{uuid.uuid4().hex[:8]}{_PARTIAL}")
        os.mkdir(path)
        return ArrayFolder(path)

    def abandon(self, files: ArrayFolder) -> None:
        """Remove one that was begun and cannot be completed."""
        shutil.rmtree(files.path, ignore_errors=True)

    def commit(self, files: ArrayFolder, notes: Mapping[str, Any], arrays: Arrays) -> Checkpoint:
        """Complete what was begun, and drop all older ones but one.

        Raises
        ------
        OutputError
            If it cannot be written, or workers wrote where this process does not see it.
        """
        for file in (file for group in arrays.values() for file in group):
            if not os.path.exists(os.path.join(files.path, file.name)):
                raise OutputError(
                    f"{self.folder}: {file.name}, which a worker has written, is not there; choose a folder on a disk "
                    "that all workers share"
                )
        with open(os.path.join(files.path, MANIFEST), "w") as manifest:
            manifest.write(manifest_of(notes, arrays))
            sync_file(manifest)
        _sync_folder(files.path)
        newest = max((int(name) for name in os.listdir(self.folder) if NUMBERED.fullmatch(name)), default=0)
        final = os.path.join(self.folder, f"{newest + 1:06d}")
        os.rename(files.path, final)
        _sync_folder(self.folder)
        for name in self.names()[KEPT:]:
            self.remove(name)
        return Checkpoint(final, dict(notes), {name: tuple(group) for name, group in arrays.items()})

    def own(self, folder: str | None) -> None:
        """Take charge of a folder of temporary files, and remove the one before, which a run that was killed left.

        Both sides hold the same token: a folder that merely was named here by somebody is not removed.
        """
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
        """Remove all checkpoints, and the folder if nothing else is there."""
        for name in self.names():
            self.remove(name)
        if not set(os.listdir(self.folder)) - {_LOCK, _OWNED}:
            shutil.rmtree(self.folder, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove one: first its name, so that it never looks torn."""
        aside = os.path.join(self.folder, f".{name}{_PARTIAL}")
        os.rename(os.path.join(self.folder, name), aside)
        shutil.rmtree(aside, ignore_errors=True)

    def error(self, error: OSError) -> OSError:
        """Say what went wrong in writing one, where that is known."""
        if isinstance(error, FileNotFoundError):
            return OutputError(
                f"{self.folder}: a worker does not see this folder; choose one on a disk that all workers share"
            )
        return output_error(self.folder, error)


def read_checkpoint(path: str) -> Checkpoint:
    """Read one from its folder; see `Checkpoints.read`."""
    checkpoint = read_manifest(path)
    every = [file for group in checkpoint.arrays.values() for file in group]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        list(pool.map(checkpoint.files.verify, every))
    return checkpoint


def read_manifest(path: str) -> Checkpoint:
    """Read one without a look at its arrays."""
    try:
        manifest = folder_at(path).read(MANIFEST)
    except CheckpointError:
        raise CheckpointError(f"{path}: has no {MANIFEST}; it is torn") from None
    try:
        content = json.loads(manifest)
        kind, version = content["kind"], int(content["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged ({error})") from error
    if kind != _KIND or version > FORMAT:
        raise CheckpointError(
            f"{path}: of format {version}, and this program reads format {FORMAT} at most; use the newer scialm-dask "
            "that wrote it"
        )
    if content.pop("sha256", None) != _digest(content):
        raise CheckpointError(f"{path}: {MANIFEST} is not what was written; it is damaged or edited")
    arrays = {name: tuple(ArrayFile(*file) for file in group) for name, group in content["arrays"].items()}
    for name in (file.name for group in arrays.values() for file in group):
        if not _ARRAY_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: names a file {name!r}, which is no array of a checkpoint")
    return Checkpoint(path, content["notes"], arrays)


def manifest_of(notes: Mapping[str, Any], arrays: Arrays) -> str:
    """Write a manifest, JSON."""
    content = {"kind": _KIND, "format": FORMAT, "notes": notes, "arrays": arrays}
    return json.dumps(content | {"sha256": _digest(content)}, indent=1)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _locked(folder: str) -> IO[str]:
    """Lock a folder until the file that is returned is closed, or this process ends however it does."""
    lock = open(os.path.join(folder, _LOCK), "a")  # noqa: SIM115  held open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise OutputError(
            f"{folder}: another run writes its checkpoints there; let it end, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            lock.close()
            raise
    return lock


def _sync_folder(path: str) -> None:
    """Make names in a folder last, where the system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
