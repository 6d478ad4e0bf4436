"""Whether a store has changed: told from its metadata, without reading the matrix."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from zarr.core.sync import sync

from scialm_dask.data.remote import RemoteStore, is_url
from scialm_dask.data.rows import Rows, StoredRows

__all__ = ["fingerprint"]

_METADATA = {".zarray", ".zattrs", ".zgroup", "zarr.json"}


def fingerprint(rows: Rows) -> str | None:
    """Digest names, sizes and times of what rows are read from, and the contents of Zarr's metadata.

    Behind a URL, names, sizes and versions. None if the rows are in memory, or in a store that has no such things.
    """
    if not isinstance(rows, StoredRows):
        return None
    if is_url(rows.path):
        stamps = sync(RemoteStore.at(rows.path, read_only=True).stamps(rows.element))
        return None if stamps is None else hashlib.sha256("\n".join(stamps).encode()).hexdigest()
    digest = hashlib.sha256()
    for path in _files(rows):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue  # between the listing and now: a change as well
        digest.update(f"{os.path.relpath(path, rows.path)} {status.st_size} {status.st_mtime_ns}\n".encode())
        if os.path.basename(path) in _METADATA:
            with open(path, "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()


def _files(rows: StoredRows) -> Iterator[str]:
    if os.path.isfile(rows.path):
        yield rows.path
        return
    for folder, below, names in os.walk(os.path.join(rows.path, rows.element)):
        below.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))
