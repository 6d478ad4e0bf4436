"""AnnData objects: the matrix in one, and the factors put beside it, by scanpy's conventions."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scialm_dask.data.matrix import Annotation, ExpressionMatrix, Observed, check_array, held_array
from scialm_dask.data.rows import reordered
from scialm_dask.data.store import open_store
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import anndata
    import dask.array as da
    import pandas as pd
    from numpy.typing import NDArray

__all__ = [
    "add_result",
    "aligned",
    "as_dask",
    "as_matrix",
    "is_anndata",
    "looks_like_counts",
    "match_names",
    "named",
    "refuse_logarithms",
]

_LOOKED_AT = 1 << 10  # cells at the start, to see whether they are whole numbers
_RUNS = 16  # in which those are, where any of them may have been changed
_COUNTS = "counts"  # as `qc` calls the layer
_IN_A_CHUNK = 1 << 22  # entries of what is cut for Dask


def is_anndata(thing: Any) -> bool:
    """Tell, without loading AnnData."""
    return hasattr(thing, "obs_names") and hasattr(thing, "var_names")


def as_matrix(matrix: Any, layer: str | None = None, *, observed: Observed | None = None) -> ExpressionMatrix:
    """Take whatever holds cells × genes.

    Parameters
    ----------
    matrix
        An `ExpressionMatrix`, as it is; an AnnData; a path to a store; a data frame; or an array, as
        `ExpressionMatrix.of` takes them.
    layer
        Of a store or an AnnData, instead of X.
    observed
        See `ExpressionMatrix`. None: what an `ExpressionMatrix` was opened with, ``"nonzero"`` for all else.

    Raises
    ------
    InputError
        If it cannot be used, or an `ExpressionMatrix` was opened with another layer or `observed`.
    """
    if isinstance(matrix, ExpressionMatrix):
        return _as_opened(matrix, layer, observed)
    observed = "nonzero" if observed is None else observed
    if isinstance(matrix, str | os.PathLike):
        return ExpressionMatrix.open(matrix, layer, observed=observed)
    if is_anndata(matrix):
        return _of_anndata(matrix, layer, observed)
    if layer is not None:
        raise InputError(f"layer is {layer!r}, but a {type(matrix).__name__} has none; leave the layer out")
    return named(ExpressionMatrix.of(matrix, observed=observed), matrix)


def _as_opened(matrix: ExpressionMatrix, layer: str | None, observed: Observed | None) -> ExpressionMatrix:
    if layer is not None:
        raise InputError(f"{matrix.name}: is opened already; give the layer, {layer!r}, to ExpressionMatrix.open")
    if observed is not None and observed != matrix.observed:
        raise InputError(
            f"{matrix.name}: is opened with observed={matrix.observed!r}, and {observed!r} is needed; open it with that"
        )
    return matrix


def named(matrix: ExpressionMatrix, given: Any) -> ExpressionMatrix:
    """Take over the names of cells and genes if a data frame was given."""
    if not hasattr(given, "columns"):
        return matrix
    import pandas as pd

    return matrix.annotated(Annotation(*(pd.DataFrame(index=axis.astype(str)) for axis in given.axes)))


def _of_anndata(adata: anndata.AnnData, layer: str | None, observed: Observed) -> ExpressionMatrix:
    """Take X or a layer with the annotation; X of a backed AnnData is read from its file, block by block."""
    annotation = Annotation(*(_in_memory(frame) for frame in (adata.obs, adata.var)))
    if layer is not None and layer not in adata.layers:
        raise InputError(f"AnnData: has no layer {layer!r}; its layers are: {', '.join(adata.layers) or 'none'}")
    if adata.isbacked and layer is None:
        if adata.is_view:
            raise InputError(
                f"{adata.filename}: this is a view of a backed AnnData; give view.to_memory(), or write the view to a "
                "file by view.copy(filename) and give that"
            )
        return ExpressionMatrix.open(adata.filename, observed=observed).annotated(annotation)
    values, name = (adata.X, "AnnData:X") if layer is None else (adata.layers[layer], f"AnnData:layers/{layer}")
    if values is None:
        raise InputError(f"AnnData: has no X; name one of its layers: {', '.join(adata.layers) or 'there are none'}")
    return ExpressionMatrix.of(values, observed=observed, name=name).annotated(annotation)


def match_names(names: pd.Index, wanted: pd.Index, what: str, owner: str) -> NDArray[np.intp] | None:
    """Return the position of each wanted name, or None where positions agree already.

    That is so where the names are the same, or where either side has none but the numbers of its rows.

    Parameters
    ----------
    names, wanted
        Of the same cells or genes, in two orders.
    what
        ``"cell"`` or ``"gene"``.
    owner
        What has `names`, for messages.

    Raises
    ------
    InputError
        If the lengths differ, a wanted name is absent, or names that are in another order repeat.
    """
    if len(names) != len(wanted):
        raise InputError(f"{owner}: {len(names)} {what}s where there should be {len(wanted)}; give the same {what}s")
    if names.equals(wanted) or not _has_names(names) or not _has_names(wanted):
        return None
    if names.is_unique and wanted.is_unique:
        positions: NDArray[np.intp] = names.get_indexer(wanted)
        if (positions >= 0).all():
            return positions
    at = int(np.argmax(np.asarray(names != wanted)))
    raise InputError(
        f"{owner}: {what} {at} is '{names[at]}' where '{wanted[at]}' is expected; give the same {what}s, and each once"
    )


def _has_names(names: pd.Index) -> bool:
    """Tell names from the numbers that stand where there are none."""
    return str(names[-1]) != str(len(names) - 1) or list(names.astype(str)) != list(map(str, range(len(names))))


def aligned(matrix: ExpressionMatrix, to: Any) -> ExpressionMatrix:
    """Return a matrix with its cells and genes in the order of another thing's, which is matched by names.

    Parameters
    ----------
    matrix
        To be put beside `to`.
    to
        Has ``obs`` and ``var``, such as an `Imputation` or an `ExpressionMatrix`.

    Raises
    ------
    InputError
        If cells or genes are not the same; see `match_names`.
    """
    if matrix.shape != to.shape:
        (m, n), (cells, genes) = matrix.shape, to.shape
        raise InputError(
            f"{matrix.name}: {m} cells × {n} genes, but {cells} × {genes} are expected; give the same cells and genes"
        )
    cells = match_names(matrix.obs.index, to.obs.index, "cell", matrix.name)
    genes = match_names(matrix.var.index, to.var.index, "gene", matrix.name)
    if cells is None and genes is None:
        return matrix
    obs = matrix.obs if cells is None else matrix.obs.iloc[cells]
    var = matrix.var if genes is None else matrix.var.iloc[genes]
    rows = reordered(matrix.rows, matrix.blocks, cells, genes)
    return replace(matrix, rows=rows, annotation=Annotation(obs, var))


def _in_memory(frame: Any) -> Any:
    return frame.to_memory() if hasattr(frame, "to_memory") else frame.copy()


def as_dask(matrix: Any, name: str) -> da.Array:
    """Take whatever holds numbers, cells × something, as a Dask array of its own precision.

    Parameters
    ----------
    matrix
        A Dask array, as it is; anything with `to_dask()`; an AnnData (its X) or a path to a store; or what is in
        memory: a NumPy or SciPy sparse array, a data frame, a list.
    name
        What to call it in messages.

    Raises
    ------
    InputError
        If it is not a matrix of numbers of known size.
    """
    import dask.array as da
    import scipy.sparse as sp

    if isinstance(matrix, str | os.PathLike) or is_anndata(matrix):
        return as_matrix(matrix).to_dask()
    if hasattr(matrix, "to_dask"):
        return matrix.to_dask()
    if isinstance(matrix, da.Array):
        check_array(matrix, name)
        return matrix
    held = held_array(matrix, name)
    held = sp.csr_matrix(held) if sp.issparse(held) else held
    rows = max(1, _IN_A_CHUNK // held.shape[1])
    return da.from_array(held, chunks=(rows, -1), asarray=False).persist()  # goes to the workers once


def looks_like_counts(matrix: ExpressionMatrix) -> bool:
    """Tell whether the values of some cells, all over a matrix whose zeros are no values, are whole numbers."""
    if matrix.observed == "finite":
        return False
    starts = {matrix.shape[0] * run // _RUNS for run in range(_RUNS)}
    runs = (matrix.rows.read(start, min(start + _LOOKED_AT // _RUNS, matrix.shape[0])) for start in sorted(starts))
    return not any(np.any(csr.data % 1) for csr in runs)


def counts_beside(matrix: ExpressionMatrix, given: Any = None) -> ExpressionMatrix | None:
    """Return layer counts of what a matrix is the X of, cut alike; None if there is no such layer.

    Parameters
    ----------
    matrix
        X of a store or an AnnData.
    given
        The AnnData.
    """
    if is_anndata(given) and matrix.origin is None:
        beside = as_matrix(given, _COUNTS) if _COUNTS in given.layers else None
    elif matrix.origin is not None and matrix.origin.layer is None and matrix.annotation is not None:
        stored = f"layers/{_COUNTS}" in open_store(matrix.origin.path)
        beside = as_matrix(matrix.origin.path, _COUNTS) if stored else None
    else:
        return None
    return None if beside is None else beside.with_blocks(matrix.blocks)


def refuse_logarithms(matrix: ExpressionMatrix, given: Any, layer: str | None) -> None:
    """Raise `InputError` if X is marked as logarithms, as scanpy's ``log1p`` does, and does not hold whole numbers.

    Parameters
    ----------
    matrix
        Made of `given`.
    given
        An AnnData, which has ``uns``; else the matrix's own store is looked at.
    layer
        Layers are not looked at: the mark is about X.
    """
    if layer is not None or matrix.observed == "finite" or not _marked(matrix, given):
        return
    first = matrix.rows.read(0, min(_LOOKED_AT, matrix.shape[0]))
    if np.any(first.data % 1):
        raise InputError(
            f"{matrix.name}: holds logarithms, as uns['log1p'] says; give the layer that holds counts, or delete "
            "uns['log1p'] if it is wrong"
        )


def _marked(matrix: ExpressionMatrix, given: Any) -> bool:
    if is_anndata(given):
        return "log1p" in given.uns
    if isinstance(matrix.annotation, str) and matrix.origin is not None and matrix.origin.layer is None:
        return "uns/log1p" in open_store(matrix.annotation)
    return False


def add_result(
    adata: anndata.AnnData, *, obsm: dict[str, da.Array], by_gene: dict[str, Any], uns: dict[str, Any]
) -> None:
    """Put a result into an AnnData. A view becomes an AnnData of its own.

    Parameters
    ----------
    adata
        To change.
    obsm
        By name; computed, unless the AnnData is lazy itself.
    by_gene
        By name, for ``var`` if one-dimensional and else for ``varm``.
    uns
        By name.
    """
    import anndata
    import dask

    lazy = not adata.isbacked and dask.is_dask_collection(adata.X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", anndata.ImplicitModificationWarning)
        for name, array in obsm.items():
            adata.obsm[name] = array if lazy else array.compute()
        for name, array in by_gene.items():
            (adata.var if array.ndim == 1 else adata.varm)[name] = array
        adata.uns.update(uns)
