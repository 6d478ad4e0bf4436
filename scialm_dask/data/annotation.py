"""Annotation of cells and genes: read from stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from scialm_dask.data.arrays import check_whole
from scialm_dask.data.storable import as_text, first_line
from scialm_dask.data.store import open_store, readable
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["Annotation", "StoredAnnotation", "read_annotation", "symbols", "total_counts"]

_SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")  # of CELLxGENE, scanpy and loom


class Annotation(NamedTuple):
    """Data frames of cells and genes."""

    obs: pd.DataFrame
    var: pd.DataFrame


class StoredAnnotation(NamedTuple):
    """Where a store has them: its path, and the names of the two elements."""

    path: str
    obs: str = "obs"
    var: str = "var"


def read_annotation(place: StoredAnnotation | Annotation | None, axis: str, length: int) -> pd.DataFrame:
    """Read ``obs`` or ``var``, names as text, unless they are given; number the rows if there are none.

    Raises
    ------
    InputError
        If the store has none, or none that can be read, or of another length.
    """
    import pandas as pd

    if isinstance(place, Annotation):
        return place.obs if axis == "obs" else place.var
    if place is None:
        return pd.DataFrame(index=pd.RangeIndex(length).astype(str))
    path, element = place.path, place.obs if axis == "obs" else place.var
    store = open_store(path)
    if element not in store:
        raise InputError(f"{path}: has no {element}; write the store again, with names of cells and genes")
    with readable(f"{path}:{element}"):
        frame = _read_frame(path, store[element], element, length)
    if len(frame) != length:
        raise InputError(f"{path}: {element} has {len(frame)} rows, the matrix {length}; write the store again")
    frame.index = as_text(frame.index)
    return frame


def _read_frame(path: str, stored: Any, element: str, length: int) -> pd.DataFrame:
    import anndata

    if hasattr(stored, "keys"):
        check_whole(f"{path}:{element}", stored)
        _check_columns(f"{path}:{element}", stored, length)
        return anndata.io.read_elem(stored)
    adata = anndata.read_h5ad(path, backed="r")  # a table, as AnnData wrote before 0.7
    try:
        owner, axis = (adata.raw, "var") if element == "raw/var" else (adata, element)
        return getattr(owner, axis).copy()
    finally:
        adata.file.close()


def _check_columns(name: str, stored: Any, length: int) -> None:
    """Refuse columns that do not say what they are, or that claim another length, before they are read."""
    for key in stored:
        column, values = stored[key], stored[key]
        if key.startswith("__"):  # how AnnData once stored categories
            continue
        if hasattr(column, "keys"):
            values = next((column[part] for part in ("codes", "values") if part in column), None)
            if "encoding-type" not in column.attrs:
                raise InputError(f"{name}/{key}: does not say what it is; the store is damaged, write it again")
        if values is not None and values.shape[:1] != (length,):
            raise InputError(f"{name}/{key}: has {values.shape} rows, the matrix {length}; write the store again")


def symbols(var: pd.DataFrame) -> list[pd.Index]:
    """Return the names by which genes may be called: the index, and columns of symbols if there are any."""
    import pandas as pd

    return [var.index, *(pd.Index(var[column].astype(str)) for column in _SYMBOLS if column in var)]


def total_counts(obs: pd.DataFrame, name: str) -> NDArray[np.float64] | None:
    """Return ``obs["total_counts"]``, the raw total of each cell, shape ``(m,)``; None if there are none.

    Raises
    ------
    InputError
        If they are not numbers; `name` is what to call the matrix.
    """
    if "total_counts" not in obs:
        return None
    try:
        return obs["total_counts"].to_numpy("float64", na_value=float("nan"))  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: obs['total_counts'] holds no numbers ({first_line(error)}); give raw totals or drop the column"
        ) from error
