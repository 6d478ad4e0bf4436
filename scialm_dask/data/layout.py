"""Where a matrix is cut: pure integers, no input or output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_MOST_NONZEROS = 2_000_000  # some 80 MB of a task's memory: any worker has that
_LEAST_NONZEROS = 500_000  # below this a task is overhead
_USEFUL_BLOCKS = 8  # enough for every core to have work on a small matrix
_MOST_ROWS = 1 << 16
_ROW_VALUES = 16  # a row takes as much of a task as so many values, beside its own


@dataclass(frozen=True)
class RowBlocks:
    """A partition of the rows of a matrix into consecutive blocks."""

    bounds: tuple[int, ...]  # strictly increasing row numbers; block b is rows bounds[b] to bounds[b + 1] - 1

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] != 0 or np.any(np.diff(self.bounds) <= 0):
            raise ValueError(f"bounds must rise from 0, got {self.bounds[:5]}…")

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return pairwise(self.bounds)

    def __getitem__(self, block: int) -> tuple[int, int]:
        return self.bounds[block], self.bounds[block + 1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each block."""
        return tuple(stop - start for start, stop in self)

    @classmethod
    def even(cls, n_rows: int, n_blocks: int) -> RowBlocks:
        """Cut into ``n_blocks`` blocks of (nearly) the same number of rows, fewer if there are fewer rows."""
        n_blocks = max(1, min(n_blocks, n_rows))
        return cls(tuple(int(b) for b in np.linspace(0, n_rows, n_blocks + 1).round()))

    @classmethod
    def by_nonzeros(cls, indptr: NDArray[np.integer], n_blocks: int | None = None) -> RowBlocks:
        """Cut so that blocks hold about the same number of stored values, of a size made for one task by default."""
        n_rows, total = len(indptr) - 1, int(indptr[-1])
        if n_blocks is not None:
            effort = indptr + _ROW_VALUES * np.arange(n_rows + 1, dtype=np.int64)
            cuts = np.searchsorted(effort, np.linspace(0, effort[-1], min(n_blocks, n_rows) + 1)[1:-1])
            return cls(tuple(np.unique(np.concatenate([[0], cuts, [n_rows]])).tolist()))
        target = min(_MOST_NONZEROS, max(_LEAST_NONZEROS, -(-total // _USEFUL_BLOCKS)))
        n_blocks = max(1, -(-total // target))
        cuts = np.searchsorted(indptr, np.linspace(0, total, n_blocks + 1)[1:-1])
        bounds = np.unique(np.concatenate([[0], cuts, [n_rows]]))
        return cls(tuple(_split_long(bounds.tolist())))

    @classmethod
    def by_width(cls, n_rows: int, row_values: int, chunk_rows: int = 1) -> RowBlocks:
        """Cut a dense matrix, each row of which holds `row_values` values, stored in chunks of `chunk_rows` rows.

        Blocks are whole chunks where that is not far too much for one task, so that no chunk is read twice.
        """
        blocks = cls.by_nonzeros(np.arange(n_rows + 1, dtype=np.int64) * row_values)
        rows = blocks.sizes[0]
        if chunk_rows <= rows:
            rows -= rows % chunk_rows
        elif chunk_rows * row_values <= 4 * _MOST_NONZEROS:
            rows = chunk_rows
        return cls((*range(0, n_rows, rows), n_rows))

    @classmethod
    def panels(cls, n_rows: int, n_columns: int, most_bytes: int) -> RowBlocks:
        """Cut so that each block takes `most_bytes` at most as dense float32, or is a single row."""
        rows = max(1, min(n_rows, most_bytes // (4 * n_columns)))
        return cls((*range(0, n_rows, rows), n_rows))


def _split_long(bounds: list[int]) -> Iterator[int]:
    for start, stop in pairwise(bounds):
        pieces = -(-(stop - start) // _MOST_ROWS)
        yield from (start + (stop - start) * i // pieces for i in range(pieces))
    yield bounds[-1]
