"""Designs of pools in files: text tables with the names of genes and pools, or bare NumPy arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scialm_dask.data.store import atomic_output
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["read_design", "write_design"]


def read_design(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a design.

    Parameters
    ----------
    path
        A .csv or .tsv table, genes in rows and pools in columns, with their names; or a .npy array without names.

    Returns
    -------
    pandas.DataFrame
        Genes × pools, as read; `scialm_dask.pooled.design.check_pools` judges it.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    import pandas as pd

    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv", ".npy"):
        raise InputError(f"{os.fspath(path)}: unknown kind of file; give the design as .csv, .tsv or .npy")
    try:
        if suffix == ".npy":
            values = np.load(path, allow_pickle=False)
            if values.ndim != 2:
                raise InputError(f"{os.fspath(path)}: shape {values.shape}; give a matrix of genes × pools")
            names = [f"gene{gene}" for gene in range(values.shape[0])]
            return pd.DataFrame(values, index=names, columns=[f"pool{pool}" for pool in range(values.shape[1])])
        frame = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", index_col=0)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{os.fspath(path)}: cannot be read as a design ({error})") from error
    frame.index = frame.index.astype(str)
    return frame


def write_design(design: pd.DataFrame, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a design as a .csv or .tsv table.

    Raises
    ------
    InputError
        If the name ends otherwise.
    OutputError
        If it cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv"):
        raise InputError(f"{os.fspath(path)}: unknown kind of file; name the design .csv or .tsv")
    with atomic_output(path, overwrite=overwrite) as partial:
        design.to_csv(partial, sep="\t" if suffix == ".tsv" else ",")
