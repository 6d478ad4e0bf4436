"""The command line: thin click commands, one for each thing a user does."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from scialm_dask import __version__
from scialm_dask.errors import ScialmError

_INTERRUPTED = 130


class _Commands(click.Group):
    """Turns the package's errors into one line on standard error and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        try:
            return super().main(*args, standalone_mode=standalone_mode, **kwargs)
        except ScialmError as error:
            click.echo(f"scialm-dask: error: {' '.join(str(error).split())}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("scialm-dask: interrupted; nothing was written", err=True)
            sys.exit(_INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="scialm-dask")
def main() -> None:
    """Complete single-cell expression matrices by low-rank matrix completion, out of core."""


def reports(command: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Give a command the option --json, and print the dictionary that it returns.

    As lines of text by default; with --json as one JSON object, the last line of standard output.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on the last line.")
    @functools.wraps(command)
    def wrapper(*args: Any, as_json: bool, **kwargs: Any) -> None:
        result = command(*args, **kwargs)
        if as_json:
            click.echo(json.dumps(result, default=float))
        else:
            for key, value in result.items():
                click.echo(f"{key.replace('_', ' '):<22} {_readable(value)}")

    return wrapper


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
layer_option = click.option("--layer", default=None, help="Read this layer instead of X.")
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")
