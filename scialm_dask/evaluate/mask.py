"""Hiding observed entries, to see how well they are recovered."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from scialm_dask.config import Share, checked
from scialm_dask.data.annotated import refuse_logarithms, storable_annotation
from scialm_dask.data.annotation import new_anndata
from scialm_dask.data.csr import CSRWriter, check_observed, entries_where
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import atomic_store, check_output
from scialm_dask.errors import InputError
from scialm_dask.events import Advance, Listener, begin, silent
from scialm_dask.linalg.random import hidden_entries, n_to_hide


def gene_counts(matrix: ExpressionMatrix, advance: Advance = lambda _: None) -> NDArray[np.int64]:
    """Count the observed entries of each gene, in one pass."""
    counts = np.zeros(matrix.shape[1], np.int64)
    for block in matrix.stream():
        counts += np.bincount(block.indices, minlength=matrix.shape[1])
        advance(1 / len(matrix.blocks))
    return counts


@checked
def mask(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    fraction: Share = 0.1,
    seed: int = 0,
    layer: str | None = None,
    missing_chunks_are_zeros: bool = False,
    overwrite: bool = False,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Hide a share of the non-zeros of each gene, uniformly and without replacement.

    Of a gene with more than three non-zeros, ``int(count * fraction)`` are hidden. Which ones depends on the seed
    alone, not on how the matrix is stored or cut. The AnnData Zarr store that is written has X without the hidden
    entries, ``layers["held_out"]`` with nothing else, and ``obs`` and ``var`` as they were, but no other layers.

    Returns
    -------
    dict
        ``destination``, ``n_cells``, ``n_genes``, ``n_observed`` (left in X), ``n_hidden``, ``fraction``, ``seed``.

    Raises
    ------
    InputError
        If the source cannot be used, holds logarithms, or no entry would be hidden.
    OutputError
        If the destination cannot be written.
    """
    check_output(destination, overwrite=overwrite, sources=(source,))
    matrix = ExpressionMatrix.open(source, layer, missing_chunks_are_zeros=missing_chunks_are_zeros)
    refuse_logarithms(matrix, source, layer)
    matrix = storable_annotation(matrix, listen)
    advance = begin(listen, "masking")
    counts = gene_counts(matrix, lambda share: advance(share / 2))
    check_observed(int(counts.sum()), matrix.name)
    n_hidden = n_to_hide(counts, fraction)
    if not n_hidden.any():
        raise InputError(f"{matrix.name}: no gene has enough non-zeros to hide {fraction} of them; give a larger share")
    with atomic_store(destination, overwrite=overwrite, sources=(source,)) as partial:
        root = new_anndata(partial, obs=matrix.obs, var=matrix.var)
        _split(root, matrix, counts, n_hidden, seed, lambda share: advance(share / 2))
        zarr.consolidate_metadata(root.store)
        matrix.check_unchanged()
    return {
        "destination": os.fspath(destination),
        "n_cells": matrix.shape[0],
        "n_genes": matrix.shape[1],
        "n_observed": int(counts.sum() - n_hidden.sum()),
        "n_hidden": int(n_hidden.sum()),
        "fraction": fraction,
        "seed": seed,
    }


def _split(
    root: zarr.Group,
    matrix: ExpressionMatrix,
    counts: NDArray[np.int64],
    n_hidden: NDArray[np.int64],
    seed: int,
    advance: Advance,
) -> None:
    before, kind = np.zeros_like(counts), {"n_columns": matrix.shape[1], "dtype": matrix.rows.read(0, 1).dtype}
    with CSRWriter(root, "X", **kind) as left, CSRWriter(root, "layers/held_out", **kind) as held_out:
        for block in matrix.stream(as_stored=True):
            hidden = hidden_entries(block.indices, before, counts, n_hidden, seed)
            before += np.bincount(block.indices, minlength=len(counts))
            left.append(entries_where(block, ~hidden))
            held_out.append(entries_where(block, hidden))
            advance(1 / len(matrix.blocks))
