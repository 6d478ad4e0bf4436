"""Denoising and imputation of single-cell counts by low-rank matrices, out of core and distributed."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Imported on first use (SPEC 1), which keeps `import scialm_dask` fast.
_MODULES = {
    "api": "impute resume",
    "compare.benchmark": "Evaluation evaluate_imputation",
    "config": "Settings",
    "data.matrix": "ExpressionMatrix",
    "errors": "InputError ScialmError",
    "estimator": "IALM",
    "evaluate.metrics": "gene_scores",
    "imputation": "Imputation",
    "pooled.als": "PooledALS",
    "pooled.design": "balanced_pools measure pool_report random_pools",
    "pooled.nuclear": "PooledNuclearNorm",
    "progress": "show_progress",
    "report.report": "write_report",
    "run.cluster": "connect",
    "solve.biological_zeros": "biological_zeros",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(["__version__", *_HOME])

if TYPE_CHECKING:
    from scialm_dask.api import impute as impute
    from scialm_dask.api import resume as resume
    from scialm_dask.compare.benchmark import Evaluation as Evaluation
    from scialm_dask.compare.benchmark import evaluate_imputation as evaluate_imputation
    from scialm_dask.config import Settings as Settings
    from scialm_dask.data.matrix import ExpressionMatrix as ExpressionMatrix
    from scialm_dask.errors import InputError as InputError
    from scialm_dask.errors import ScialmError as ScialmError
    from scialm_dask.estimator import IALM as IALM
    from scialm_dask.evaluate.metrics import gene_scores as gene_scores
    from scialm_dask.imputation import Imputation as Imputation
    from scialm_dask.pooled.als import PooledALS as PooledALS
    from scialm_dask.pooled.design import balanced_pools as balanced_pools
    from scialm_dask.pooled.design import measure as measure
    from scialm_dask.pooled.design import pool_report as pool_report
    from scialm_dask.pooled.design import random_pools as random_pools
    from scialm_dask.pooled.nuclear import PooledNuclearNorm as PooledNuclearNorm
    from scialm_dask.progress import show_progress as show_progress
    from scialm_dask.report.report import write_report as write_report
    from scialm_dask.run.cluster import connect as connect
    from scialm_dask.solve.biological_zeros import biological_zeros as biological_zeros


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
