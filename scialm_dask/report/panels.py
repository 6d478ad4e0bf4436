"""The pictures of the report: one panel each, with what it shows in words for those who do not see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scialm_dask.imputation import Imputation
from scialm_dask.report.comparison import Comparison

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "COLOURS",
    "LEAST_DETECTED",
    "Groups",
    "Panel",
    "cell_panels",
    "fit_panels",
    "groups_of",
    "held_out_known",
    "inflation_panel",
]

# Stand-ins that the report replaces by colours of its light or dark palette, by name.
COLOURS = {"ink": "#000001", "muted": "#000002", "line": "#000003", "accent": "#000004", "second": "#000005"} | {
    **{f"group{number}": f"#0001{number:02d}" for number in range(10)},
    **{f"shade{number}": f"#0002{number:02d}" for number in range(5)},
}
LEAST_DETECTED = 0.01  # share of cells in which a gene must be seen for its change to mean something
_SIZE = (4.4, 2.9)  # inches: small, so that its letters stay legible on a phone
_MANY_DECADES = 30.0  # largest over smallest value from which a scale is logarithmic
_ALIKE = 1.2  # largest over smallest value up to which a scale does not begin at zero
_MOST_GROUPS = 10
_RATIOS = (-2.0, 7.0)  # log₂ of the least and the largest inflation shown

_CURVES = {"objective": "Objective", "residual": "Residual on what was observed", "rank": "Singular values kept"}

Draw = Callable[[Any], None]


@dataclass(frozen=True)
class Panel:
    """One picture.

    Parameters
    ----------
    name
        Unique in the report, for identifiers.
    title
        Short.
    words
        What the picture shows, for those who do not see it.
    draw
        Draws it on axes of Matplotlib.
    size
        Inches.
    """

    name: str
    title: str
    words: str
    draw: Draw
    size: tuple[float, float] = _SIZE


@dataclass(frozen=True)
class Groups:
    """How cells are coloured: a number and a colour of `COLOURS` for each cell, and the name of each number."""

    by: str
    codes: NDArray[np.intp]
    names: tuple[str, ...]
    colours: tuple[str, ...]


def fit_panels(result: Imputation) -> dict[str, list[Panel]]:
    """Draw what the fit has left: ``convergence``, ``held_out``, ``unseen`` and ``spectrum``, empty without any."""
    import pandas as pd

    history, kept = _numbered(result.history), result.summary.get("chosen_iteration")
    panels: dict[str, list[Panel]] = {"convergence": [], "held_out": [], "unseen": [], "spectrum": []}
    for name, title in _CURVES.items():
        if name in history and len(history):
            panels["convergence"].append(_curve(history, name, title, kept))
    if held_out_known(history):
        panels["held_out"].append(_curve(history, "held_out", "Error on held-out entries", kept))
    if (splitting := result.summary.get("count_splitting")) is not None:
        best = next(fit["chosen_iteration"] for fit in splitting["tried"] if fit["chosen"])
        errors = _numbered(pd.DataFrame({"unseen": splitting["errors"], "rank": splitting["ranks"]}))
        panels["unseen"].append(_curve(errors[errors["rank"] > 0], "unseen", "Error on unseen molecules", best))
    values = np.asarray(result.summary.get("singular_values", ()))
    if len(values):
        panels["spectrum"].append(_spectrum(values))
    return panels


def _numbered(history: pd.DataFrame) -> pd.DataFrame:
    return history if "iteration" in history else history.assign(iteration=np.arange(1, len(history) + 1))


def held_out_known(history: pd.DataFrame) -> bool:
    """Tell whether entries were held out; as long as the rank is 0 all of them would be missed, and are said to be."""
    return "held_out" in history and bool(history.loc[history["rank"] > 0, "held_out"].notna().any())


def _curve(history: pd.DataFrame, column: str, title: str, kept: int | None) -> Panel:
    x, y = history["iteration"].to_numpy(), history[column].to_numpy(np.float64)
    words = f"Line chart. {title}: {y[0]:.3g} at iteration {x[0]}, {y[-1]:.3g} at the last, {x[-1]}"
    lowest = int(np.nanargmin(y))
    if column != "rank" and lowest < len(y) - 1:
        words += f", lowest with {y[lowest]:.3g} at iteration {x[lowest]}"
    value = float(y[x == kept][0]) if kept else math.nan
    if kept:
        words += f". Iteration {kept}, with {value:.3g}, was kept"

    def draw(axes: Any) -> None:
        axes.plot(x, y, "-o", color=COLOURS["accent"], markersize=3.5, linewidth=1.6)
        _scale(axes, y)
        axes.set_xlabel("iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if kept:
            axes.axvline(kept, color=COLOURS["muted"], linewidth=1, linestyle=(0, (3, 3)), zorder=0)
            axes.plot([kept], [value], "o", color=COLOURS["second"], markersize=7)
            _label(axes, f"kept: {value:.3g}", kept, value)

    return Panel(f"curve-{column.replace('_', '-')}", title, words + ".", draw)


def _label(axes: Any, words: str, x: float, y: float) -> None:
    """Write beside a vertical line, at its upper end, unless the point (x, y) is there."""
    across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    axes.annotate(
        words,
        (x, 0.0 if up > 0.8 else 1.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-5 if across > 0.5 else 5, 4 if up > 0.8 else -4),
        textcoords="offset points",
        ha="right" if across > 0.5 else "left",
        va="bottom" if up > 0.8 else "top",
        color=COLOURS["muted"],
    )


def _spectrum(values: NDArray[np.float64]) -> Panel:
    words = (
        f"Chart of the {len(values)} singular values of the completed matrix in falling order, from {values[0]:.4g} to "
        f"{values[-1]:.4g}. The first holds {values[0] ** 2 / np.sum(values**2):.0%} of the sum of their squares."
    )

    def draw(axes: Any) -> None:
        numbers = np.arange(1, len(values) + 1)
        axes.plot(numbers, values, "o", color=COLOURS["accent"], markersize=3.5)
        axes.vlines(numbers, max(values[-1] * 0.7, 1e-300), values, color=COLOURS["line"], linewidth=1, zorder=0)
        _scale(axes, values)
        axes.set_xlim(0, len(values) + 1)
        axes.set_xlabel("number")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return Panel("spectrum", "Singular values, after thresholding", words, draw)


def inflation_panel(compared: Comparison) -> Panel | None:
    """Histogram over genes of mean imputed over mean observed; None if no gene is seen often enough."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    genes = compared.genes[compared.genes["detected"] >= LEAST_DETECTED]
    ratios = (genes["mean_imputed"] / genes["mean_observed"]).to_numpy()
    ratios = ratios[np.isfinite(ratios)]
    if not len(ratios):
        return None
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    words = (
        f"Histogram of {len(ratios):,} genes by mean imputed over mean observed. The median is {middle:.3g}; half of "
        f"the genes lie between {low:.3g} and {high:.3g}."
    )

    def draw(axes: Any) -> None:
        shown = np.clip(np.log2(np.maximum(ratios, 2.0 ** _RATIOS[0])), *_RATIOS)
        axes.hist(shown, bins=np.linspace(*_RATIOS, 46), color=COLOURS["accent"], rwidth=0.86)
        axes.axvline(0, color=COLOURS["muted"], linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        axes.axvline(np.log2(middle), color=COLOURS["second"], linewidth=1.6)
        axes.xaxis.set_major_locator(MultipleLocator(2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _times(2.0**value)))
        axes.set_xlim(*_RATIOS)
        axes.set_xlabel("mean imputed ÷ mean observed")
        axes.set_ylabel("genes")

    return Panel("inflation", "Inflation, gene by gene", words, draw)


def _times(ratio: float) -> str:
    return f"{ratio:g}×" if ratio >= 1 else f"1/{1 / ratio:g}×"


def groups_of(name: str, values: pd.Series) -> Groups:
    """Colour cells by a column: numbers by fifths, anything else by its most frequent values."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values) and values.nunique() > 5:
        edges = np.unique(np.quantile(values.dropna(), np.linspace(0, 1, 6), method="nearest"))
        codes = np.clip(np.searchsorted(edges, values.to_numpy(np.float64), side="right") - 1, 0, len(edges) - 2)
        names = [f"{a:.4g} – {b:.4g}" for a, b in pairwise(edges)]
        colours = [f"shade{n}" for n in range(len(names))]
        if values.isna().any():
            codes[values.isna()] = len(names)
            names, colours = [*names, "unknown"], [*colours, "muted"]
        return Groups(name, codes.astype(np.intp), tuple(names), tuple(colours))
    text = values.astype(object).where(values.notna(), "unknown").astype(str)
    counts = text.value_counts()
    common = sorted(counts.index, key=lambda label: (-counts[label], label))
    if len(common) > _MOST_GROUPS:
        common = [*common[: _MOST_GROUPS - 1], f"{len(common) - _MOST_GROUPS + 1} others"]
    place = {label: code for code, label in enumerate(common)}
    codes = np.array([place.get(label, len(common) - 1) for label in text], np.intp)
    return Groups(name, codes, tuple(common), tuple(f"group{n}" for n in range(len(common))))


def cell_panels(compared: Comparison, groups: Groups) -> list[Panel]:
    """Scatter the sampled cells on their first two principal components, before and after."""
    panels = []
    for name, points, shares in (
        ("before", compared.before, compared.shares[0]),
        ("after", compared.after, compared.shares[1]),
    ):
        words = (
            f"Scatter plot of {len(points):,} cells {name} imputation on the first two principal components, which "
            f"hold {shares[0]:.0%} and {shares[1]:.0%} of the variance, coloured by {groups.by}."
        )
        title = f"Cells {name} imputation"
        panels.append(Panel(f"cells-{name}", title, words, _scatter(points, shares, groups), (4.4, 3.6)))
    return panels


def _scatter(points: NDArray[np.float64], shares: tuple[float, float], groups: Groups) -> Draw:
    def draw(axes: Any) -> None:
        for code, colour in enumerate(groups.colours):
            x, y = points[groups.codes == code].T
            axes.plot(x, y, "o", color=COLOURS[colour], markersize=2.6, markeredgewidth=0, alpha=0.75)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"principal component 1 ({shares[0]:.0%})")
        axes.set_ylabel(f"principal component 2 ({shares[1]:.0%})")

    return draw


def _scale(axes: Any, values: NDArray[np.float64]) -> None:
    """Logarithmic over some decades, else from zero, unless they are so alike that nothing would be seen."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    finite = values[np.isfinite(values)]
    if finite.min() > 0 and finite.max() > _MANY_DECADES * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif finite.max() > _ALIKE * finite.min():
        axes.set_ylim(bottom=min(0.0, float(finite.min())))
