"""Arrays of stores: written with a checksum for each chunk, checked for lost chunks, and read fast from HDF5."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np
import zarr
from isal import isal_zlib
from numcodecs import Shuffle, Zstd
from numpy.typing import NDArray
from zarr.abc.store import RangeByteRequest
from zarr.codecs import ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from scialm_dask.errors import InputError

ZARR_FORMAT: Literal[2] = 2  # AnnData's default, which most programs read
MOST_MISSING = 10_000  # missing chunks to list; a damaged shape may have 1e12
_MOST_ASKED = 1_000_000  # requests to a web server, which cannot list chunks
_LONGEST_WRITE = 30  # seconds
_EVERY_CHUNK: Any = {"write_empty_chunks": True}  # so that an absent chunk is a lost one
_writing = threading.Lock()  # Zarr's configuration is shared by all threads


def new_array(group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any) -> Any:
    """Create an array of an AnnData store with every chunk written, even of zeros, and with a checksum.

    The checksum is Zstandard's own, which every reader of Zarr compares. In Zarr format 2 the bytes are shuffled first:
    gene indices then compress four times as fast, and to less.
    """
    filters: Any = [Shuffle(np.dtype(dtype).itemsize)] if group.metadata.zarr_format == 2 else "auto"
    array = group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        filters=filters,
        compressors=_checksummed(group, level=1),
        config=_EVERY_CHUNK,
    )
    set_encoding(array, "array", "0.2.0")
    return array


def write_chunk(array: Any, number: int, values: NDArray[Any]) -> None:
    """Write chunk `number` of a one-dimensional array of Zarr format 2, in the calling thread.

    The Zarr library takes twice the processor time, half of it in one thread for all. Nobody sees a half-written chunk,
    since the store gets its name later.
    """
    lacking = array.chunks[0] - len(values)
    chunk = np.pad(values, (0, lacking)) if lacking else values
    for codec in (*array.filters, *array.compressors):
        chunk = codec.encode(chunk)
    place = array.store_path / array.metadata.encode_chunk_key((number,))
    if isinstance(place.store, LocalStore):
        (place.store.root / place.path).write_bytes(chunk)
    else:
        sync(place.set(default_buffer_prototype().buffer.from_bytes(bytes(chunk))))


def write_element(group: Any, name: str, value: Any) -> None:
    """Write any value that AnnData can write, with a checksum for each chunk."""
    import anndata

    with _writing, zarr.config.set({"array.write_empty_chunks": True}):
        anndata.io.write_elem(group, name, value, dataset_kwargs={"compressor": _checksummed(group)})
        for path, array in dict(_arrays_below(group[name], name)).items():
            if not is_checksummed(array):  # AnnData ignores the compressor for single values
                values = array[...]
                made = group.create_array(
                    path,
                    shape=array.shape,
                    chunks=array.chunks,
                    dtype=array.metadata.dtype,
                    filters=array.filters,
                    compressors=_checksummed(group),
                    fill_value=array.fill_value,
                    attributes=array.attrs.asdict(),
                    overwrite=True,
                )
                made[...] = values


def set_encoding(node: Any, kind: str, version: str, **attributes: Any) -> None:
    """Set the AnnData encoding of a Zarr node."""
    node.attrs.update({"encoding-type": kind, "encoding-version": version, **attributes})


def missing_chunks(array: Any) -> list[tuple[int, ...]]:
    """Return grid positions of chunks or shards of a Zarr or HDF5 array that its store lacks, `MOST_MISSING` at most.

    Zarr reads an absent chunk as the fill value, so that a lost file looks like zeros.
    """
    if not isinstance(array, zarr.Array):
        held = array.id.get_num_chunks() if array.chunks else n_chunks(array) * (array.id.get_storage_size() > 0)
        return [(0,) * array.ndim] * min(n_chunks(array) - held, MOST_MISSING)
    grid, prefix = _grid(array), f"{array.path}/" if array.path else ""
    encode = array.metadata.encode_chunk_key
    if array.store.supports_listing:
        present = set(sync(all_of(array.store.list_prefix(prefix))))
    elif math.prod(grid) <= _MOST_ASKED:
        present = sync(_asked(array.store, [prefix + encode(position) for position in _positions(grid)]))
    else:
        raise InputError(f"{prefix[:-1]}: {math.prod(grid)} chunks are too many to ask a server for; use larger chunks")
    return list(islice((p for p in _positions(grid) if prefix + encode(p) not in present), MOST_MISSING))


def n_chunks(array: Any) -> int:
    """Return the number of chunks or shards of a complete array."""
    return math.prod(_grid(array))


def _grid(array: Any) -> list[int]:
    steps = getattr(array, "shards", None) or array.chunks or array.shape
    return [-(-size // step) if size else 0 for size, step in zip(array.shape, steps, strict=True)]


def await_writes() -> None:
    """Wait until Zarr's thread has finished its writes, which go on after an exception in this thread."""

    async def rest() -> None:
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=_LONGEST_WRITE)

    sync(rest())


def check_whole(name: str, node: Any, *, always: bool = False) -> None:
    """Raise `InputError` if an array, or an array in a group, lacks chunks.

    Other programs do not write chunks of zeros. So arrays without checksums, which are not ours, may lack chunks unless
    `always`, but never those with names of cells and genes.
    """
    index = node.attrs.get("_index") or "_index"
    for path, array in _arrays_below(node, ""):
        names = path in (index, f"{index}/values")  # of the strings of pandas 3
        if not (always or names or is_checksummed(array)):
            continue
        if gone := missing_chunks(array):
            what = path or array.basename
            raise InputError(f"{name}: chunk {gone[0]} of {what} is missing; the store is damaged, write it again")


def _checksummed(group: zarr.Group, level: int = 0) -> Any:
    return (Zstd if group.metadata.zarr_format == 2 else ZstdCodec)(level=level, checksum=True)


def is_checksummed(array: zarr.Array[Any]) -> bool:
    """Return whether chunks have checksums: then this package wrote the array, and all its chunks."""
    return any(getattr(codec, "checksum", False) for codec in array.compressors)


def _arrays_below(node: Any, path: str) -> Iterator[tuple[str, zarr.Array[Any]]]:
    if isinstance(node, zarr.Array):
        yield path, node
    elif isinstance(node, zarr.Group):  # HDF5 itself notices lost chunks
        for name, below in node.members():
            yield from _arrays_below(below, f"{path}/{name}" if path else name)


def _positions(grid: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield all positions of a grid of any size, in order; `itertools.product` would first list each axis."""
    if not grid:
        yield ()
        return
    for first in range(grid[0]):
        for rest in _positions(grid[1:]):
            yield (first, *rest)


async def all_of(keys: AsyncIterator[str]) -> list[str]:
    """Return all keys of an asynchronous iterator."""
    return [key async for key in keys]


async def _asked(store: Any, keys: list[str]) -> set[str]:
    """Return the keys that exist in a store that cannot list them."""
    one_byte, side_by_side = RangeByteRequest(0, 1), asyncio.Semaphore(zarr.config.get("async.concurrency"))

    async def is_there(key: str) -> bool:
        async with side_by_side:
            return await store.get(key, default_buffer_prototype(), one_byte) is not None

    found = await asyncio.gather(*map(is_there, keys))
    return {key for key, there in zip(keys, found, strict=True) if there}


def read_span(array: Any, span: slice) -> NDArray[Any]:
    """Return ``array[span]`` of a one-dimensional Zarr or HDF5 array; `span` has a start and a stop within it.

    Gzip chunks of HDF5 are inflated by isal, at twice the speed of HDF5.
    """
    import h5py

    filters: tuple[int, ...] = ()
    if not isinstance(array, zarr.Array) and array.dtype.kind in "iuf":
        made = array.id.get_create_plist()
        filters = tuple(made.get_filter(i)[0] for i in range(made.get_nfilters()))
    shuffled = filters == (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE)
    if not (shuffled or filters == (h5py.h5z.FILTER_DEFLATE,)) or span.start == span.stop:
        return np.asarray(array[span])
    chunk, dtype = array.chunks[0], array.dtype
    values = np.empty(span.stop - span.start, dtype)
    for first in range(span.start - span.start % chunk, span.stop, chunk):
        skipped, stored = array.id.read_direct_chunk((first,))
        # HDF5 may skip a filter for a chunk, and then reads it itself.
        whole = array[first : first + chunk] if skipped else _unpacked(stored, shuffled, dtype, chunk)
        start, stop = max(first, span.start), min(first + chunk, span.stop)
        values[start - span.start : stop - span.start] = whole[start - first : stop - first]
    return values


def _unpacked(stored: bytes, shuffled: bool, dtype: np.dtype[Any], chunk: int) -> NDArray[Any]:
    n_bytes = chunk * dtype.itemsize
    stream = isal_zlib.decompressobj()
    inflated: Any = stream.decompress(stored, n_bytes + 1)  # no more, even if the chunk is damaged
    if len(inflated) != n_bytes or not stream.eof:
        raise ValueError(f"a chunk of {n_bytes} bytes inflates to another size")
    return np.frombuffer(Shuffle(dtype.itemsize).decode(inflated) if shuffled else inflated, dtype)
