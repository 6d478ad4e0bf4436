"""The whole of it on 700 blood cells that come with scanpy: hide, impute, score."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import scipy.sparse as sp

from scialm_dask.config import Settings
from scialm_dask.data.arrays import write_element
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import atomic_output, check_output, new_anndata
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.metrics import score_held_out
from scialm_dask.events import Listener, silent
from scialm_dask.run.job import complete_matrix

__all__ = ["demo"]


def demo(folder: str | os.PathLike[str], *, overwrite: bool = False, listen: Listener = silent) -> dict[str, Any]:
    """Hide a tenth of the entries of real cells, impute, and score beside each gene's mean. Needs no network.

    Parameters
    ----------
    folder
        To make, with ``cells.zarr`` (counts), ``masked.zarr`` and ``imputed.zarr``.
    overwrite
        Replace `folder` if it exists.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    dict
        The scores, and ``result``, the path of the imputed cells.
    """
    check_output(folder, overwrite=overwrite)
    with atomic_output(folder, overwrite=overwrite) as partial:
        partial.mkdir()
        _write_cells(partial / "cells.zarr")
        mask(partial / "cells.zarr", partial / "masked.zarr", fraction=0.1, seed=0, listen=listen)
        masked = ExpressionMatrix.open(partial / "masked.zarr")
        result = complete_matrix(masked, Settings(), listen=listen)
        result.summary["source"] = f"{Path(folder) / 'masked.zarr'}:X"  # where it is going to be
        result.to_zarr(partial / "imputed.zarr", listen=listen)
        scores = score_held_out(result, ExpressionMatrix.open(partial / "masked.zarr", "held_out"), masked, listen)
    return {
        "cells": result.shape[0],
        "genes": result.shape[1],
        "rank": result.rank,
        **scores,
        "seconds": result.summary["seconds"],
        "result": str(Path(folder) / "imputed.zarr"),
    }


def _write_cells(path: Path) -> None:
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is older than the AnnData that reads it
        cells = sc.datasets.pbmc68k_reduced()
    # what is kept there are logarithms of counts that were scaled to 10,000 in every cell
    scale = cells.obs["n_counts"].to_numpy()[:, None] / 1e4
    counts = sp.csr_matrix(cells.raw.X).expm1().multiply(scale).rint().tocsr()
    root = new_anndata(path, obs=cells.obs[["bulk_labels"]], var=cells.raw.var[[]])
    write_element(root, "X", counts.astype("float32"))
