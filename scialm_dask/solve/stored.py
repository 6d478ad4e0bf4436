"""Results on disk: AnnData stores with factors, notes, and optionally the imputed matrix as X."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import zarr
from numpy.typing import NDArray

from scialm_dask.data.annotated import aligned
from scialm_dask.data.annotation import StoredAnnotation, new_anndata, read_annotation
from scialm_dask.data.arrays import check_whole, write_element
from scialm_dask.data.csr import CSRWriter, RowBlocks
from scialm_dask.data.formats import locate
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.remote import is_url
from scialm_dask.data.rows import fingerprint
from scialm_dask.data.store import atomic_store, lasting, open_store, readable
from scialm_dask.data.written import CHUNK_BYTES, write_dense, write_left, write_sparse
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, begin
from scialm_dask.reduction import stacked
from scialm_dask.solve.biological_zeros import BiologicalZeros
from scialm_dask.solve.estimate import Axes
from scialm_dask.solve.scaling import model_of

if TYPE_CHECKING:
    import dask.array as da

KEY = "scialm"
_FACTORS, _RESIDUAL = f"{KEY}_factors", f"{KEY}_residual"
_LAYER = "counts"
_LOW_RANK = "only the values of the low-rank part are known; give `Imputation.open` the counts"


def read_result(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str | None]:
    """Return the arguments of `Imputation` except its counts, and a reference to these for `follow`."""
    import anndata

    root: Any = open_store(path)
    held = {"obsm": _FACTORS, "varm": _FACTORS, "uns": KEY}
    with readable(path):
        if isinstance(root, zarr.Array) or any(axis not in root or k not in root[axis] for axis, k in held.items()):
            raise InputError(f"{path}: not a result of this version; make one with `scialm-dask impute`")
        left, right, notes = (root[axis][key] for axis, key in held.items())
        for name, part in {"left factor": left, "right factor": right}.items():
            check_whole(f"{path}: {name}", part, always=True)
        check_whole(f"{path}:uns/{KEY}", notes)
        right, uns = np.asarray(right[...]), anndata.io.read_elem(notes)
        summary = json.loads(str(uns["summary"]))
        if left.shape[1:] != right.shape[1:] or not isinstance(summary, dict) or not np.isfinite(right).all():
            raise InputError(f"{path}: the factors or their summary are damaged; impute again")
        path, annotation = lasting(path), StoredAnnotation(lasting(path))
        var = read_annotation(annotation, "var", right.shape[0])
        weight = var.pop(_RESIDUAL).to_numpy(np.float32) if _RESIDUAL in var else None
        arguments = {
            "left": _rows_of(path, f"obsm/{_FACTORS}", left),
            "right": right,
            "obs": read_annotation(annotation, "obs", left.shape[0]),
            "var": var,
            "summary": summary,
            "history": {name: column.tolist() for name, column in uns["history"].items()},
            "clip": bool(uns["clip"]),
            "model": model_of(uns["model"]) if "model" in uns else None,
            "residual_weight": weight,
            "axes": Axes(**uns["axes"]) if "axes" in uns else None,
            "stored": path,
        }
    return arguments, uns.get("counts")


def _rows_of(path: str, name: str, stored: Any) -> da.Array:
    """Return a stored array as a Dask array with tasks that open the store."""
    read, (cells, rank) = dask.delayed(_read_rows, pure=True), stored.shape
    rows = RowBlocks.panels(cells, max(1, rank), CHUNK_BYTES)
    if stored.chunks is not None:  # an .h5ad may have none
        rows = RowBlocks((*range(0, cells, stored.chunks[0]), cells))
    return stacked([read(path, name, *span) for span in rows], rows.sizes, rank, stored.dtype)


def _read_rows(path: str, name: str, start: int, stop: int) -> NDArray[np.float32]:
    with readable(f"{path}:{name}"):
        rows = np.asarray(open_store(path)[name][start:stop])
    if not np.isfinite(rows).all():
        raise InputError(f"{path}: {name} of cells {start} to {stop} is not finite; impute again")
    return rows


def write_result(
    result: Any,
    path: str | os.PathLike[str],
    dense: bool,
    keep_observed: ExpressionMatrix | None,
    preserve_zeros: BiologicalZeros | None,
    overwrite: bool,
    sources: tuple[str | os.PathLike[str], ...],
    listen: Listener,
) -> dict[str, Any] | None:
    """Write an `Imputation` as `Imputation.to_zarr` says, and return the entry X of the summary."""
    _check_x(result, dense, keep_observed, preserve_zeros)
    keep_observed = None if keep_observed is None else aligned(keep_observed, result)
    advance, written = begin(listen, "writing"), None
    by_cell = {_FACTORS: result.left, f"X_{KEY}": result.embedding}
    by_cell = {name: part for name, part in by_cell.items() if part is not None}
    parts = len(by_cell) + (dense or preserve_zeros is not None)

    def advance_part(share: float) -> None:
        advance(share / parts)

    weight, counts = result.residual_weight, result.counts
    var = result.var if weight is None else result.var.assign(**{_RESIDUAL: weight})
    with atomic_store(path, overwrite=overwrite, sources=sources) as partial:
        root = new_anndata(partial, obs=result.obs, var=var)
        for name, part in by_cell.items():
            write_left(root, name, part, advance_part)
        write_element(root["varm"], _FACTORS, result.right)
        if preserve_zeros is not None:
            rule = preserve_zeros.left, preserve_zeros.allowed(), preserve_zeros.matrix
            total = write_sparse(root, result.to_dask(), *rule, keep_observed is not None, advance_part)
            written = {"written": "preserve_zeros", "rank": preserve_zeros.rank}
        elif dense:
            total = write_dense(root, result.to_dask(), keep_observed, advance_part)
            written = {"written": "dense"}
        if written is not None:
            mean, observed = total / result.shape[0] / result.shape[1], result.summary.get("mean_observed")
            written |= {"keep_observed": keep_observed is not None}
            written |= {"mean_over_observed": mean / observed if observed else None}
        place = {} if counts is None else {"counts": json.dumps(_refer_to(counts, root, result.stored))}
        write_element(root["uns"], KEY, result.notes(written) | place)
        zarr.consolidate_metadata(root.store)
        if read := preserve_zeros.matrix if preserve_zeros is not None else keep_observed:
            read.check_unchanged()
    return written


def _check_x(
    result: Any, dense: bool, keep_observed: ExpressionMatrix | None, preserve_zeros: BiologicalZeros | None
) -> None:
    """Raise `InputError` for options of `Imputation.to_zarr` that contradict each other or the result."""
    if dense and preserve_zeros is not None:
        raise InputError("dense and preserve_zeros both say what X is to be; give one of them")
    if keep_observed is not None and not dense and preserve_zeros is None:
        raise InputError("keep_observed is about X, and none is written; give dense=True or preserve_zeros too")
    if preserve_zeros is None:
        return
    if not hasattr(preserve_zeros, "expressed"):
        raise InputError(
            f"preserve_zeros is {preserve_zeros!r}; give the rule of the matrix that was imputed: "
            "biological_zeros(matrix)"
        )
    if aligned(preserve_zeros.matrix, result) is not preserve_zeros.matrix:
        raise InputError(
            f"preserve_zeros is of {preserve_zeros.matrix.name}, whose cells or genes are in another order than "
            "those of the result; give the rule of the matrix that was imputed"
        )


def _refer_to(counts: ExpressionMatrix, root: zarr.Group, stored: str | None) -> dict[str, Any]:
    """Return a reference to the counts, JSON values; write them as a layer of `root` if they were in memory.

    The counts of `stored`, the store that the result was opened from, are written too.
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
    """Return the counts of the result at `path`, or None and a line that says why they cannot be used.

    The reference is from `_refer_to`, as JSON; None if there is none.
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
