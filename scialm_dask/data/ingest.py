"""Any usual file format of counts → chunked, compressed AnnData Zarr, streaming by row blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from scialm_dask.data.annotation import StoredAnnotation, read_annotation
from scialm_dask.data.arrays import set_encoding
from scialm_dask.data.fingerprint import Stamp
from scialm_dask.data.matrix import check_values
from scialm_dask.data.rows import StoredRows, blocks_of, check_chunks, describe, numeric, sum_duplicates
from scialm_dask.data.storable import storable
from scialm_dask.data.store import atomic_store, check_output, lasting, new_anndata, open_store, readable
from scialm_dask.data.stream import in_order
from scialm_dask.data.tenx import MatrixMarket, h5_annotation, h5_group, h5_rows, is_10x_h5
from scialm_dask.data.transpose import Entries, columns_of, csr_of, rows_in_order
from scialm_dask.data.writer import CSRWriter
from scialm_dask.errors import InputError
from scialm_dask.events import Advance, Listener, Note, begin, silent

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["convert", "unique_names"]

_GENES = "Gene Expression"


Blocks = Callable[[Advance], Iterator[sp.csr_matrix]]


class _Matrix(NamedTuple):
    """A matrix to write: its columns and type, and what makes its rows, block after block, in order.

    `blocks` may raise `_OutOfOrderError`; then `sorted_blocks` makes the same rows, by sorting the entries on disk.
    """

    n_columns: int
    dtype: np.dtype[Any]
    blocks: Blocks
    sorted_blocks: Blocks | None = None


class _OutOfOrderError(Exception):
    pass


class _Source(NamedTuple):
    matrices: dict[str, _Matrix]
    obs: pd.DataFrame
    var: pd.DataFrame
    notes: list[str]
    logarithms: bool = False  # whether X is marked as such
    raw_var: pd.DataFrame | None = None  # genes of .raw.X


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layer: str | None = None,
    genome: str | None = None,
    missing_chunks_are_zeros: bool = False,
    overwrite: bool = False,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Write counts in any usual format as a chunked, compressed AnnData Zarr store.

    Memory does not grow with the number of stored values. Values keep their type; explicit zeros go and entries
    stored twice are added. ``.raw`` is kept too. Repeated names are made unique as scanpy does (``-1``, ``-2``, …).
    Of ``uns`` nothing is kept but the mark that X holds logarithms (``uns["log1p"]``).

    Parameters
    ----------
    source
        AnnData .h5ad or .zarr (X and all layers; CSR, CSC or dense), a bare 2-D Zarr array, a 10x .h5 file (of any
        version), or a 10x folder with matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, plain or gzip. Of 10x
        data with other features too, only ``Gene Expression`` is taken.
    destination
        The store to write.
    layer
        Take this layer alone, as X, for instance counts beside an X that has been scaled.
    genome
        Which genome of a 10x file to take, where it holds several.
    missing_chunks_are_zeros
        Read the absent chunks of a dense Zarr array as zeros instead of refusing them.
    overwrite
        Replace `destination` if it exists.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    dict
        ``destination``, ``n_cells``, ``n_genes``, ``n_observed`` (non-zeros of X), ``layers``, ``notes``.

    Raises
    ------
    InputError
        If the source cannot be used: damaged, empty, or X not finite and non-negative numbers.
    OutputError
        If the destination cannot be written.
    """
    source = os.fspath(source)
    check_output(destination, overwrite=overwrite, sources=(source,))
    with readable(source):
        before = Stamp.of(lasting(source))
        found = _open(source, layer, genome, missing_chunks_are_zeros)
    advance = begin(listen, "converting")
    with atomic_store(destination, overwrite=overwrite, sources=(source,)) as partial:
        root = new_anndata(partial, obs=found.obs, var=found.var, raw_var=found.raw_var)
        n_stored = {
            name: _write(root, name, matrix, source, lambda share: advance(share / len(found.matrices)))
            for name, matrix in found.matrices.items()
        }
        if found.logarithms:
            set_encoding(root.create_group("uns/log1p"), "dict", "0.1.0")
        zarr.consolidate_metadata(root.store)
        before.check()
    for note in found.notes:
        listen(Note(note))
    return {
        "destination": os.fspath(destination),
        "n_cells": len(found.obs),
        "n_genes": len(found.var),
        "n_observed": n_stored["X"],
        "layers": [name.removeprefix("layers/").removesuffix("/X") for name in n_stored if name != "X"],
        "notes": found.notes,
    }


def unique_names(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Make the index unique as scanpy does; tell how many names were changed."""
    import warnings

    from anndata.utils import make_index_unique

    n_repeated = int(frame.index.duplicated().sum())
    if n_repeated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a suffix may look like part of a name
            frame = frame.set_axis(make_index_unique(frame.index), axis=0)
    return frame, n_repeated


def _write(root: zarr.Group, name: str, matrix: _Matrix, source: str, advance: Advance) -> int:
    """Write one matrix and return its number of non-zeros."""
    try:
        return _write_blocks(root, name, matrix, matrix.blocks(advance), source)
    except _OutOfOrderError:
        assert matrix.sorted_blocks is not None
        del root[name]
        return _write_blocks(root, name, matrix, matrix.sorted_blocks(advance), source)


def _write_blocks(root: zarr.Group, name: str, matrix: _Matrix, blocks: Iterator[sp.csr_matrix], source: str) -> int:
    n_rows = n_stored = 0
    with CSRWriter(root, name, n_columns=matrix.n_columns, dtype=matrix.dtype) as writer:
        for block in blocks:
            if name == "X":
                check_values(block, source, n_rows)
            block.eliminate_zeros()
            writer.append(block)
            n_rows, n_stored = n_rows + block.shape[0], n_stored + block.nnz
    return n_stored


def _open(source: str, layer: str | None, genome: str | None, missing_chunks_are_zeros: bool) -> _Source:
    if os.path.isdir(source) and not any(
        os.path.exists(os.path.join(source, name)) for name in (".zgroup", ".zarray", "zarr.json")
    ):
        return _open_folder(source, layer)
    store = open_store(source)
    if not isinstance(store, zarr.Group | zarr.Array) and is_10x_h5(store):
        return _open_10x_h5(source, layer, genome)
    return _open_anndata(source, store, layer, missing_chunks_are_zeros)


def _open_anndata(source: str, store: Any, layer: str | None, missing_chunks_are_zeros: bool) -> _Source:
    bare = isinstance(store, zarr.Array)
    more = sorted(store["layers"]) if layer is None and not bare and "layers" in store else []
    wanted = {"X": layer, **{f"layers/{name}": name for name in more}}
    if layer is None and not bare and "raw/X" in store and "layers/raw" not in store:
        wanted["raw/X"] = "raw"
    found = {name: describe(source, store, which) for name, which in wanted.items()}
    n_cells, n_genes = found["X"][0].shape
    for rows, element in found.values():
        if rows.shape != (n_cells, rows.shape[1] if rows.element == "raw/X" else n_genes):
            raise InputError(f"{rows.name}: shape {rows.shape}, X has {(n_cells, n_genes)}; write the store again")
        check_chunks(rows, element, missing_chunks_are_zeros)
    place = None if bare else StoredAnnotation(source, var="raw/var" if found["X"][0].element == "raw/X" else "var")
    obs, var = (read_annotation(place, axis, length) for axis, length in (("obs", n_cells), ("var", n_genes)))
    raw_var = None
    if "raw/X" in found:
        raw_var = read_annotation(StoredAnnotation(source, var="raw/var"), "var", found["raw/X"][0].shape[1])
    notes = [] if bare else _left_behind(store, "raw/X" in found or layer == "raw")
    matrices = {name: _stored(*element) for name, element in found.items()}
    marked = layer is None and not bare and "uns/log1p" in store
    return _source(matrices, obs, var, notes)._replace(logarithms=marked, raw_var=raw_var)


def _left_behind(store: Any, raw_is_kept: bool) -> list[str]:
    names = [name for name in ("obsm", "varm", "obsp", "varp", "uns") if name in store and len(store[name])]
    names += ["raw"] if "raw/X" in store and not raw_is_kept else []
    return [f"not carried over: {', '.join(names)}"] if names else []


def _open_10x_h5(source: str, layer: str | None, genome: str | None) -> _Source:
    _refuse_layer(source, layer)
    group = h5_group(source, genome)
    rows = h5_rows(source, group)
    obs, var = h5_annotation(rows)
    matrix = _stored(rows, open_store(source)[group])
    keep = np.ones(len(var), bool)
    if genome is not None and "genome" in var:
        keep = (var["genome"] == genome).to_numpy()
        if not keep.any():
            known = ", ".join(sorted(set(var["genome"])))
            raise InputError(f"{source}: has no genome {genome}; it holds {known}")
    return _genes_only({"X": matrix}, obs, var, keep)


def _refuse_layer(source: str, layer: str | None) -> None:
    if layer is not None:
        raise InputError(f"{source}: 10x data have no layer {layer!r}; leave the layer out")


def _open_folder(source: str, layer: str | None) -> _Source:
    _refuse_layer(source, layer)
    market = MatrixMarket.open(source)
    obs, var = market.annotation()
    matrix = _Matrix(
        market.shape[1],
        market.dtype,
        lambda advance: _as_they_come(market, advance),
        lambda advance: _sorted(
            market.entries(), market.shape, market.dtype, market.n_entries, str(market.matrix), advance
        ),
    )
    return _genes_only({"X": matrix}, obs, var, np.ones(len(var), bool))


def _genes_only(matrices: dict[str, _Matrix], obs: pd.DataFrame, var: pd.DataFrame, keep: NDArray[np.bool_]) -> _Source:
    """Leave out antibodies and other features, unless there is nothing else."""
    notes = []
    if "feature_types" in var and 0 < (var["feature_types"] == _GENES).sum() < len(var):
        others = (var["feature_types"] != _GENES).to_numpy()
        notes.append(f"left out {np.sum(keep & others)} features that are not {_GENES}")
        keep = keep & ~others
    if keep.all():
        return _source(matrices, obs, var, notes)
    columns = np.flatnonzero(keep)

    def chosen(blocks: Blocks) -> Blocks:
        return lambda advance: (block[:, columns] for block in blocks(advance))

    kept = {
        name: matrix._replace(
            n_columns=len(columns),
            blocks=chosen(matrix.blocks),
            sorted_blocks=matrix.sorted_blocks and chosen(matrix.sorted_blocks),
        )
        for name, matrix in matrices.items()
    }
    return _source(kept, obs, var[keep], notes)


def _source(matrices: dict[str, _Matrix], obs: pd.DataFrame, var: pd.DataFrame, notes: list[str]) -> _Source:
    (obs, of_obs), (var, of_var) = storable(obs, "obs"), storable(var, "var")
    (obs, n_cells), (var, n_genes) = unique_names(obs), unique_names(var)
    repeated = [
        f"{n} repeated {what} names were made unique with -1, -2, …"
        for n, what in ((n_cells, "cell"), (n_genes, "gene"))
        if n
    ]
    return _Source(matrices, obs, var, notes + of_obs + of_var + repeated)


def _stored(rows: StoredRows, element: Any) -> _Matrix:
    """Take a matrix that is stored by cells, by genes or dense."""
    if rows.encoding == "csc_matrix":
        dtype, n_stored = numeric(element["data"].dtype), int(element["data"].shape[0])

        def transposed(advance: Advance) -> Iterator[sp.csr_matrix]:
            return _sorted(columns_of(rows), rows.shape, dtype, n_stored, rows.name, advance)

        return _Matrix(rows.shape[1], dtype, transposed)
    cuts = blocks_of(rows, element)

    def read(span: tuple[int, int]) -> sp.csr_matrix:
        block = rows.read(*span)
        sum_duplicates(block, rows.name)
        return block

    def straight(advance: Advance) -> Iterator[sp.csr_matrix]:
        for block in in_order(read, cuts):
            yield block
            advance(1 / len(cuts))

    return _Matrix(rows.shape[1], numeric((element if rows.encoding == "array" else element["data"]).dtype), straight)


def _sorted(
    pieces: Iterable[Entries],
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    n_expected: int,
    name: str,
    advance: Advance,
) -> Iterator[sp.csr_matrix]:
    """Sort entries on disk; half of the work is reading them, half is writing them."""

    def counted() -> Iterator[Entries]:
        for piece in pieces:
            yield piece
            advance(len(piece.rows) / n_expected / 2)

    for block in rows_in_order(counted(), shape, dtype, n_expected, name):
        yield block
        advance(block.shape[0] / shape[0] / 2)


def _as_they_come(market: MatrixMarket, advance: Advance) -> Iterator[sp.csr_matrix]:
    """Rows of a Matrix Market file without sorting, which its cells must not fall for."""
    next_row, waiting = 0, Entries(*(np.empty(0, kind) for kind in (np.int64, np.int32, market.dtype)))
    for piece in market.entries():
        entries = Entries(*(np.concatenate(parts) for parts in zip(waiting, piece, strict=True)))
        if entries.rows[0] < next_row or np.any(np.diff(entries.rows) < 0):
            raise _OutOfOrderError
        last = int(entries.rows[-1])  # more of it may follow
        n_done = int(np.searchsorted(entries.rows, last))
        done, waiting = Entries(*(part[:n_done] for part in entries)), Entries(*(part[n_done:] for part in entries))
        if last > next_row:
            yield csr_of(done, (next_row, last), market.shape[1], market.dtype, str(market.matrix))
            next_row = last
        advance(len(piece.rows) / market.n_entries)
    yield csr_of(waiting, (next_row, market.shape[0]), market.shape[1], market.dtype, str(market.matrix))
