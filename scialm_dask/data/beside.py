"""What lies beside a matrix in its AnnData store: embeddings, layers, notes."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from scialm_dask.data.annotation import StoredAnnotation, read_annotation
from scialm_dask.data.store import open_store, readable
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import anndata
    import pandas as pd


def place_of(name: str) -> tuple[str, str | None]:
    """Return the path and the layer of a matrix that is called ``path:X``, ``path:layers/counts`` or ``path:raw/X``."""
    path, _, element = re.sub(r":(?=(X|raw/X|layers/[^:]+)$)", "\0", name).partition("\0")
    return path, None if element in ("", "X") else element.removeprefix("layers/").removesuffix("/X")


def add_source(adata: anndata.AnnData, name: str) -> None:
    """Put what lies beside a matrix of this name in its store into an AnnData: ``obsm``, ``uns`` and ``layers``.

    Arrays stay lazy. Nothing is added where the store is gone or has other cells, and no layer where genes differ.
    """
    path, _ = place_of(name)
    if not _same_names(path, "obs", adata.obs_names):
        return
    store: Any = open_store(path)
    with readable(path):
        adata.obsm.update(_elements(store, "obsm"))
        adata.uns.update(_elements(store, "uns"))
        if _same_names(path, "var", adata.var_names):
            adata.layers.update(_elements(store, "layers"))


def _same_names(path: str, axis: str, names: pd.Index) -> bool:
    with suppress(InputError):  # gone, or of another length
        if hasattr(open_store(path), "keys"):
            return bool(read_annotation(StoredAnnotation(path), axis, len(names)).index.equals(names))
    return False


def _elements(store: Any, group: str) -> dict[str, Any]:
    from anndata.experimental import read_elem_lazy
    from anndata.io import read_elem

    found = {}
    for name in store.get(group, ()):
        element = store[group][name]
        lazy = group != "uns" and element.attrs.get("encoding-type") in ("array", "csr_matrix", "csc_matrix")
        found[name] = read_elem_lazy(element) if lazy else read_elem(element)
    return found
