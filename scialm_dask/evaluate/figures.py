"""Pictures of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scialm_dask.data.factors import Imputation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["convergence"]


def convergence(result: Imputation) -> Figure:
    """Draw residual, held-out error and rank over the iterations, with the iteration that was kept."""
    from matplotlib.figure import Figure

    history = result.history
    figure = Figure(figsize=(7, 3), layout="constrained")
    errors, ranks = figure.subplots(1, 2)
    errors.semilogy(history["iteration"], history["residual"], ".-", label="residual on observed entries")
    if history["held_out"].notna().any():
        errors.semilogy(history["iteration"], history["held_out"], ".-", label="error on held-out entries")
    ranks.plot(history["iteration"], history["rank"], ".-", color="tab:green", label="rank")
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
    axes.annotate("kept", (iteration, top), xytext=(3, -2), textcoords="offset points", va="top", color="grey")
