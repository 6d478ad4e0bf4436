"""What runs that were killed left behind: unfinished results and scratch, whose names say which process holds them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scialm_dask.data.lease import is_alive, this_process
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Note

_HOLDER = r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>[0-9a-f]+)-"
_PARTIAL = re.compile(rf"\.(?P<final>.+)\.{_HOLDER}[0-9a-f]{{4}}\.(partial|replaced)")
_SCRATCH = re.compile(rf"scialm-{_HOLDER}.*")
_MOST_NAMED = 3


def held_name() -> str:
    """Return part of a name that tells the others who holds it, as long as this process lives."""
    process = this_process()
    return f"{_short(process['machine'])}-{process['pid']}-{int(process['started']):x}-{uuid.uuid4().hex[:4]}"


def clean(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Remove what runs that were killed have left in a folder, and what no living process holds.

    Parameters
    ----------
    folder
        Where results and scratch were to be.

    Returns
    -------
    dict
        ``removed``, and ``kept``: names of what is held by processes that live, or that are of another machine, where
        this is to be called then.

    Raises
    ------
    InputError
        If there is no such folder.
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
