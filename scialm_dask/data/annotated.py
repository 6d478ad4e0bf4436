"""Matrices of AnnData objects and other inputs, matched by names; and results added to an AnnData as scanpy does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.annotation import Annotation, as_text, storable, swapped_axes
from scialm_dask.data.csr import Observed, check_array, held_array
from scialm_dask.data.formats import layers_of
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.rows import Rows, reordered
from scialm_dask.data.store import open_store, readable
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Note

if TYPE_CHECKING:
    import anndata
    import dask.array as da
    import pandas as pd

_AXES = ("obs", "var")
_COUNTS = "counts"  # the layer that `qc` writes
_CHUNK_ENTRIES = 1 << 22  # of a matrix in memory that becomes a Dask array
_SMALLEST, _LARGEST = 1e-9, 30  # logarithms; counts of deep cells are larger
_BASES: dict[str, Callable[[Any], Any]] = {
    "expm1(x)": np.expm1,
    "2**x - 1": lambda x: np.exp2(x) - 1,
    "10**x - 1": lambda x: 10**x - 1,
}


def is_anndata(thing: Any) -> bool:
    """Return whether a thing is an AnnData, without importing AnnData."""
    return hasattr(thing, "obs_names") and hasattr(thing, "var_names")


def as_matrix(matrix: Any, layer: str | None = None, *, observed: Observed | None = None) -> ExpressionMatrix:
    """Return an `ExpressionMatrix` of one, of an AnnData, of a path to a store, or of an array of cells × genes.

    `layer` is read instead of X of a store or an AnnData; ``"raw"`` is ``.raw.X``, unless there is a layer of that
    name. By default `observed` is that of an `ExpressionMatrix`, and ``"nonzero"`` for other inputs. Raises
    `InputError` if the matrix cannot be used, or an `ExpressionMatrix` was opened with another layer or `observed`.
    """
    if isinstance(matrix, ExpressionMatrix):
        name, opened = matrix.name, matrix.observed
        if layer is not None:
            raise InputError(f"{name}: is opened already; give the layer, {layer!r}, to ExpressionMatrix.open")
        if observed is not None and observed != opened:
            raise InputError(f"{name}: opened with observed={opened!r}, and {observed!r} is needed; open it with that")
        return matrix
    observed = "nonzero" if observed is None else observed
    if isinstance(matrix, str | os.PathLike):
        return ExpressionMatrix.open(matrix, layer, observed=observed)
    if is_anndata(matrix):
        return _of_anndata(matrix, layer, observed)
    if layer is not None:
        raise InputError(f"layer is {layer!r}, but a {type(matrix).__name__} has none; leave the layer out")
    return named(ExpressionMatrix.of(matrix, observed=observed), matrix)


def named(matrix: ExpressionMatrix, given: Any) -> ExpressionMatrix:
    """Return the matrix with the names of cells and genes of a data frame, if `given` is one."""
    if not hasattr(given, "columns"):
        return matrix
    import pandas as pd

    return replace(matrix, annotation=Annotation(*(pd.DataFrame(index=axis.astype(str)) for axis in given.axes)))


def _of_anndata(adata: anndata.AnnData, layer: str | None, observed: Observed) -> ExpressionMatrix:
    """Return X or a layer, with annotation; X of a backed AnnData is read from its file, block by block."""
    if not hasattr(adata, "isbacked"):  # an AnnCollection
        remedy = "give anndata.concat(…), or join files by `scialm-dask convert A B DST.zarr`"
        raise InputError(f"a {type(adata).__name__} has no matrix of its own; {remedy}")
    layers = ", ".join(filter(None, adata.layers))  # AnnData 0.13 has X as layer None
    raw = layer == "raw" and layer not in adata.layers and getattr(adata, "raw", None) is not None
    if layer is not None and layer not in adata.layers and not raw:
        raise InputError(f"AnnData: has no layer {layer!r}; its layers are: {layers or 'none'}")
    frames = [adata.obs, adata.raw.var if raw else adata.var]
    frames = [frame.to_memory() if hasattr(frame, "to_memory") else frame.copy() for frame in frames]
    annotation = Annotation(*(frame.set_axis(as_text(frame.index), axis=0) for frame in frames))
    if adata.isbacked and (layer is None or raw):
        if adata.is_view:
            remedy = "give view.to_memory(), or write the view to a file by view.copy(filename) and give that"
            raise InputError(f"{adata.filename}: this is a view of a backed AnnData; {remedy}")
        return replace(ExpressionMatrix.open(adata.filename, layer, observed=observed), annotation=annotation)
    if raw:
        values, name = adata.raw.X, "AnnData:raw/X"
    else:
        values, name = (adata.X, "AnnData:X") if layer is None else (adata.layers[layer], f"AnnData:layers/{layer}")
    if values is None:
        raise InputError(f"AnnData: has no X; name one of its layers: {layers or 'there are none'}")
    return replace(ExpressionMatrix.of(values, observed=observed, name=name), annotation=annotation)


def match_names(names: pd.Index, wanted: pd.Index, what: str, owner: str) -> NDArray[np.intp] | None:
    """Return the position of each wanted name of `what`, ``"cell"`` or ``"gene"``; None if the order is the same.

    It is the same if the names are, or if either side has no names but row numbers. Raises `InputError` about `owner`
    if the lengths differ, a wanted name is absent, or names in another order repeat.
    """
    if len(names) != len(wanted):
        raise InputError(f"{owner}: {len(names)} {what}s where there should be {len(wanted)}; give the same {what}s")
    if names.equals(wanted) or _is_numbered(names) or _is_numbered(wanted):
        return None
    if names.is_unique and wanted.is_unique:
        positions: NDArray[np.intp] = names.get_indexer(wanted)
        if (positions >= 0).all():
            return positions
    at = int(np.argmax(np.asarray(names != wanted)))
    raise InputError(
        f"{owner}: {what} {at} is '{names[at]}' where '{wanted[at]}' is expected; give the same {what}s, and each once"
    )


def _is_numbered(names: pd.Index) -> bool:
    return str(names[-1]) == str(len(names) - 1) and list(names.astype(str)) == list(map(str, range(len(names))))


def axes_of(thing: Any) -> tuple[pd.Index | None, pd.Index | None]:
    """Return the names of cells and genes of an input of `as_dask`, None where it has none."""
    if hasattr(thing, "columns"):
        return thing.index.astype(str), thing.columns.astype(str)
    if isinstance(thing, str | os.PathLike):
        thing = as_matrix(thing)
    names = [getattr(thing, f"{axis}_names", getattr(getattr(thing, axis, None), "index", None)) for axis in _AXES]
    return names[0], names[1]


def aligned(matrix: ExpressionMatrix, to: Any) -> ExpressionMatrix:
    """Return a matrix with cells and genes in the order of `to`, by name; raises `InputError` if they differ."""
    if matrix.shape != to.shape:
        (m, n), (cells, genes) = matrix.shape, to.shape
        raise InputError(
            f"{matrix.name}: {m} cells × {n} genes, but {cells} × {genes} are expected; give the same ones"
        )
    cells = match_names(matrix.obs.index, to.obs.index, "cell", matrix.name)
    genes = match_names(matrix.var.index, to.var.index, "gene", matrix.name)
    if cells is None and genes is None:
        return matrix
    obs = matrix.obs if cells is None else matrix.obs.iloc[cells]
    var = matrix.var if genes is None else matrix.var.iloc[genes]
    rows = reordered(matrix.rows, matrix.blocks, cells, genes)
    return replace(matrix, rows=rows, annotation=Annotation(obs, var))


def as_dask(matrix: Any, name: str) -> da.Array:
    """Return numbers, cells × something, as a Dask array of their own precision.

    They are a Dask array, anything with `to_dask()`, an AnnData (its X), a path to a store, or a matrix in memory.
    Raises `InputError` if they are no matrix of numbers of known size.
    """
    import dask.array as da

    if isinstance(matrix, str | os.PathLike) or is_anndata(matrix):
        return as_matrix(matrix).to_dask()
    if hasattr(matrix, "to_dask"):
        return matrix.to_dask()
    if isinstance(matrix, da.Array):
        check_array(matrix, name)
        return matrix
    held = held_array(matrix, name)
    held = sp.csr_matrix(held) if sp.issparse(held) else held
    rows = max(1, _CHUNK_ENTRIES // held.shape[1])
    return da.from_array(held, chunks=(rows, -1), asarray=False).persist()  # sent to the workers once


def looks_like_counts(matrix: ExpressionMatrix) -> bool:
    """Return whether some cells, from all over a matrix with unobserved zeros, have whole numbers only."""
    return matrix.observed != "finite" and not np.any(some_cells(matrix.rows, 16, 64).data % 1)


def counts_beside(matrix: ExpressionMatrix, given: Any = None) -> ExpressionMatrix | None:
    """Return layer counts beside a matrix that is X of a store or AnnData, in the same blocks, or None."""
    if is_anndata(given) and matrix.origin is None:
        beside = as_matrix(given, _COUNTS) if _COUNTS in given.layers else None
    elif matrix.origin is not None and matrix.annotation is not None and _is_beside_x(matrix, f"layers/{_COUNTS}"):
        beside = as_matrix(matrix.origin.path, _COUNTS)
    else:
        return None
    return None if beside is None else beside.with_blocks(matrix.blocks)


def refuse_logarithms(matrix: ExpressionMatrix, given: Any, layer: str | None) -> None:
    """Raise `InputError` if a matrix holds logarithms, by its values or by scanpy's mark of X, ``uns["log1p"]``.

    The mark is read from `given`, if that is an AnnData, else from the matrix's store; it does not apply to layers. A
    matrix with observed zeros may hold anything.
    """
    if matrix.observed == "finite":
        return
    cells = some_cells(matrix.rows)
    evidence = evidence_of_logarithms(cells)
    if evidence is None and layer is None and np.any(np.floor(cells.data) != cells.data):
        marked = "log1p" in given.uns if is_anndata(given) else _is_beside_x(matrix, "uns/log1p")
        evidence = "uns['log1p'] says (delete it if it is wrong)" if marked else None
    if evidence is not None:
        names: list[str] = []
        if is_anndata(given):
            names = [*filter(None, given.layers), *(["raw"] if getattr(given, "raw", None) is not None else [])]
        elif matrix.origin is not None:
            with readable(path := matrix.origin.path):
                names = layers_of(open_store(path))
        layers = ", ".join(names)
        remedy = f"give the layer that holds counts, of: {layers}" if layers else "give counts, or undo the logarithm"
        raise InputError(f"{matrix.name}: holds logarithms, as {evidence}; {remedy}")


def _is_beside_x(matrix: ExpressionMatrix, element: str) -> bool:
    """Return whether a matrix is X of a store that has this element."""
    if matrix.origin is None or matrix.origin.layer is not None:
        return False
    with readable(path := matrix.origin.path):
        return element in open_store(path)


def storable_annotation(matrix: ExpressionMatrix, listen: Listener) -> ExpressionMatrix:
    """Return the matrix with its annotation in a form that can be written; `listen` is told of changes.

    Raises `InputError` if it has none, before long work rather than after it.
    """
    if matrix.annotation is None:
        return matrix
    (obs, of_obs), (var, of_var) = storable(matrix.obs, "obs"), storable(matrix.var, "var")
    for note in of_obs + of_var + swapped_axes(obs, var):
        listen(Note(f"{matrix.name}: {note}"))
    return replace(matrix, annotation=Annotation(obs, var))


def add_result(
    adata: anndata.AnnData, *, obsm: dict[str, da.Array], by_gene: dict[str, Any], uns: dict[str, Any]
) -> None:
    """Add a result to an AnnData, lazily if its X is lazy; `by_gene` goes into ``var`` or ``varm``."""
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


def some_cells(rows: Rows, places: int = 4, count: int = 32) -> sp.csr_matrix:
    """Return `count` cells from each of `places` places, all over the matrix; all cells of a small one."""
    n_cells = rows.shape[0]
    if n_cells <= places * count:
        return rows.read(0, n_cells)
    starts = np.linspace(0, n_cells - count, places).astype(int).tolist()
    return sp.vstack([rows.read(start, start + count) for start in starts], format="csr")


def evidence_of_logarithms(cells: sp.csr_matrix) -> str | None:
    """Say what shows that values are logarithms of counts, normalised or not; None if nothing does.

    With the logarithm undone, the values of each cell are whole multiples of the smallest, or all cells have the same
    total; as they are, neither holds. Counts are whole numbers, and normalised counts are whole multiples as they are.
    """
    values = cells.data.astype(np.float64)
    if not len(values) or not np.any(np.floor(values) != values) or not 0 <= values.min() <= values.max() <= _LARGEST:
        return None  # false for NaN too
    by_cell = [kept for row in np.split(values, cells.indptr[1:-1]) if len(kept := row[row > _SMALLEST])]
    for words, undo in _BASES.items():
        multiples = [
            bool(_multiples(undo(row))) > bool(_multiples(row)) for row in by_cell if _multiples(row) is not None
        ]
        if len(multiples) >= 5 and np.mean(multiples) >= 0.5:
            return f"{words} gives whole multiples in each cell"
        totals = np.array([(undo(row).sum(), row.sum()) for row in by_cell])
        if len(totals) < 10:
            continue
        spread, as_is = totals.std(axis=0) / totals.mean(axis=0)
        if spread < 0.01 and spread < as_is / 5:
            return f"{words} sums to {totals[:, 0].mean():.5g} in each cell"
    return None


def _multiples(row: NDArray[np.float64]) -> bool | None:
    """Return whether values are whole multiples of the smallest; None if there are too few values."""
    ratios = np.unique(row) / row.min()
    ratios = ratios[(ratios > 1) & (ratios < 100)]
    if len(ratios) < 2:
        return None
    return bool(np.all(np.abs(ratios - ratios.round()) < 0.01))
