"""The command line: thin click commands, one for each thing a user does."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from scialm_dask import __version__
from scialm_dask.errors import ScialmError

_INTERRUPTED = 130


class _Commands(click.Group):
    """Turns the package's errors into one line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
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
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
layer_option = click.option("--layer", default=None, help="Read this layer instead of X.")
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")
preset_option = click.option(
    "--preset",
    type=click.Choice(["auto", "paper", "denoise"]),
    default="auto",
    help="paper: as published. denoise: zeros count too.",
)
missing_chunks_option = click.option(
    "--missing-chunks-are-zeros", is_flag=True, help="Read absent chunks of a dense Zarr as zeros; else refuse."
)


@contextlib.contextmanager
def progress(label: str, quiet: bool) -> Iterator[Callable[[float], None]]:
    """Show a bar on a terminal; give a function to tell the share of the work done since the last call."""
    from tqdm import tqdm

    form = "{l_bar}{bar}| {elapsed}<{remaining}"
    with tqdm(total=1.0, desc=label, bar_format=form, disable=True if quiet else None, leave=False) as bar:
        yield lambda share: None if bar.disable else bar.update(min(share, bar.total - bar.n))


@main.command()
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@click.option("--layer", default=None, help="Take this layer alone, as X.")
@click.option("--genome", default=None, help="Take this genome of a 10x .h5 file that holds several.")
@missing_chunks_option
@overwrite_option
@quiet_option
@reports
def convert(src: str, dst: str, quiet: bool, **options: Any) -> dict[str, Any]:
    """Turn .h5ad, 10x .h5, a 10x MEX folder or Zarr into chunked AnnData Zarr.

    Memory does not grow with the size of the matrix. X and all layers are taken, with obs and var.
    """
    from scialm_dask.data.ingest import convert

    with progress("converting", quiet) as advance:
        result = convert(src, dst, **options, advance=advance)
    for note in result["notes"]:
        click.echo(f"scialm-dask: note: {note}", err=True)
    return result


@main.command()
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@click.option("--min-genes", type=int, default=None, help="Least number of genes with counts, of a cell.")
@click.option("--max-genes", type=int, default=None, help="Most genes with counts, of a cell.")
@click.option("--max-mito", type=float, default=None, help="Most counts on mitochondrial genes, in percent of a cell.")
@click.option("--mito-prefix", default="MT-", help="How their names begin, in capitals or not.")
@click.option("--min-cells", type=int, default=None, help="Least number of kept cells with counts, of a gene.")
@layer_option
@missing_chunks_option
@overwrite_option
@quiet_option
@reports
def qc(
    src: str,
    dst: str,
    quiet: bool,
    min_genes: int | None,
    max_genes: int | None,
    max_mito: float | None,
    mito_prefix: str,
    min_cells: int | None,
    **source: Any,
) -> dict[str, Any]:
    """Drop poor cells, then rare genes; scale every cell to the median total. No logarithm."""
    from scialm_dask.data.quality import Thresholds, quality_control

    thresholds = Thresholds(min_genes, max_genes, max_mito, mito_prefix, min_cells)
    with progress("quality control", quiet) as advance:
        return quality_control(src, dst, thresholds, **source, advance=advance)


@main.command()
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@click.option("--fraction", type=float, default=0.1, help="Share of the non-zeros of each gene to hide.")
@click.option("--seed", type=int, default=0, help="Which ones.")
@layer_option
@missing_chunks_option
@overwrite_option
@quiet_option
@reports
def mask(src: str, dst: str, fraction: float, seed: int, quiet: bool, **source: Any) -> dict[str, Any]:
    """Hide non-zeros, gene by gene, in layer held_out, to score their recovery."""
    from scialm_dask.evaluate.masking import mask

    with progress("masking", quiet) as advance:
        return mask(src, dst, fraction=fraction, seed=seed, **source, advance=advance)


@main.command()
@click.argument("dst", metavar="DST.zarr")
@click.option("--cells", type=int, required=True)
@click.option("--genes", type=int, required=True)
@click.option("--density", type=float, default=0.05, help="Share of the entries that are not zero.")
@click.option("--rank", type=int, default=20, help="Number of expression programs.")
@click.option("--seed", type=int, default=0)
@overwrite_option
@quiet_option
@reports
def simulate(
    dst: str, cells: int, genes: int, density: float, rank: int, seed: int, overwrite: bool, quiet: bool
) -> dict[str, Any]:
    """Simulate counts of low rank with known factors, of any size."""
    from scialm_dask.evaluate.simulation import simulate

    with progress("simulating", quiet) as advance:
        return simulate(
            dst,
            n_cells=cells,
            n_genes=genes,
            density=density,
            rank=rank,
            seed=seed,
            overwrite=overwrite,
            advance=advance,
        )


@main.command()
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@preset_option
@click.option("--observed", type=click.Choice(["nonzero", "finite"]), default="nonzero", help="finite: all but NaN.")
@click.option("--stop", type=click.Choice(["residual", "held-out", "count-split"]), default=None, help="When to stop.")
@click.option("--zeros", default=None, help="Confidence in zeros: 0 (unknown, as published) to 1, or auto.")
@click.option("--epsilon", type=float, default=None, help="Residual to stop at.")
@click.option("--validation", type=float, default=None, help="Share of the entries hidden to know when to stop.")
@click.option("--max-iterations", type=int, default=None)
@click.option("--rank-policy", type=click.Choice(["paper", "adaptive"]), default=None)
@click.option("--increment", type=int, default=None, help="R of the paper's rank policy.")
@click.option("--max-rank", type=int, default=None, help="Most singular values to keep.")
@click.option("--scaling", default=None, help="none, poisson, or exponents of genes and cells such as 0.75,0.5.")
@click.option("--seed", type=int, default=None)
@click.option("--scratch", default="auto", help="Where the working state is kept: auto, memory, or zarr:PATH.")
@click.option("--memory-limit", default=None, help="Most memory to use, such as 8GB.  [default: what is free]")
@click.option("--blocks", type=click.IntRange(min=1), default=None, help="Number of row blocks.")
@click.option("--write", type=click.Choice(["factors", "dense"]), default="factors", help="dense: the matrix as X too.")
@click.option("--keep-observed", is_flag=True, help="In X, leave observed entries as they were.")
@click.option("--preserve-zeros", is_flag=True, help="Write X, sparse: biological zeros (rule of ALRA) stay zero.")
@layer_option
@missing_chunks_option
@overwrite_option
@quiet_option
@reports
def impute(
    src: str,
    dst: str,
    preset: str,
    observed: Any,
    scratch: str,
    memory_limit: str | None,
    blocks: int | None,
    write: str,
    keep_observed: bool,
    preserve_zeros: bool,
    layer: str | None,
    missing_chunks_are_zeros: bool,
    overwrite: bool,
    quiet: bool,
    **settings: Any,
) -> dict[str, Any]:
    """Complete the matrix SRC by low-rank matrix completion and write its factors to DST.zarr."""
    from scialm_dask.api import impute
    from scialm_dask.config import preset as settings_of
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.data.store import check_output

    if keep_observed and write != "dense" and not preserve_zeros:
        raise click.UsageError("--keep-observed goes with --write dense or --preserve-zeros")
    if preserve_zeros and (write == "dense" or observed == "finite"):
        raise click.UsageError("--preserve-zeros writes a sparse X and goes neither with dense nor with finite")
    settings_of(preset, **settings)
    check_output(dst, overwrite=overwrite, sources=(src,))
    matrix = ExpressionMatrix.open(
        src, layer, observed=observed, blocks=blocks, missing_chunks_are_zeros=missing_chunks_are_zeros
    )
    with iterations(quiet) as show:
        result = impute(
            matrix,
            preset=preset,
            scratch=scratch,
            memory_limit=memory_limit,
            scratch_folder=os.path.dirname(os.path.abspath(dst)),
            on_iteration=show,
            **settings,
        )
    result.to_zarr(
        dst,
        dense=write == "dense",
        keep_observed=matrix if keep_observed else None,
        preserve_zeros=_zeros_of(matrix, result, dst) if preserve_zeros else None,
        overwrite=overwrite,
        sources=(src,),
    )
    hidden = ("settings", "singular_values")
    return {"destination": dst} | {key: value for key, value in result.summary.items() if key not in hidden}


def _zeros_of(matrix: Any, result: Any, dst: str) -> Any:
    """Find biological zeros, with the working state where that of the fit was."""
    from scialm_dask.solve.alra import biological_zeros

    folder = os.path.dirname(os.path.abspath(dst)) if result.summary["scratch"] == "zarr" else None
    return biological_zeros(matrix, seed=result.summary["settings"]["seed"], scratch_folder=folder)


@main.command()
@click.argument("result", metavar="RESULT.zarr")
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@layer_option
@missing_chunks_option
@overwrite_option
@reports
def transform(
    result: str, src: str, dst: str, layer: str | None, missing_chunks_are_zeros: bool, overwrite: bool
) -> dict[str, Any]:
    """Complete the cells of SRC, which were not in the fit, with the gene factors of RESULT.zarr.

    Genes are matched by name. SRC must be on the scale of the matrix of the fit.
    """
    from scialm_dask.data.factors import Imputation
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.data.store import check_output

    check_output(dst, overwrite=overwrite, sources=(src, result))
    matrix = ExpressionMatrix.open(src, layer, missing_chunks_are_zeros=missing_chunks_are_zeros)
    completed = Imputation.open(result).transform(matrix)
    completed.to_zarr(dst, overwrite=overwrite, sources=(src, result))
    return {"destination": dst, **completed.summary}


@main.command()
@click.argument("src", metavar="SRC")
@preset_option
@click.option("--max-rank", type=int, default=None, help="Most singular values to keep.")
@click.option("--blocks", type=click.IntRange(min=1), default=None, help="Number of row blocks.")
@layer_option
@reports
def plan(src: str, preset: str, max_rank: int | None, blocks: int | None, layer: str | None) -> dict[str, Any]:
    """Say what imputing SRC will take: memory, disk, passes, tasks, bytes and time. Computes nothing."""
    from scialm_dask.config import preset as settings_of
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.run.plan import plan

    return plan(ExpressionMatrix.open(src, layer, blocks=blocks), settings_of(preset, max_rank=max_rank))


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


@contextlib.contextmanager
def iterations(quiet: bool) -> Iterator[Callable[[Any], None]]:
    """Show iterations as they are made: one changing line on a terminal, else a line each; nothing when quiet."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(desc="imputing", unit=" iterations", disable=quiet or not terminal, leave=False) as bar:

        def show(latest: Any) -> None:
            if quiet:
                return
            words = f"rank {latest.rank}, residual {latest.residual:.3g}"
            if latest.held_out == latest.held_out:
                words += f", held-out error {latest.held_out:.4g}"
            if terminal:
                bar.update()
                bar.set_postfix_str(words)
            else:
                click.echo(f"iteration {latest.iteration}: {words}", err=True)

        yield show


@main.command()
@click.argument("folder", default="scialm-demo")
@overwrite_option
@quiet_option
@reports
def demo(folder: str, overwrite: bool, quiet: bool) -> dict[str, Any]:
    """Impute 700 real blood cells, offline, and score the result. Makes FOLDER."""
    from scialm_dask.config import Settings
    from scialm_dask.run.demo import demo

    with iterations(quiet) as show:
        return demo(folder, Settings(), overwrite=overwrite, on_iteration=show)
