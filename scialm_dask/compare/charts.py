"""Pictures of an evaluation: scores of methods, scores over a quantity, clusters, cells, time and memory.

One colour for each method throughout (Okabe and Ito's, which the colour-blind can tell apart), named where it is drawn
rather than in a legend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scialm_dask.compare.methods import METHODS, OURS, QUOTED
from scialm_dask.report.figures import logarithmic, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["cell_pictures", "cluster_scores", "costs", "effort", "method_scores", "scores_over", "whole_scores"]

METRICS = {"mse": "mean squared error", "mae": "mean absolute error", "pearson": "Pearson r", "cosine": "cosine"}
_ERRORS = ("mse", "mae")
_COLOURS = {
    "auto": "#0072B2",
    "denoise": "#009E73",
    "paper": "#3392CC",
    "gene-mean": "#888888",
    "as observed": "#444444",
    "knn": "#E69F00",
    "alra": "#CC79A7",
    "softimpute": "#D55E00",
    "magic": "#7A4FA0",
    "scvi": "#8C6D1F",
}
_OTHERS = ("#117733", "#882255", "#332288", "#44AA99", "#AA4499")
_GREY = "#666666"
_BESIDE, _POINTS = 6, 160  # between a dot and its number, and the least width of a panel of dots, in points

_MOST_TICKS = 10


def colour_of(name: str) -> str:
    """Of a method, the same in every figure."""
    known = _COLOURS.get(name.split(" ")[0] if name not in _COLOURS else name)
    return known or _OTHERS[sum(map(ord, name)) % len(_OTHERS)]


def label_of(method: str, setting: str = "") -> str:
    """Of a method, in figures and tables."""
    known = METHODS.get(method) or QUOTED.get(method)
    label = known.label if known else method
    return f"{label} {setting}".strip()


def method_scores(scores: pd.DataFrame, title: str = "") -> Figure:
    """Draw the scores of every method on hidden entries, best at the top: a dot for each seed, the mean in figures.

    Parameters
    ----------
    scores
        Rows of one experiment and one share of `Evaluation.scores`.
    title
        Over the figure.
    """
    panels = [(name, words, name in _ERRORS and _spread(scores[name])) for name, words in METRICS.items()]
    return _dots(scores, panels, title)


def whole_scores(scores: pd.DataFrame, title: str = "") -> Figure:
    """Draw how near all entries come to a truth or to unseen molecules, zeros included; see `method_scores`."""
    panels = [
        ("relative_error", "relative error", False),
        ("mean_ratio", "mean imputed / mean true", _spread(scores["mean_ratio"])),
        ("zeros_pearson", "Pearson r at observed zeros", False),
    ]
    return _dots(scores, panels, title)


def _dots(
    scores: pd.DataFrame, panels: Sequence[tuple[str, str, bool]], title: str, *, ascending: bool = True
) -> Figure:
    """Draw a panel for each (column, title, whether its axis is logarithmic), methods in the order of the first."""
    names = _ranked(scores, panels[0][0], ascending)
    figure, axes = new_figure(1, len(panels), 2.6 * len(panels) + 1.2, 0.3 * len(names) + 1.1, title, sharey=True)
    for (column, words, spread), each in zip(panels, axes[0], strict=True):
        if spread:
            logarithmic(each.xaxis)
            scores = scores.assign(**{column: scores[column].where(scores[column] > 0)})
        for place, name in enumerate(names):
            rows = scores[_names(scores) == name]
            _one_line(each, rows, column, len(names) - 1 - place)
        if column == "mean_ratio":
            each.axvline(1, color=_GREY, linewidth=0.8, linestyle=":")
        each.set_title(words, loc="left", fontsize=9)
        each.set_ylim(-0.6, len(names) - 0.4)
        each.grid(axis="y", color="#eeeeee")
        each.margins(x=0.08)
        each.set_axisbelow(True)
        _make_room(each)
        if scores[column].isna().all():
            each.set_xticks([])
    labels = [label_of(*scores[_names(scores) == name].iloc[0][["method", "setting"]]) for name in names]
    axes[0, 0].set_yticks(range(len(names))[::-1], labels)
    for tick, name in zip(axes[0, 0].get_yticklabels(), names, strict=True):
        if name.split(" ")[0] in OURS:
            tick.set_fontweight("bold")
    return figure


def _make_room(axes: Any) -> None:
    """Let an axis end so far right that the numbers written beside the dots end before it."""
    scale = axes.xaxis.get_transform()
    low, high = scale.transform(np.asarray(axes.get_xlim()))
    for text in axes.texts:
        if text.xycoords == "data":
            taken = (_BESIDE + 0.65 * text.get_fontsize() * len(text.get_text())) / _POINTS
            high = max(high, low + (scale.transform(text.xy[0]) - low) / (1 - taken))
    axes.set_xlim(*scale.inverted().transform(np.asarray([low, high])))


def _spread(values: pd.Series) -> bool:
    """Tell whether numbers over zero are so unequal that a logarithmic axis is needed."""
    known = values[values > 0]
    return len(known) > 0 and float(known.max()) > 5 * float(known.min())


def _one_line(axes: Any, rows: pd.DataFrame, column: str, y: int) -> None:
    values = rows[column].dropna().to_numpy(float)
    if not len(values):
        status = rows["status"].iloc[0]
        words = "" if status in ("ok", "quoted") else status
        axes.annotate(words, (0.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=_GREY)
        return
    colour, quoted = colour_of(rows["method"].iloc[0]), (rows["status"] == "quoted").all()
    fill = "none" if quoted else colour
    axes.scatter(values, np.full(len(values), y), s=28, facecolors=fill, edgecolors=colour, linewidths=1, zorder=3)
    mean = values.mean()
    words = (f"{mean:,.0f}" if mean >= 1000 else f"{mean:#.3g}".rstrip(".")) + (" (quoted)" if quoted else "")
    axes.annotate(
        words,
        (values.max(), y),
        xytext=(_BESIDE, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color="#333333",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # no line goes through it
        zorder=2,
    )


def _names(scores: pd.DataFrame) -> pd.Series:
    return (scores["method"] + " " + scores["setting"]).str.strip()


def _ranked(scores: pd.DataFrame, column: str, ascending: bool) -> list[str]:
    """Names from the best to the worst, those without a score last."""
    means = scores.assign(name=_names(scores)).groupby("name", sort=False)[column].mean()
    return list(means.sort_values(ascending=ascending, na_position="last", kind="stable").index)


def scores_over(scores: pd.DataFrame, column: str, words: str, title: str = "") -> Figure:
    """Draw all four scores over a quantity, such as the share hidden or a setting, a line for each method.

    Parameters
    ----------
    scores
        Rows of `Evaluation.scores`, with the quantity in `column`.
    column
        A numeric column.
    words
        What it is.
    title
        Over the figure.
    """
    figure, axes = new_figure(2, 2, 8.2, 5.4, title)
    for (metric, name), each in zip(METRICS.items(), axes.ravel(), strict=True):
        ends: list[tuple[float, float, str]] = []
        for method, rows in scores.dropna(subset=[metric]).groupby("method", sort=False):
            line = rows.groupby(column)[metric].agg(["mean", "min", "max"])
            colour = colour_of(str(method))
            weight = 2.0 if method in OURS else 1.2
            each.plot(line.index, line["mean"], ".-", color=colour, linewidth=weight, markersize=5)
            each.fill_between(line.index, line["min"], line["max"], color=colour, alpha=0.15, linewidth=0)
            ends.append((float(line.index[-1]), float(line["mean"].iloc[-1]), str(method)))
        if metric in _ERRORS and _spread(scores[metric]):
            logarithmic(each.yaxis)
        each.set_title(name, loc="left", fontsize=9)
        each.set_xlabel(words)
        _tick_at(each, scores[column])
        _label_ends(each, ends)
    return figure


def _tick_at(axes: Any, values: pd.Series) -> None:
    """Put numbers at the values there are, unless they are many."""
    from matplotlib.ticker import NullLocator

    if 1 <= values.nunique() <= _MOST_TICKS:
        known = np.sort(values.unique())
        axes.set_xticks(known, [f"{value:,g}" for value in known])
        axes.xaxis.set_minor_locator(NullLocator())


def _label_ends(axes: Any, ends: list[tuple[float, float, str]]) -> None:
    """Name lines at their right ends, moved apart where they would cover each other."""
    figure = axes.figure
    figure.draw_without_rendering()  # lays out, so that pixels mean something
    box = axes.get_window_extent()
    apart = 9 * figure.dpi / 72
    ends = sorted(ends, key=lambda end: end[1])
    places = [float(axes.transData.transform(end[:2])[1]) for end in ends]
    for n in range(1, len(places)):
        places[n] = max(places[n], places[n - 1] + apart)
    highest = box.y1
    for n in reversed(range(len(places))):  # what was moved over the top comes down, and what is in its way
        places[n] = min(places[n], highest)
        highest = places[n] - apart
    for at, (_, _, name) in zip(places, ends, strict=True):
        height = (at - box.y0) / box.height
        weight = "bold" if name in OURS else "normal"
        axes.annotate(
            label_of(name),
            (1.01, height),
            xycoords="axes fraction",
            va="center",
            fontsize=7,
            color=colour_of(name),
            fontweight=weight,
            annotation_clip=False,
        )


def cluster_scores(clusters: pd.DataFrame, title: str = "") -> Figure:
    """Draw ARI and NMI of k-means and Leiden and the silhouette, for one experiment of `Evaluation.clusters`."""
    panels = [
        ("kmeans_ari", "ARI, k-means", False),
        ("leiden_ari", "ARI, Leiden", False),
        ("kmeans_nmi", "NMI, k-means", False),
        ("leiden_nmi", "NMI, Leiden", False),
        ("silhouette", "silhouette", False),
    ]
    return _dots(clusters.assign(status="ok"), panels, title, ascending=False)


def cell_pictures(umap: dict[str, NDArray[np.float32]], labels: pd.Series, title: str = "") -> Figure:
    """Draw cells by UMAP, one panel for each matrix, coloured by their labels.

    Parameters
    ----------
    umap
        Coordinates by the name of the panel, shapes ``(m, 2)``.
    labels
        Of the cells.
    title
        Over the figure.
    """
    from matplotlib import colormaps

    columns = min(4, len(umap))
    rows = -(-len(umap) // columns)
    kinds = sorted(labels.unique(), key=lambda kind: (len(kind) * kind[:1].isdigit(), kind))
    beside = max(1, int(2.6 * columns / (0.45 + 0.06 * max(map(len, kinds)))))  # names in a line of the legend
    figure, axes = new_figure(rows, columns, 2.6 * columns, 2.6 * rows + 0.5 + 0.17 * -(-len(kinds) // beside), title)
    palette = colormaps["tab20"].colors if len(kinds) > 10 else colormaps["tab10"].colors  # type: ignore[attr-defined]
    size = float(np.clip(6000 / len(labels), 0.2, 6))
    for each in axes.ravel()[len(umap) :]:
        each.set_visible(False)
    for (name, points), each in zip(umap.items(), axes.ravel(), strict=False):
        for number, kind in enumerate(kinds):
            chosen = points[(labels == kind).to_numpy()]
            each.scatter(*chosen.T, s=size, color=palette[number % len(palette)], linewidths=0, rasterized=True)
        each.set_title(name, loc="left", fontsize=9)
        each.set_xticks([])
        each.set_yticks([])
        each.spines[:].set_visible(False)
    handles = [
        figure.axes[0].scatter([], [], s=18, color=palette[number % len(palette)], label=kind)
        for number, kind in enumerate(kinds)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=beside, fontsize=7, frameon=False)
    return figure


def effort(scores: pd.DataFrame, title: str = "") -> Figure:
    """Draw the time and the memory of each method beside its error; see `method_scores`."""
    megabytes = scores.assign(megabytes=_megabytes(scores["peak_bytes"]))
    panels = [
        ("mse", METRICS["mse"], _spread(scores["mse"])),
        ("seconds", "seconds", _spread(scores["seconds"])),
        ("megabytes", "peak memory over that of imports, MB", _spread(megabytes["megabytes"])),
    ]
    return _dots(megabytes[megabytes["status"] != "quoted"], panels, title)


def _megabytes(peaks: pd.Series) -> pd.Series:
    """Turn bytes into MB, at least 0.1: less cannot be told from nothing, and nothing has no logarithm."""
    return (peaks / 1e6).clip(lower=0.1)


def costs(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw time and memory against the number of cells, a line for each method; one that fails ends in a cross.

    Parameters
    ----------
    table
        Columns ``cells``, ``method``, ``status``, ``seconds``, ``peak_bytes``.
    title
        Over the figure.
    """
    figure, axes = new_figure(1, 2, 9, 3.4, title)
    table = table.assign(megabytes=_megabytes(table["peak_bytes"]))
    panels = (("seconds", "seconds"), ("megabytes", "peak memory over that of imports, MB"))
    for each, (column, words) in zip(axes[0], panels, strict=True):
        ends: list[tuple[float, float, str]] = []
        logarithmic(each.xaxis)
        if _spread(table[column]):
            logarithmic(each.yaxis)
        for method, rows in table.groupby("method", sort=False):
            ran = rows[rows["status"] == "ok"]
            if not len(ran):
                continue
            values, colour = ran[column], colour_of(str(method))
            each.plot(ran["cells"], values, ".-", color=colour, linewidth=2.0 if method in OURS else 1.2)
            if len(ran) < len(rows):
                each.plot(ran["cells"].iloc[-1], values.iloc[-1], "x", color=colour, markersize=9)
            ends.append((float(ran["cells"].iloc[-1]), float(values.iloc[-1]), str(method)))
        each.set_xlabel("cells")
        each.set_title(words, loc="left", fontsize=9)
        each.grid(color="#eeeeee")
        _tick_at(each, table["cells"])
        _label_ends(each, ends)
    return figure
