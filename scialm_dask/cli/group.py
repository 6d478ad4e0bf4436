"""The command group, options that commands share, and the commands that prepare counts."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from scialm_dask import __version__
from scialm_dask.errors import DoesNotFitError, OutputError, ScialmError
from scialm_dask.events import Listener, Note, silent
from scialm_dask.progress import in_words, label, printable
from scialm_dask.run.interruption import Terminated, on_sigterm

_NO_THREAD = "can't start new thread"  # Python's message if there is no memory for it
_INTERRUPTED, _TERMINATED = 130, 143  # 128 plus the number of the signal
_WHERE = "scheduler scheduler_file cluster workers threads worker_memory tls".split()
_TASKS = {
    "Prepare counts": "convert qc mask simulate",
    "Impute": "demo plan impute resume transform",
    "Look at results": "report score evaluate",
    "Pooled measurements": "pools unpool",
    "Tidy up": "clean",
}


class _Command(click.Command):
    """A command that shows its epilog as an example."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Example"):
            formatter.write(f"  scialm-dask {self.epilog}\n")


class _Commands(click.Group):
    """A group that turns errors, Ctrl-C and SIGTERM into one line on standard error and an exit code."""

    command_class = _Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for task, names in _TASKS.items():
            with formatter.section(task):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(1000)) for name in names.split()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["command"] = command_of(args)  # stored in results
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # no other file may get the number of a closed stream
            pass
        os.close(spare)
        try:
            with on_sigterm(deferred=False):
                return super().invoke(ctx)
        except ScialmError as error:
            _end(f"error: {' '.join(str(error).split())}", error.exit_code)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # Outputs and scratch name the full disk; numba's cache of compiled code does not.
            remedy = "free some space, in your home too, or set NUMBA_CACHE_DIR to a folder on another disk"
            _end(f"error: {error.strerror}; {remedy}", OutputError.exit_code)
        except (MemoryError, RuntimeError) as error:
            cause = " ".join(str(error).split())
            if not (isinstance(error, MemoryError) or _NO_THREAD in cause):
                raise
            remedy = "free some, raise the limits that `ulimit -a` shows, or give a smaller --memory-limit"
            _end(f"error: there is not enough memory{cause and f' ({cause})'}; {remedy}", DoesNotFitError.exit_code)
        except KeyboardInterrupt as error:
            terminated = isinstance(error, Terminated)
            what = "terminated" if terminated else "interrupted"
            _end(f"{what}; nothing was written", _TERMINATED if terminated else _INTERRUPTED)


def command_of(args: list[str]) -> str:
    """Return the command line without credentials in URLs."""
    return re.sub(r"://[^/@\s]+@", "://", shlex.join(["scialm-dask", *args]))


def _end(words: str, exit_code: int) -> NoReturn:
    """Print a line on standard error, if possible, and exit."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"scialm-dask: {printable(words)}", err=True)
    sys.exit(exit_code)


_COMPLETION = """\b
The Tab key completes names of commands and options after
  eval "$(_SCIALM_DASK_COMPLETE=bash_source scialm-dask)"
in ~/.bashrc; zsh_source in ~/.zshrc, fish_source for fish."""


@click.group(
    "scialm",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog=_COMPLETION,
)
@click.version_option(__version__, prog_name="scialm-dask")
def main() -> None:
    """Denoise and impute single-cell counts, out of core."""


def reports(
    command: Callable[..., dict[str, Any]], in_short: Callable[[dict[str, Any]], list[str]] | None = None
) -> Callable[..., None]:
    """Add the option --json to a command, and print the dictionary that it returns, as JSON or as text.

    `in_short` returns the lines of text; by default one per key.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on the last line.")
    @functools.wraps(command)
    def wrapper(as_json: bool, **options: Any) -> None:
        result = command(**options)
        lines = in_short(result) if in_short else [f"{label(k):<22} {in_words(v, k)}" for k, v in result.items()]
        _tell(
            [json.dumps(result, default=float)] if as_json else lines, written=command.__name__ not in ("plan", "score")
        )

    return wrapper


def _tell(lines: list[str], *, written: bool) -> None:
    """Print lines. If they cannot be printed, the command fails only if no result is `written`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that its encoding lacks
    try:
        for line in lines:
            click.echo(printable(line))
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):  # otherwise flushing the buffer fails again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = getattr(error, "strerror", None) or error
        if not written:
            raise OutputError(f"standard output cannot be written ({reason}); send it elsewhere") from error
        with contextlib.suppress(OSError, ValueError):
            click.echo(f"scialm-dask: note: the result is written, its summary cannot be shown ({reason})", err=True)


def connects(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add options for the cluster to a command, as one argument `connected`.

    It is a function from the listener to a context manager, to be entered once the input has been checked.
    """

    @click.option("--scheduler", metavar="ADDRESS", help="Compute on this running scheduler.")
    @click.option("--scheduler-file", metavar="FILE", help="Compute on the scheduler that wrote this file.")
    @click.option("--cluster", metavar="KIND", help="Start local, slurm, pbs, sge or lsf workers.")
    @click.option("--workers", type=click.IntRange(min=1), help="Processes to start, or to wait for.")
    @click.option("--threads", type=click.IntRange(min=1), help="Threads of each worker, or of this process.")
    @click.option("--worker-memory", help="Memory of each worker of --cluster, such as 8GB.")
    @click.option("--tls/--no-tls", default=None, help="Encrypt and authenticate all connections.")
    @functools.wraps(command)
    def wrapper(**options: Any) -> Any:
        where = {name: options.pop(name) for name in _WHERE}

        def connected(listen: Listener) -> Any:
            from scialm_dask.run.cluster import connect

            return connect(**where, notify=lambda line: listen(Note(line)))

        return command(connected=connected, **options)

    return wrapper


Connect = Callable[[Listener], contextlib.AbstractContextManager[Any]]
overwrites = click.option("--overwrite", is_flag=True, help="Replace an existing destination.")
missing_chunks_option = click.option(
    "--missing-chunks-are-zeros", is_flag=True, help="Read missing chunks of a dense Zarr as zeros instead of failing."
)


def reads_matrix(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options --layer and --missing-chunks-are-zeros to a command."""
    return click.option("--layer", help="Read this layer instead of X; raw for .raw.X.")(missing_chunks_option(command))


def shows_progress(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options --quiet and --log-json to a command, as one argument `listen`."""

    @click.option("--quiet", is_flag=True, help="Show no progress.")
    @click.option("--log-json", is_flag=True, help="Show progress as JSON lines on standard error.")
    @functools.wraps(command)
    def wrapper(quiet: bool, log_json: bool, **options: Any) -> Any:
        from scialm_dask.data.lease import tell_leftovers
        from scialm_dask.progress import show_progress

        if quiet and log_json:
            raise click.UsageError("--quiet shows no progress and --log-json does; give one of them")
        if quiet:
            return command(listen=silent, **options)
        with show_progress(json_lines=log_json) as listen:
            if (dst := options.get("dst")) and "://" not in dst:
                tell_leftovers(os.path.dirname(dst) or ".", listen)
            return command(listen=listen, **options)

    return wrapper


@main.command(epilog="convert sample1.h5 sample2.h5 cells.zarr --sample-key sample")
@click.argument("src", metavar="SRC...", nargs=-1, required=True)
@click.argument("dst", metavar="DST.zarr")
@click.option("--sample-key", default="sample", help="Column of obs for the names of several SRC.")
@click.option("--join", type=click.Choice(["inner", "outer"]), default="inner", help="Genes of all SRC, or of any.")
@click.option("--layer", help="Convert only this layer, as X; raw for .raw.X.")
@click.option("--genome", help="Genome to read from a 10x .h5 file with several.")
@click.option("--prefix", help="Prefix of the file names in an MEX folder, such as GSM123_.")
@click.option("--rows", type=click.Choice(["cells", "genes"]), help="What the rows of a text file are.")
@missing_chunks_option
@overwrites
@reports
@shows_progress
def convert(src: tuple[str, ...], dst: str, **options: Any) -> dict[str, Any]:
    """Convert .h5ad, 10x .h5, MEX or STARsolo folders, loom, .mtx, .csv, .tsv or Zarr to chunked AnnData Zarr.

    Memory does not grow with the size of the matrix. X, all layers and .raw are converted, with obs and var. The cells
    of several SRC are concatenated, with genes matched by name.
    """
    from scialm_dask.data.ingest import convert

    return convert(src, dst, **options)


@main.command(epilog="qc cells.zarr clean.zarr --min-genes 200 --max-mito 20 --min-cells 3")
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@click.option("--min-genes", type=int, help="Minimum number of genes with counts in a cell.")
@click.option("--max-genes", type=int, help="Maximum number of genes with counts in a cell.")
@click.option("--max-mito", type=float, help="Maximum mitochondrial counts of a cell, in percent.")
@click.option("--mito-prefix", default="MT-", help="Prefix of mitochondrial genes, in either case.")
@click.option("--min-cells", type=int, help="Minimum number of kept cells with counts of a gene.")
@reads_matrix
@overwrites
@reports
@shows_progress
def qc(src: str, dst: str, **options: Any) -> dict[str, Any]:
    """Drop poor cells, then rare genes; scale each cell to the median total, without logarithm.

    The counts are kept in layer counts, for `impute --layer counts --preset denoise`.
    """
    from scialm_dask.data.qc import Thresholds, quality_control

    limits = {name: options.pop(name) for name in Thresholds.__dataclass_fields__}
    return quality_control(src, dst, Thresholds(**limits), **options)


@main.command(epilog="mask clean.zarr masked.zarr --fraction 0.1")
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@click.option("--fraction", type=float, default=0.1, help="Share of each gene's non-zeros to hide.")
@click.option("--seed", type=int, default=0, help="Seed of the random choice.")
@reads_matrix
@overwrites
@reports
@shows_progress
def mask(src: str, dst: str, **options: Any) -> dict[str, Any]:
    """Move a share of each gene's non-zeros to layer held_out, to score their recovery."""
    from scialm_dask.evaluate.mask import mask

    return mask(src, dst, **options)


@main.command(epilog="simulate cells.zarr --cells 10000 --genes 2000")
@click.argument("dst", metavar="DST.zarr")
@click.option("--cells", type=int, required=True, help="Number of cells.")
@click.option("--genes", type=int, required=True, help="Number of genes.")
@click.option("--density", type=float, default=0.05, help="Share of non-zero entries.")
@click.option("--rank", type=int, default=20, help="Number of expression programs.")
@click.option("--seed", type=int, default=0, help="Seed of all random draws.")
@overwrites
@reports
@shows_progress
def simulate(dst: str, cells: int, genes: int, **options: Any) -> dict[str, Any]:
    """Simulate counts of low rank with known factors, at any size."""
    from scialm_dask.evaluate.simulate import simulate

    return simulate(dst, n_cells=cells, n_genes=genes, **options)


@main.command(epilog="clean .")
@click.argument("folder", metavar="PATH")
@reports
def clean(folder: str) -> dict[str, Any]:
    """Remove unfinished results and scratch of killed runs from folder PATH."""
    from scialm_dask.data.lease import clean

    return clean(folder)
