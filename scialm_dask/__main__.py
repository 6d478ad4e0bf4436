"""``scialm-dask`` and ``python -m scialm_dask``: all commands."""

from scialm_dask import cli_pooled  # noqa: F401  adds its commands
from scialm_dask.cli import main

if __name__ == "__main__":
    main(prog_name="scialm-dask")
