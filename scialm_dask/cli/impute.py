"""The commands `impute`, `resume`, `transform`, `plan` and `demo`."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import click

from scialm_dask.cli.group import Connect, connects, main, overwrites, reads_matrix, reports, shows_progress
from scialm_dask.errors import InputError, StoppedError
from scialm_dask.events import Listener, Note
from scialm_dask.progress import in_words
from scialm_dask.run.interruption import on_sigterm

_PRESETS = "auto: denoise raw counts, else complete. denoise: expression. complete: lost entries. paper: as published."
_OBSERVED = "finite: zeros are values, NaN is missing."
_RANK_POLICY = "How many singular values to compute in the next iteration.  [default: by preset]"
_OPTIONS = (
    click.option("--preset", type=click.Choice("auto denoise complete paper".split()), default="auto", help=_PRESETS),
    click.option("--observed", type=click.Choice(["nonzero", "finite"]), default="nonzero", help=_OBSERVED),
    click.option("--stop", type=click.Choice(["residual", "held-out"]), help="When to stop.  [default: by preset]"),
    click.option("--epsilon", type=float, help="Residual of the scaled matrix at which to stop.  [default: 1e-4]"),
    click.option("--validation", type=float, help="Share of entries hidden to decide when to stop.  [default: 0.02]"),
    click.option("--max-iterations", type=int, help="Maximum number of iterations.  [default: 1000]"),
    click.option("--rank-policy", type=click.Choice(["paper", "adaptive"]), help=_RANK_POLICY),
    click.option("--increment", type=int, help="R of the paper's rank policy."),
    click.option("--max-rank", help="Most singular values, or none.  [default: 64; complete: 128; paper: none]"),
    click.option("--scaling", help="none, poisson, or exponents of genes and cells, such as 0.75,0.5."),
    click.option("--seed", type=int, help="Seed of all random draws.  [default: 0]"),
    click.option("--scratch", help="Where the working state is kept: auto, memory, or zarr:PATH."),
    click.option("--memory-limit", help="Maximum memory, such as 8GB.  [default: free memory]"),
    click.option("--blocks", type=click.IntRange(min=1), help="Number of row blocks."),
)
_SETTINGS = "stop epsilon validation max_iterations rank_policy increment max_rank scaling seed".split()


# from SRC to the matrix to impute, the preset that `auto` resolves to, settings, and notes that say why
Choose = Callable[[str], tuple[Any, str, dict[str, Any], list[Note]]]


def imputes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for matrix and settings to a command, as one argument `choose`.

    It is a function that opens SRC and checks the settings; see `Choose`.
    """

    @functools.wraps(command)
    def wrapper(preset: str, **options: Any) -> Any:
        settings = {name: options.pop(name) for name in _SETTINGS}
        source = {name: options.pop(name) for name in ("layer", "observed", "blocks", "missing_chunks_are_zeros")}

        def choose(src: str) -> tuple[Any, str, dict[str, Any], list[Note]]:
            from scialm_dask.api import resolve_preset
            from scialm_dask.config import preset as settings_of
            from scialm_dask.data.matrix import ExpressionMatrix

            if preset != "auto":  # else the matrix decides which settings are valid
                settings_of(preset, **settings)
            matrix = ExpressionMatrix.open(src, **source)
            notes: list[Any] = []
            matrix, resolved = resolve_preset(matrix, preset, listen=notes.append)
            settings_of(resolved, **settings)
            return matrix, resolved, settings, notes

        return command(choose=choose, **options)

    return functools.reduce(lambda decorated, option: option(decorated), reversed((*_OPTIONS, reads_matrix)), wrapper)


def _in_short(result: dict[str, Any]) -> list[str]:
    """Return the result, its quality and the next step in a few lines."""
    if "n_cells" not in result:  # the run had finished before
        return [f"the result is in {result['destination']}"]
    size = f"{result['n_cells']:,} cells × {result['n_genes']:,} genes"
    if "unseen" in result:
        share, errors = result["residual_share"], result["unseen"]
        lines = [
            f"denoised {size}: {result['rank']} components, plus a share of the counts for {share:.0%} of the genes",
            f"error on unseen molecules: {errors['imputed']:.4g}; counts {errors['observed']:.4g}, "
            f"gene means {errors['gene_mean']:.4g}",
            result["verdict"],
        ]
    else:
        lines = [f"completed {size}: rank {result['rank']} after {result['iterations']} iterations"]
        if result["held_out_error"] is not None:
            lines.append(f"error on hidden entries: {result['held_out_error']:.4g}")
        lines.append(f"stopped: {result['stop_reason']}")
    cost = (in_words(result[key], key) for key in ("seconds", "peak_memory_bytes"))
    lines.append(f"{result['passes']} passes, {', at most '.join(cost)} of memory")
    lines += [f"beware: {fact} {meaning}" for fact, meaning in result["warnings"]]
    where = shlex.quote(result["destination"])
    return [*lines, f"written to {where}; look at it by `scialm-dask report {where} -o report.html`"]


@main.command(epilog="impute cells.h5ad denoised.zarr --memory-limit 8GB")
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@imputes
@click.option(
    "--write", type=click.Choice(["factors", "dense"]), default="factors", help="dense: also write the matrix as X."
)
@click.option("--keep-observed", is_flag=True, help="In X, keep observed entries unchanged.")
@click.option(
    "--preserve-zeros", is_flag=True, help="Write a sparse X in which biological zeros (ALRA's rule) stay zero."
)
@click.option("--checkpoint", metavar="DIR", help="Write checkpoints to this new folder, for `resume`.")
@click.option(
    "--checkpoint-every", help="Iterations or time between checkpoints, such as 30min.  [default: 10 minutes]"
)
@connects
@overwrites
@functools.partial(reports, in_short=_in_short)
@shows_progress
def impute(
    src: str,
    dst: str,
    choose: Choose,
    scratch: str | None,
    memory_limit: str | None,
    checkpoint: str | None,
    checkpoint_every: str | None,
    listen: Listener,
    connected: Connect,
    **asked: Any,
) -> dict[str, Any]:
    """Denoise or complete the matrix SRC and write the result, as factors, to DST.zarr."""
    from scialm_dask.api import impute
    from scialm_dask.data.scratch import scratch_folder_for
    from scialm_dask.data.store import check_output, lasting
    from scialm_dask.run.checkpointing import Checkpointing
    from scialm_dask.run.job import checkpoints_of

    if checkpoint_every is not None and checkpoint is None:
        raise click.UsageError("--checkpoint-every goes with --checkpoint")
    if asked["keep_observed"] and asked["write"] != "dense" and not asked["preserve_zeros"]:
        raise click.UsageError("--keep-observed goes with --write dense or --preserve-zeros")
    check_output(dst, overwrite=asked["overwrite"], sources=(src, checkpoint) if checkpoint else (src,))
    matrix, preset, settings, notes = choose(src)
    if asked["preserve_zeros"] and (asked["write"] == "dense" or matrix.observed == "finite"):
        raise click.UsageError("--preserve-zeros writes a sparse X and goes neither with dense nor with finite")
    asked |= {"destination": lasting(dst), "run": uuid.uuid4().hex}
    kept = contextlib.nullcontext() if checkpoint is None else checkpoints_of(checkpoint, new_for=matrix)
    with kept as checkpoints, connected(listen):
        for note in notes:
            listen(note)
        with _resumable(checkpoint) as stop:
            result = impute(
                matrix,
                preset=preset,
                scratch=scratch,
                memory_limit=memory_limit,
                scratch_folder=scratch_folder_for(dst),
                checkpoint=Checkpointing(checkpoints, result=asked, stop=stop) if checkpoints else None,
                checkpoint_every=checkpoint_every,
                listen=listen,
                **settings,
            )
        return _write(result, matrix, asked, src, checkpoints, listen)


@main.command(epilog="resume run1")
@click.argument("folder", metavar="DIR")
@click.argument("dst", metavar="[DST.zarr]", required=False)
@click.option("--scratch", help="Where the working state is kept.  [default: that of the run]")
@click.option("--memory-limit", help="Maximum memory, such as 8GB.  [default: that of the run]")
@overwrites
@connects
@functools.partial(reports, in_short=_in_short)
@shows_progress
def resume(
    folder: str,
    dst: str | None,
    scratch: str | None,
    memory_limit: str | None,
    overwrite: bool,
    connected: Connect,
    listen: Listener,
) -> dict[str, Any]:
    """Continue `impute --checkpoint DIR` from its last complete checkpoint.

    The result is written to the destination of the run, or to DST.zarr, which is required if that destination is not in
    the same folder as DIR. Further checkpoints are written to DIR.
    """
    from scialm_dask.config import bytes_of, validated
    from scialm_dask.data.store import check_output
    from scialm_dask.run.checkpointing import as_written, ended, source_of
    from scialm_dask.run.job import checkpoints_of, resume_run

    limit = bytes_of("memory limit", memory_limit)
    with checkpoints_of(folder) as checkpoints:
        notes = checkpoints.notes()
        with as_written(folder):
            asked, finished = dict(notes["result"]), notes["finished"]
            validated("destination", asked.get("destination"), str | None)
        if words := ended(folder, notes) or _ended_now(checkpoints, asked):
            listen(Note(words))
            return {"destination": finished or asked["destination"]}
        asked |= {"destination": _destination(folder, dst, asked), "overwrite": overwrite}
        matrix = source_of(notes)
        source = notes["run"]["source"]["path"]
        check_output(asked["destination"], overwrite=overwrite, sources=(source, folder))
        with connected(listen):
            with _resumable(folder) as stop:
                result = resume_run(checkpoints, matrix, scratch=scratch, memory_limit=limit, stop=stop, listen=listen)
            return _write(result, matrix, asked, source, checkpoints, listen)


def _destination(folder: str, dst: str | None, asked: dict[str, Any]) -> str:
    """Return the destination. One outside the folder of the checkpoint, which anybody may have made, needs DST."""
    from scialm_dask.data.store import lasting

    if dst is not None:
        return lasting(dst)
    if (destination := asked.get("destination")) is None:
        raise InputError(f"{folder}: the run was started from Python; name the destination: resume DIR DST.zarr")
    if os.path.dirname(destination) != os.path.dirname(lasting(folder).rstrip("/")):
        raise InputError(
            f"{folder}: its result goes to {destination}, which is not in the same folder; confirm that by "
            f"`scialm-dask resume {folder} {destination}`"
        )
    return str(destination)


def _ended_now(checkpoints: Any, asked: dict[str, Any]) -> str:
    """Finish a run that was killed after writing its result, and return a message; return "" for other runs."""
    from scialm_dask.imputation import Imputation
    from scialm_dask.run.checkpointing import finish

    with contextlib.suppress(InputError):
        if "run" in asked and Imputation.open(asked["destination"]).summary.get("run") == asked["run"]:
            finish(checkpoints, asked["destination"])
            return f"{checkpoints.folder}: the result of that run was written already"
    return ""


@contextlib.contextmanager
def _resumable(checkpoint: str | None, *, deferred: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM came. An interruption becomes an error with the next step.

    Without a checkpoint, or unless `deferred`, SIGTERM interrupts at once.
    """
    try:
        with on_sigterm(deferred=deferred and checkpoint is not None) as stop:
            yield stop
    except KeyboardInterrupt:
        if checkpoint is None or not ("://" in checkpoint or os.path.isdir(checkpoint)):
            raise
        raise StoppedError(f"interrupted; continue with `scialm-dask resume {checkpoint}`") from None


def _write(
    result: Any, matrix: Any, asked: dict[str, Any], src: str, checkpoints: Any, listen: Listener
) -> dict[str, Any]:
    """Write the result as the options say, and finish the checkpoints."""
    from scialm_dask.data.scratch import scratch_folder_for
    from scialm_dask.imputation import LONG
    from scialm_dask.report.diagnostics import warnings_of
    from scialm_dask.run.checkpointing import finish
    from scialm_dask.solve.biological_zeros import biological_zeros

    if "run" in asked:
        result.summary["run"] = asked["run"]
    result.summary["command"] = click.get_current_context().meta["command"]
    dst, zeros = asked["destination"], None
    with _resumable(checkpoints and checkpoints.folder, deferred=False):
        if asked.get("preserve_zeros"):
            scratch = scratch_folder_for(dst) if result.summary["scratch"] == "zarr" else None
            seed = result.summary["settings"]["seed"]
            zeros = biological_zeros(matrix, seed=seed, scratch_folder=scratch, listen=listen)
        summary = result.to_zarr(
            dst,
            dense=asked.get("write") == "dense",
            keep_observed=matrix if asked.get("keep_observed") else None,
            preserve_zeros=zeros,
            overwrite=asked.get("overwrite", False),
            sources=(src,),
            listen=listen,
        )
        if checkpoints is not None:
            finish(checkpoints, dst)
    told = {key: value for key, value in summary.items() if key not in LONG}
    return {"destination": dst} | told | {"warnings": warnings_of(result)}


@main.command(epilog="transform denoised.zarr new_cells.h5ad new_denoised.zarr")
@click.argument("result", metavar="RESULT.zarr")
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@reads_matrix
@overwrites
@connects
@reports
@shows_progress
def transform(
    result: str, src: str, dst: str, overwrite: bool, connected: Connect, listen: Listener, **source: Any
) -> dict[str, Any]:
    """Impute the cells of SRC, which were not in the fit, with the gene factors of RESULT.zarr.

    Genes are matched by name. SRC must be on the scale of the fitted matrix.
    """
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.data.store import check_output
    from scialm_dask.imputation import Imputation

    check_output(dst, overwrite=overwrite, sources=(src, result))
    fit = Imputation.open(result)
    matrix = ExpressionMatrix.open(src, observed=fit.observed, **source)
    with connected(listen):
        completed = fit.transform(matrix, listen=listen)
        completed.to_zarr(dst, overwrite=overwrite, sources=(src, result), listen=listen)
    return {"destination": dst, **completed.summary}


@main.command(epilog="plan cells.h5ad --memory-limit 8GB")
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="[DST.zarr]", required=False)
@imputes
@click.option("--preserve-zeros", is_flag=True, help="Include the search for biological zeros.")
@connects
@reports
@shows_progress
def plan(
    src: str,
    dst: str | None,
    choose: Choose,
    scratch: str | None,
    memory_limit: str | None,
    preserve_zeros: bool,
    connected: Connect,
    listen: Listener,
) -> dict[str, Any]:
    """Estimate memory, disk space, passes, tasks, bytes and time of imputing SRC, and whether it fits.

    One block is read to estimate the time, on the workers of --scheduler or --cluster if given. DST.zarr is not
    written; it determines the folder of scratch on disk.
    """
    from scialm_dask.config import bytes_of, configured
    from scialm_dask.config import preset as settings_of
    from scialm_dask.data.scratch import scratch_folder_for
    from scialm_dask.run.checkpointing import Job
    from scialm_dask.run.plan import plan

    limit = bytes_of("memory limit", configured("memory-limit", memory_limit))
    matrix, preset, settings, notes = choose(src)
    job = Job(matrix, settings_of(preset, **settings), configured("scratch", scratch), limit, scratch_folder_for(dst))
    with connected(listen):
        for note in notes:
            listen(note)
        return plan(job, preserve_zeros=preserve_zeros)


@main.command(epilog="demo")
@click.argument("folder", default="scialm-demo")
@overwrites
@reports
@shows_progress
def demo(folder: str, overwrite: bool, listen: Listener) -> dict[str, Any]:
    """Denoise a thousand simulated cells and compare with the truth, offline. Creates FOLDER."""
    from scialm_dask.run.demo import demo

    return demo(folder, overwrite=overwrite, listen=listen)
