"""Arrays of stores: written with a checksum for each chunk, looked at for lost chunks, and read fast from HDF5."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
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

ZARR_FORMAT: Literal[2] = 2  # what AnnData writes by default: the widest choice of readers
MOST_MISSING = 10_000  # chunks that are named: a shape that lies may want 1e12 of them
_MOST_ASKED = 1_000_000  # chunks that a web server, which cannot list them, is asked for

_LONGEST_WRITE = 30  # seconds
_EVERY_CHUNK: Any = {"write_empty_chunks": True}  # so that an absent chunk is a lost one
_writing = threading.Lock()  # Zarr's configuration is one for all threads


def new_array(group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any) -> Any:
    """Create an array of an AnnData store, every chunk of which is written and has a checksum.

    The checksum is Zstandard's own, which every program that reads Zarr compares. In Zarr format 2 the bytes of numbers
    are shuffled before: indices of genes are then compressed at four times the speed, and to less.
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
    """Write a chunk, by its number, of a one-dimensional array of Zarr format 2, in the thread that calls.

    By way of the Zarr library it takes twice the processor's time, and half of that is of one thread for all.
    A chunk half written is seen by nobody: its store gets its name when it is whole.
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
    """Write whatever AnnData can write, every chunk with a checksum."""
    import anndata

    with _writing, zarr.config.set({"array.write_empty_chunks": True}):
        anndata.io.write_elem(group, name, value, dataset_kwargs={"compressor": _checksummed(group)})
        for path, array in dict(_arrays_below(group[name], name)).items():
            if not is_checksummed(array):  # AnnData has its own way with single values
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
    """Mark a Zarr node with its AnnData encoding."""
    node.attrs.update({"encoding-type": kind, "encoding-version": version, **attributes})


def missing_chunks(array: Any) -> list[tuple[int, ...]]:
    """Grid positions of the chunks (or shards) of a Zarr or HDF5 array that are not in its store.

    Zarr reads an absent chunk as the fill value, so a lost file looks like zeros. Of many, the first ones are given.
    """
    if not isinstance(array, zarr.Array):
        held = array.id.get_num_chunks() if array.chunks else n_chunks(array) * (array.id.get_storage_size() > 0)
        return [(0,) * array.ndim] * min(n_chunks(array) - held, MOST_MISSING)
    grid, prefix = _grid(array), f"{array.path}/" if array.path else ""
    encode = array.metadata.encode_chunk_key
    if array.store.supports_listing:
        present = sync(_listed(array.store, prefix))
    elif math.prod(grid) <= _MOST_ASKED:
        present = sync(_asked(array.store, [prefix + encode(position) for position in _positions(grid)]))
    else:
        raise InputError(
            f"{prefix[:-1]}: shape {array.shape} in chunks of {array.chunks} is too much to ask a server for"
        )
    return list(islice((p for p in _positions(grid) if prefix + encode(p) not in present), MOST_MISSING))


def n_chunks(array: Any) -> int:
    """Count the chunks (or shards) that an array is to have."""
    return math.prod(_grid(array))


def _grid(array: Any) -> list[int]:
    steps = getattr(array, "shards", None) or array.chunks or array.shape
    return [-(-size // step) if size else 0 for size, step in zip(array.shape, steps, strict=True)]


def await_writes() -> None:
    """Wait until Zarr's thread has written what it was told to: it goes on after an exception in this one."""
    sync(_rest_done())


async def _rest_done() -> None:
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=_LONGEST_WRITE)


def check_whole(name: str, node: Any, *, always: bool = False) -> None:
    """Raise `InputError` if chunks of an array, or of those below a group, are lost.

    Other programs leave out chunks of zeros. So what has no checksum, and hence is not of ours, may lack them, but not
    the names of cells and genes, and nothing if `always`.
    """
    index = node.attrs.get("_index") or "_index"
    for path, array in _arrays_below(node, ""):
        names = path in (index, f"{index}/values")  # AnnData writes the text of pandas 3 as values and a mask
        if not (always or names or is_checksummed(array)):
            continue
        if gone := missing_chunks(array):
            raise InputError(
                f"{name}: chunk {gone[0]} of {path or array.basename} is missing; the store is damaged, write it again"
            )


def _checksummed(group: zarr.Group, level: int = 0) -> Any:
    return (Zstd if group.metadata.zarr_format == 2 else ZstdCodec)(level=level, checksum=True)


def is_checksummed(array: zarr.Array[Any]) -> bool:
    """Tell whether chunks have checksums, so that they are of this package, which leaves none out."""
    return any(getattr(codec, "checksum", False) for codec in array.compressors)


def _arrays_below(node: Any, path: str) -> Iterator[tuple[str, zarr.Array[Any]]]:
    if isinstance(node, zarr.Array):
        yield path, node
    elif isinstance(node, zarr.Group):  # HDF5 knows itself what it lacks
        for name, below in node.members():
            yield from _arrays_below(below, f"{path}/{name}" if path else name)


def _positions(grid: list[int]) -> Iterator[tuple[int, ...]]:
    """All positions in a grid of any size, in order; `itertools.product` would list each axis first."""
    if not grid:
        yield ()
        return
    for first in range(grid[0]):
        for rest in _positions(grid[1:]):
            yield (first, *rest)


async def _listed(store: Any, prefix: str) -> set[str]:
    return {key async for key in store.list_prefix(prefix)}


async def _asked(store: Any, keys: list[str]) -> set[str]:
    """Those of the keys that are there, of a store that cannot list them."""
    one_byte, side_by_side = RangeByteRequest(0, 1), asyncio.Semaphore(zarr.config.get("async.concurrency"))

    async def is_there(key: str) -> bool:
        async with side_by_side:
            return await store.get(key, default_buffer_prototype(), one_byte) is not None

    found = await asyncio.gather(*map(is_there, keys))
    return {key for key, there in zip(keys, found, strict=True) if there}


def read_span(array: Any, span: slice) -> NDArray[Any]:
    """Return ``array[span]``, of a one-dimensional array of Zarr or HDF5; `span` has a start and a stop within it."""
    shuffled = None if isinstance(array, zarr.Array) else _is_shuffled(array)
    if shuffled is None or span.start == span.stop:
        return np.asarray(array[span])
    chunk, dtype = array.chunks[0], array.dtype
    values = np.empty(span.stop - span.start, dtype)
    for first in range(span.start - span.start % chunk, span.stop, chunk):
        skipped, stored = array.id.read_direct_chunk((first,))
        # A filter may be left out of a chunk; HDF5 knows how to read that.
        whole = array[first : first + chunk] if skipped else _unpacked(stored, shuffled, dtype, chunk)
        start, stop = max(first, span.start), min(first + chunk, span.stop)
        values[start - span.start : stop - span.start] = whole[start - first : stop - first]
    return values


def _unpacked(stored: bytes, shuffled: bool, dtype: np.dtype[Any], chunk: int) -> NDArray[Any]:
    n_bytes = chunk * dtype.itemsize
    stream = isal_zlib.decompressobj()
    inflated: Any = stream.decompress(stored, n_bytes + 1)  # no more than that, whatever the bytes make of it
    if len(inflated) != n_bytes or not stream.eof:
        raise ValueError(f"a chunk of {n_bytes} bytes inflates to another size")
    return np.frombuffer(Shuffle(dtype.itemsize).decode(inflated) if shuffled else inflated, dtype)


def _is_shuffled(dataset: Any) -> bool | None:
    """Tell whether bytes of numbers were shuffled before gzip; None if other filters, or none, were used."""
    import h5py

    made = dataset.id.get_create_plist()
    filters = tuple(made.get_filter(i)[0] for i in range(made.get_nfilters()))
    plain, shuffled = (h5py.h5z.FILTER_DEFLATE,), (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE)
    return {plain: False, shuffled: True}.get(filters) if dataset.dtype.kind in "iuf" else None
