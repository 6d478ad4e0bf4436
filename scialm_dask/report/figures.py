"""Pictures of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scialm_dask.data.qc import CellMeasures, Thresholds, chosen_cells
from scialm_dask.imputation import Imputation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["convergence", "logarithmic", "new_figure", "quality", "spectrum"]

_MANY = 300.0  # largest over smallest value from which numbers at 1, 2 and 5 would cover each other
_BLUE, _GREEN, _RED = "#0072B2", "#009E73", "#D55E00"


def new_figure(
    rows: int, columns: int, width: float, height: float, title: str = "", **kwargs: Any
) -> tuple[Figure, NDArray[Any]]:
    """Make a figure of some inches with its axes, shape ``(rows, columns)``: small letters, no box around."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for each in axes.ravel():
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8, length=3)
        each.xaxis.label.set_fontsize(8)
        each.yaxis.label.set_fontsize(8)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, axes


def logarithmic(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5, or where that would be many at 1 alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def words(value: float, _: int) -> str:
        low, high = axis.get_view_interval()
        return f"{value:,g}" if high < _MANY * low or f"{value:e}".startswith("1.0") else ""

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(words))
    axis.set_minor_formatter(NullFormatter())


def convergence(result: Imputation, title: str = "") -> Figure:
    """Draw residual, held-out error and rank over the iterations, with the iteration that was kept."""
    history = result.history
    figure, ((errors, ranks),) = new_figure(1, 2, 7, 3, title)
    errors.plot(history["iteration"], history["residual"], ".-", color=_BLUE, label="residual on observed entries")
    if history["held_out"].notna().any():
        held_out = history["held_out"]
        errors.plot(history["iteration"], held_out, ".-", color=_RED, label="error on held-out entries")
    logarithmic(errors.yaxis)
    errors.set_ylabel("relative error")
    errors.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, frameon=False, fontsize=8)
    ranks.plot(history["iteration"], history["rank"], ".-", color=_GREEN)
    ranks.set_ylabel("rank: singular values kept")
    ranks.yaxis.get_major_locator().set_params(integer=True)
    for axes in (errors, ranks):
        _mark_chosen(axes, int(result.summary["chosen_iteration"]))
        axes.set_xlabel("iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _mark_chosen(axes: Any, iteration: int) -> None:
    axes.axvline(iteration, color="grey", linewidth=1, linestyle=":")
    late = 2 * iteration > sum(axes.get_xlim())  # the word goes where there is more room
    axes.annotate(
        "kept",
        (iteration, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-3 if late else 3, -2),
        textcoords="offset points",
        va="top",
        ha="right" if late else "left",
        color="grey",
        fontsize=8,
    )


def spectrum(result: Imputation, title: str = "") -> Figure:
    """Draw the singular values of the iterate that was kept."""
    values = np.asarray(result.summary["singular_values"], np.float64)
    figure, ((axes,),) = new_figure(1, 1, 4, 3, title)
    axes.plot(np.arange(1, len(values) + 1), values, ".-", color=_BLUE, markersize=3)
    logarithmic(axes.yaxis)
    axes.set(xlabel="number", ylabel="singular value")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def quality(cells: CellMeasures, thresholds: Thresholds, title: str = "") -> Figure:
    """Draw mitochondrial share and number of genes against the total of each cell, with what the thresholds remove.

    Parameters
    ----------
    cells
        Of the matrix before quality control.
    thresholds
        Drawn as lines; how many cells each removes is said beside it.
    title
        Over the figure.
    """
    kept = chosen_cells(cells, thresholds)
    figure, (pair,) = new_figure(1, 2, 8, 3.4, title)
    panels: tuple[tuple[Any, str, list[tuple[float | None, str]]], ...] = (
        (cells.pct_mito, "mitochondrial share of the counts, %", [(thresholds.max_mito, "over")]),
        (cells.n_genes, "genes with counts", [(thresholds.max_genes, "over"), (thresholds.min_genes, "under")]),
    )
    for axes, (values, words, limits) in zip(pair, panels, strict=True):
        for chosen, colour, opacity, label in ((kept, _BLUE, 0.3, "kept"), (~kept, _RED, 1, "removed")):
            number = f"{label}: {np.count_nonzero(chosen):,} cells"
            points = cells.totals[chosen], values[chosen]
            axes.scatter(*points, s=5, color=colour, alpha=opacity, linewidths=0, label=number, rasterized=True)
        for limit, side in limits:
            if limit is not None:
                _mark_limit(axes, values, float(limit), side)
        axes.set(xlabel="total counts", ylabel=words)
    pair[0].legend(frameon=False, fontsize=8, markerscale=3)
    return figure


def _mark_limit(axes: Any, values: Any, limit: float, side: str) -> None:
    at, align = (0.02, "left") if values.dtype.kind == "i" and side == "over" else (1.0, "right")  # clear of the cells
    removed = int(np.count_nonzero(values > limit if side == "over" else values < limit))
    axes.axhline(limit, color=_RED, linewidth=0.8, linestyle="--")
    words = f"{side} {limit:g}: {removed:,} cells"
    axes.annotate(
        words,
        (at, limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha=align,
        color=_RED,
        fontsize=8,
    )
