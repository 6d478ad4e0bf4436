"""Writing the imputed matrix: its left factor, or all of it, dense or sparse.

The tasks that make rows also write them, whole chunks each, and return only sizes and sums. A few pieces for each
thread are made at a time, so that memory does not depend on the number of cells.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import zarr
from numpy.typing import NDArray

from scialm_dask.data.arrays import new_array
from scialm_dask.data.csr import CHUNK_VALUES, RowBlocks, finish_csr, row_of
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.temporary import is_seen
from scialm_dask.events import Advance
from scialm_dask.reduction import current_client, execute, n_threads

if TYPE_CHECKING:
    import dask.array as da
    import scipy.sparse as sp

CHUNK_BYTES = 4 << 20
_DENSE_CHUNK_ROWS = 1024
_MOST_HERE = 4  # pieces made at a time by threads of this process


def write_left(root: zarr.Group, name: str, left: da.Array, advance: Advance) -> None:
    """Write a left factor, of shape (n_cells, rank), as element `name` of ``obsm``."""
    cells, rank = left.shape
    panels = RowBlocks.panels(cells, max(1, rank), CHUNK_BYTES)
    array = new_array(root.require_group("obsm"), name, (cells, rank), (panels.sizes[0], max(1, rank)), np.float32)
    if rank:
        _write_rows(array, _pieces(left, panels), advance)
    else:
        advance(1.0)


def write_dense(root: zarr.Group, imputed: da.Array, keep_observed: ExpressionMatrix | None, advance: Advance) -> float:
    """Write the imputed matrix as dense X and return the sum of X; observed entries are those of `keep_observed`."""
    panels = _panels(imputed.shape)
    array = new_array(root, "X", imputed.shape, (panels.sizes[0], imputed.shape[1]), np.float32)
    pieces = _pieces(imputed, panels)
    if keep_observed is not None:
        keep, observed = dask.delayed(_with_observed), _shared(keep_observed.for_workers().with_blocks(panels))
        pieces = [keep(piece, observed, number) for number, piece in enumerate(pieces)]
    return _write_rows(array, pieces, advance)


def write_sparse(
    root: zarr.Group,
    imputed: da.Array,
    left: da.Array,
    rule: Callable[[NDArray[np.float32]], NDArray[np.bool_]],
    observed: ExpressionMatrix,
    keep_observed: bool,
    advance: Advance,
) -> float:
    """Write the imputed matrix as sparse X and return the sum of X; see `BiologicalZeros`.

    `rule` returns, for rows of `left`, where their cells may be other than zero. Observed entries are never zero.
    """
    panels, group = _panels(imputed.shape), root.create_group("X")
    shared = _shared(rule), _shared(observed.for_workers().with_blocks(panels))
    make, measure, total = dask.delayed(_sparse_rows), dask.delayed(_measured), 0.0
    pieces = zip(_pieces(imputed, panels), _pieces(left, panels), strict=True)
    parts = [make(*pair, *shared, number, keep_observed) for number, pair in enumerate(pieces)]
    kinds = {"data": np.float32, "indices": np.int32}
    arrays = [new_array(group, name, (0,), (CHUNK_VALUES,), kind) for name, kind in kinds.items()]
    waiting: list[tuple[int, int, Any]] = []  # first and last value, and part, of rows not fully written
    indptr, written = [np.zeros(1, np.int64)], 0
    for some in _waves(len(parts)):
        made = list(execute([parts[number] for number in some]))
        for part, (lengths, amount) in zip(made, dask.compute(*map(measure, made)), strict=True):
            indptr.append(indptr[-1][-1] + np.cumsum(lengths))
            waiting.append((int(indptr[-2][-1]), int(indptr[-1][-1]), part))
            total += amount
        stored = int(indptr[-1][-1])
        end = stored if some.stop == len(parts) else stored - stored % CHUNK_VALUES  # full chunks, and the last one
        _write_chunks(arrays, written, end, waiting)
        written, waiting = end, [each for each in waiting if each[1] > end]
        advance(len(some) / len(parts))
    finish_csr(group, indptr, imputed.shape[1])
    return total


def _write_chunks(arrays: Sequence[Any], begin: int, end: int, rows: Sequence[tuple[int, int, Any]]) -> None:
    """Write values `begin` to ``end - 1`` of data and indices, a task for each chunk."""
    for array in arrays:
        array.resize((end,))
    shared, put, tasks = [*map(_shared, arrays)], dask.delayed(_put_values), []
    here = not _seen_by_workers(arrays[0])
    for start in range(begin, end, CHUNK_VALUES):
        stop = min(start + CHUNK_VALUES, end)
        own = [(first, part) for first, after, part in rows if first < stop and after > start]
        firsts, parts = [first for first, _ in own], [part for _, part in own]
        if here:
            _put_values(arrays, start, stop, firsts, dask.compute(*parts))
        else:
            tasks.append(put(shared, start, stop, firsts, parts))
    dask.compute(*tasks)


def _put_values(arrays: Sequence[Any], start: int, stop: int, firsts: Sequence[int], parts: Sequence[Any]) -> None:
    for array, kind in zip(arrays, ("data", "indices"), strict=True):
        spans = (getattr(part, kind)[max(0, start - a) : stop - a] for a, part in zip(firsts, parts, strict=True))
        array[start:stop] = np.concatenate(list(spans))


def _sparse_rows(
    dense: NDArray[np.float32],
    left: NDArray[np.float32],
    rule: Callable[[NDArray[np.float32]], NDArray[np.bool_]],
    observed: ExpressionMatrix,
    number: int,
    keep_observed: bool,
) -> sp.csr_matrix:
    import scipy.sparse as sp

    csr, values = observed.read_block(number), dense * rule(left)
    at = row_of(csr), csr.indices
    values[at] = csr.data if keep_observed else np.where(dense[at] > 0, dense[at], csr.data)
    return sp.csr_matrix(values)


def _measured(rows: sp.csr_matrix) -> tuple[NDArray[np.int64], float]:
    return np.diff(rows.indptr).astype(np.int64), float(rows.data.sum(dtype=np.float64))


def _with_observed(dense: NDArray[np.float32], observed: ExpressionMatrix, number: int) -> NDArray[np.float32]:
    csr, values = observed.read_block(number), dense if dense.flags.writeable else dense.copy()
    values[row_of(csr), csr.indices] = csr.data  # in place, which may be done twice
    return values


def _write_rows(array: Any, pieces: Sequence[Any], advance: Advance) -> float:
    """Write delayed rows, whole chunks each, and return their sum."""
    total, rows, put, shared = 0.0, array.chunks[0], dask.delayed(_put_rows), _shared(array)
    here = not _seen_by_workers(array)
    for some in _waves(len(pieces)):
        if here:
            sums = tuple(_put_rows(array, rows * number, pieces[number].compute()) for number in some)
        else:
            sums = execute([put(shared, rows * number, pieces[number]) for number in some], dask.compute)
        total += float(sum(sums))
        advance(len(some) / len(pieces))
    return total


def _put_rows(array: Any, start: int, values: NDArray[np.float32]) -> float:
    array[start : start + len(values)] = values
    return float(values.sum(dtype=np.float64))


def _waves(count: int) -> Iterator[range]:
    """Return the numbers of the pieces to make at a time."""
    size = min(n_threads(), _MOST_HERE) if current_client() is None else 2 * n_threads()
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _seen_by_workers(array: Any) -> bool:
    """Return whether tasks can write to an array; otherwise this process writes what they make."""
    folder = getattr(array.store, "root", None)
    return current_client() is None or (folder is not None and is_seen(folder))


def _shared(value: Any) -> Any:
    """Return a task with the value, which each worker gets once, for all its tasks."""
    return dask.delayed(value, name=f"written-{uuid.uuid4().hex[:12]}", traverse=False)


def _pieces(array: da.Array, blocks: RowBlocks) -> list[Any]:
    """Return these row blocks of a Dask array, delayed."""
    return array.rechunk((blocks.sizes, -1)).to_delayed()[:, 0].tolist()  # type: ignore[no-any-return]


def _panels(shape: tuple[int, int]) -> RowBlocks:
    """Return row blocks with a small dense form."""
    n_cells, n_genes = shape
    return RowBlocks.panels(n_cells, n_genes, min(CHUNK_BYTES, 4 * n_genes * _DENSE_CHUNK_ROWS))
