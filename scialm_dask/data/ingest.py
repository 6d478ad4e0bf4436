"""Conversion of the usual formats of counts to AnnData Zarr, some rows at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from scialm_dask.data.annotation import new_anndata, read_annotation, storable, swapped_axes, unique_names
from scialm_dask.data.arrays import set_encoding
from scialm_dask.data.csr import CSRWriter, check_values, renumbered
from scialm_dask.data.formats import genes_among, locate
from scialm_dask.data.remote import is_url
from scialm_dask.data.rows import Stamp, StoredRows, blocks_of, check_chunks, numeric, sum_duplicates
from scialm_dask.data.store import MARKERS, atomic_store, check_output, lasting, open_store, readable
from scialm_dask.data.temporary import Entries, columns_of, csr_of, rows_in_order
from scialm_dask.data.text import Axis, TextMatrix, open_text
from scialm_dask.errors import InputError
from scialm_dask.events import Advance, Listener, Note, begin, silent
from scialm_dask.reduction import in_order

if TYPE_CHECKING:
    import pandas as pd

Blocks = Callable[[Advance], Iterator[sp.csr_matrix]]


class _OutOfOrderError(Exception):
    pass


def convert(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    layer: str | None = None,
    genome: str | None = None,
    prefix: str | None = None,
    rows: Axis | None = None,
    sample_key: str = "sample",
    join: Literal["inner", "outer"] = "inner",
    missing_chunks_are_zeros: bool = False,
    overwrite: bool = False,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Write counts in any usual format as a chunked, compressed AnnData Zarr store.

    Memory does not grow with the number of stored values. Values keep their type; explicit zeros are dropped, and
    entries stored twice are summed. ``.raw`` is kept. Repeated names are made unique as scanpy does (``-1``, ``-2``,
    …). Of ``uns``, only scanpy's mark that X holds logarithms is kept (``uns["log1p"]``).

    Parameters
    ----------
    source
        AnnData .h5ad or .zarr (X and all layers; CSR, CSC or dense), a bare 2-D Zarr array, a 10x .h5 file of any
        version, a loom file, a folder with matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, as Cell Ranger and
        STARsolo write it, an .mtx file, or a .csv, .tsv or .txt table with names in its first line and column. Text may
        be gzip. Of 10x data only ``Gene Expression`` is taken. The cells of several sources are concatenated, with
        genes matched by name.
    destination
        The store to write.
    layer
        Take only this layer, as X, such as counts beside a scaled X.
    genome
        The genome to take from a 10x file with several.
    prefix
        Prefix of the names of the files in a folder with matrix.mtx, such as ``GSM123_``.
    rows
        What the rows of a table or an .mtx file are. By default the names of a table decide.
    sample_key
        Column of ``obs`` for the names of several sources.
    join
        Genes of several sources: ``"inner"`` for those that all have, ``"outer"`` for those that any has.
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
    given = [source] if isinstance(source, str | os.PathLike) else source
    sources = tuple(os.fspath(path) for path in given)
    if not sources:
        raise InputError("no source is given; give one at least")
    check_output(destination, overwrite=overwrite, sources=sources)
    before, parts = [], []
    for path in sources:
        with readable(path):
            before.append(Stamp.of(lasting(path)))
            is_store = is_url(path) or any(os.path.exists(os.path.join(path, name)) for name in MARKERS)
            text = None if is_store else open_text(path, prefix, rows)
            store = _of_store(path, layer, genome, missing_chunks_are_zeros) if text is None else _of_text(text, layer)
            parts.append(store)
    found = parts[0] if len(parts) == 1 else joined(parts, sample_names(sources), sample_key, join)
    advance = begin(listen, "converting")
    with atomic_store(destination, overwrite=overwrite, sources=sources) as partial:
        root = new_anndata(partial, obs=found.obs, var=found.var, raw_var=found.raw_var)
        n_stored = {
            name: _write(root, name, matrix, lambda share: advance(share / len(found.matrices)))
            for name, matrix in found.matrices.items()
        }
        if found.logarithms:
            set_encoding(root.create_group("uns/log1p"), "dict", "0.1.0")
        zarr.consolidate_metadata(root.store)
        for stamp in before:
            stamp.check()
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


def _write(root: zarr.Group, name: str, matrix: Matrix, advance: Advance, *, sort: bool = False) -> int:
    """Write one matrix and return its number of non-zeros."""
    n_rows = n_stored = 0
    blocks = matrix.sorted_blocks if sort and matrix.sorted_blocks is not None else matrix.blocks
    try:
        with CSRWriter(root, name, n_columns=matrix.n_columns, dtype=matrix.dtype) as writer:
            for block in blocks(advance):
                if name == "X":
                    check_values(block, matrix.name, n_rows)
                block.eliminate_zeros()
                writer.append(block)
                n_rows, n_stored = n_rows + block.shape[0], n_stored + block.nnz
    except _OutOfOrderError:
        del root[name]
        return _write(root, name, matrix, advance, sort=True)
    return n_stored


def _of_store(path: str, layer: str | None, genome: str | None, missing_chunks_are_zeros: bool) -> Source:
    store = open_store(path)
    names = {} if isinstance(store, zarr.Array) else store
    wanted = {"X": layer}
    if layer is None and "layers" in names:
        wanted |= {f"layers/{name}": name for name in sorted(store["layers"])}
    if layer is None and "raw/X" in names and "layers/raw" not in wanted:
        wanted["raw/X"] = "raw"
    found = {name: locate(path, store, which, genome) for name, which in wanted.items()}
    n_cells, n_genes = found["X"].rows.shape
    for rows, element, *_ in found.values():
        if rows.shape != (n_cells, rows.shape[1] if rows.element == "raw/X" else n_genes):
            raise InputError(f"{rows.name}: shape {rows.shape}, X has {(n_cells, n_genes)}; write the store again")
        check_chunks(rows, element, missing_chunks_are_zeros)
    obs, var = (read_annotation(found["X"].annotation, axis, n) for axis, n in (("obs", n_cells), ("var", n_genes)))
    raw, raw_var, notes = found.get("raw/X"), None, found["X"].notes
    if raw is not None:
        raw_var = read_annotation(raw.annotation, "var", raw.rows.shape[1])
    dropped = [name for name in ("obsm", "varm", "obsp", "varp", "uns") if name in names and len(store[name])]
    if dropped := dropped + ["raw"] * ("raw/X" in names and raw is None and layer != "raw"):
        notes = [*notes, f"not carried over: {', '.join(dropped)}"]
    matrices = {name: _stored(located.rows, located.element) for name, located in found.items()}
    marked = layer is None and "uns/log1p" in names
    return _source(matrices, obs, var, notes)._replace(logarithms=marked, raw_var=raw_var)


def _of_text(text: TextMatrix, layer: str | None) -> Source:
    if layer is not None:
        raise InputError(f"{text.path}: text and 10x data have no layer {layer!r}; leave the layer out")
    (obs, var), name, dtype = text.annotation(), str(text.path), text.dtype

    def as_they_come(advance: Advance) -> Iterator[sp.csr_matrix]:
        """Yield rows without sorting, which needs a file with its cells in order."""
        next_row, waiting = 0, Entries(*(np.empty(0, kind) for kind in (np.int64, np.int32, dtype)))
        for piece in text.entries(advance):
            entries = Entries(*(np.concatenate(parts) for parts in zip(waiting, piece, strict=True)))
            if entries.rows[0] < next_row or np.any(np.diff(entries.rows) < 0):
                raise _OutOfOrderError
            last = int(entries.rows[-1])  # more entries of it may follow
            n_done = int(np.searchsorted(entries.rows, last))
            done, waiting = (
                Entries(*(part[span] for part in entries)) for span in (slice(n_done), slice(n_done, None))
            )
            if last > next_row:
                yield csr_of(done, (next_row, last), text.shape[1], dtype, name)
                next_row = last
        yield csr_of(waiting, (next_row, text.shape[0]), text.shape[1], dtype, name)

    def sorted_blocks(advance: Advance) -> Iterator[sp.csr_matrix]:
        read = text.entries(lambda share: advance(share / 2))
        return _sorted(read, text.shape, dtype, text.n_entries, name, advance)

    keep, notes = genes_among(var)
    matrix = Matrix(name, text.shape[1], dtype, as_they_come, sorted_blocks)
    placed = with_genes(matrix, np.where(keep, np.cumsum(keep) - 1, -1), int(keep.sum()))
    return _source({"X": placed}, obs, var[keep], notes)


def _source(matrices: dict[str, Matrix], obs: pd.DataFrame, var: pd.DataFrame, notes: list[str]) -> Source:
    (obs, of_obs), (var, of_var) = storable(obs, "obs"), storable(var, "var")
    (obs, of_cells), (var, of_genes) = unique_names(obs, "cell"), unique_names(var, "gene")
    swapped = swapped_axes(obs, var)
    return Source(matrices, obs, var, [*notes, *of_obs, *of_var, *of_cells, *of_genes, *swapped])


def _stored(rows: StoredRows, element: Any) -> Matrix:
    """Return a matrix that is stored by cells, by genes or dense."""
    dtype = numeric((element if rows.encoding == "array" else element["data"]).dtype)

    def transposed(advance: Advance) -> Iterator[sp.csr_matrix]:
        n_stored = int(element["data"].shape[0])

        def read() -> Iterator[Entries]:
            for piece in columns_of(rows):
                yield piece
                advance(len(piece.rows) / n_stored / 2)

        return _sorted(read(), rows.shape, dtype, n_stored, rows.name, advance)

    if rows.encoding == "csc_matrix":
        return Matrix(rows.name, rows.shape[1], dtype, transposed)
    cuts = blocks_of(rows, element)

    def read(span: tuple[int, int]) -> sp.csr_matrix:
        block = rows.read(*span)
        sum_duplicates(block, rows.name)
        return block

    def straight(advance: Advance) -> Iterator[sp.csr_matrix]:
        for block in in_order(read, cuts):
            yield block
            advance(1 / len(cuts))

    return Matrix(rows.name, rows.shape[1], dtype, straight)


def _sorted(
    pieces: Iterable[Entries], shape: tuple[int, int], dtype: np.dtype[Any], n: int, name: str, advance: Advance
) -> Iterator[sp.csr_matrix]:
    """Sort about `n` entries on disk; writing them is the second half of the work."""
    for block in rows_in_order(pieces, shape, dtype, n, name):
        yield block
        advance(block.shape[0] / shape[0] / 2)


class Matrix(NamedTuple):
    """A matrix to write, with functions that yield its rows, block by block, in order.

    `blocks` may raise `_OutOfOrderError`; then `sorted_blocks` yields them, after sorting the entries on disk.
    """

    name: str
    n_columns: int
    dtype: np.dtype[Any]
    blocks: Blocks
    sorted_blocks: Blocks | None = None


class Source(NamedTuple):
    """What to write: matrices by their names in a store, annotation, and notes for the user."""

    matrices: dict[str, Matrix]
    obs: pd.DataFrame
    var: pd.DataFrame
    notes: list[str]
    logarithms: bool = False  # whether X is marked as logarithms
    raw_var: pd.DataFrame | None = None  # genes of .raw.X


def with_genes(matrix: Matrix, positions: NDArray[np.intp], n_genes: int) -> Matrix:
    """Return a matrix with its genes at other positions of `n_genes`; those at −1 are left out."""
    if n_genes == len(positions) and np.array_equal(positions, np.arange(n_genes)):
        return matrix

    def placed(blocks: Blocks, advance: Advance) -> Iterator[sp.csr_matrix]:
        for block in blocks(advance):
            yield renumbered(block, positions, n_genes)

    blocks, later = matrix.blocks, matrix.sorted_blocks
    later = later and functools.partial(placed, later)
    return matrix._replace(n_columns=n_genes, blocks=functools.partial(placed, blocks), sorted_blocks=later)


def sample_names(paths: Sequence[str]) -> list[str]:
    """Return names for sources: the parts in which their paths differ."""
    parts = [[*PurePath(p).parts[:-1], PurePath(p).name.split(".")[0] or PurePath(p).name] for p in paths]
    longest = max(map(len, parts))
    padded = [[""] * (longest - len(each)) + each for each in parts]
    differ = [n for n in range(longest) if len({each[n] for each in padded}) > 1]
    names = ["_".join(each[n] for n in differ if each[n].strip("/")) for each in padded]
    if len(set(names)) < len(names):
        repeated = next(path for path, name in zip(paths, names, strict=True) if names.count(name) > 1)
        raise InputError(f"{repeated}: is given twice; give each sample once")
    return names


def joined(parts: Sequence[Source], names: Sequence[str], key: str, join: Literal["inner", "outer"]) -> Source:
    """Concatenate the cells of several sources, with genes matched by name."""
    import pandas as pd

    if len({part.logarithms for part in parts}) > 1:
        marked = ", ".join(name for name, part in zip(names, parts, strict=True) if part.logarithms)
        raise InputError(f"{marked}: X holds logarithms, unlike the other samples; give a layer of counts of all")
    if clash := next((name for name, part in zip(names, parts, strict=True) if key in part.obs), None):
        raise InputError(f"{clash}: obs has a column {key!r} already; give another name by --sample-key")
    genes = parts[0].var.index
    for index in (part.var.index for part in parts[1:]):
        genes = genes[genes.isin(index)] if join == "inner" else genes.append(index[~index.isin(genes)])
    if not len(genes):
        firsts = " and ".join(str(part.var.index[0]) for part in parts[:2])
        raise InputError(f"no gene is in all samples (they begin with {firsts}); give the same kind of names")
    var = pd.concat([part.var for part in parts])
    var = var[~var.index.duplicated()].reindex(genes)
    obs = pd.concat([part.obs for part in parts])
    obs[key] = pd.Categorical(np.repeat(list(names), [len(part.obs) for part in parts]), categories=list(names))
    notes = [f"{name}: {note}" for name, part in zip(names, parts, strict=True) for note in part.notes]
    whose = "all" if join == "inner" else "any"
    most = max(len(part.var) for part in parts)
    notes.append(f"{len(parts)} samples in obs[{key!r}]; {len(genes)} genes that {whose} have, the largest has {most}")
    if not obs.index.is_unique:
        obs.index = [f"{cell}-{sample}" for cell, sample in zip(obs.index, obs[key], strict=True)]
        notes.append("cell names repeat between samples, so the name of the sample was appended to each")
    common = [name for name in parts[0].matrices if name != "raw/X" and all(name in part.matrices for part in parts)]
    if dropped := sorted({name for part in parts for name in part.matrices} - set(common)):
        notes.append(f"not carried over, as not all samples have the same: {', '.join(dropped)}")
    indices = [part.var.index for part in parts]
    matrices = {name: _chained([part.matrices[name] for part in parts], indices, genes) for name in common}
    return Source(matrices, obs, var, notes, logarithms=parts[0].logarithms)


def _chained(matrices: Sequence[Matrix], given: Sequence[pd.Index], genes: pd.Index) -> Matrix:
    placed = [with_genes(m, genes.get_indexer(names), len(genes)) for m, names in zip(matrices, given, strict=True)]

    def blocks(advance: Advance) -> Iterator[sp.csr_matrix]:
        for matrix in placed:  # text is sorted at once, since there is no second attempt
            yield from (matrix.sorted_blocks or matrix.blocks)(lambda share: advance(share / len(placed)))

    dtype = np.result_type(*(matrix.dtype for matrix in placed))
    return Matrix(matrices[0].name, len(genes), dtype, blocks)
