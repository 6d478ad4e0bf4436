"""Locates the matrix and annotation in a store: AnnData, a bare Zarr array, 10x .h5 of any version, or loom."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import zarr
from numpy.typing import NDArray

from scialm_dask.data.annotation import Annotation, StoredAnnotation, unique_names
from scialm_dask.data.rows import StoredRows, arrays_of
from scialm_dask.errors import DoesNotFitError, InputError

if TYPE_CHECKING:
    import pandas as pd

GENES = "Gene Expression"  # 10x's type of features that are genes
_BYTES_EACH = 24  # memory for a cell or a gene while a matrix is opened


class Located(NamedTuple):
    """A matrix in an open store: reader of its rows, node, annotation, and notes on what was left out."""

    rows: StoredRows
    element: Any
    annotation: StoredAnnotation | Annotation | None
    notes: list[str]


def locate(path: str, store: Any, layer: str | None, genome: str | None = None) -> Located:
    """Find X or a layer in an open store; raises `InputError` if it is missing or damaged.

    ``"raw"`` is ``.raw.X`` unless there is a layer of that name. `genome` chooses one of several in a 10x file.
    """
    groups = [] if isinstance(store, zarr.Group | zarr.Array) or "X" in store else store.values()
    if any("barcodes" in group for group in groups if hasattr(group, "keys")):
        return _in_10x_h5(path, store, layer, genome)
    if not isinstance(store, zarr.Array) and "row_attrs" in store and "matrix" in store:
        return _in_loom(path, store, layer)
    rows, element = _describe(path, store, layer)
    place = StoredAnnotation(path, var="raw/var" if rows.element == "raw/X" else "var")
    return Located(rows, element, None if isinstance(store, zarr.Array) else place, [])


def _in_10x_h5(path: str, store: Any, layer: str | None, genome: str | None) -> Located:
    if layer is not None:
        raise InputError(f"{path}: 10x data have no layer {layer!r}; leave the layer out")
    groups = [name for name, group in store.items() if hasattr(group, "keys") and "barcodes" in group]
    known = ", ".join(groups)  # of genomes in files from before 2018; later ones have one group, matrix
    if genome is None and len(groups) > 1:
        raise InputError(f"{path}: holds the genomes {known}; choose one by `scialm-dask convert --genome`")
    if genome is not None and "matrix" not in groups and genome not in groups:
        raise InputError(f"{path}: has no genome {genome}; it holds {known}")
    group = genome if genome is not None and genome in groups else str(groups[0])
    element = store[group]
    absent = [name for name in ("data", "indices", "indptr", "shape") if name not in element]
    if absent:
        raise InputError(f"{path}: group {group} has no {', '.join(absent)}; the file is damaged, fetch it again")
    shape = tuple(int(n) for n in np.ravel(element["shape"][()]))[::-1]
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}: shape {shape}; a matrix of at least one cell and gene is needed")
    obs, var = _annotation_of_10x(f"{path}:{group}", element, group, shape)
    keep, notes = genes_among(var)
    if genome is not None and "genome" in var:
        keep = keep & (var["genome"] == genome).to_numpy()  # not in place: arrays of pandas 3 are read-only
        if not keep.any():
            raise InputError(f"{path}: has no genome {genome}; it holds {', '.join(sorted(set(var['genome'])))}")
    var, repeated = unique_names(var[keep], "gene")
    features = None if keep.all() else keep.tobytes()
    rows = StoredRows(path, group, "csr_matrix", (shape[0], len(var)), features=features)
    return Located(rows, element, Annotation(obs, var), notes + repeated)


def _annotation_of_10x(name: str, element: Any, group: str, shape: tuple[int, ...]) -> list[pd.DataFrame]:
    """Return data frames of cells and features, features by name."""
    import pandas as pd

    def strings(part: str, length: int) -> Any:
        if part not in element:
            raise InputError(f"{name}: has no {part}; the file is damaged, fetch it again")
        try:
            found = element[part].asstr()[:]
        except (AttributeError, TypeError, ValueError, OSError) as error:
            raise InputError(f"{name}: {part} cannot be read ({error}); fetch the file again") from error
        if len(found) != length:
            raise InputError(f"{name}: {len(found)} {part}, but the matrix has {length}; fetch the file again")
        return found

    obs = pd.DataFrame(index=pd.Index(strings("barcodes", shape[0])))
    if group == "matrix":
        columns = {"gene_ids": "features/id", "feature_types": "features/feature_type", "genome": "features/genome"}
        names = strings("features/name", shape[1])
    else:
        columns, names = {"gene_ids": "genes"}, strings("gene_names", shape[1])
    given = {key: strings(part, shape[1]) for key, part in columns.items() if part in element}
    return [obs, pd.DataFrame(given, index=pd.Index(names))]


def genes_among(var: pd.DataFrame) -> tuple[NDArray[np.bool_], list[str]]:
    """Return which features are genes, or all if none is, and notes on what is left out."""
    keep = np.ones(len(var), bool)
    if "feature_types" in var and (var["feature_types"] == GENES).any():
        keep = (var["feature_types"] == GENES).to_numpy(bool)
    return keep, [] if keep.all() else [f"left out {np.count_nonzero(~keep)} features that are not {GENES}"]


def _in_loom(path: str, store: Any, layer: str | None) -> Located:
    """Locate a matrix of a loom file, dense, of genes × cells."""
    import pandas as pd

    name = f"layers/{layer}" if layer else "matrix"
    if name not in store:
        raise InputError(f"{path}: has no {name}; its layers are: {', '.join(store['layers']) or 'none'}")
    element = store[name]
    if element.ndim != 2 or 0 in element.shape or element.dtype.kind not in "buif":
        raise InputError(f"{path}:{name}: shape {element.shape} of {element.dtype}; a matrix of numbers is needed")
    frames = []
    for attributes, length, wanted in (
        (store["col_attrs"], element.shape[1], ("CellID", "cell_id", "obs_names")),
        (store["row_attrs"], element.shape[0], ("Gene", "gene_name", "var_names", "Accession")),
    ):
        given = {key: part[:] for key, part in attributes.items() if part.shape == (length,)}
        table = pd.DataFrame({k: [x.decode() for x in v] if v.dtype == object else v for k, v in given.items()})
        key = next((key for key in wanted if key in table), None)
        frames.append(table if key is None else table.set_index(key))
        frames[-1].index = frames[-1].index.astype(str)
    var, repeated = unique_names(frames[1], "gene")
    rows = StoredRows(path, name, "array", element.shape[::-1], transposed=True)
    return Located(rows, element, Annotation(frames[0], var), repeated)


def _describe(path: str, store: Any, layer: str | None) -> tuple[StoredRows, Any]:
    """Return the element and its reader."""
    element: Any
    if isinstance(store, zarr.Array):
        if layer is not None:
            raise InputError(f"{path}: a bare array has no layer {layer!r}; leave the layer out")
        element, name = store, ""
    else:
        name = f"layers/{layer}" if layer else "X"
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise InputError(f"{path}: a layer cannot be named {layer!r}; give a name without . and .. parts")
        if layer == "raw" and name not in store and "raw/X" in store:
            name = "raw/X"
        if name not in store:
            raise InputError(f"{path}: has no {name}; its layers are: {', '.join(layers_of(store)) or 'none'}")
        element = store[name]
    encoding = str(element.attrs.get("encoding-type", "array")).replace("-", "_")
    if before_0_7 := element.attrs.get("h5sparse_format"):  # AnnData before 0.7
        encoding = f"{before_0_7}_matrix"
    if encoding in ("csr_matrix", "csc_matrix"):
        parts = set(element) if hasattr(element, "keys") else set()
        absent = [part for part in ("data", "indices", "indptr") if part not in parts]
        shape = element.attrs.get("shape", element.attrs.get("h5sparse_shape"))
        if absent := absent + ["shape"] * (shape is None):
            raise InputError(f"{path}:{name}: has no {', '.join(absent)}; the store is damaged, write it again")
        for part in ("indices", "indptr"):
            if (kind := element[part].dtype).kind not in "iu" or element[part].ndim != 1:
                raise InputError(f"{path}:{name}: {part} are {kind}; the store is damaged, write it again")
        shape, dtype = tuple(int(n) for n in np.ravel(shape)), element["data"].dtype
    elif encoding == "array" and hasattr(element, "shape"):
        shape, dtype = tuple(element.shape), element.dtype
    else:
        raise InputError(f"{path}:{name}: stored as {encoding}, not as numbers in CSR, CSC or dense form; convert it")
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"{path}:{name}: shape {shape}; a matrix of at least one cell and one gene is needed")
    if dtype.kind not in "buif":
        raise InputError(f"{path}:{name}: values are of type {dtype}, not numbers; convert them first")
    rows = StoredRows(path, name, encoding, (shape[0], shape[1]))
    _check_size(rows, element)
    return rows, element


def _check_size(rows: StoredRows, element: Any) -> None:
    """Raise `DoesNotFitError` if a row or chunk does not fit in memory: its sizes may be damaged."""
    cells, genes = rows.shape
    need = {
        f"{cells} cells × {genes} genes": _BYTES_EACH * (cells + genes),
        **{f"a chunk of {a.chunks}": math.prod(a.chunks or ()) * a.dtype.itemsize for a in arrays_of(rows, element)},
    }
    if rows.encoding == "array":
        need[f"a row of {genes} genes"] = 2 * genes * element.dtype.itemsize
    what, most = max(need.items(), key=lambda item: item[1])
    if most > (free := psutil.virtual_memory().available) or genes > np.iinfo(np.int32).max:
        what = f"{what} takes {most / 1e9:,.1f} GB before any value is read, and {free / 1e9:,.1f} GB are free"
        remedy = "write the store again if its sizes are wrong, with smaller chunks if they are right"
        raise DoesNotFitError(f"{rows.name}: {what}; {remedy}")


def layers_of(store: Any) -> list[str]:
    """Return the names of the layers of an open store, with ``raw`` if it has ``.raw``."""
    if isinstance(store, zarr.Array):
        return []
    return [*(sorted(store["layers"]) if "layers" in store else []), *(["raw"] if "raw/X" in store else [])]
