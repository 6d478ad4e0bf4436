"""Annotation of cells and genes: reads it, makes it storable, looks up names, and adds what is beside a matrix."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import zarr

from scialm_dask.data.arrays import ZARR_FORMAT, check_whole, set_encoding, write_element
from scialm_dask.data.remote import NewStore
from scialm_dask.data.store import open_store, readable
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import anndata
    import pandas as pd
    from numpy.typing import NDArray

_LOOKED_AT = 50_000  # names, to tell barcodes from genes
_BARCODE = r"(?:^|[^A-Z])[ACGTN]{8,}(?:[^A-Z]|$)"
_GENE_ID = r"^(?:ENS[A-Z]*G|FBGN|WBGENE)\d{6,}"
_COMMON_GENES = frozenset("ACTB GAPDH B2M MALAT1 EEF1A1 TPT1 RPLP0 RPS6 UBC HSPA8 MT-CO1 PPIA TMSB4X FTL".split())
_SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")  # of CELLxGENE, scanpy and loom
_LONGEST_NAME = 200  # bytes; a column is a folder, whose name is limited to 255 on most disks


class Annotation(NamedTuple):
    """Data frames of cells and genes."""

    obs: pd.DataFrame
    var: pd.DataFrame


class AnnotationHere(Annotation):
    """Data frames that stay in this process: they are pickled as None."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class StoredAnnotation(NamedTuple):
    """A store with data frames of cells and genes, and the names of these elements."""

    path: str
    obs: str = "obs"
    var: str = "var"


def read_annotation(place: StoredAnnotation | Annotation | None, axis: str, length: int) -> pd.DataFrame:
    """Return ``obs`` or ``var``, read from the store if need be, with names as text; numbered if there is no store."""
    import pandas as pd

    if isinstance(place, Annotation):
        return place.obs if axis == "obs" else place.var
    if place is None:
        return pd.DataFrame(index=pd.RangeIndex(length).astype(str))
    import anndata

    path, element = place.path, place.obs if axis == "obs" else place.var
    store = open_store(path)
    with readable(f"{path}:{element}"):
        if element not in store:
            raise InputError(f"{path}: has no {element}; write the store again, with names of cells and genes")
        if hasattr(store[element], "keys"):
            check_whole(f"{path}:{element}", store[element])
            _check_columns(f"{path}:{element}", store[element], length)
            frame = anndata.io.read_elem(store[element])
        else:  # a table, as AnnData wrote before 0.7
            adata = anndata.read_h5ad(path, backed="r")
            try:
                frame = (adata.raw.var if element == "raw/var" else getattr(adata, element)).copy()
            finally:
                adata.file.close()
    if len(frame) != length:
        raise InputError(f"{path}: {element} has {len(frame)} rows, the matrix {length}; write the store again")
    frame.index = as_text(frame.index)
    return frame


def _check_columns(name: str, stored: Any, length: int) -> None:
    """Raise `InputError` for columns without an encoding or with another length, before they are read."""
    index = stored.attrs.get("_index", "_index")
    for key in (index, *stored.attrs.get("column-order", stored)):  # HDF5 has column a/b in a group a
        if key not in stored or key.startswith("__"):  # AnnData reports it; old categories begin with __
            continue
        column, values = stored[key], stored[key]
        if hasattr(column, "keys"):
            values = next((column[part] for part in ("codes", "values") if part in column), None)
            if "encoding-type" not in column.attrs:
                raise InputError(f"{name}/{key}: does not say what it is; the store is damaged, write it again")
        if values is not None and values.shape[:1] != (length,):
            raise InputError(f"{name}/{key}: has {values.shape} rows, the matrix {length}; write the store again")


def symbols(var: pd.DataFrame) -> list[pd.Index]:
    """Return the index of genes, and columns of symbols if there are any."""
    return [var.index, *(as_text(var[column]) for column in _SYMBOLS if column in var)]


def total_counts(obs: pd.DataFrame, name: str) -> NDArray[np.float64] | None:
    """Return ``obs["total_counts"]`` as float64, or None; raises `InputError` if they are no numbers."""
    if "total_counts" not in obs:
        return None
    try:
        return obs["total_counts"].to_numpy("float64", na_value=float("nan"))  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: obs['total_counts'] holds no numbers ({first_line(error)}); give raw totals or drop it"
        ) from error


def looks_like(names: pd.Index) -> Literal["cells", "genes"] | None:
    """Return whether names are barcodes, or names or IDs of genes; None if they look like neither."""
    import pandas as pd

    upper = [str(name).upper() for name in names[:_LOOKED_AT]]
    text = pd.Index(upper[:: max(1, len(upper) // 1000)], dtype=object)  # pandas 3 has no str for half a surrogate
    if text.str.contains(_BARCODE).mean() > 0.5:
        return "cells"
    few = len(_COMMON_GENES.intersection(upper)) < 3
    return None if few and text.str.contains(_GENE_ID).mean() < 0.5 else "genes"


def positions_of(wanted: Any, frame: pd.DataFrame, what: str) -> tuple[Any, bool]:
    """Return the positions of names, symbols or whatever NumPy indexes with, and whether a single one was wanted."""
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
    """Return a frame with unique names, made as scanpy does, and a note if any name has changed."""
    import warnings

    from anndata.utils import make_index_unique

    n_repeated = int(frame.index.duplicated().sum())
    if not n_repeated:
        return frame, []
    with warnings.catch_warnings(action="ignore"):  # about suffixes that look like parts of names
        frame = frame.set_axis(make_index_unique(frame.index), axis=0)
    return frame, [f"{n_repeated} repeated {what} names were made unique with -1, -2, …"]


def swapped_axes(obs: pd.DataFrame, var: pd.DataFrame) -> list[str]:
    """Return a note that a matrix may be genes × cells, if its names look like it."""
    of_obs, of_var = looks_like(obs.index), looks_like(var.index)
    if of_obs != "genes" and of_var != "cells":
        return []
    return [
        f"cells are called {obs.index[0]}, … and genes {var.index[0]}, …: if this is genes × cells, give its transpose"
    ]


def new_anndata(place: str | Path | NewStore, *, obs: Any, var: Any, raw_var: Any = None) -> zarr.Group:
    """Create an AnnData Zarr store with annotation, of ``.raw`` too if given, and without a matrix."""
    root = zarr.open_group(place, mode="w-", zarr_format=ZARR_FORMAT)
    set_encoding(root, "anndata", "0.1.0")
    for name, value in {"obs": obs, "var": var}.items():
        write_element(root, name, storable(value, name)[0])
    if raw_var is not None:
        set_encoding(root.create_group("raw"), "raw", "0.1.0")
        write_element(root["raw"], "var", storable(raw_var, "raw/var")[0])
        set_encoding(root.create_group("raw/varm"), "dict", "0.1.0")
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        set_encoding(root.create_group(name), "dict", "0.1.0")
    return root


def as_text(names: pd.Index | pd.Series) -> pd.Index:
    """Return names of any type as Python strings."""
    import pandas as pd

    # Objects, since pandas 3 strings cannot hold lone surrogates, which replace bytes that are not UTF-8.
    return pd.Index([str(name) for name in names], dtype=object, name=names.name)


def storable(frame: pd.DataFrame, axis: str) -> tuple[pd.DataFrame, list[str]]:
    """Return a data frame that AnnData can write to Zarr, and notes about what was changed.

    Numbers, booleans, text and categories stay as they are; other types, such as dates, become text, and text with
    missing values becomes categories. A slash in the name of a column becomes ``_``. Raises `InputError` if `axis`,
    ``"obs"`` or ``"var"``, still cannot be written.
    """
    import anndata
    import pandas as pd

    kept = frame.copy(deep=False)
    names: list[str] = []
    notes: list[str] = []
    for position, given in enumerate(frame.columns):
        names.append(_plain_name(given, names))
        column = frame.iloc[:, position]
        values = _plain_values(column)
        if values is not None:
            kept.isetitem(position, values)
        how = [f"as {names[-1]!r}"] if names[-1] != given else []
        is_text = pd.api.types.infer_dtype(column, skipna=True) in ("string", "empty", "bytes")
        how += ["as text"] if values is not None and column.dtype.kind not in "fU" and not is_text else []
        if how:
            notes.append(f"{axis}[{str(given)!r}] is kept {' '.join(how)}")
    kept.columns = names
    kept.index = as_text(frame.index)
    if kept.index.name is not None and _plain_name(kept.index.name, names) != kept.index.name:
        kept.index.name = None
    try:
        anndata.io.write_elem(zarr.open_group(zarr.storage.MemoryStore(), zarr_format=2), "frame", kept.iloc[:2])
    except Exception as error:
        raise InputError(f"{axis} cannot be written to Zarr ({first_line(error)}); drop that column first") from error
    return kept, notes


def _plain_name(given: Any, taken: list[str]) -> str:
    """Return a name for a column that is valid for a folder and not taken."""
    name = str(given).replace("/", "_").replace("\0", "_")
    name = name.encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")
    if name.startswith(".") or name in ("", "_index", "zarr.json"):
        name = f"column{name}"
    unique, number = name, 0
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def _plain_values(column: pd.Series) -> Any:
    """Return the values of a column in a form that can be written; None if they are in one."""
    import pandas as pd

    dtype: Any = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        categories = _plain_values(dtype.categories.to_series())
        if categories is None:
            return None
        return pd.Categorical(pd.Series(np.asarray(categories)[column.cat.codes]).where(column.notna().to_numpy()))
    if isinstance(dtype, pd.SparseDtype):
        return column.sparse.to_dense().to_numpy()
    if pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
        if dtype.kind == "f" and (not isinstance(dtype, np.dtype) or dtype.itemsize > 8):
            return column.to_numpy(np.float64, na_value=np.nan)
        return _text(column) if dtype.kind == "O" else None
    text = isinstance(dtype, np.dtype) or getattr(dtype, "na_value", None) is np.nan  # pandas 2 and 3
    if text and pd.api.types.infer_dtype(column, skipna=False) == "string":
        return None
    return _text(column)


def _text(column: pd.Series) -> Any:
    import pandas as pd

    missing = column.isna().to_numpy()
    words = np.array([v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in column], dtype=object)
    return pd.Categorical(pd.Series(words).where(~missing)) if missing.any() else words


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0] or type(error).__name__


def place_of(name: str) -> tuple[str, str | None]:
    """Return path and layer of a matrix by its name: ``path:X``, ``path:layers/counts`` or ``path:raw/X``."""
    path, _, element = re.sub(r":(?=(X|raw/X|layers/[^:]+)$)", "\0", name).partition("\0")
    return path, None if element in ("", "X") else element.removeprefix("layers/").removesuffix("/X")


def add_source(adata: anndata.AnnData, name: str) -> None:
    """Add ``obsm``, ``uns`` and ``layers`` of the store of a matrix, by its name, to an AnnData.

    Arrays stay lazy. Nothing is added if the store is gone or has other cells, and no layers if it has other genes.
    """
    path, _ = place_of(name)
    if not _same_names(path, "obs", adata.obs_names):
        return
    from anndata.experimental import read_elem_lazy
    from anndata.io import read_elem

    store: Any = open_store(path)
    groups = ["obsm", "uns"] + ["layers"] * _same_names(path, "var", adata.var_names)
    with readable(path):
        for group in groups:
            for name in store.get(group, ()):
                element = store[group][name]
                lazy = group != "uns" and element.attrs.get("encoding-type") in ("array", "csr_matrix", "csc_matrix")
                getattr(adata, group)[name] = read_elem_lazy(element) if lazy else read_elem(element)


def _same_names(path: str, axis: str, names: pd.Index) -> bool:
    with suppress(InputError):  # gone, or of another length
        if hasattr(open_store(path), "keys"):
            return bool(read_annotation(StoredAnnotation(path), axis, len(names)).index.equals(names))
    return False
