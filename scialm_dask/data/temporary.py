"""Temporary copies on disk, of what cannot be read block by block where it is."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import numpy as np
import scipy.sparse as sp
import zarr

from scialm_dask.data.arrays import ZARR_FORMAT
from scialm_dask.data.csr import CSRWriter
from scialm_dask.data.leftovers import held_name
from scialm_dask.data.rows import Rows, StoredRows, numeric
from scialm_dask.data.store import output_error
from scialm_dask.errors import InputError
from scialm_dask.reduction import current_client


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder for temporary files, where Dask is configured to have them, removed at the end.

    Raises
    ------
    OutputError
        If the disk is full.
    """
    folder = _new_folder()
    try:
        yield folder
    except OSError as error:
        raise output_error(folder, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_csr(blocks: Iterable[sp.csr_matrix], n_columns: int, dtype: np.dtype[Any], name: str) -> StoredRows:
    """Write blocks of rows, in order, as one matrix of a temporary store.

    It lies in the ``temporary-directory`` of Dask's configuration, else in the system's, and is removed when nobody
    here refers to the rows any more, at the latest when the process ends.

    Parameters
    ----------
    blocks
        The rows.
    n_columns
        Number of genes.
    dtype
        Of the values.
    name
        What to call the matrix in messages.

    Raises
    ------
    InputError
        If workers of the Dask cluster do not see the folder.
    OutputError
        If the disk is full.
    """
    folder = _new_folder()
    path, n_rows = os.fspath(folder / "rows.zarr"), 0
    try:
        _check_seen(folder, name)
        root = zarr.open_group(path, mode="w-", zarr_format=ZARR_FORMAT)
        with CSRWriter(root, "X", n_columns=n_columns, dtype=numeric(dtype)) as writer:
            for block in blocks:
                writer.append(block)
                n_rows += block.shape[0]
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise output_error(folder, error) from error
        raise
    rows = StoredRows(path, "X", "csr_matrix", (n_rows, n_columns), label=name)
    weakref.finalize(rows, shutil.rmtree, folder, ignore_errors=True)
    return rows


def check_seen(rows: Rows) -> None:
    """Raise `InputError` if rows are of a temporary copy that workers of the Dask cluster do not see."""
    if isinstance(rows, StoredRows) and rows.label is not None:  # temporary ones alone have a label
        _check_seen(Path(rows.path).parent, rows.name)


def is_seen(folder: str | os.PathLike[str]) -> bool:
    """Tell whether all workers of the Dask cluster, if there is one, see a folder."""
    client = current_client()
    return client is None or all(client.run(os.path.isdir, os.fspath(folder)).values())


def _check_seen(folder: Path, name: str) -> None:
    if not is_seen(folder):
        raise InputError(
            f"{name}: a temporary copy of it for the workers is put in {folder.parent}, which they do not see; set "
            "Dask's temporary-directory to a folder that all see, or write the matrix there and pass its path"
        )


def _new_folder() -> Path:
    parent = dask.config.get("temporary-directory", None)
    if parent is not None:
        os.makedirs(parent, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"scialm-{held_name()}-", dir=parent))
