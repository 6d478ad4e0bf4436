"""``scialm-dask`` and ``python -m scialm_dask``: all commands."""

from scialm_dask.cli import evaluate, impute, pooled  # noqa: F401  add their commands
from scialm_dask.cli.group import main

if __name__ == "__main__":
    main(prog_name="scialm-dask")
