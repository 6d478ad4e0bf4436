"""Who holds what: a lock on a store that a dead process does not hold, and what killed runs have left behind."""

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

from scialm_dask.data.remote import all_of
from scialm_dask.errors import InputError, OutputError
from scialm_dask.events import Listener, Note

BEAT = 10.0  # seconds after which a lease is renewed
_DEAD = 3.5  # beats without renewal after which its holder is taken for dead
_PREFIX = ".lease-"
_BYTES = default_buffer_prototype()
_HOLDER = r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>[0-9a-f]+)-"
_PARTIAL = re.compile(rf"\.(?P<final>.+)\.{_HOLDER}[0-9a-f]{{4}}\.(partial|replaced)")
_SCRATCH = re.compile(rf"scialm-{_HOLDER}.*")
_MOST_NAMED = 3


class Lease:
    """A key that its holder renews; `lease` takes it."""

    def __init__(self, store: Any, where: str) -> None:
        self._store, self._where, self._key = store, where, f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        self._ended, self._holder, self._beats = threading.Event(), this_process(), 0

    def write(self) -> None:
        """Show that the holder lives."""
        self._beats += 1
        content = json.dumps(self._holder | {"beats": self._beats}).encode()
        sync(self._store.set(self._key, _BYTES.buffer.from_bytes(content)))

    def renew(self) -> None:
        """Write again and again, until `end`."""
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # a store that fails for a while; others wait for more than one beat
                if self._read(self._key):
                    self.write()

    def end(self) -> None:
        """Give the lease back."""
        self._ended.set()
        with contextlib.suppress(Exception):
            sync(self._store.delete(self._key))

    def check(self) -> None:
        """Raise `OutputError` if somebody has taken over, since this process stood still for too long."""
        if not self._read(self._key):
            raise OutputError(f"{self._where}: another run goes on from these checkpoints; this one ends")

    def refuse_others(self) -> None:
        """Raise `OutputError` if another holder lives; remove what the dead have left."""
        seen: dict[str, tuple[float, Any]] = {}
        while True:
            now, dead = time.monotonic(), []
            for key in sync(all_of(self._store.list_dir(""))):
                if not key.startswith(_PREFIX) or key == self._key or (holder := self._read(key)) is None:
                    continue
                since, before = seen.setdefault(key, (now, holder))
                alive = is_alive(holder)
                if alive or holder != before:
                    raise OutputError(
                        f"{self._where}: another run writes its checkpoints there; let it end, or choose another folder"
                    )
                if alive is False or now - since > _DEAD * BEAT:
                    dead.append(key)
            for key in dead:
                with contextlib.suppress(FileNotFoundError):
                    sync(self._store.delete(key))
            if not seen.keys() - set(dead):
                return
            seen = {key: value for key, value in seen.items() if key not in dead}
            time.sleep(BEAT / 10)

    def _read(self, key: str) -> dict[str, Any] | None:
        content = sync(self._store.get(key, _BYTES))
        try:
            return None if content is None else dict(json.loads(content.to_bytes()))
        except (ValueError, TypeError):
            return {}


@contextlib.contextmanager
def lease(store: Any, where: str) -> Iterator[Lease]:
    """Hold a store while the block runs, so that no other process does; raises `OutputError` if one does already.

    Of a holder on this machine it is known whether it lives. One on another machine, which a lock of the file system
    may not reach, is dead if it does not renew its lease for half a minute.
    """
    held = Lease(store, where)
    held.write()
    try:
        held.refuse_others()
        threading.Thread(target=held.renew, daemon=True).start()
        yield held
    finally:
        held.end()


def this_process() -> dict[str, Any]:
    """Name this process so that others can tell whether it lives; see `is_alive`."""
    return {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Tell whether a process lives; None if it is of another machine."""
    if process.get("machine") != _machine():
        return None
    try:
        return bool(abs(psutil.Process(process["pid"]).create_time() - process["started"]) < 2)
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _machine() -> str:
    """Name this machine and its container: process numbers are their own in each."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)


def held_name() -> str:
    """Return part of a name that tells the others who holds it, as long as this process lives."""
    process = this_process()
    return f"{_short(process['machine'])}-{process['pid']}-{int(process['started']):x}-{uuid.uuid4().hex[:4]}"


def clean(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Remove what runs that were killed have left in a folder of results or scratch, and what no living process holds.

    Returned are the names in ``removed``, and in ``kept`` what is held by processes that live, or that are of another
    machine, where this is to be called then. Raises `InputError` if there is no such folder.
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
    """Name what runs that were killed have left in a folder."""
    names = [path.name for path, alive in _leftovers(folder) if alive is False]
    if names:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        what = f"holds what killed runs have left, {', '.join(names[:_MOST_NAMED])}{more}"
        listen(Note(f"{os.fspath(folder)}: {what}; remove it by `scialm-dask clean {os.fspath(folder)}`"))


def _leftovers(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, bool | None]]:
    """Yield what is held by processes, and whether these live; None if they are of another machine."""
    this = this_process()
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in names:
        if (match := _PARTIAL.fullmatch(name) or _SCRATCH.fullmatch(name)) is None:
            continue
        found = match.groupdict()
        final = found.get("final")
        if final and not os.path.lexists(Path(folder, final)) and any(_replaces(each, final) for each in names):
            continue  # killed between two renames: the only copies there are
        mine = found["machine"] == _short(this["machine"])
        holder = {"machine": this["machine"], "pid": int(found["pid"]), "started": int(found["started"], 16)}
        yield Path(folder, name), is_alive(holder) if mine else None


def _replaces(name: str, final: str) -> bool:
    match = _PARTIAL.fullmatch(name)
    return match is not None and match["final"] == final and name.endswith(".replaced")


def _short(machine: str) -> str:
    return hashlib.sha256(machine.encode()).hexdigest()[:8]
