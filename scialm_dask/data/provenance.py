"""Where the counts of a denoised result are: they stay where they were, or lie beside it as a layer."""

from __future__ import annotations

import json
import os
from typing import Any

import zarr

from scialm_dask.data.fingerprint import fingerprint
from scialm_dask.data.formats import locate
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.remote import is_url
from scialm_dask.data.store import lasting, open_store, readable
from scialm_dask.data.writer import CSRWriter
from scialm_dask.errors import InputError

__all__ = ["follow", "refer_to"]

_LAYER = "counts"
_LOW_RANK = "these are the values of the low-rank part; give `Imputation.open` the counts for all"


def refer_to(counts: ExpressionMatrix, root: zarr.Group, stored: str | None) -> dict[str, Any]:
    """Return where counts are, plain values; counts that were in memory are written as a layer of `root`.

    Parameters
    ----------
    counts
        Cells × genes.
    root
        The store that the result is written to.
    stored
        The store that it was opened from: a layer there is written anew.
    """
    origin = counts.origin
    if origin is not None and origin.path != stored:
        path = lasting(origin.path)
        place = {"path": path, "layer": origin.layer, "missing": origin.missing_chunks_are_zeros}
        return place | {"fingerprint": _stamp(path, origin.layer)}
    with CSRWriter(root.require_group("layers"), _LAYER, n_columns=counts.shape[1]) as writer:
        for csr in counts.stream():
            writer.append(csr)
    return {"path": "", "layer": _LAYER, "missing": False, "fingerprint": None}


def follow(reference: str | None, path: str, shape: tuple[int, int]) -> tuple[ExpressionMatrix | None, str]:
    """Open the counts of a result again: give None and why, in a line, where they are gone or have changed.

    Parameters
    ----------
    reference
        From `refer_to`, as JSON; None if it is not known where they are.
    path
        Of the result.
    shape
        That they must have.
    """
    if reference is None:
        return None, f"{path}: does not say where its counts are; {_LOW_RANK}"
    place = json.loads(reference)
    where, layer, missing = place["path"] or path, place["layer"], place["missing"]
    if not os.path.exists(where) and not is_url(where):
        beside = os.path.join(os.path.dirname(path), os.path.basename(where))  # moved together
        where = beside if os.path.exists(beside) else where
    try:
        if place["fingerprint"] not in (None, _stamp(where, layer)):
            return None, f"{path}: its counts, {where}, have changed since; {_LOW_RANK}"
        counts = ExpressionMatrix.open(where, layer, missing_chunks_are_zeros=missing)
    except InputError as error:
        return None, f"{path}: its counts cannot be read ({error}); {_LOW_RANK}"
    if counts.shape != shape:
        return None, f"{path}: its counts, {where}, are of other cells now; {_LOW_RANK}"
    return counts, ""


def _stamp(path: str, layer: str | None) -> str | None:
    with readable(path):
        return fingerprint(locate(path, open_store(path), layer).rows)
