"""Stores behind URLs: on S3, Google Cloud Storage, web servers, and whatever else fsspec knows."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, MemoryStore

from scialm_dask.errors import InputError, OutputError, ScialmError

__all__ = ["NewStore", "RemoteStore", "check_new", "is_url", "new_store"]

_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")
_MARKERS = (".zmetadata", ".zgroup", "zarr.json")  # of the root; without them nothing opens
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
_WEB = ("http", "https")
_ARCHIVES = ("zip", "tar", "libarchive")
_PATIENT = ("s3", "s3a", "gs", "gcs", "memory")  # try again by themselves, or need not
_S3_ATTEMPTS = 6
_WAITS = (0.25, 0.5, 1.0, 2.0, 4.0)  # seconds between attempts, where fsspec makes only one
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP states worth another attempt
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_stores: dict[str, FsspecStore] = {}
_lock = threading.Lock()
T = TypeVar("T")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Tell whether a store is named by a URL rather than by a path."""
    return "://" in os.fspath(path)


class RemoteStore(FsspecStore):
    """A store behind a URL: tries again what may pass, and says of an error which URL it is about.

    How to reach it, credentials above all, is fsspec's own configuration and the environment's, never ours, so that
    a URL is all that travels to workers and into results.
    """

    url: str

    @classmethod
    def at(cls, url: str, *, read_only: bool) -> Self:
        """Make one; reads and writes nothing yet.

        Raises
        ------
        InputError
            If the URL cannot name a store, or the package for its protocol is not installed.
        """
        url = url.rstrip("/")
        protocol = _checked(url)
        reached = _reached(url, protocol)
        store = cls(fs=reached.fs, path=reached.path, read_only=read_only)
        store.url = url
        store.supports_listing = protocol not in _WEB  # pages of links are no list of keys
        return store

    @property
    def protocol(self) -> str:
        """How it is reached, such as ``"s3"``."""
        return urlsplit(self.url).scheme

    def with_read_only(self, read_only: bool = False) -> Self:
        """Give the same store, to read only or to write too."""
        other = copy.copy(self)
        other._read_only = read_only
        return other

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a key; None if there is none.

        Raises
        ------
        InputError
            If it cannot be read.
        """
        read = super().get
        try:
            return await self._patiently(lambda: read(key, prototype, byte_range))
        except Exception as error:
            # Who may not list a bucket is refused where a key is absent, as the metadata of other formats are.
            if _is_metadata(key) and (isinstance(error, PermissionError) or getattr(error, "status", 0) == 403):
                return None
            raise InputError(
                f"{self.url}: {key} cannot be read ({_cause(error)}); check the connection and the permissions"
            ) from error

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write a key.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        write = super().set
        try:
            await self._patiently(lambda: write(key, value, byte_range))
        except Exception as error:
            raise OutputError(
                f"{self.url}: {key} cannot be written ({_cause(error)}); check the connection and the permissions"
            ) from error

    async def delete(self, key: str) -> None:
        """Delete a key.

        Raises
        ------
        OutputError
            If it cannot be deleted.
        """
        try:
            await super().delete(key)
        except Exception as error:
            raise OutputError(
                f"{self.url}: {key} cannot be deleted ({_cause(error)}); check the connection and the permissions"
            ) from error

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """List all keys that begin with `prefix`."""
        for key in await self._looked(lambda: _all_of(FsspecStore.list_prefix(self, prefix))):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List the names one level below `prefix`."""
        for key in await self._looked(lambda: _all_of(FsspecStore.list_dir(self, prefix))):
            yield key

    async def _looked(self, look: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._patiently(look)
        except Exception as error:
            raise InputError(
                f"{self.url}: cannot be listed ({_cause(error)}); check the connection and the permissions"
            ) from error

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Do it, again and again with growing waits while the error may pass, unless fsspec does so itself."""
        for wait in () if self.protocol in _PATIENT else _WAITS:
            try:
                return await attempt()
            except Exception as error:
                if not _may_pass(error):
                    raise
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))
        return await attempt()


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
        if _is_metadata(key):
            return await self._held.get(key, prototype, byte_range)
        return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write a chunk, keep metadata."""
        await (self._held.set(key, value) if _is_metadata(key) else super().set(key, value, byte_range))

    async def exists(self, key: str) -> bool:
        """Tell whether there is such a key."""
        return await (self._held.exists(key) if _is_metadata(key) else super().exists(key))

    async def delete(self, key: str) -> None:
        """Forget a key."""
        await (self._held.delete(key) if _is_metadata(key) else super().delete(key))

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
    store = _writable(url)
    claim = _claim(store)
    try:
        yield store
        sync(RemoteStore.delete(store, claim))
        sync(store.commit())
    except BaseException as error:
        try:
            sync(FsspecStore.delete_dir(store, ""))
        except Exception as second:
            if not isinstance(error, ScialmError):
                raise error from second
            raise OutputError(f"{error}; unfinished parts stay there, which do not open: delete them") from error
        raise


def check_new(url: str) -> None:
    """Raise `OutputError` if a result cannot be written to `url`, or not be deleted there. Leaves nothing there."""
    store = _writable(url)
    claim = _claim(store)
    sync(RemoteStore.delete(store, claim))
    if claim in sync(_all_of(RemoteStore.list_dir(store, ""))):
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
    if set(await _all_of(RemoteStore.list_dir(store, ""))) - {claim, ""}:
        return True
    return bool((await store._looked(lambda: store.fs._info(store.path)))["type"] == "file")


def _writable(url: str) -> NewStore:
    store = NewStore.at(url, read_only=False)
    if store.protocol in _WEB:
        raise OutputError(f"{url}: {store.protocol} is only read; write to a folder, s3:// or gs://")
    return store


def _checked(url: str) -> str:
    """Refuse a URL that cannot name a store; give its protocol."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url}: not a URL ({error}); check how it is spelled") from error
    protocol = parts.scheme.lower()
    if parts.username or parts.password:
        raise InputError(
            f"{protocol}://…@{parts.hostname}: a URL with credentials ends in logs and results; put them into the "
            "environment or fsspec's configuration"
        )
    if "::" in url or protocol in _ARCHIVES:
        raise InputError(f"{url}: archives and chained URLs are not read; unpack it into a folder or an object store")
    if "?" in url or (protocol in _WEB and "#" in url):
        raise InputError(f"{url}: a store is many keys below one URL; give it without ? and #")
    if not parts.netloc or {".", ".."} & set(parts.path.split("/")):
        raise InputError(f"{url}: not the URL of a store; spell it {protocol}://BUCKET/NAME, without . and ..")
    return protocol


def _reached(url: str, protocol: str) -> FsspecStore:
    """Connect once for each process and URL: fsspec does so for every thread, and each has its own client."""
    from fsspec.utils import tokenize

    options = _options(protocol)
    key = tokenize(os.getpid(), url, options)
    with _lock:
        if key not in _stores:
            try:
                _stores[key] = FsspecStore.from_url(url, storage_options=options)
            except Exception as error:
                extra, remedy = _EXTRAS.get(protocol), "check the URL and the connection"
                if isinstance(error, ImportError):
                    remedy = f"pip install 'scialm-dask[{extra}]'" if extra else "install that package"
                raise InputError(f"{url}: cannot be opened ({_cause(error)}); {remedy}") from error
        return _stores[key]


def _options(protocol: str) -> dict[str, Any]:
    """Our defaults, beneath what the user's configuration says."""
    from fsspec.config import conf

    if protocol not in ("s3", "s3a"):
        return {}
    given: dict[str, Any] = conf.get("s3", {}) | conf.get("s3a", {})
    config = dict(given.get("config_kwargs", {}))
    if not os.environ.keys() & {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"}:
        config.setdefault("retries", {"mode": "standard", "total_max_attempts": _S3_ATTEMPTS})
    # Other processes may have written since a listing. And Zarr reads chunks side by side, so one request each will
    # do, without asking for the size first.
    return {"use_listings_cache": False, "max_concurrency": 1} | given | {"config_kwargs": config}


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return status in _PASSING
    by_network = type(error).__module__.partition(".")[0] == "aiohttp"
    return by_network or (isinstance(error, OSError) and not isinstance(error, _LASTING))


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_metadata(key: str) -> bool:
    return key.rpartition("/")[2] in _METADATA


async def _all_of(keys: AsyncIterator[str]) -> list[str]:
    return [key async for key in keys]
