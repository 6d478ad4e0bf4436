"""The commands that look at results: `score` and `report`."""

from __future__ import annotations

from typing import Any

import click

from scialm_dask.cli import main, overwrite_option, reports, shows_progress
from scialm_dask.events import Listener


@main.command()
@click.argument("result", metavar="RESULT.zarr")
@click.option("--held-out", "masked", required=True, metavar="MASKED", help="What `mask` has written.")
@reports
@shows_progress
def score(result: str, masked: str, listen: Listener) -> dict[str, Any]:
    """Score a result on the hidden entries of MASKED, beside the prediction of each gene's mean."""
    from scialm_dask.data.factors import Imputation
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.evaluate.metrics import score_held_out

    held_out = ExpressionMatrix.open(masked, "held_out")
    return score_held_out(Imputation.open(result), held_out, ExpressionMatrix.open(masked), listen)


@main.command()
@click.argument("result", metavar="RESULT.zarr")
@click.option("-o", "--output", "path", required=True, metavar="FILE.html", help="What to write.")
@click.option("--source", default=None, metavar="SRC", help="What was imputed.  [default: where it was then]")
@click.option("--color", default=None, metavar="COLUMN", help="Column of obs to colour cells by.")
@overwrite_option
@reports
@shows_progress
def report(result: str, path: str, **options: Any) -> dict[str, Any]:
    """Write a report on a result: one HTML file that needs no network."""
    from scialm_dask.report import write_report

    return write_report(result, path, **options)
