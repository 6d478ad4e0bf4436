"""Matrices on their way into a store, of one source or of several whose cells are put one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.errors import InputError
from scialm_dask.events import Advance

if TYPE_CHECKING:
    import pandas as pd

Blocks = Callable[[Advance], Iterator[sp.csr_matrix]]


class Matrix(NamedTuple):
    """A matrix to write: its name, columns and type, and what makes its rows, block after block, in order.

    `blocks` may find that rows are out of order; then `sorted_blocks` makes them, by sorting the entries on disk.
    """

    name: str
    n_columns: int
    dtype: np.dtype[Any]
    blocks: Blocks
    sorted_blocks: Blocks | None = None


class Source(NamedTuple):
    """What is to be written: matrices by their names in a store, annotation, and notes for the user."""

    matrices: dict[str, Matrix]
    obs: pd.DataFrame
    var: pd.DataFrame
    notes: list[str]
    logarithms: bool = False  # whether X is marked as such
    raw_var: pd.DataFrame | None = None  # genes of .raw.X


def with_genes(matrix: Matrix, positions: NDArray[np.intp], n_genes: int | None = None) -> Matrix:
    """Put the genes of a matrix to other positions, of so many; those at −1 are left out."""
    n_genes = int(positions.max()) + 1 if n_genes is None else n_genes
    if n_genes == len(positions) and np.array_equal(positions, np.arange(n_genes)):
        return matrix
    kept = np.flatnonzero(positions >= 0)
    place = sp.csr_matrix((np.ones(len(kept), matrix.dtype), (kept, positions[kept])), shape=(len(positions), n_genes))

    def placed(blocks: Blocks) -> Blocks:
        def moved(advance: Advance) -> Iterator[sp.csr_matrix]:
            for block in blocks(advance):
                block = block @ place
                block.sort_indices()
                yield block

        return moved

    later = matrix.sorted_blocks
    return matrix._replace(
        n_columns=n_genes, blocks=placed(matrix.blocks), sorted_blocks=None if later is None else placed(later)
    )


def sample_names(paths: Sequence[str]) -> list[str]:
    """Name sources by what their paths do not have in common."""
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
    """Put the cells of several sources one after the other, genes matched by name.

    Raises
    ------
    InputError
        If there is no gene that all have, or only some are marked as logarithms.
    """
    import pandas as pd

    if len({part.logarithms for part in parts}) > 1:
        marked = ", ".join(name for name, part in zip(names, parts, strict=True) if part.logarithms)
        raise InputError(f"{marked}: X holds logarithms, unlike the other samples; give a layer of counts of all")
    if clash := next((name for name, part in zip(names, parts, strict=True) if key in part.obs), None):
        raise InputError(f"{clash}: obs has a column {key!r} already; name another by --sample-key")
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
        notes.append("cell names are in several samples, so they got the names of these")
    common = [name for name in parts[0].matrices if name != "raw/X" and all(name in part.matrices for part in parts)]
    if dropped := sorted({name for part in parts for name in part.matrices} - set(common)):
        notes.append(f"not carried over, as not all samples have the same: {', '.join(dropped)}")
    indices = [part.var.index for part in parts]
    matrices = {name: _chained([part.matrices[name] for part in parts], indices, genes) for name in common}
    return Source(matrices, obs, var, notes, logarithms=parts[0].logarithms)


def _chained(matrices: Sequence[Matrix], given: Sequence[pd.Index], genes: pd.Index) -> Matrix:
    placed = [with_genes(m, genes.get_indexer(names), len(genes)) for m, names in zip(matrices, given, strict=True)]

    def blocks(advance: Advance) -> Iterator[sp.csr_matrix]:
        for matrix in placed:  # text is sorted at once, as there is no second try
            yield from (matrix.sorted_blocks or matrix.blocks)(lambda share: advance(share / len(placed)))

    dtype = np.result_type(*(matrix.dtype for matrix in placed))
    return Matrix(matrices[0].name, len(genes), dtype, blocks)
