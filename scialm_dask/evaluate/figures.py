"""Pictures of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scialm_dask.data.factors import Imputation
from scialm_dask.data.quality import CellMeasures, Thresholds, chosen_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["convergence", "quality", "spectrum"]

_BLUE, _GREEN, _RED = "#0072B2", "#009E73", "#D55E00"


def convergence(result: Imputation) -> Figure:
    """Draw residual, held-out error and rank over the iterations, with the iteration that was kept."""
    from matplotlib.figure import Figure

    history = result.history
    figure = Figure(figsize=(7, 3), layout="constrained")
    errors, ranks = figure.subplots(1, 2)
    errors.semilogy(history["iteration"], history["residual"], ".-", label="residual on observed entries")
    if history["held_out"].notna().any():
        errors.semilogy(history["iteration"], history["held_out"], ".-", label="error on held-out entries")
    ranks.plot(history["iteration"], history["rank"], ".-", color=_GREEN, label="rank")
    ranks.yaxis.get_major_locator().set_params(integer=True)
    for axes in (errors, ranks):
        _mark_chosen(axes, int(result.summary["chosen_iteration"]))
        axes.set_xlabel("iteration")
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    errors.set_ylabel("relative error")
    ranks.set_ylabel("singular values kept")
    return figure


def _mark_chosen(axes: Any, iteration: int) -> None:
    axes.axvline(iteration, color="grey", linewidth=1, linestyle=":")
    top = np.max(axes.get_ylim())
    axes.annotate(
        "kept", (iteration, top), xytext=(-3, -2), textcoords="offset points", va="top", ha="right", color="grey"
    )


def spectrum(result: Imputation) -> Figure:
    """Draw the rank over the iterations, and the singular values of the iterate that was kept."""
    from matplotlib.figure import Figure

    values = np.asarray(result.summary["singular_values"], np.float64)
    figure = Figure(figsize=(7, 3), layout="constrained")
    ranks, spectrum = figure.subplots(1, 2)
    ranks.plot(result.history["iteration"], result.history["rank"], ".-", color=_GREEN)
    _mark_chosen(ranks, int(result.summary["chosen_iteration"]))
    ranks.set(xlabel="iteration", ylabel="singular values over the threshold")
    ranks.yaxis.get_major_locator().set_params(integer=True)
    spectrum.semilogy(np.arange(1, len(values) + 1), values, ".-", color=_BLUE, markersize=3)
    spectrum.set(xlabel="number", ylabel="singular value")
    for axes in (ranks, spectrum):
        axes.spines[["top", "right"]].set_visible(False)
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
    from matplotlib.figure import Figure

    kept = chosen_cells(cells, thresholds)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels: tuple[tuple[Any, str, list[tuple[float | None, str]]], ...] = (
        (cells.pct_mito, "mitochondrial share of the counts, %", [(thresholds.max_mito, "over")]),
        (cells.n_genes, "genes with counts", [(thresholds.max_genes, "over"), (thresholds.min_genes, "under")]),
    )
    for axes, (values, words, limits) in zip(figure.subplots(1, 2), panels, strict=True):
        for chosen, colour, opacity, label in ((kept, _BLUE, 0.3, "kept"), (~kept, _RED, 1, "removed")):
            number = f"{label}: {np.count_nonzero(chosen):,} cells"
            points = cells.totals[chosen], values[chosen]
            axes.scatter(*points, s=5, color=colour, alpha=opacity, linewidths=0, label=number, rasterized=True)
        for limit, side in limits:
            if limit is not None:
                _mark_limit(axes, values, float(limit), side)
        axes.set(xlabel="total counts", ylabel=words)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize="small", markerscale=3)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
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
        fontsize="small",
    )
