"""The whole of it on 700 blood cells: hide, impute, score.

``blood.h5ad`` holds 765 genes of the 68,000 mononuclear cells of Zheng et al. (Nature Communications 8, 14049, 2017;
data of 10x Genomics, CC BY 4.0), chosen and labelled as in scanpy's ``pbmc68k_reduced``.
"""

from __future__ import annotations

import os
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
from scialm_dask.run.checkpointing import Job
from scialm_dask.run.job import run

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
        result = run(Job(masked, Settings()), listen=listen)
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
    import anndata

    cells = anndata.read_h5ad(Path(__file__).with_name("blood.h5ad"))
    root = new_anndata(path, obs=cells.obs, var=cells.var)
    write_element(root, "X", sp.csr_matrix(cells.X, dtype="float32"))
