"""Three products of a sparse row block with tall matrices, in tiles that stay in cache and registers.

For a block S in CSR, rows Y (m × l) and columns Q (n × l): ``spmm`` adds S Q to Y, ``spmm_t`` adds Sᵀ Y to Q, and
``sddmm`` computes Y Qᵀ on the pattern of S. Each entry needs one row of Q, in random order, so Q is cut into tiles: as
many rows as fit in the second-level cache, and 64 columns, so that a row of Y stays in registers while its entries are
visited. Where entries are few, copying Q into tiles would take longer than it saves. Columns must ascend within each
row of the pattern.
"""
# ruff: noqa: ARG001 (numba passes code generators more arguments than they need)

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, models, register_model
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pattern = NDArray[np.integer]

_TILE_VALUES = 1 << 16  # in a tile of Q: 256 KB
_ROW_ENTRIES = 256  # entries of a row in a tile, on average, at least: each row of a tile waits for memory once
_FEW = 16  # entries per row of Q; with fewer, no tiles: measured with 48 to 200 columns
_GATHER, _SCATTER, _SAMPLED = range(3)
_FAST = ("reassoc", "contract", "nsz")


class _Cache(FunctionCache):  # type: ignore[misc]
    """Drops cached files that cannot be read, such as those truncated by a full disk, and ignores failed writes."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling raises
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Return `numba.njit` with these options: compiled on the first call, and run without the interpreter lock."""

    def decorate(function: Any) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError):  # no folder for the cache can be written
            dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate


_jit = compiled(boundscheck=False)
_jit_fast = compiled(boundscheck=False, fastmath=set(_FAST))


def spmm(indptr: Pattern, indices: Pattern, values: Floats, columns: Floats, rows: Floats) -> None:
    """Add S Q to the rows Y."""
    _product(_GATHER, indptr, indices, values, columns, rows, rows)


def spmm_t(indptr: Pattern, indices: Pattern, values: Floats, rows: Floats, columns: Floats) -> None:
    """Add Sᵀ Y to the columns Q."""
    _product(_SCATTER, indptr, indices, values, columns, rows, columns)


def sddmm(indptr: Pattern, indices: Pattern, rows: Floats, columns: Floats) -> Floats:
    """Return Y Qᵀ on the pattern, shape ``(N,)``."""
    values = np.zeros(len(indices), np.float32)
    _product(_SAMPLED, indptr, indices, values, columns, rows, np.empty((0, 0), np.float32))
    return values


# A row of a tile is one LLVM vector. In a loop over its columns, the compiler would not keep it in registers.


class _Lanes(types.Type):
    """A row of `count` float32 numbers."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"Lanes({count})")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: _Lanes) -> None:
        super().__init__(manager, lanes, _vector(lanes.count))


def _vector(count: int, element: ir.Type | None = None) -> ir.VectorType:
    return ir.VectorType(element or ir.FloatType(), count)


def _address(context: Any, builder: Any, signature: Any, args: Any, count: int) -> Any:
    """Return a pointer to row ``args[1]`` of the contiguous tile ``args[0]``."""
    row = context.cast(builder, args[1], signature.args[1], types.intp)
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    first = builder.gep(data, [builder.mul(row, ir.Constant(row.type, count))])
    return builder.bitcast(first, _vector(count).as_pointer())


@intrinsic
def _load(_: Any, tile: Any, row: Any, lanes: Any) -> Any:
    """Load a row of a tile; `lanes` is its width, a literal."""
    if not isinstance(lanes, types.IntegerLiteral):
        raise numba.errors.RequireLiteralValue("lanes")
    count = lanes.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature, args, count), align=4)

    return _Lanes(count)(tile, row, lanes), generate


@intrinsic
def _store(_: Any, tile: Any, row: Any, x: Any) -> Any:
    """Store a row of a tile."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature, args, x.count), align=4)
        return context.get_dummy_value()

    return types.void(tile, row, x), generate


@intrinsic
def _axpy(_: Any, scalar: Any, x: Any, y: Any) -> Any:
    """Return scalar · x + y."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = ir.IntType(32)
        undefined = ir.Constant(_vector(x.count), ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(index, 0))
        everywhere = ir.Constant(_vector(x.count, index), [0] * x.count)
        spread = builder.shuffle_vector(first, undefined, everywhere)
        return builder.fadd(builder.fmul(spread, args[1], _FAST), args[2], _FAST)

    return y(types.float32, x, y), generate


@intrinsic
def _dot(_: Any, x: Any, y: Any) -> Any:
    """Return the inner product of two rows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        single = ir.FloatType()
        kind = ir.FunctionType(single, [single, _vector(x.count)])
        total = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{x.count}f32")
        return builder.call(total, [ir.Constant(single, 0), builder.fmul(*args, _FAST)], fastmath=_FAST)

    return types.float32(x, y), generate


@_jit
def _product(kind, indptr, indices, values, columns, rows, out):  # type: ignore[no-untyped-def]
    """Add one of the three products to `out` (rows or columns) or `values`: tile by tile, unless entries are few."""
    n, width = columns.shape
    if len(indices) < _FEW * n:
        _visit_directly(kind, indptr, indices, values, columns, rows, out)
        return
    at = np.empty(len(indptr) - 1, indptr.dtype)
    least = _ROW_ENTRIES * n * len(at) // max(1, len(indices))
    left = 0
    while left < width:
        lanes = 64 if width - left > 32 else 32 if width - left > 16 else 16
        at[:] = indptr[:-1]
        y = _packed(rows, 0, len(rows), left, lanes)
        height = max(_TILE_VALUES // lanes, least)
        for start in range(0, n, height):
            stop = min(start + height, n)
            q = _packed(columns, start, stop, left, lanes)
            if lanes == 64:
                _visit_tile(64, kind, at, indptr, indices, values, start, stop, q, y)
            elif lanes == 32:
                _visit_tile(32, kind, at, indptr, indices, values, start, stop, q, y)
            else:
                _visit_tile(16, kind, at, indptr, indices, values, start, stop, q, y)
            if kind == _SCATTER:
                _unpack(q, out, start, left)
        if kind == _GATHER:
            _unpack(y, out, 0, left)
        left += lanes


@_jit_fast
def _visit_directly(kind, indptr, indices, values, columns, rows, out):  # type: ignore[no-untyped-def]
    """Visit all entries without tiles."""
    for i in range(len(indptr) - 1):
        for k in range(indptr[i], indptr[i + 1]):
            j = indices[k]
            if kind == _GATHER:
                for t in range(columns.shape[1]):
                    out[i, t] += values[k] * columns[j, t]
            elif kind == _SCATTER:
                for t in range(columns.shape[1]):
                    out[j, t] += values[k] * rows[i, t]
            else:
                for t in range(columns.shape[1]):
                    values[k] += rows[i, t] * columns[j, t]


@_jit
def _visit_tile(lanes, kind, at, indptr, indices, values, start, stop, q, y):  # type: ignore[no-untyped-def]
    """Visit the entries in columns `start` to `stop`; `at` has the next entry of each row, and is moved on."""
    numba.literally(lanes)
    for i in range(len(at)):
        k, end = at[i], indptr[i + 1]
        row = _load(y, i, lanes)
        if kind == _GATHER:
            while k < end and indices[k] < stop:
                row = _axpy(values[k], _load(q, indices[k] - start, lanes), row)
                k += 1
            _store(y, i, row)
        elif kind == _SCATTER:
            while k < end and indices[k] < stop:
                j = indices[k] - start
                _store(q, j, _axpy(values[k], row, _load(q, j, lanes)))
                k += 1
        else:
            while k < end and indices[k] < stop:
                values[k] += _dot(row, _load(q, indices[k] - start, lanes))
                k += 1
        at[i] = k


@_jit
def _packed(source, start, stop, left, lanes):  # type: ignore[no-untyped-def]
    """Copy rows `start` to `stop` and `lanes` columns from `left` on; zeros beyond the last column."""
    tile = np.empty((stop - start, lanes), np.float32)
    some = min(lanes, source.shape[1] - left)
    for i in range(stop - start):
        tile[i, :some] = source[start + i, left : left + some]
        tile[i, some:] = 0
    return tile


@_jit
def _unpack(tile, target, start, left):  # type: ignore[no-untyped-def]
    """Copy a tile back to where it came from."""
    for i in range(len(tile)):
        for t in range(min(tile.shape[1], target.shape[1] - left)):
            target[start + i, left + t] = tile[i, t]


def are_compiled() -> bool:
    """Return whether numba's cache has these products, so that this process need not compile them."""
    kept = _product.stats.cache_path
    return kept is not None and any(Path(kept).glob("sparse_products._product-*.nbi"))
