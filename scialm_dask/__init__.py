"""Denoising and imputation of single-cell counts by low-rank matrices, out of core and distributed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "IALM",
    "Evaluation",
    "ExpressionMatrix",
    "Imputation",
    "InputError",
    "PooledALS",
    "PooledNuclearNorm",
    "ScialmError",
    "Settings",
    "__version__",
    "balanced_pools",
    "biological_zeros",
    "connect",
    "evaluate_imputation",
    "gene_scores",
    "impute",
    "measure",
    "pool_report",
    "random_pools",
    "resume",
    "show_progress",
    "write_report",
]

if TYPE_CHECKING:
    from scialm_dask.api import impute, resume
    from scialm_dask.compare.benchmark import Evaluation, evaluate_imputation
    from scialm_dask.config import Settings
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.errors import InputError, ScialmError
    from scialm_dask.estimator import IALM
    from scialm_dask.evaluate.metrics import gene_scores
    from scialm_dask.imputation import Imputation
    from scialm_dask.pooled.als import PooledALS
    from scialm_dask.pooled.design import balanced_pools, measure, pool_report, random_pools
    from scialm_dask.pooled.nuclear import PooledNuclearNorm
    from scialm_dask.progress import show_progress
    from scialm_dask.report.report import write_report
    from scialm_dask.run.cluster import connect
    from scialm_dask.solve.biological_zeros import biological_zeros

_HOME = {
    "Evaluation": "compare.benchmark",
    "ExpressionMatrix": "data.matrix",
    "IALM": "estimator",
    "Imputation": "imputation",
    "InputError": "errors",
    "PooledALS": "pooled.als",
    "PooledNuclearNorm": "pooled.nuclear",
    "ScialmError": "errors",
    "Settings": "config",
    "balanced_pools": "pooled.design",
    "biological_zeros": "solve.biological_zeros",
    "connect": "run.cluster",
    "evaluate_imputation": "compare.benchmark",
    "gene_scores": "evaluate.metrics",
    "impute": "api",
    "measure": "pooled.design",
    "pool_report": "pooled.design",
    "random_pools": "pooled.design",
    "resume": "api",
    "show_progress": "progress",
    "write_report": "report.report",
}


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `import scialm_dask` is quick.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    # What is imported when first used is found by completion too.
    return __all__
