"""Hide observed entries, to score how well they are recovered."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import zarr

from scialm_dask.config import Share, checked
from scialm_dask.data.annotated import refuse_logarithms, storable_annotation
from scialm_dask.data.annotation import new_anndata
from scialm_dask.data.csr import CSRWriter, check_observed, entries_where
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import atomic_store, check_output
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, begin, silent
from scialm_dask.linalg.random import hidden_entries, n_to_hide


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

    ``int(count * fraction)`` non-zeros are hidden of each gene with more than three. The choice depends only on the
    seed, not on how the matrix is stored. The written AnnData Zarr store has X without the hidden entries,
    ``layers["held_out"]`` with the hidden entries only, and the same ``obs`` and ``var``, but no other layers.

    Returns ``destination``, ``n_cells``, ``n_genes``, ``n_observed`` (left in X), ``n_hidden``, ``fraction`` and
    ``seed``. Raises `InputError` if the source is invalid, holds logarithms, or no entry would be hidden, and
    `OutputError` if the destination cannot be written.
    """
    check_output(destination, overwrite=overwrite, sources=(source,))
    matrix = ExpressionMatrix.open(source, layer, missing_chunks_are_zeros=missing_chunks_are_zeros)
    refuse_logarithms(matrix, source, layer)
    matrix = storable_annotation(matrix, listen)
    advance, share_of_block = begin(listen, "masking"), 0.5 / len(matrix.blocks)
    counts = np.zeros(matrix.shape[1], np.int64)
    for block in matrix.stream():
        counts += np.bincount(block.indices, minlength=len(counts))
        advance(share_of_block)
    check_observed(int(counts.sum()), matrix.name)
    n_hidden = n_to_hide(counts, fraction)
    if not n_hidden.any():
        raise InputError(f"{matrix.name}: no gene has enough non-zeros to hide {fraction} of them; give a larger share")
    with atomic_store(destination, overwrite=overwrite, sources=(source,)) as partial:
        root = new_anndata(partial, obs=matrix.obs, var=matrix.var)
        before, kind = np.zeros_like(counts), {"n_columns": len(counts), "dtype": matrix.rows.read(0, 1).dtype}
        with CSRWriter(root, "X", **kind) as left, CSRWriter(root, "layers/held_out", **kind) as held_out:
            for block in matrix.stream(as_stored=True):
                hidden = hidden_entries(block.indices, before, counts, n_hidden, seed)
                before += np.bincount(block.indices, minlength=len(counts))
                left.append(entries_where(block, ~hidden))
                held_out.append(entries_where(block, hidden))
                advance(share_of_block)
        zarr.consolidate_metadata(root.store)
        matrix.check_unchanged()
    told = {"destination": os.fspath(destination), "n_cells": matrix.shape[0], "n_genes": matrix.shape[1]}
    told |= {"n_observed": int(counts.sum() - n_hidden.sum()), "n_hidden": int(n_hidden.sum())}
    return told | {"fraction": fraction, "seed": seed}
