"""The imputed matrix on its way to disk: its left factor, or all of it, dense or sparse.

The tasks that make some rows write them, whole chunks each; only sizes and sums come here. A few rows for each thread
are on their way at a time, so that memory does not depend on the number of cells.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import dask
import numpy as np
import zarr
from numpy.typing import NDArray

from scialm_dask.data.arrays import new_array, set_encoding
from scialm_dask.data.csr import CHUNK_ROWS, CHUNK_VALUES, RowBlocks, row_of
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.temporary import is_seen
from scialm_dask.events import Advance
from scialm_dask.reduction import current_client, execute, n_threads

if TYPE_CHECKING:
    import dask.array as da
    import scipy.sparse as sp

CHUNK_BYTES = 4 << 20
_DENSE_CHUNK_ROWS = 1024
_MOST_HERE = 4  # pieces on their way at a time in this process


class ZeroRule(Protocol):
    """Tells which entries of a matrix may be other than zero; see `BiologicalZeros`."""

    @property
    def matrix(self) -> ExpressionMatrix:
        """Whose observed entries are never zero."""
        ...

    @property
    def rank(self) -> int:
        """Of the approximation that tells."""
        ...

    @property
    def left(self) -> da.Array:
        """Left factor of the approximation, shape ``(m, k)``."""
        ...

    def allowed(self) -> Callable[[NDArray[np.float32]], NDArray[np.bool_]]:
        """Return what tells of rows of `left` where their cells may be other than zero; small, for tasks."""
        ...


def write_left(root: zarr.Group, name: str, left: da.Array, advance: Advance) -> None:
    """Write a left factor, shape ``(m, r)``, as element `name` of ``obsm``."""
    cells, rank = left.shape
    rows = max(1, min(cells, CHUNK_BYTES // (4 * max(1, rank))))
    array = new_array(root.require_group("obsm"), name, (cells, rank), (rows, max(1, rank)), np.float32)
    if rank:
        _write_rows(array, _pieces(left, RowBlocks((*range(0, cells, rows), cells))), advance)
    else:
        advance(1.0)


def write_dense(root: zarr.Group, imputed: da.Array, keep_observed: ExpressionMatrix | None, advance: Advance) -> float:
    """Write the imputed matrix as dense X, observed entries as they were if a matrix is given; return the sum of X."""
    panels = _panels(imputed.shape)
    array = new_array(root, "X", imputed.shape, (panels.sizes[0], imputed.shape[1]), np.float32)
    pieces = _pieces(imputed, panels)
    if keep_observed is not None:
        keep, observed = dask.delayed(_with_observed), _shared(keep_observed.for_workers().with_blocks(panels))
        pieces = [keep(piece, observed, number) for number, piece in enumerate(pieces)]
    return _write_rows(array, pieces, advance)


def write_sparse(root: zarr.Group, imputed: da.Array, zeros: ZeroRule, keep_observed: bool, advance: Advance) -> float:
    """Write the imputed matrix as sparse X, without biological zeros, unless observed; return the sum of X."""
    panels, group = _panels(imputed.shape), root.create_group("X")
    observed, rule = (_shared(each) for each in (zeros.matrix.for_workers().with_blocks(panels), zeros.allowed()))
    make, measure, total = dask.delayed(_sparse_rows), dask.delayed(_measured), 0.0
    pieces = zip(_pieces(imputed, panels), _pieces(zeros.left, panels), strict=True)
    parts = [make(*pair, rule, observed, number, keep_observed) for number, pair in enumerate(pieces)]
    values, indptr = _Values(group), [np.zeros(1, np.int64)]
    for some in _waves(len(parts)):
        made = list(execute([parts[number] for number in some]))
        for part, (lengths, amount) in zip(made, dask.compute(*map(measure, made)), strict=True):
            indptr.append(values.stored + np.cumsum(lengths))
            values.append(part, int(lengths.sum()))
            total += amount
        values.write(last=some.stop == len(parts))
        advance(len(some) / len(parts))
    dtype = np.int32 if values.stored <= np.iinfo(np.int32).max else np.int64  # as the indices if it can be
    starts = np.concatenate(indptr).astype(dtype)
    new_array(group, "indptr", starts.shape, (CHUNK_ROWS,), dtype)[:] = starts
    set_encoding(group, "csr_matrix", "0.1.0", shape=list(imputed.shape))
    return total


class _Values:
    """Values and column numbers of a CSR matrix, whole chunks of which are written by tasks as rows are added."""

    def __init__(self, group: zarr.Group) -> None:
        kinds = {"data": np.float32, "indices": np.int32}
        self._arrays = [new_array(group, name, (0,), (CHUNK_VALUES,), kind) for name, kind in kinds.items()]
        self._here = not _seen_by_workers(self._arrays[0])
        self._waiting: list[tuple[int, int, Any]] = []  # first and last value, and part, of rows not yet all written
        self.stored = self._written = 0

    def append(self, part: Any, count: int) -> None:
        """Add rows, delayed, of so many values."""
        self._waiting.append((self.stored, self.stored + count, part))
        self.stored += count

    def write(self, *, last: bool) -> None:
        """Write all chunks that are full, and the last one."""
        end = self.stored if last else self.stored - self.stored % CHUNK_VALUES
        for array in self._arrays:
            array.resize((end,))
        shared, put, tasks = [*map(_shared, self._arrays)], dask.delayed(_put_values), []
        for start in range(self._written, end, CHUNK_VALUES):
            stop = min(start + CHUNK_VALUES, end)
            own = [(first, part) for first, after, part in self._waiting if first < stop and after > start]
            firsts, parts = [first for first, _ in own], [part for _, part in own]
            if self._here:
                _put_values(self._arrays, start, stop, firsts, dask.compute(*parts))
            else:
                tasks.append(put(shared, start, stop, firsts, parts))
        dask.compute(*tasks)
        self._written = end
        self._waiting = [each for each in self._waiting if each[1] > end]


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
    values[row_of(csr), csr.indices] = csr.data  # in place: done twice it is the same
    return values


def _write_rows(array: Any, pieces: Sequence[Any], advance: Advance) -> float:
    """Write delayed rows, whole chunks each; returns their sum."""
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
    """Numbers of the pieces that are made at a time."""
    size = min(n_threads(), _MOST_HERE) if current_client() is None else 2 * n_threads()
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _seen_by_workers(array: Any) -> bool:
    """Tell whether tasks can write to an array; else this process does, with what they make."""
    folder = getattr(array.store, "root", None)
    return current_client() is None or (folder is not None and is_seen(folder))


def _shared(value: Any) -> Any:
    """Make what all tasks need one task, which is sent to each worker once."""
    return dask.delayed(value, name=f"written-{uuid.uuid4().hex[:12]}", traverse=False)


def _pieces(array: da.Array, blocks: RowBlocks) -> list[Any]:
    """Cut a Dask array into these rows, delayed."""
    return array.rechunk((blocks.sizes, -1)).to_delayed()[:, 0].tolist()  # type: ignore[no-any-return]


def _panels(shape: tuple[int, int]) -> RowBlocks:
    """Rows of which the dense form is small."""
    n_cells, n_genes = shape
    return RowBlocks.panels(n_cells, n_genes, min(CHUNK_BYTES, 4 * n_genes * _DENSE_CHUNK_ROWS))
