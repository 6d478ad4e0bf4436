"""A demonstration: denoise a thousand simulated cells, and compare with the known truth."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from scialm_dask.config import preset
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import atomic_output, check_output, open_store
from scialm_dask.evaluate.metrics import Scores
from scialm_dask.evaluate.simulate import simulate
from scialm_dask.events import Listener, silent
from scialm_dask.run.checkpointing import Job
from scialm_dask.run.job import run

_CELLS = _GENES = 1000
_DENSITY = 0.1


def demo(folder: str | os.PathLike[str], *, overwrite: bool = False, listen: Listener = silent) -> dict[str, Any]:
    """Denoise simulated cells, and compare counts and result with the simulated truth. Needs no network.

    Writes ``cells.zarr`` (counts and truth) and ``denoised.zarr`` into a new folder. Returns the relative error to the
    truth, and the median over genes of the correlation with it, before and after denoising; ``verdict``, the conclusion
    of the run without the truth; and ``result``, the path of the result.
    """
    check_output(folder, overwrite=overwrite)
    with atomic_output(folder, overwrite=overwrite) as partial:
        partial.mkdir()
        cells = partial / "cells.zarr"
        simulate(cells, n_cells=_CELLS, n_genes=_GENES, density=_DENSITY, listen=listen)
        matrix, store = ExpressionMatrix.open(cells), open_store(cells)
        truth = store["obsm/true_left"][...] @ store["varm/true_right"][...].T
        result = run(Job(matrix, preset("denoise")), listen=listen)
        before, after = (Scores.of_columns(X, truth) for X in (matrix.read_block(0).toarray(), result[:, :]))
        result.to_zarr(partial / "denoised.zarr", listen=listen)
    return {
        "cells": _CELLS,
        "genes": _GENES,
        "error_of_counts": before.relative_error,
        "error_denoised": after.relative_error,
        "gene_correlation_of_counts": float(np.nanmedian(before.pearson)),
        "gene_correlation_denoised": float(np.nanmedian(after.pearson)),
        "verdict": result.summary["verdict"],
        "seconds": result.summary["seconds"],
        "result": str(Path(folder) / "denoised.zarr"),
    }
