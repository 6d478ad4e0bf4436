"""Locks on stores that end with their process, and files that killed runs have left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from scialm_dask.data.arrays import all_of
from scialm_dask.errors import InputError, OutputError
from scialm_dask.events import Listener, Note

BEAT = 10.0  # seconds between renewals of a lease
_DEAD = 3.5  # beats without a renewal after which the holder counts as dead
_PREFIX = ".lease-"
_BYTES = default_buffer_prototype()
_HOLDER = r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>[0-9a-f]+)-"
_PARTIAL = re.compile(rf"\.(?P<final>.+)\.{_HOLDER}[0-9a-f]{{4}}\.(partial|replaced)")
_SCRATCH = re.compile(rf"scialm-{_HOLDER}.*")
_MOST_NAMED = 3


class Lease:
    """A key in a store, renewed until `end`, that keeps other processes off; `OutputError` if another one holds it.

    A holder on this machine is known to be alive or dead. One on another machine is dead if it does not renew its lease
    for half a minute. Of several processes that ask at the same time, the one with the smallest key gets the lease.
    """

    def __init__(self, store: Any, where: str) -> None:
        self._store, self._where, self._key = store, where, f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        self._ended, self._holder, self._beats, self._held = threading.Event(), _this_process(), 0, False
        self._write()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()
        try:
            self._refuse_others()
        except BaseException:
            self.end()
            raise
        self._held = True
        self._write()

    def _write(self) -> None:
        self._beats += 1
        content = json.dumps(self._holder | {"beats": self._beats, "held": self._held}).encode()
        sync(self._store.set(self._key, _BYTES.buffer.from_bytes(content)))

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # a store may fail for a while; others wait for several beats
                if self._read(self._key):
                    self._write()

    def end(self) -> None:
        """Release the lease."""
        self._ended.set()
        self._renewing.join(BEAT)  # else it might write the key anew
        with contextlib.suppress(Exception):
            sync(self._store.delete(self._key))

    def check(self) -> None:
        """Raise `OutputError` if another process has taken over, because this one stood still for too long."""
        if not self._read(self._key):
            raise OutputError(f"{self._where}: another run goes on from these checkpoints; this one ends")

    def _refuse_others(self) -> None:
        """Raise `OutputError` if another holder lives, or asks with a smaller key; delete the leases of dead ones."""
        seen: dict[str, tuple[float, Any]] = {}
        waiting = True
        while waiting:
            waiting = False
            for key in sync(all_of(self._store.list_dir(""))):
                if not key.startswith(_PREFIX) or key == self._key or (holder := self._read(key)) is None:
                    continue
                now, alive = time.monotonic(), is_alive(holder)
                since, before = seen.get(key, (now, holder))
                if alive is False or (holder == before and now - since > _DEAD * BEAT):
                    with contextlib.suppress(FileNotFoundError):
                        sync(self._store.delete(key))
                elif (alive or holder != before) and (holder.get("held", True) or key < self._key):
                    raise OutputError(
                        f"{self._where}: another run writes its checkpoints there; let it end, or choose another folder"
                    )
                else:
                    seen[key], waiting = (since if holder == before else now, holder), True
            time.sleep(BEAT / 10 if waiting else 0)

    def _read(self, key: str) -> dict[str, Any] | None:
        content = sync(self._store.get(key, _BYTES))
        try:
            return None if content is None else dict(json.loads(content.to_bytes()))
        except (ValueError, TypeError):
            return {}


def _this_process() -> dict[str, Any]:
    return {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Return whether a process lives; None if it runs on another machine."""
    if process.get("machine") != _machine():
        return None
    try:
        return bool(abs(psutil.Process(process["pid"]).create_time() - process["started"]) < 2)
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _machine() -> str:
    """Return a digest of the names of this machine and its container: each container numbers its own processes."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]


def held_name() -> str:
    """Return a part for the name of a file or folder by which `clean` knows whether this process still holds it."""
    process = _this_process()
    return f"{process['machine']}-{process['pid']}-{int(process['started']):x}-{uuid.uuid4().hex[:4]}"


def clean(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Remove what killed runs have left in a folder of results or scratch.

    Returns the names in ``removed``, and in ``kept`` those that belong to living processes, or to processes on another
    machine, where `clean` can remove them. Raises `InputError` if there is no such folder.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{os.fspath(folder)}: no such folder; give the one in which results or scratch were to be")
    removed: list[str] = []
    kept: list[str] = []
    for path, alive in _leftovers(folder):
        if alive is False:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        (kept if os.path.lexists(path) else removed).append(path.name)
    return {"folder": os.fspath(folder), "removed": removed, "kept": kept}


def tell_leftovers(folder: str | os.PathLike[str], listen: Listener) -> None:
    """Tell the listener what killed runs have left in a folder."""
    names = [path.name for path, alive in _leftovers(folder) if alive is False]
    if names:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        what = f"holds what killed runs have left, {', '.join(names[:_MOST_NAMED])}{more}"
        listen(Note(f"{os.fspath(folder)}: {what}; remove it by `scialm-dask clean {os.fspath(folder)}`"))


def _leftovers(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, bool | None]]:
    """Yield the files and folders of runs, and whether their process lives; None if it is on another machine."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = {name: match for name in names if (match := _PARTIAL.fullmatch(name) or _SCRATCH.fullmatch(name))}
    # A run killed between the two renames that replace a result has left the only copies there are.
    replaced = {match["final"] for name, match in found.items() if name.endswith(".replaced") and match.re is _PARTIAL}
    for name, match in found.items():
        if match.re is _PARTIAL and match["final"] in replaced and not os.path.lexists(Path(folder, match["final"])):
            continue
        holder = {"machine": match["machine"], "pid": int(match["pid"]), "started": int(match["started"], 16)}
        yield Path(folder, name), is_alive(holder)
