"""Whether a store has changed: told from its metadata, without reading the matrix."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from zarr.core.sync import sync

from scialm_dask.data.remote import RemoteStore, is_url
from scialm_dask.data.rows import Rows, StoredRows
from scialm_dask.errors import InputError

_METADATA = {".zarray", ".zattrs", ".zgroup", "zarr.json"}


def fingerprint(rows: Rows) -> str | None:
    """Digest what rows are read from, see `Stamp`; None if that is in memory."""
    return _digest(rows.path, (rows.element,)) if isinstance(rows, StoredRows) else None


class Stamp(NamedTuple):
    """What some elements of a store were like: names, sizes and times of their files, and Zarr's metadata.

    Behind a URL, names, sizes and versions. The digest is None if it has no such things.
    """

    path: str
    elements: tuple[str, ...]
    digest: str | None

    @classmethod
    def of(cls, path: str, *elements: str) -> Stamp:
        """Look at these elements; at everything, if none is given."""
        elements = elements or ("",)
        return cls(path, elements, _digest(path, elements))

    def check(self) -> None:
        """Raise `InputError` if it is not like that any more."""
        if _digest(self.path, self.elements) != self.digest:
            raise InputError(
                f"{self.path}: was changed while it was read; begin again when nothing writes to it any more"
            )


def _digest(path: str, elements: tuple[str, ...]) -> str | None:
    if is_url(path):
        store = RemoteStore.at(path, read_only=True)
        found = [sync(store.stamps(element)) for element in elements]
        words = None if None in found else "\n".join(word for each in found for word in each or ())
        return None if words is None else hashlib.sha256(words.encode()).hexdigest()
    digest = hashlib.sha256()
    for file in (file for element in elements for file in _files(path, element)):
        try:
            status = os.stat(file)
        except FileNotFoundError:
            continue  # between the listing and now: a change as well
        digest.update(f"{os.path.relpath(file, path)} {status.st_size} {status.st_mtime_ns}\n".encode())
        if os.path.basename(file) in _METADATA:
            with open(file, "rb") as opened:
                digest.update(opened.read())
    return digest.hexdigest()


def _files(path: str, element: str) -> Iterator[str]:
    if os.path.isfile(path):
        yield path
        return
    for folder, below, names in os.walk(os.path.join(path, element)):
        below.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))
