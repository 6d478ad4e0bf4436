"""Stores behind URLs, on S3, Google Cloud Storage, web servers and whatever else fsspec reads; and results there."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, MemoryStore, WrapperStore

from scialm_dask.data.arrays import all_of, await_writes
from scialm_dask.errors import InputError, OutputError, ScialmError

_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json")
_MARKERS = (".zmetadata", ".zgroup", "zarr.json")  # without these at the root a store does not open
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
_WEB = ("http", "https")
_ARCHIVES = ("zip", "tar", "libarchive")
_PATIENT = ("s3", "s3a", "gs", "gcs", "memory")  # retry by themselves, or need not
# What tells versions of a key; the first one known is used.
_VERSIONS = ("ETag", "etag", "LastModified", "updated", "last_modified", "mtime", "created")
_S3_ATTEMPTS = 6
_S3_SILENCE = 20  # seconds without a byte that fail an attempt; botocore waits for 60
_WAITS = (0.25, 0.5, 1.0, 2.0, 4.0)  # seconds between attempts, where fsspec does not retry
_LONGEST = 600  # seconds for all attempts at one key
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP states to retry after
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_LISTED = "cannot be listed"
_file_systems: dict[str, Any] = {}
_lock = threading.Lock()
T = TypeVar("T")
W = TypeVar("W", bound=Store)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL."""
    return "://" in os.fspath(path)


class _ByGetAndSet(WrapperStore[W]):
    """A wrapper through whose `get` and `set` all reads and writes go."""

    set_if_not_exists, _get_many, _set_many = Store.set_if_not_exists, Store._get_many, Store._set_many


class RemoteStore(_ByGetAndSet[FsspecStore]):
    """A store behind a URL that retries after passing failures, and names the URL in errors.

    Credentials and other options come from fsspec's configuration and the environment, so that only the URL travels to
    workers and into results. Methods raise `InputError` if reading or listing fails, and `OutputError` if writing or
    deleting fails.
    """

    def __init__(self, store: FsspecStore, url: str) -> None:
        super().__init__(store)
        self.url, self._protocol = url, urlsplit(url).scheme

    @classmethod
    def at(cls, url: str, *, read_only: bool) -> Self:
        """Return the store at a URL, without reading or writing anything yet.

        Raises `InputError` if it is no URL of a store, or the package for its protocol is missing, and `OutputError`
        for writing to a web server.
        """
        import fsspec

        url = url.rstrip("/")
        protocol = _checked(url)
        # One file system for each process and host, since fsspec would make one for each thread, with a client each.
        options = _options(protocol)
        key = fsspec.utils.tokenize(os.getpid(), protocol, urlsplit(url).netloc, options)
        try:
            with _lock:
                if key not in _file_systems:
                    _file_systems[key] = FsspecStore.from_url(url, storage_options=options).fs
            fs, path = _file_systems[key], fsspec.get_filesystem_class(protocol)._strip_protocol(url)
        except Exception as error:
            extra, remedy = _EXTRAS.get(protocol), "check the URL and the connection"
            if isinstance(error, ImportError):
                remedy = f"pip install 'scialm-dask[{extra}]'" if extra else "install that package"
            raise InputError(f"{url}: cannot be opened ({_cause(error)}); {remedy}") from error
        if not read_only and protocol in _WEB:
            raise OutputError(f"{url}: {protocol} is only read; write to a folder, s3:// or gs://")
        return cls(FsspecStore(fs=fs, path=path, read_only=read_only), url)

    def _with_store(self, store: FsspecStore) -> Self:
        return type(self)(store, self.url)

    @property
    def supports_listing(self) -> bool:
        """Whether keys can be listed; web servers have only pages of links."""
        return self._protocol not in _WEB

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            return await self._tried(f"{key} cannot be read", lambda: self._store.get(key, prototype, byte_range))
        except InputError as error:
            # Without the right to list a bucket, absent keys are forbidden, such as metadata of other formats.
            cause = error.__cause__
            if is_metadata(key) and (isinstance(cause, PermissionError) or getattr(cause, "status", 0) == 403):
                return None
            raise

    async def set(self, key: str, value: Buffer) -> None:
        await self._tried(f"{key} cannot be written", lambda: self._store.set(key, value), OutputError)

    async def delete(self, key: str) -> None:
        await self._tried(f"{key} cannot be deleted", lambda: self._store.delete(key), OutputError)

    async def exists(self, key: str) -> bool:
        return await self._tried(_LISTED, lambda: self._store.exists(key))

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in await self._tried(_LISTED, lambda: all_of(self._store.list_prefix(prefix))):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for key in await self._tried(_LISTED, lambda: all_of(self._store.list_dir(prefix))):
            yield key

    async def stamps(self, prefix: str) -> list[str] | None:
        """Return name, size and version of all keys below `prefix`, sorted; None if they cannot be listed."""
        if not self.supports_listing:
            return None
        fs, path = self._store.fs, f"{self._store.path}/{prefix}".rstrip("/")
        found = await self._tried(_LISTED, lambda: fs._find(path, detail=True))
        versions = {key: next((info[name] for name in _VERSIONS if name in info), "") for key, info in found.items()}
        return [f"{key} {found[key].get('size')} {version}" for key, version in sorted(versions.items())]

    async def is_a_key(self) -> bool:
        """Return whether the URL itself is a key."""
        found = await self._tried(_LISTED, lambda: self._store.fs._info(self._store.path))
        return bool(found["type"] == "file")

    async def _tried(self, what: str, attempt: Callable[[], Awaitable[T]], kind: type[ScialmError] = InputError) -> T:
        """Retry after errors that may pass, with growing waits, unless fsspec does so; raises `kind` in the end."""
        try:
            async with asyncio.timeout(_LONGEST):
                for wait in () if self._protocol in _PATIENT else _WAITS:
                    try:
                        return await attempt()
                    except Exception as error:
                        status, module = getattr(error, "status", None), type(error).__module__.partition(".")[0]
                        lasts = module != "aiohttp" and (not isinstance(error, OSError) or isinstance(error, _LASTING))
                        if status not in _PASSING if isinstance(status, int) and status else lasts:
                            raise
                    await asyncio.sleep(wait * random.uniform(0.5, 1.5))
                return await attempt()
        except Exception as error:
            remedy = "check the connection and the permissions"
            raise kind(f"{self.url}: {what} ({_cause(error)}); {remedy}") from error


def _checked(url: str) -> str:
    """Return the protocol of a URL; raises `InputError` if it cannot be that of a store."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url}: not a URL ({error}); check how it is spelled") from error
    protocol = parts.scheme.lower()
    if parts.username or parts.password:
        remedy = "put them into the environment or fsspec's configuration"
        raise InputError(f"{protocol}://…@{parts.hostname}: a URL with credentials ends in logs and results; {remedy}")
    if "::" in url or protocol in _ARCHIVES:
        raise InputError(f"{url}: archives and chained URLs are not read; unpack it into a folder or an object store")
    if "?" in url or (protocol in _WEB and "#" in url):
        raise InputError(f"{url}: a store is many keys below one URL; give it without ? and #")
    if not parts.netloc or {".", ".."} & set(parts.path.split("/")):
        raise InputError(f"{url}: not the URL of a store; spell it {protocol}://BUCKET/NAME, without . and ..")
    return protocol


def _options(protocol: str) -> dict[str, Any]:
    """Return fsspec's options: our defaults, overridden by the user's configuration."""
    from fsspec.config import conf

    if protocol not in ("s3", "s3a"):
        return {}
    given: dict[str, Any] = conf.get("s3", {}) | conf.get("s3a", {})
    config = dict(given.get("config_kwargs", {}))
    if not os.environ.keys() & {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"}:
        config.setdefault("retries", {"mode": "standard", "total_max_attempts": _S3_ATTEMPTS})
    config.setdefault("read_timeout", _S3_SILENCE)
    # Other processes may have written since a listing. Zarr reads chunks in parallel, so one request for each will do,
    # without a request for its size first.
    return {"use_listings_cache": False, "max_concurrency": 1} | given | {"config_kwargs": config}


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def is_metadata(key: str) -> bool:
    """Return whether a key of a Zarr store holds metadata rather than a chunk."""
    return key.rpartition("/")[2] in _METADATA


class NewStore(_ByGetAndSet[RemoteStore]):
    """A store being written: chunks go to their place, and metadata are held here until `commit`.

    An object store cannot rename, but without metadata nothing opens. And metadata that change often are sent once.
    """

    def __init__(self, store: RemoteStore, held: MemoryStore | None = None) -> None:
        super().__init__(store)
        self._held = held or MemoryStore()

    def _with_store(self, store: RemoteStore) -> Self:
        return type(self)(store, self._held)

    async def commit(self) -> None:
        """Write the metadata, those of the root last."""
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
        return await self._where(key).get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        await self._where(key).set(key, value)

    async def exists(self, key: str) -> bool:
        return await self._where(key).exists(key)

    async def delete(self, key: str) -> None:
        await self._where(key).delete(key)

    async def delete_dir(self, prefix: str) -> None:
        await self._held.delete_dir(prefix)
        await self._store.delete_dir(prefix)

    async def is_empty(self, prefix: str) -> bool:
        return await self._held.is_empty(prefix)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        return self._held.list_dir(prefix)  # groups and arrays all have metadata


@contextmanager
def new_store(url: str) -> Iterator[NewStore]:
    """Yield a store to write to, which opens as a store only when the block has succeeded.

    After an exception what was written is deleted; if that fails, it does not open. Raises `OutputError` if there is
    something at `url` already, or it cannot be written.
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
    """Raise `OutputError` if a result cannot be written to or deleted from `url`. Leaves nothing there."""
    remote = RemoteStore.at(url, read_only=False)
    claim = _claim(remote)
    sync(remote.delete(claim))
    if claim in sync(all_of(remote.list_dir(""))):
        raise OutputError(f"{url}: keys can be written but not deleted, which unfinished output needs; allow it too")


def _claim(remote: RemoteStore) -> str:
    """Write a key and look for others; returns the key. Of two runs that begin at once, at most one goes on."""
    claim = f".{uuid.uuid4().hex}.partial"
    sync(remote.set(claim, default_buffer_prototype().buffer.from_bytes(b"")))
    try:
        others = set(sync(all_of(remote.list_dir("")))) - {claim, ""}
        if bool(others) or sync(remote.is_a_key()):
            remedy = "delete it first or choose another URL"
            raise OutputError(f"{remote.url}: exists already, and nothing is replaced behind a URL; {remedy}")
    except BaseException:
        sync(remote.delete(claim))
        raise
    return claim
