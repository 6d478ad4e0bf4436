"""The commands `score`, `report` and `evaluate`."""

from __future__ import annotations

import functools
from typing import Any

import click

from scialm_dask.cli.group import main, overwrites, reads_matrix, reports, shows_progress
from scialm_dask.events import Listener


@main.command(epilog="score completed.zarr --held-out masked.zarr")
@click.argument("result", metavar="RESULT.zarr")
@click.option("--held-out", "masked", required=True, metavar="MASKED", help="The output of `mask`.")
@reports
@shows_progress
def score(result: str, masked: str, listen: Listener) -> dict[str, Any]:
    """Score a result on the hidden entries of MASKED, next to predictions by gene means.

    X is scored if the result has one, otherwise the factors; `scored` tells which.
    """
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.evaluate.metrics import score_held_out
    from scialm_dask.imputation import Imputation

    completed, held_out = Imputation.open(result), ExpressionMatrix.open(masked, "held_out")
    scored = "factors" if completed.X is None else "X"
    return {"scored": scored, **score_held_out(completed, held_out, ExpressionMatrix.open(masked), listen)}


@main.command(epilog="report denoised.zarr -o report.html --color cell_type")
@click.argument("result", metavar="RESULT.zarr")
@click.option("-o", "--output", "path", required=True, metavar="FILE.html", help="The report to write.")
@click.option("--source", metavar="SRC", help="The matrix that was imputed.  [default: its path then]")
@click.option("--color", metavar="NAME", help="Column of obs, or gene, to colour cells by.")
@overwrites
@reports
@shows_progress
def report(result: str, path: str, **options: Any) -> dict[str, Any]:
    """Write a report on a result as one HTML file that works offline."""
    from scialm_dask.report.report import write_report

    return write_report(result, path, **options)


@main.command(epilog="evaluate cells.h5ad evaluation --methods denoise,gene-mean,knn --mask 0.1")
@click.argument("src", metavar="SRC")
@click.argument("folder", default="scialm-evaluation")
@click.option("--methods", default="denoise,complete", help="denoise, complete, paper, peers, all, or names as below.")
@click.option("--mask", "shares", default="0.1", help="Shares of the non-zeros to hide, such as 0.1,0.5; may be empty.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Runs of each experiment, with different seeds.")
@click.option(
    "--count-split/--no-count-split",
    "split",
    default=None,
    help="Also score on hidden molecules.  [default: for counts]",
)
@click.option("--reference", metavar="STORE", help="The same cells and genes, sequenced more deeply.")
@click.option("--labels", metavar="COLUMN", help="Column of obs with cell types, to compare clusters with.")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="FIELD=VALUES",
    help="Values of a setting to try, such as max_rank=10,20,50.",
)
@click.option("--memory-limit", help="Maximum memory of each method, such as 8GB.  [default: no limit]")
@click.option("--method-timeout", type=float, metavar="SECONDS", help="Maximum time of each run.")
@reads_matrix
@overwrites
@reports
@shows_progress
def evaluate(
    src: str,
    folder: str,
    methods: str,
    shares: str,
    seeds: int,
    reference: str | None,
    layer: str | None,
    missing_chunks_are_zeros: bool,
    overwrite: bool,
    listen: Listener,
    **options: Any,
) -> dict[str, Any]:
    """Compare methods on SRC: hide entries, impute, score; write tables and figures to FOLDER.

    Peers: gene-mean (always included), knn, alra, softimpute, and with the extra [bench] magic and scvi. For dca, saver
    and scimpute, the scores of the publication are quoted. module:function runs your own function. Every method runs in
    a process of its own. The total time is estimated first.
    """
    from scialm_dask.compare.benchmark import WHOLE, evaluate_imputation
    from scialm_dask.compare.tables import summary_table, write_evaluation
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.data.scratch import scratch_folder_for
    from scialm_dask.data.store import atomic_output, check_output
    from scialm_dask.errors import InputError

    names, listed = ([word.strip() for word in words.split(",") if word.strip()] for words in (methods, shares))
    try:
        hidden = [float(word) for word in listed]
    except ValueError:
        raise InputError(f"--mask is {shares!r}; give numbers separated by commas") from None
    sources = tuple(path for path in (src, reference) if path)
    check_output(folder, overwrite=overwrite, sources=sources)
    open_matrix = functools.partial(ExpressionMatrix.open, missing_chunks_are_zeros=missing_chunks_are_zeros)
    found = evaluate_imputation(
        open_matrix(src, layer),
        methods=names,
        shares=hidden,
        seeds=list(range(seeds)),
        reference=None if reference is None else open_matrix(reference),
        scratch_folder=scratch_folder_for(folder),
        listen=listen,
        **options,
    )
    with atomic_output(folder, overwrite=overwrite, sources=sources, keep=listen) as partial:
        about = {"source": src, "layer": layer, "reference": reference, "methods": methods, "mask": hidden}
        write_evaluation(found, partial, {**about, "seeds": seeds, **options})
    scores: dict[str, Any] = {"destination": folder}
    for row in summary_table(found).to_dict("records"):
        share = f"{row['share']:.0%}" if row["share"] == row["share"] else ""
        name = " ".join(filter(None, [row["experiment"], share, row["method"], row["setting"]]))
        kept = {k: row[k] for k in ("mse", "mae", "pearson", "cosine", *WHOLE, "leiden_ari") if k in row}
        known = {k: v for k, v in kept.items() if v == v}
        scores[name] = known if row["status"] == "ok" else row["status"]
    return scores
