"""Annotation in names and forms that a store takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_LONGEST_NAME = 200  # bytes; a column is a folder, and few disks take more than 255


def as_text(names: pd.Index | pd.Series) -> pd.Index:
    """Return the same names as Python strings, whatever they were."""
    import pandas as pd

    # of objects, as the text of pandas 3 cannot hold half a surrogate, which stands where a file is not in UTF-8
    return pd.Index([str(name) for name in names], dtype=object, name=names.name)


def storable(frame: pd.DataFrame, axis: str) -> tuple[pd.DataFrame, list[str]]:
    """Put a data frame into names and forms that AnnData writes to Zarr; tell in notes what had to change.

    Numbers, truth values, text and categories stay as they are; everything else, such as dates, is kept as text, and
    text with missing values as categories. A slash in the name of a column becomes ``_``.

    Parameters
    ----------
    frame
        Of cells or genes.
    axis
        ``"obs"`` or ``"var"``, for messages.

    Raises
    ------
    InputError
        If it cannot be written even so.
    """
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
        how += ["as text"] if values is not None and column.dtype.kind not in "fU" and not _is_text(column) else []
        if how:
            notes.append(f"{axis}[{str(given)!r}] is kept {' '.join(how)}")
    kept.columns = names
    kept.index = as_text(frame.index)
    if kept.index.name is not None and _plain_name(kept.index.name, names) != kept.index.name:
        kept.index.name = None
    _try_to_write(kept, axis)
    return kept, notes


def _try_to_write(frame: pd.DataFrame, axis: str) -> None:
    import anndata
    import zarr

    try:
        anndata.io.write_elem(zarr.open_group(zarr.storage.MemoryStore(), zarr_format=2), "frame", frame.iloc[:2])
    except Exception as error:
        raise InputError(f"{axis} cannot be written to Zarr ({first_line(error)}); drop that column first") from error


def _plain_name(given: Any, taken: list[str]) -> str:
    """Name a column so that a folder can have that name, and no other column has it."""
    name = str(given).replace("/", "_").replace("\0", "_")
    name = name.encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")
    if name.startswith(".") or name in ("", "_index", "zarr.json"):
        name = f"column{name}"
    unique, number = name, 0
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def _is_text(column: pd.Series) -> bool:
    import pandas as pd

    return pd.api.types.infer_dtype(column, skipna=True) in ("string", "empty", "bytes")


def _plain_values(column: pd.Series) -> Any:
    """Values of a column in a form that is written everywhere; None if they are in one already."""
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
    """Return what an error says, without the lines that libraries append."""
    return str(error).partition("\n")[0] or type(error).__name__
