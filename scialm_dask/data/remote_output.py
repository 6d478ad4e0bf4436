"""Results behind URLs, which open as stores only once they are whole."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, MemoryStore

from scialm_dask.data.arrays import await_writes
from scialm_dask.data.remote import RemoteStore, all_of, is_metadata
from scialm_dask.errors import OutputError, ScialmError

__all__ = ["NewStore", "check_new", "new_store"]

_MARKERS = (".zmetadata", ".zgroup", "zarr.json")  # of the root; without them nothing opens


class NewStore(RemoteStore):
    """A store that is being written: chunks go to their place, metadata wait here until `commit`.

    An object store cannot rename, but without metadata nobody takes what is there for a matrix. And metadata that
    change with every chunk need not be sent every time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held = MemoryStore()

    async def commit(self) -> None:
        """Put the metadata in place, those of the root last."""
        keys = [key async for key in self._held.list()]
        inner = [key for key in keys if "/" in key]
        last = sorted((key for key in keys if "/" not in key), key=lambda key: (key in _MARKERS, key == ".zgroup"))
        await asyncio.gather(*(self._send(key) for key in inner))
        for key in last:
            await self._send(key)

    async def _send(self, key: str) -> None:
        value = await self._held.get(key, default_buffer_prototype())
        assert value is not None
        await super().set(key, value)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a key."""
        if is_metadata(key):
            return await self._held.get(key, prototype, byte_range)
        return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write a chunk, keep metadata."""
        await (self._held.set(key, value) if is_metadata(key) else super().set(key, value, byte_range))

    async def exists(self, key: str) -> bool:
        """Tell whether there is such a key."""
        return await (self._held.exists(key) if is_metadata(key) else super().exists(key))

    async def delete(self, key: str) -> None:
        """Forget a key."""
        await (self._held.delete(key) if is_metadata(key) else super().delete(key))

    async def delete_dir(self, prefix: str) -> None:
        """Forget all below `prefix`."""
        await self._held.delete_dir(prefix)
        await super().delete_dir(prefix)

    async def is_empty(self, prefix: str) -> bool:
        """Tell whether no group or array is at `prefix`."""
        return await self._held.is_empty(prefix)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List groups and arrays one level below `prefix`: all have metadata, and chunks need no listing."""
        async for name in self._held.list_dir(prefix):
            yield name


@contextmanager
def new_store(url: str) -> Iterator[NewStore]:
    """Give a store to write to, which opens as a store only once the block has ended well.

    After an exception what has been written is deleted; if that fails too, it does not open.

    Raises
    ------
    OutputError
        If there is something at `url` already, or it cannot be written.
    """
    store = NewStore.at(url, read_only=False)
    claim = _claim(store)
    try:
        yield store
        sync(RemoteStore.delete(store, claim))
        sync(store.commit())
    except BaseException as error:
        try:
            await_writes()
            sync(FsspecStore.delete_dir(store, ""))
        except Exception as second:
            if not isinstance(error, ScialmError):
                raise error from second
            raise OutputError(f"{error}; unfinished parts stay there, which do not open: delete them") from error
        raise


def check_new(url: str) -> None:
    """Raise `OutputError` if a result cannot be written to `url`, or not be deleted there. Leaves nothing there."""
    store = NewStore.at(url, read_only=False)
    claim = _claim(store)
    sync(RemoteStore.delete(store, claim))
    if claim in sync(all_of(RemoteStore.list_dir(store, ""))):
        raise OutputError(f"{url}: keys are written but not deleted, as what is unfinished must be; allow it, too")


def _claim(store: NewStore) -> str:
    """Put a key of ours, then look for others: of two runs that begin at once, at most one goes on."""
    claim = f".{uuid.uuid4().hex}.partial"
    sync(RemoteStore.set(store, claim, default_buffer_prototype().buffer.from_bytes(b"")))
    try:
        if sync(_others(store, claim)):
            raise OutputError(
                f"{store.url}: exists already, and what is behind a URL cannot be replaced in one step; delete it "
                "first or choose another URL"
            )
    except BaseException:
        sync(RemoteStore.delete(store, claim))
        raise
    return claim


async def _others(store: NewStore, claim: str) -> bool:
    """Tell whether there are other keys below the URL, or is one of that very name."""
    if set(await all_of(RemoteStore.list_dir(store, ""))) - {claim, ""}:
        return True
    return bool((await store.looked(lambda: store.fs._info(store.path)))["type"] == "file")
