"""Annotation of cells and genes: read from stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from scialm_dask.data.arrays import check_whole
from scialm_dask.data.storable import as_text, first_line
from scialm_dask.data.store import open_store, readable
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

_LOOKED_AT = 50_000  # names, to see what they are of
_BARCODE = r"(?:^|[^A-Z])[ACGTN]{8,}(?:[^A-Z]|$)"
_GENE_ID = r"^(?:ENS[A-Z]*G|FBGN|WBGENE)\d{6,}"
_COMMON_GENES = frozenset("ACTB GAPDH B2M MALAT1 EEF1A1 TPT1 RPLP0 RPS6 UBC HSPA8 MT-CO1 PPIA TMSB4X FTL".split())
_SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")  # of CELLxGENE, scanpy and loom


class Annotation(NamedTuple):
    """Data frames of cells and genes."""

    obs: pd.DataFrame
    var: pd.DataFrame


class AnnotationHere(Annotation):
    """Data frames that stay in this process: None is what workers get."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


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
    with readable(f"{path}:{element}"):
        if element not in store:
            raise InputError(f"{path}: has no {element}; write the store again, with names of cells and genes")
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
    index = stored.attrs.get("_index", "_index")
    for key in (index, *stored.attrs.get("column-order", stored)):  # column a/b of HDF5 lies in a group named a
        if key not in stored or key.startswith("__"):  # AnnData names what is missing, and once stored categories so
            continue
        column, values = stored[key], stored[key]
        if hasattr(column, "keys"):
            values = next((column[part] for part in ("codes", "values") if part in column), None)
            if "encoding-type" not in column.attrs:
                raise InputError(f"{name}/{key}: does not say what it is; the store is damaged, write it again")
        if values is not None and values.shape[:1] != (length,):
            raise InputError(f"{name}/{key}: has {values.shape} rows, the matrix {length}; write the store again")


def symbols(var: pd.DataFrame) -> list[pd.Index]:
    """Return the names by which genes may be called: the index, and columns of symbols if there are any."""
    return [var.index, *(as_text(var[column]) for column in _SYMBOLS if column in var)]


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


def looks_like(names: pd.Index) -> Literal["cells", "genes"] | None:
    """Tell barcodes from names or IDs of genes; None if they look like neither."""
    import pandas as pd

    upper = [str(name).upper() for name in names[:_LOOKED_AT]]
    text = pd.Index(upper[:: max(1, len(upper) // 1000)], dtype=object)  # pandas 3 has no str for half a surrogate
    if text.str.contains(_BARCODE).mean() > 0.5:
        return "cells"
    few = len(_COMMON_GENES.intersection(upper)) < 3
    return None if few and text.str.contains(_GENE_ID).mean() < 0.5 else "genes"


def positions_of(wanted: Any, frame: pd.DataFrame, what: str) -> tuple[Any, bool]:
    """Turn names or symbols, or whatever NumPy indexes with, into positions; tell whether it was a single one."""
    if isinstance(wanted, slice):
        return wanted, False
    single = isinstance(wanted, str | int | np.integer)
    items = np.atleast_1d(np.asarray(wanted))
    if not items.size:
        return np.empty(0, np.intp), False
    if items.dtype.kind in "US" or items.dtype == object:
        names = next((called for called in symbols(frame) if np.isin(items, called).all()), frame.index)
        repeated = np.isin(items, names[names.duplicated()])
        if repeated.any():
            raise InputError(f"several {what}s are named '{items[np.argmax(repeated)]}'; pick one by its number")
        positions = names.get_indexer_for(items)
        if (positions < 0).any():
            absent = items[np.flatnonzero(positions < 0)[0]]
            raise InputError(f"no {what} is named '{absent}'; the first ones are {', '.join(map(str, names[:3]))}")
        return positions, single
    return np.arange(len(frame))[items], single


def unique_names(frame: pd.DataFrame, what: str) -> tuple[pd.DataFrame, list[str]]:
    """Make the names of cells or genes unique as scanpy does; say so in a note, if any name has changed."""
    import warnings

    from anndata.utils import make_index_unique

    n_repeated = int(frame.index.duplicated().sum())
    if not n_repeated:
        return frame, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a suffix may look like part of a name
        frame = frame.set_axis(make_index_unique(frame.index), axis=0)
    return frame, [f"{n_repeated} repeated {what} names were made unique with -1, -2, …"]


def swapped_axes(obs: pd.DataFrame, var: pd.DataFrame) -> list[str]:
    """Say in a note that a matrix may be genes × cells, if its names look like that."""
    of_obs, of_var = looks_like(obs.index), looks_like(var.index)
    if of_obs != "genes" and of_var != "cells":
        return []
    return [
        f"cells are called {obs.index[0]}, … and genes {var.index[0]}, …: if this is genes × cells, give its transpose"
    ]
