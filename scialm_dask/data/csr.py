"""Small things that are done to CSR blocks in many places. All keep the pattern's order of entries."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["entries_where", "row_of", "scaled_rows"]


def row_of(csr: sp.csr_matrix) -> NDArray[np.intp]:
    """Row of each stored value, shape ``(nnz,)``."""
    return np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))


def entries_where(csr: sp.csr_matrix, chosen: NDArray[np.bool_]) -> sp.csr_matrix:
    """Keep the chosen ones of the stored values, of which `chosen` tells in their order."""
    indptr = np.concatenate([[0], np.cumsum(chosen)])[csr.indptr]
    return sp.csr_matrix((csr.data[chosen], csr.indices[chosen], indptr), shape=csr.shape)


def scaled_rows(csr: sp.csr_matrix, factors: NDArray[np.floating]) -> sp.csr_matrix:
    """Multiply each row by its factor: float32, in a matrix of the same pattern."""
    values = (csr.data * np.repeat(factors, np.diff(csr.indptr))).astype(np.float32)
    return sp.csr_matrix((values, csr.indices, csr.indptr), shape=csr.shape)
