"""What a method has completed: read in panels of cells, or at single entries, however it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.csr import row_of
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.imputation import Imputation
from scialm_dask.linalg.kernels import Block, sampled_product

if TYPE_CHECKING:
    import dask.array as da

__all__ = [
    "Dense",
    "Factors",
    "Given",
    "Prediction",
    "Sparse",
    "as_dask",
    "panels",
    "read_prediction",
    "write_prediction",
]

Floats = NDArray[np.float32]
_PANEL_BYTES = 16 << 20


class Prediction(Protocol):
    """A completed matrix, cells × genes, not negative."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        ...

    def rows(self, start: int, stop: int) -> Floats:
        """Cells `start` to `stop`, all genes."""
        ...

    def at(self, entries: sp.csr_matrix, start: int) -> Floats:
        """Predict the stored entries of a block whose first cell is `start`, in the order of its data."""
        ...


@dataclass(frozen=True)
class Dense:
    """A whole matrix; a memory map will do."""

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.values.shape[0], self.values.shape[1]

    def rows(self, start: int, stop: int) -> Floats:
        """Cells `start` to `stop`."""
        return np.maximum(self.values[start:stop], 0)

    def at(self, entries: sp.csr_matrix, start: int) -> Floats:
        """Predict stored entries."""
        picked: Floats = self.values[start + row_of(entries), entries.indices]
        return np.maximum(picked, 0)


@dataclass(frozen=True)
class Factors:
    """``max(left @ right.T, 0)``, from factors of shapes ``(m, r)`` and ``(n, r)``; memory maps will do."""

    left: Floats
    right: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.left.shape[0], self.right.shape[0]

    def rows(self, start: int, stop: int) -> Floats:
        """Cells `start` to `stop`."""
        dense: Floats = self.left[start:stop] @ self.right.T
        return np.maximum(dense, 0, out=dense)

    def at(self, entries: sp.csr_matrix, start: int) -> Floats:
        """Predict stored entries."""
        block = Block(entries.indptr, entries.indices, entries.data, entries.shape[1])
        left = np.ascontiguousarray(self.left[start : start + entries.shape[0]])
        return np.maximum(sampled_product(block, left, self.right), 0)


@dataclass(frozen=True)
class Sparse:
    """A matrix, or a block of one, that stores what is not zero; indices sorted and unique."""

    values: sp.csr_matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.values.shape  # type: ignore[no-any-return]

    def rows(self, start: int, stop: int) -> Floats:
        """Cells `start` to `stop`."""
        return self.values[start:stop].toarray()  # type: ignore[no-any-return]

    def at(self, entries: sp.csr_matrix, start: int) -> Floats:
        """Predict stored entries, without a dense row."""
        picked = self.values[start + row_of(entries), entries.indices] if entries.nnz else ()
        return np.asarray(picked, np.float32).ravel()


@dataclass(frozen=True)
class Given:
    """The matrix that methods were given, as it is: no imputation."""

    matrix: ExpressionMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.matrix.shape

    def rows(self, start: int, stop: int) -> Floats:
        """Cells `start` to `stop`."""
        return self._cells(start, stop).rows(0, stop - start)

    def at(self, entries: sp.csr_matrix, start: int) -> Floats:
        """Predict stored entries."""
        return self._cells(start, start + entries.shape[0]).at(entries, 0)

    def _cells(self, start: int, stop: int) -> Sparse:
        blocks = RowBlocks(tuple(sorted({0, start, stop, self.shape[0]})))
        return Sparse(self.matrix.with_blocks(blocks).read_block(blocks.bounds.index(start)))


def panels(shape: tuple[int, int]) -> RowBlocks:
    """Rows of which the dense form is small."""
    return RowBlocks.panels(*shape, _PANEL_BYTES)


def as_dask(prediction: Prediction) -> da.Array:
    """Give a prediction as a dense Dask array, float32, panel by panel."""
    import dask
    import dask.array as da

    read = dask.delayed(type(prediction).rows, pure=True)
    held = dask.delayed(prediction, traverse=False)
    pieces = [
        da.from_delayed(read(held, start, stop), shape=(stop - start, prediction.shape[1]), dtype=np.float32)
        for start, stop in panels(prediction.shape)
    ]
    return da.concatenate(pieces, axis=0)


def write_prediction(answer: Any, folder: Path, scale: NDArray[np.float32] | None) -> None:
    """Keep what a method has returned in `folder`, each cell multiplied by its `scale`.

    Parameters
    ----------
    answer
        A dense matrix, a pair (left, right) of factors, or an `Imputation`.
    folder
        To write ``dense.npy``, or ``left.npy`` and ``right.npy`` to.
    scale
        Shape ``(m,)``; None for ones.

    Raises
    ------
    ValueError
        If that is no matrix of finite numbers.
    """
    if isinstance(answer, Imputation):
        answer = answer.left, answer.right
    if isinstance(answer, tuple):
        left, right = answer if answer[1].shape[1] else (np.zeros((len(answer[0]), 1)), np.zeros((len(answer[1]), 1)))
        if left.shape[1] != right.shape[1]:
            raise ValueError(f"gave factors of {left.shape[1]} and {right.shape[1]} columns")
        np.save(folder / "right.npy", _finite(np.asarray(right, np.float32)))
        _write_scaled(folder / "left.npy", left, scale)
    else:
        _write_scaled(folder / "dense.npy", np.asarray(answer), scale)


def _write_scaled(path: Path, rows: Any, scale: NDArray[np.float32] | None) -> None:
    target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=rows.shape)
    for start, stop in panels(rows.shape):
        piece = rows[start:stop]
        piece = _finite(piece.compute() if hasattr(piece, "compute") else piece)
        target[start:stop] = piece if scale is None else piece * scale[start:stop, None]
    target.flush()


def _finite(values: Any) -> Any:
    if not np.isfinite(values).all():
        raise ValueError("gave values that are not finite")
    return values


def read_prediction(folder: Path) -> Prediction:
    """Open what `write_prediction` has kept, without reading it."""
    if (folder / "dense.npy").exists():
        return Dense(np.load(folder / "dense.npy", mmap_mode="r", allow_pickle=False))
    return Factors(
        np.load(folder / "left.npy", mmap_mode="r", allow_pickle=False),
        np.load(folder / "right.npy", allow_pickle=False),
    )
