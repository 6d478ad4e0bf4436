"""Low-rank completion of single-cell expression matrices, out of core and distributed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["ExpressionMatrix", "Imputation", "InputError", "ScialmError", "Settings", "__version__", "impute"]

if TYPE_CHECKING:
    from scialm_dask.api import impute
    from scialm_dask.config import Settings
    from scialm_dask.data.factors import Imputation
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.errors import InputError, ScialmError

_HOME = {
    "ExpressionMatrix": "scialm_dask.data.matrix",
    "Imputation": "scialm_dask.data.factors",
    "InputError": "scialm_dask.errors",
    "ScialmError": "scialm_dask.errors",
    "Settings": "scialm_dask.config",
    "impute": "scialm_dask.api",
}


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `import scialm_dask` is quick.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
