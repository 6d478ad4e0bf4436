"""What people give as a matrix of numbers, and its values: taken, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from scialm_dask.arguments import short_repr
from scialm_dask.data.rows import StoredRows
from scialm_dask.data.temporary import temporary_csr
from scialm_dask.data.transpose import Entries, rows_in_order
from scialm_dask.errors import InputError

Observed = Literal["nonzero", "finite"]

_LARGEST = 1e15  # value; of larger ones, and of smaller than its inverse, products leave what float32 holds


def held_array(matrix: Any, name: str) -> Any:
    """Take what is in memory, SciPy sparse or anything that NumPy takes; raises `InputError` as `check_array`.

    A sparse data frame stays sparse, and the bytes of numbers are put into the order of this machine.
    """
    if np.ma.is_masked(matrix):
        raise InputError(f"{name}: has masked entries; fill them, with zeros or NaN, whatever stands for the unknown")
    if hasattr(matrix, "columns") and all(
        hasattr(kind, "fill_value") and kind.fill_value == 0 for kind in matrix.dtypes
    ):
        matrix = matrix.sparse.to_coo().tocsr()
    try:
        held = matrix if sp.issparse(matrix) else np.asarray(matrix)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: a {type(matrix).__name__}, not a matrix of numbers ({error})") from error
    if held.ndim == 0:
        raise InputError(f"{name} is {short_repr(matrix)}; give a matrix of numbers")
    check_array(held, name)
    return held.astype(held.dtype.newbyteorder("="), copy=False)


def unmasked(matrix: Any, observed: Observed) -> Any:
    """Put what stands for the unknown where a masked array is masked."""
    if not isinstance(matrix, np.ma.MaskedArray):
        return matrix
    if observed == "nonzero":
        return matrix.filled(0)
    filled = matrix.filled(0).astype(np.float64)
    filled[np.ma.getmaskarray(matrix)] = np.nan
    return filled


def check_array(array: Any, name: str) -> None:
    """Raise `InputError` if an array, of NumPy, SciPy or Dask, is not a matrix of numbers of known size."""
    if array.ndim != 2 or any(np.isnan(n) or n == 0 for n in array.shape):
        raise InputError(
            f"{name}: shape {array.shape}; give a matrix: two dimensions of known size, one cell and gene at least"
        )
    if array.dtype.kind not in "buif" or array.dtype == np.float16:
        raise InputError(
            f"{name}: values are of type {array.dtype}, not numbers that can be computed with; convert them first"
        )


def computed(array: Any, name: str, observed: Observed) -> StoredRows:
    """Compute a Dask array, a row of chunks at a time, into a temporary store."""
    if hasattr(array, "to_dask_array"):
        raise InputError(f"{name}: a Dask data frame, of unknown length; give frame.to_dask_array(lengths=True)")
    check_array(array, name)

    def chunk(*place: int) -> sp.csr_matrix:
        return sp.csr_matrix(unmasked(array.blocks[place].compute(), observed))

    dtype = np.dtype(np.float64) if observed == "finite" else array.dtype.newbyteorder("=")
    if array.numblocks[0] > 1 or array.numblocks[1] == 1:
        array = array.rechunk({1: -1})
        return temporary_csr((chunk(i) for i in range(array.numblocks[0])), array.shape[1], dtype, name)
    starts = np.cumsum([0, *array.chunks[1]])  # stored by genes, as CSC is

    def pieces() -> Iterator[Entries]:
        for number, start in enumerate(starts[:-1]):
            entries = chunk(0, number).tocoo()
            yield Entries(entries.row, (entries.col + start).astype(np.int32), entries.data)

    n_values = array.shape[0] * array.shape[1] // 10  # nobody knows before they are read
    return temporary_csr(rows_in_order(pieces(), array.shape, dtype, n_values, name), array.shape[1], dtype, name)


def check_values(csr: sp.csr_matrix, name: str, first_row: int) -> None:
    """Raise `InputError` if a value is negative, NaN or infinite."""
    smallest, largest = (csr.data.min(), csr.data.max()) if csr.nnz else (0, 0)
    if smallest >= 0 and largest < np.inf:  # false for NaN too
        return
    at = int(np.flatnonzero(~((csr.data >= 0) & (csr.data < np.inf)))[0])
    row = int(np.searchsorted(csr.indptr, at, side="right")) - 1
    raise InputError(
        f"{name}: value {csr.data[at]} at cell {first_row + row}, gene {csr.indices[at]}; expression must be "
        "finite and not negative: give counts or normalised counts, not scaled or centred data"
    )


def check_observed(n_observed: int, name: str) -> None:
    """Raise `InputError` if a matrix turned out to have no observed entry."""
    if n_observed == 0:
        raise InputError(
            f"{name}: no entry is observed, all are zero; give a matrix with non-zeros, e.g. another layer"
        )


def finite_entries(csr: sp.csr_matrix, name: str) -> sp.csr_matrix:
    """All entries that are not NaN, zeros stored explicitly."""
    dense = csr.toarray()
    if np.isinf(dense).any():
        raise InputError(f"{name}: holds an infinite value; mark missing entries as NaN")
    keep = ~np.isnan(dense)
    indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))])
    return sp.csr_matrix((dense[keep], np.nonzero(keep)[1].astype(np.int32), indptr), shape=csr.shape)


def check_size(csr: sp.csr_matrix, name: str, first_row: int) -> None:
    """Raise `InputError` if values are so large or small that they cannot be computed with."""
    largest, last_row = np.abs(csr.data).max(initial=0), first_row + csr.shape[0] - 1
    if largest and not 1 / _LARGEST <= largest <= _LARGEST:
        raise InputError(
            f"{name}: cells {first_row} to {last_row} have values up to {largest:g}, whose squares are beyond "
            f"float32; multiply the matrix so that they lie between {1 / _LARGEST:g} and {_LARGEST:g}"
        )
