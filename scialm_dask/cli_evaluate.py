"""The commands that look at results: `score` and `evaluate`."""

from __future__ import annotations

import os
from typing import Any

import click

from scialm_dask.cli import layer_option, main, overwrite_option, quiet_option, reports


@main.command()
@click.argument("result", metavar="RESULT.zarr")
@click.option("--held-out", "masked", required=True, metavar="MASKED", help="What `mask` has written.")
@reports
def score(result: str, masked: str) -> dict[str, Any]:
    """Score a result on the hidden entries of MASKED, beside the prediction of each gene's mean."""
    from scialm_dask.data.factors import Imputation
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.evaluate.metrics import score_held_out

    held_out = ExpressionMatrix.open(masked, "held_out")
    return score_held_out(Imputation.open(result), held_out, ExpressionMatrix.open(masked))


@main.command()
@click.argument("src", metavar="SRC")
@click.argument("folder", default="scialm-evaluation")
@click.option("--methods", default="auto,denoise", help="auto, denoise, paper, peers, all, or names as below.")
@click.option("--mask", "shares", default="0.1", help="Shares of the non-zeros to hide, such as 0.1,0.3,0.5.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="How often, each time with another seed.")
@click.option("--count-split/--no-count-split", "split", default=None, help="[default: if the counts are known]")
@click.option("--reference", default=None, metavar="STORE", help="The same cells and genes sequenced deeper.")
@click.option("--labels", default=None, metavar="COLUMN", help="Known types in obs: cluster the cells and compare.")
@click.option("--sweep", "sweeps", multiple=True, metavar="FIELD=VALUES", help="Such as increment=10,50,100,…,400.")
@click.option("--memory-limit", default=None, help="What each method may hold, such as 8GB.  [default: no limit]")
@click.option("--time-limit", type=float, default=None, metavar="SECONDS", help="What each method may take.")
@layer_option
@overwrite_option
@quiet_option
@reports
def evaluate(
    src: str,
    folder: str,
    methods: str,
    shares: str,
    seeds: int,
    memory_limit: str | None,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> dict[str, Any]:
    """Compare methods on SRC: hide entries, impute, score; write tables and figures to FOLDER.

    Peers: gene-mean (always there), knn, alra, softimpute, and with the extra [bench] magic and scvi; dca, saver and
    scimpute quote the publication. module:function runs a function of your own. Each runs in a process of its own.
    """
    from scialm_dask.api import parse_limit
    from scialm_dask.data.store import atomic_output, check_output
    from scialm_dask.errors import InputError
    from scialm_dask.evaluate.compare import evaluate_imputation
    from scialm_dask.evaluate.written import summary_table, write_evaluation

    try:
        hidden = [float(share) for share in shares.split(",") if share]
    except ValueError:
        raise InputError(f"--mask is {shares!r}; give shares with commas between, such as 0.1,0.3") from None
    sources = tuple(path for path in (src, options["reference"]) if path)
    check_output(folder, overwrite=overwrite, sources=sources)
    found = evaluate_imputation(
        src,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        shares=hidden,
        seeds=range(seeds),
        memory_limit=parse_limit(memory_limit),
        scratch_folder=os.path.dirname(os.path.abspath(folder)),
        on_row=lambda row: None if quiet else click.echo(_words_of(row), err=True),
        **options,
    )
    with atomic_output(folder, overwrite=overwrite, sources=sources) as partial:
        partial.mkdir()
        write_evaluation(found, partial, {"source": src, "methods": methods, "mask": hidden, "seeds": seeds, **options})
    return {"destination": folder, **_scores_of(summary_table(found))}


def _words_of(row: dict[str, Any]) -> str:
    """Say in one line what became of a method."""
    what = [row["experiment"], f"{row['share']:.0%}" if row["share"] == row["share"] else "", f"seed {row['seed']}"]
    words = f"{' '.join(filter(None, what))}: {' '.join(filter(None, [row['method'], row['setting']]))}"
    for name, form in (("mse", ".4g"), ("pearson", ".4f"), ("relative_error", ".4g"), ("seconds", ".1f")):
        words += f", {name.replace('_', ' ')} {row[name]:{form}}" if row[name] == row[name] else ""
    return words if row["status"] == "ok" else f"{words}, {row['status']}: {row['note']}"


def _scores_of(table: Any) -> dict[str, Any]:
    """Scores by experiment and method, for people and for --json."""
    scores: dict[str, Any] = {}
    for row in table.to_dict("records"):
        share = f"{row['share']:.0%}" if row.get("share", None) == row.get("share", None) else ""
        name = " ".join(filter(None, [row["experiment"], share, row["method"], row["setting"]]))
        kept = {k: row[k] for k in ("mse", "mae", "pearson", "cosine", "relative_error", "leiden_ari") if k in row}
        known = {k: v for k, v in kept.items() if v == v}
        scores[name] = known if row["status"] == "ok" else row["status"]
    return scores
