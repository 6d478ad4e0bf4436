"""Results behind URLs, which open as stores only once they are whole."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Self

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore, WrapperStore

from scialm_dask.data.arrays import await_writes
from scialm_dask.data.remote import RemoteStore, all_of, is_metadata
from scialm_dask.errors import OutputError, ScialmError

__all__ = ["NewStore", "check_new", "new_store"]

_MARKERS = (".zmetadata", ".zgroup", "zarr.json")  # of the root; without them nothing opens


class NewStore(WrapperStore[RemoteStore]):
    """A store that is being written: chunks go to their place, metadata wait here until `commit`.

    An object store cannot rename, but without metadata nobody takes what is there for a matrix. And metadata that
    change with every chunk need not be sent every time.
    """

    set_if_not_exists, _get_many, _set_many = (
        Store.set_if_not_exists,
        Store._get_many,
        Store._set_many,
    )  # by get and set

    def __init__(self, store: RemoteStore, held: MemoryStore | None = None) -> None:
        super().__init__(store)
        self._held = held or MemoryStore()

    def _with_store(self, store: RemoteStore) -> Self:
        return type(self)(store, self._held)

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
        await self._store.set(key, value)

    def _where(self, key: str) -> Store:
        return self._held if is_metadata(key) else self._store

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a key."""
        return await self._where(key).get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a chunk, keep metadata."""
        await self._where(key).set(key, value)

    async def exists(self, key: str) -> bool:
        """Tell whether there is such a key."""
        return await self._where(key).exists(key)

    async def delete(self, key: str) -> None:
        """Forget a key."""
        await self._where(key).delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Forget all below `prefix`."""
        await self._held.delete_dir(prefix)
        await self._store.delete_dir(prefix)

    async def is_empty(self, prefix: str) -> bool:
        """Tell whether no group or array is at `prefix`."""
        return await self._held.is_empty(prefix)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List groups and arrays one level below `prefix`: all have metadata, and chunks need no listing."""
        return self._held.list_dir(prefix)


@contextmanager
def new_store(url: str) -> Iterator[NewStore]:
    """Give a store to write to, which opens as a store only once the block has ended well.

    After an exception what has been written is deleted; if that fails too, it does not open.

    Raises
    ------
    OutputError
        If there is something at `url` already, or it cannot be written.
    """
    remote = RemoteStore.at(url, read_only=False)
    claim = _claim(remote)
    try:
        yield (store := NewStore(remote))
        sync(remote.delete(claim))
        sync(store.commit())
    except BaseException as error:
        try:
            await_writes()
            sync(remote.delete_dir(""))
        except Exception as second:
            if not isinstance(error, ScialmError):
                raise error from second
            raise OutputError(f"{error}; unfinished parts stay there, which do not open: delete them") from error
        raise


def check_new(url: str) -> None:
    """Raise `OutputError` if a result cannot be written to `url`, or not be deleted there. Leaves nothing there."""
    remote = RemoteStore.at(url, read_only=False)
    claim = _claim(remote)
    sync(remote.delete(claim))
    if claim in sync(all_of(remote.list_dir(""))):
        raise OutputError(f"{url}: keys are written but not deleted, as what is unfinished must be; allow it, too")


def _claim(remote: RemoteStore) -> str:
    """Put a key of ours, then look for others: of two runs that begin at once, at most one goes on."""
    claim = f".{uuid.uuid4().hex}.partial"
    sync(remote.set(claim, default_buffer_prototype().buffer.from_bytes(b"")))
    try:
        others = set(sync(all_of(remote.list_dir("")))) - {claim, ""}
        if bool(others) or sync(remote.is_a_key()):
            raise OutputError(
                f"{remote.url}: exists already, and what is behind a URL cannot be replaced in one step; delete it "
                "first or choose another URL"
            )
    except BaseException:
        sync(remote.delete(claim))
        raise
    return claim
