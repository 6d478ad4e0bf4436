"""Go or refuse: what limit a run is held against, where its working state is kept, and what would make it fit."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, replace

import psutil
from dask.utils import format_bytes

from scialm_dask.config import Settings
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import scratch_folder_for
from scialm_dask.errors import InputError
from scialm_dask.run.cluster import Workers
from scialm_dask.run.plan import Forecast, Need, forecast

__all__ = ["Place", "limit_of", "place_scratch", "usable_memory"]

_SURE = 0.99  # of the limit, for what is advised: the same program does not start with quite the same memory again
_MOST_BLOCKS = 256  # to advise, or so many times those there are; with more, adding up takes what they save
_FINER = 16
_LEAST_RANK = 16  # to advise

Change = tuple[int, int | None]  # number of blocks, and max_rank, None as it is


@dataclass(frozen=True)
class Place:
    """Where the working state of a run is to be kept, and whether that fits.

    Parameters
    ----------
    scratch
        ``"memory"`` or ``"zarr:PATH"``.
    forecast
        Of the run.
    here
        Who computes.
    limit
        Bytes that each process may take.
    refusal
        Why it does not fit and what would, in words; empty if it does.
    """

    scratch: str
    forecast: Forecast
    here: Workers
    limit: int
    refusal: str = ""

    @property
    def need(self) -> Need:
        """Bytes of this way to run."""
        return self.forecast.in_memory if self.scratch == "memory" else self.forecast.on_disk

    @property
    def memory_in_all(self) -> int:
        """Bytes of all processes together: this one and the scheduler take no more than a worker without the state."""
        apart = self.here.resident is not None
        return self.here.workers * self.need.memory + (self.forecast.on_disk.memory if apart else 0)


def place_scratch(
    scratch: str,
    matrix: ExpressionMatrix,
    settings: Settings,
    here: Workers,
    *,
    folder: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    resumed: bool = False,
) -> Place:
    """Choose where the working state is kept, and say whether it fits.

    Parameters
    ----------
    scratch
        ``"auto"``, ``"memory"`` or ``"zarr:PATH"``.
    matrix, settings
        What is to be completed, and how.
    here
        Who computes.
    folder
        Where Zarr scratch goes if it is chosen here; where temporary files do by default.
    memory_limit
        See `limit_of`.
    resumed
        Whether blocks and rank are given, so that it is of no use to advise others.

    Raises
    ------
    InputError
        If `scratch` is none of these.
    """
    named = scratch.startswith("zarr:")
    path = scratch.removeprefix("zarr:") if named else os.fspath(folder or scratch_folder_for(None))
    if scratch not in ("auto", "memory") and not (named and path):
        raise InputError(f"scratch is {scratch!r}; give auto, memory, or zarr:PATH with a folder on a local disk")
    limit, raised_by = limit_of(here, memory_limit)
    need = forecast(matrix, settings, here.threads, here.workers, here.resident)
    on_disk = named or (scratch == "auto" and need.in_memory.memory > limit)
    chosen = Place(f"zarr:{path}" if on_disk else "memory", need, here, limit)
    wanted = chosen.need
    if wanted.memory > limit:
        remedy = _remedy(matrix, settings, here, scratch, limit=limit, raised_by=raised_by, resumed=resumed)
        words = f"the forecast is {format_bytes(wanted.memory)} of memory and the limit {format_bytes(limit)}; {remedy}"
        return replace(chosen, refusal=words)
    free = shutil.disk_usage(path).free if on_disk and os.path.isdir(path) else math.inf
    if wanted.disk > free:
        words = (
            f"the forecast is {format_bytes(wanted.disk)} of scratch and {path} has {format_bytes(int(free))} free; "
            "pass --scratch zarr:PATH with a folder on another disk"
        )
        return replace(chosen, refusal=words)
    return chosen


def _remedy(
    matrix: ExpressionMatrix,
    settings: Settings,
    here: Workers,
    scratch: str,
    *,
    limit: int,
    raised_by: str,
    resumed: bool,
) -> str:
    """Name the options with which the run would fit, or else what it would need at least."""
    now, sure = len(matrix.blocks), _SURE * limit
    forecasts = _forecasts(matrix, settings, here, resumed=resumed)

    def take(change: Change) -> int:
        one = forecasts[change]
        on_disk = scratch.startswith("zarr:") or one.in_memory.memory > limit
        return (one.on_disk if on_disk else one.in_memory).memory

    def words(change: Change) -> str:
        blocks, rank = change
        options = ["--scratch auto"] * (scratch == "memory") + [f"--blocks {blocks}"] * (blocks != now)
        return " ".join(options + [f"--max-rank {rank}"] * (rank is not None))

    fit = [change for change in forecasts if take(change) <= sure]
    more_blocks = [(blocks, rank) for blocks, rank in fit if rank is None][:1]
    lower_rank = [(blocks, rank) for blocks, rank in fit if rank is not None and blocks == now][:1]
    if chosen := more_blocks + lower_rank or fit[:1]:
        ways = [f"{words(change)} would take {format_bytes(take(change))}" for change in chosen]
        return f"{', '.join(ways)}, or raise {raised_by}"
    least = min(forecasts, key=take)
    by = words(least)
    return f"at least {format_bytes(take(least))} are needed{f', with {by}' if by else ''}; raise {raised_by}"


def _forecasts(matrix: ExpressionMatrix, settings: Settings, here: Workers, *, resumed: bool) -> dict[Change, Forecast]:
    """Forecast the run as it is, with more blocks, by doubling, and with lower ranks, by halving; mildest first."""

    def foresee(cut: RowBlocks, rank: int | None) -> Forecast:
        changed = settings if rank is None else replace(settings, max_rank=rank)
        return forecast(matrix.with_blocks(cut), changed, here.threads, here.workers, here.resident)

    n_cells, blocks = matrix.shape[0], len(matrix.blocks)
    cuts, as_is = {blocks: matrix.blocks}, foresee(matrix.blocks, None)
    if resumed:
        return {(blocks, None): as_is}
    finest = min(n_cells, max(_MOST_BLOCKS, _FINER * blocks))
    while (blocks := 2 * blocks) <= finest:
        cuts[blocks] = RowBlocks.even(n_cells, blocks)
    highest = min(as_is.basis_width, settings.max_rank or as_is.basis_width)
    ranks = [2**power for power in range(highest.bit_length(), 0, -1) if _LEAST_RANK <= 2**power < highest]
    return {(number, rank): foresee(cut, rank) for rank in (None, *ranks) for number, cut in cuts.items()}


def limit_of(here: Workers, asked: int | None) -> tuple[int, str]:
    """Bytes that each process may take, and the option that raises that.

    Parameters
    ----------
    here
        Who computes.
    asked
        The limit that was asked for; None for what is left.
    """
    if here.memory is not None and here.memory < (asked or math.inf):
        return here.memory, "--worker-memory"
    return asked or usable_memory(), "--memory-limit"


def usable_memory() -> int:
    """Bytes that this process may still take: what the cgroup or the machine leaves."""
    from distributed.system import MEMORY_LIMIT

    return int(min(MEMORY_LIMIT, psutil.virtual_memory().available + psutil.Process().memory_info().rss))
