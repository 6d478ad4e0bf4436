"""The commands `pools` and `unpool`, for pooled measurements."""

from __future__ import annotations

from typing import Any

import click

from scialm_dask.cli.group import main, overwrites, reads_matrix, reports, shows_progress
from scialm_dask.events import Listener, Note


@main.command(epilog="pools P.csv --genes 100 --pools 24 --per-gene 4")
@click.argument("table", metavar="P.csv")
@click.option("--genes", type=int, help="Draw a design of this many genes and write it to P.csv.")
@click.option("--pools", type=int, help="With --genes: number of pools.")
@click.option("--per-gene", type=int, help="With --genes: number of pools of every gene, balanced.")
@click.option("--density", type=float, default=0.25, help="With --genes: probability that a gene is in a pool.")
@click.option("--names-of", metavar="SRC", help="With --genes: matrix with the names of the genes.")
@click.option("--seed", type=int, default=0, help="Seed of the random draws.")
@overwrites
@reports
def pools(
    table: str,
    genes: int | None,
    pools: int | None,
    per_gene: int | None,
    density: float,
    names_of: str | None,
    seed: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Describe the design P.csv, genes × pools; with --genes and --pools, draw it first."""
    from dataclasses import asdict

    import pandas as pd

    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.errors import InputError
    from scialm_dask.pooled.design import balanced_pools, pool_report, random_pools, read_design, write_design

    if (genes is None) != (pools is None):
        raise click.UsageError("--genes and --pools go together")
    if genes is not None and pools is not None:
        if per_gene is None:
            P = random_pools(genes, pools, density=density, random_state=seed)
        else:
            P = balanced_pools(genes, pools, per_gene=per_gene, random_state=seed)
        names = [f"gene{gene}" for gene in range(genes)]
        if names_of is not None:
            names = [str(name) for name in ExpressionMatrix.open(names_of).var.index]
            if len(names) != genes:
                raise InputError(f"{names_of}: {len(names)} genes, --genes says {genes}; give the same number")
        columns = [f"pool{pool}" for pool in range(pools)]
        write_design(pd.DataFrame(P, index=names, columns=columns), table, overwrite=overwrite)
    report = asdict(pool_report(read_design(table).to_numpy()))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in report.items()}


@main.command(epilog="unpool measured.zarr recovered.zarr --pools P.csv")
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST.zarr")
@click.option("--pools", "design", required=True, metavar="P", help="The design, genes × pools: .csv, .tsv or .npy.")
@click.option(
    "--method",
    type=click.Choice(["als", "nuclear"]),
    default="als",
    help="Least squares of given rank, or nuclear norm.",
)
@click.option("--rank", type=int, default=10, help="als: number of components.")
@click.option("--ridge", type=float, default=0.0, help="als: weight of the penalty.")
@click.option("--restarts", type=int, default=1, help="als: number of starts.")
@click.option("--seed", type=int, default=0, help="als: seed of the start.")
@click.option("--delta", type=float, default=0.0, help="nuclear: maximum ‖XP − D‖ over all cells.")
@click.option("--max-iterations", type=int, help="Maximum sweeps (als, 100) or iterations (nuclear, 1000).")
@reads_matrix
@overwrites
@reports
@shows_progress
def unpool(
    src: str,
    dst: str,
    design: str,
    method: str,
    rank: int,
    ridge: float,
    restarts: int,
    seed: int,
    delta: float,
    max_iterations: int | None,
    overwrite: bool,
    listen: Listener,
    **source: Any,
) -> dict[str, Any]:
    """Recover expression from SRC, cells × pools, measured through the pools P; write its factors to DST.zarr.

    Pools are matched by name if SRC and P have the same names, otherwise by position.
    """
    from scialm_dask.data.matrix import ExpressionMatrix
    from scialm_dask.data.store import check_output
    from scialm_dask.pooled.als import PooledALS
    from scialm_dask.pooled.design import read_design
    from scialm_dask.pooled.nuclear import PooledNuclearNorm

    check_output(dst, overwrite=overwrite, sources=(src, design))
    matrix, table = ExpressionMatrix.open(src, **source), read_design(design)
    table, names = table.set_axis(table.columns.astype(str), axis=1), matrix.var.index
    if names.is_unique and table.columns.is_unique and set(names) == set(table.columns):
        table = table[names]
    if method == "als":
        als = PooledALS(rank, seed, ridge=ridge, restarts=restarts, max_sweeps=max_iterations or 100)
        result = als.fit(matrix, table.to_numpy(), listen=listen)
    else:
        nuclear = PooledNuclearNorm(delta, max_iterations=max_iterations or 1000)
        result = nuclear.fit(matrix, table.to_numpy(), listen=listen)
    imputation = result.to_imputation(obs=matrix.obs, var=table[[]])
    imputation.to_zarr(dst, overwrite=overwrite, sources=(src, design), listen=listen)
    if not names.equals(table.columns):
        listen(Note("pools are matched by position, as their names differ between the design and the matrix"))
    if not result.converged:
        listen(Note("not converged; raise --max-iterations"))
    return {"destination": dst, **imputation.summary}
