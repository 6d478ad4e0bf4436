"""Figures of a result, and of methods side by side.

Each method has the same colour in all figures (Okabe and Ito's palette, which suits colour-blind readers). Names of
genes, cells and files are never read as mathematics.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scialm_dask.data.annotation import as_text
from scialm_dask.errors import InputError
from scialm_dask.imputation import Imputation
from scialm_dask.progress import printable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Draw = Callable[[Any, Mapping[str, str]], None]  # of axes, and colours by name

_NAMES = "ink muted line accent second low high".split() + [f"group{number}" for number in range(10)]
_LIGHT = (
    "1b2126 58636d e2e4e6 0b6a98 c2500a b9d3e6 0a4575 "
    "0072b2 d55e00 009e73 c05c96 d19500 45a8dd 7a5ea8 8c6d31 b22222 808080"
)
_DARK = (
    "e7eaed a2adb7 30373d 62b6e2 f29a5c 31506b cbe6f9 "
    "4ea3dc f08a4b 3cc79c e29bc4 f2bd4b 9bd5f5 b39ddb c8aa6c ee7070 a8a8a8"
)
LIGHT, DARK = (
    {name: f"#{colour}" for name, colour in zip(_NAMES, colours.split(), strict=True)} for colours in (_LIGHT, _DARK)
)
_METHODS = dict(
    zip(
        "auto complete denoise paper gene-mean knn alra softimpute magic scvi".split(),
        "#56B4E9 #0072B2 #009E73 #004C6D #777777 #B87F00 #CC79A7 #D55E00 #7A4FA0 #8C6D1F".split(),
        strict=True,
    )
)
_OTHERS = ("#117733", "#882255", "#332288", "#44AA99", "#AA4499")

# Panels: columns of scores with their titles.
HIDDEN = {"mse": "mean squared error", "mae": "mean absolute error", "pearson": "Pearson r", "cosine": "cosine"}
WHOLE = {
    "relative_error": "relative error",
    "gene_correlation": "r over cells, median gene",
    "cell_correlation": "r over genes, median cell",
    "zeros_pearson": "r at observed zeros",
    "mean_ratio": "imputed ÷ true mean",
}
CLUSTERS = {
    "kmeans_ari": "ARI, k-means",
    "leiden_ari": "ARI, Leiden",
    "kmeans_nmi": "NMI, k-means",
    "leiden_nmi": "NMI, Leiden",
    "silhouette": "silhouette",
}
COSTS = {"seconds": "seconds", "megabytes": "memory over imports, MB"}
_LESS_IS_BETTER = ("mse", "mae", "relative_error", *COSTS)

_SIZE = (4.6, 2.9)  # inches: small, so that text stays legible on a phone
_MANY_DECADES, _ALIKE = 30.0, 1.2  # largest over smallest value: logarithmic above, and not from zero below
_MOST_GROUPS = 10


@contextmanager
def style(colours: Mapping[str, str] = LIGHT, ground: str = "white") -> Iterator[None]:
    """Set Matplotlib's style in a context, or as a decorator."""
    import matplotlib as mpl

    by_value: dict[Any, str] = {
        colours["muted"]: "axes.edgecolor axes.labelcolor xtick.color ytick.color",
        colours["ink"]: "text.color",
        colours["line"]: "grid.color",
        ground: "figure.facecolor savefig.facecolor",
        8: "axes.labelsize legend.fontsize xtick.labelsize ytick.labelsize",
        9: "font.size axes.titlesize",
        True: "axes.axisbelow",
        "left": "axes.titlelocation",
        # a gene may be called $x_1$
        False: "text.parse_math axes.spines.right axes.spines.top legend.frameon",
        "scialm": "svg.hashsalt",  # makes files reproducible
    }
    parameters = {name: value for value, names in by_value.items() for name in names.split()}
    parameters |= {"axes.facecolor": "none", "svg.fonttype": "none"}  # text stays text
    with mpl.rc_context(parameters), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # browsers have glyphs that Matplotlib lacks
        yield


def new_figure(
    rows: int, columns: int, width: float, height: float, title: str = "", **kwargs: Any
) -> tuple[Figure, NDArray[Any]]:
    """Return a figure, sized in inches, and its axes, shape ``(rows, columns)``; the title is wrapped to the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(textwrap.fill(printable(title), int(12 * width)), fontsize=10, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


@style()
def save(figure: Figure, path: Path) -> None:
    """Save a figure as `path` + .svg and `path` + .png, reproducibly."""
    figure.savefig(f"{path}.svg", metadata={"Date": None}, dpi=150)
    figure.savefig(f"{path}.png", dpi=150)


def short_name(name: object) -> str:
    """Return a name for figures: printable, and cut to 32 characters."""
    letters = printable(str(name))
    return letters if len(letters) <= 32 else f"{letters[:31]}…"


def _logarithmic(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5, or only at 1 if it spans more than 60-fold."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def words(value: float, _: int) -> str:
        low, high = axis.get_view_interval()
        return f"{value:,g}" if high < 60 * low or f"{value:e}".startswith("1.0") else ""

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(words))
    axis.set_minor_formatter(NullFormatter())


class Picture(NamedTuple):
    """A figure for a page: title, alternative text, and SVG as data URIs for light and dark pages."""

    title: str
    words: str
    light: str
    dark: str

    @classmethod
    def of(cls, title: str, words: str, draw: Draw) -> Picture:
        """Draw a figure in light and dark colours."""
        from matplotlib.figure import Figure

        drawn = []
        for colours in (LIGHT, DARK):
            buffer = io.BytesIO()
            with style(colours, "none"):
                figure = Figure(figsize=_SIZE, layout="constrained")
                draw(figure.add_subplot(), colours)
                figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
            drawn.append(f"data:image/svg+xml;base64,{b64encode(buffer.getvalue()).decode()}")
        return cls(title, words, *drawn)


def known_curves(history: pd.DataFrame) -> tuple[dict[str, str], dict[str, str]]:
    """Return the columns of a history to draw, with their labels: errors, and the rank."""
    names = {"residual": "residual, observed entries", "held_out": "error, held-out entries", "objective": "objective"}
    # at rank 0 the held-out error is 1, even without held-out entries
    fitted = history[history["rank"] > 0] if "rank" in history else history
    errors = {name: words for name, words in names.items() if name in history and fitted[name].notna().any()}
    return errors, {"rank": "singular values kept"} if "rank" in history and len(history) else {}


def curves(history: pd.DataFrame, names: Mapping[str, str], kept: int | None) -> Draw:
    """Return a function that draws columns of a history over the iterations and marks the kept iteration."""
    iterations = history.get("iteration", np.arange(1, len(history) + 1))

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        for (name, words), colour in zip(names.items(), ("accent", "second", "muted"), strict=False):
            axes.plot(iterations, history[name], ".-", color=colours[colour], label=words)
        _scale(axes, history[list(names)].to_numpy(np.float64))
        axes.set_xlabel("iteration")
        if kept:
            axes.axvline(kept, color=colours["muted"], linewidth=1, linestyle=":", zorder=0)
            where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text(kept, 1.01, "kept", color=colours["muted"], fontsize=8, **where)
        axes.legend() if len(names) > 1 else axes.set_ylabel(next(iter(names.values())))

    return draw


def _scale(axes: Any, values: NDArray[np.float64]) -> None:
    """Make the y axis logarithmic if values differ 30-fold, else start it at 0 unless they are similar."""
    finite = values[np.isfinite(values)]
    if finite.min() > 0 and finite.max() > _MANY_DECADES * finite.min():
        _logarithmic(axes.yaxis)
    elif finite.max() > _ALIKE * finite.min():
        axes.set_ylim(bottom=min(0.0, float(finite.min())))
    axes.grid(axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)


def singular_values(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Draw:
    """Return a function that draws singular values, and with `weights` also the kept part of each."""
    numbers, weighted = np.arange(1, len(values) + 1), len(weights) == len(values)
    kept = np.where(weights > 0, values * weights, np.nan) if weighted else values

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        axes.plot(numbers, kept, ".", color=colours["accent"], label="kept, by its weight", zorder=3)
        _scale(axes, values)
        axes.set(xlim=(0, len(values) + 1), xlabel="number", ylabel="singular value")
        if weighted:
            axes.plot(numbers, values, ".", color=colours["muted"], label="found")
            _logarithmic(axes.yaxis)  # although the kept part of the last ones may be near 0
            axes.set_ylim(0.8 * max(np.nanmin(kept, initial=values.min()), values.min() / 30), 1.5 * values.max())
            axes.legend()

    return draw


@style()
def convergence(result: Imputation, title: str = "") -> Figure:
    """Draw residual, held-out error and rank over the iterations, and mark the kept iteration."""
    if not len(result.history):
        raise InputError("the result has no history of iterations to draw; presets complete and paper have one")
    figure, (row,) = new_figure(1, 2, 7, 3, title)
    for axes, names in zip(row, known_curves(result.history), strict=True):
        curves(result.history, names, result.summary.get("chosen_iteration"))(axes, LIGHT)
    return figure


def inflation(ratios: NDArray[np.float64]) -> Draw:
    """Return a function that draws the histogram of imputed over observed means of genes."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        drawn = np.log2(np.clip(ratios, 1 / 4, 128))
        low, high = min(-1, np.floor(drawn.min())), max(1, np.ceil(drawn.max()))
        axes.hist(drawn, bins=np.linspace(low, high, 46), color=colours["accent"], rwidth=0.86)
        axes.axvline(0, color=colours["muted"], linewidth=1, linestyle=":", zorder=0)
        axes.axvline(np.median(drawn), color=colours["second"], linewidth=1.6)
        axes.xaxis.set_major_locator(MultipleLocator(1 if high - low < 6 else 2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{2**x:g}×" if x >= 0 else f"1/{2**-x:g}×"))
        axes.grid(axis="y")
        axes.set(xlim=(low, high), xlabel="mean imputed ÷ mean observed", ylabel="genes")

    return draw


class Colouring(NamedTuple):
    """A variable that colours cells: its name, and for each cell a number (NaN: unknown) or the code of a group."""

    by: str
    values: NDArray[Any]
    groups: Sequence[str] = ()  # names of the codes; empty for numbers

    @classmethod
    def of(cls, by: str, values: pd.Series) -> Colouring:
        """Colour by a column: numbers with many values as numbers, anything else by its most frequent values."""
        from pandas.api.types import is_bool_dtype, is_numeric_dtype

        if is_numeric_dtype(values) and not is_bool_dtype(values) and values.nunique() > _MOST_GROUPS:
            return cls(by, values.to_numpy(np.float64, na_value=np.nan))
        text = as_text(values).where(values.notna().to_numpy(), "unknown")
        counts = text.value_counts()
        common = sorted(counts.index, key=lambda label: (-counts[label], label))
        if len(common) > _MOST_GROUPS:
            common = [*common[: _MOST_GROUPS - 1], f"{len(common) - _MOST_GROUPS + 1} others"]
        place = {label: code for code, label in enumerate(common)}
        return cls(by, np.array([place.get(label, len(common) - 1) for label in text], np.intp), common)


def cells(points: NDArray[np.float64], shares: tuple[float, float], colouring: Colouring) -> Draw:
    """Return a function that draws cells on two principal components, which have these shares of the variance."""
    from matplotlib.colors import LinearSegmentedColormap

    def draw(axes: Any, colours: Mapping[str, str]) -> None:
        marks, values = {"s": 5, "linewidths": 0, "rasterized": True}, colouring.values
        if colouring.groups:
            palette = np.array([colours[f"group{number}"] for number in range(len(colouring.groups))])
            axes.scatter(*points.T, c=palette[values], alpha=0.8, **marks)
        else:
            order, known = np.argsort(values), values[np.isfinite(values)]  # high values on top
            ramp = LinearSegmentedColormap.from_list("", [colours["low"], colours["high"]])
            top = float(np.quantile(known, 0.99)) or None if len(known) else 1.0
            drawn = axes.scatter(*points[order].T, c=values[order], cmap=ramp, vmax=top, **marks)
            axes.figure.colorbar(drawn, ax=axes, shrink=0.7, label=short_name(colouring.by))
        axes.set(xticks=[], yticks=[])
        axes.set(xlabel=f"component 1 ({shares[0]:.0%})", ylabel=f"component 2 ({shares[1]:.0%})")
        axes.spines[:].set(visible=True, color=colours["line"])

    return draw


def _title(column: str, words: str, less: str, more: str) -> str:
    """Return the title of a panel, with the direction of better scores."""
    better = "best: 1" if column == "mean_ratio" else less if column in _LESS_IS_BETTER else more
    return f"{words}\n{better}"


def _colour_of(method: str) -> str:
    return _METHODS.get(method) or _OTHERS[sum(map(ord, method)) % len(_OTHERS)]


def _is_spread(values: pd.Series) -> bool:
    """Return whether positive numbers span more than 5-fold, for a logarithmic axis."""
    known = values[values > 0]
    return len(known) > 0 and float(known.max()) > 5 * float(known.min())


@style()
def dots(scores: pd.DataFrame, panels: Mapping[str, str], title: str = "") -> Figure:
    """Draw the scores of methods, best at the top: a dot for each seed, and their mean as a number at the right.

    `scores` has a row per method and seed: ``method``, ``label``, ``status``, and the scores. `panels` are columns with
    their titles, such as `HIDDEN`; the first determines the order of the methods.
    """
    first = next(iter(panels))
    means = scores.groupby("label", sort=False)[first].mean()
    names = list(means.sort_values(ascending=first not in _LESS_IS_BETTER, na_position="first", kind="stable").index)
    figure, (row,) = new_figure(1, len(panels), 2.3 * len(panels) + 1.4, 0.3 * len(names) + 1.3, title, sharey=True)
    for (column, words), axes in zip(panels.items(), row, strict=True):
        values = scores[column]
        axes.locator_params(axis="x", nbins=3)
        if column in (*_LESS_IS_BETTER, "mean_ratio") and _is_spread(values):
            _logarithmic(axes.xaxis)
            values = values.where(values > 0)
        for y, name in enumerate(names):
            rows = scores[scores["label"] == name].assign(value=values)
            known, status = rows["value"].dropna().to_numpy(float), rows["status"].iloc[0]
            text = short_name(status) if column == first and status not in ("ok", "quoted") else ""
            if len(known):
                colour, mean = _colour_of(rows["method"].iloc[0]), known.mean()
                marks = {"facecolors": "none" if status == "quoted" else colour, "edgecolors": colour}
                axes.scatter(known, np.full(len(known), y), s=28, linewidths=1, zorder=3, **marks)
                text = f"{mean:,.0f}" if mean >= 1000 else f"{mean:.3f}" if mean < 1 else f"{mean:#.3g}".rstrip(".")
            axes.annotate(text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)
        axes.set(title=_title(column, words, "← better", "better →"), ylim=(-0.6, len(names) - 0.4))
        axes.margins(x=0.08)
        axes.grid(axis="y")
        if column == "mean_ratio":
            axes.axvline(1, color=LIGHT["muted"], linewidth=0.8, linestyle=":")
        if values.isna().all():
            axes.set_xticks([])
    row[0].set_yticks(range(len(names)), list(map(short_name, names)))
    for tick, name in zip(row[0].get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name.startswith("scIALM") else "normal")
    return figure


@style()
def lines(
    scores: pd.DataFrame, x: str, words: str, panels: Mapping[str, str] = HIDDEN, title: str = "", log_x: bool = False
) -> Figure:
    """Draw scores over a quantity: a line for each method, with the range of its seeds; a cross where it fails.

    `x` is a numeric column, such as the hidden share, and `words` its label. For the others see `dots`.
    """
    rows = -(-len(panels) // 2)
    figure, grid = new_figure(rows, 2, 8.6, 2.8 * rows, title)
    for (column, name), axes in zip(panels.items(), grid.ravel(), strict=True):
        if log_x:
            _logarithmic(axes.xaxis)
        if column in _LESS_IS_BETTER and _is_spread(scores[column]):
            _logarithmic(axes.yaxis)
        known = np.sort(scores[x].unique())
        if len(known) <= 10:
            axes.set_xticks(known, [f"{value:,g}" for value in known])
            axes.set_xticks([], minor=True)
        for method, of_it in scores.groupby("method", sort=False):
            line = of_it.dropna(subset=[column]).groupby(x)[column].agg(["mean", "min", "max"])
            colour, label = _colour_of(method), of_it["label"].iloc[0] if of_it["label"].nunique() == 1 else method
            if len(line):
                axes.plot(line.index, line["mean"], ".-", color=colour, label=label, linewidth=1.2)
                axes.fill_between(line.index, line["min"], line["max"], color=colour, alpha=0.15, linewidth=0)
                if of_it.loc[of_it[column].isna(), x].max() > line.index[-1]:
                    axes.plot(line.index[-1:], line["mean"].iloc[-1:], "x", color=colour, markersize=9)
        axes.set(title=_title(column, name, "↓ better", "↑ better"), xlabel=words)
        axes.grid(axis="y")
    drawn = sorted(grid[0, 0].get_legend_handles_labels()[0], key=lambda line: -line.get_ydata()[-1])
    figure.legend(drawn, [short_name(line.get_label()) for line in drawn], loc="outside right upper")
    return figure


def effort(scores: pd.DataFrame, title: str = "") -> Figure:
    """Draw error, time and memory of each method; see `dots`."""
    # at least 0.1 MB, as less is not measurable and zero has no logarithm
    known = scores.assign(megabytes=(scores["peak_bytes"] / 1e6).clip(lower=0.1))
    return dots(known[known["status"] != "quoted"], {"mse": HIDDEN["mse"], **COSTS}, title)


@style()
def cell_pictures(umap: Mapping[str, NDArray[np.float32]], labels: pd.Series, title: str = "") -> Figure:
    """Draw UMAPs of cells, shape (m, 2), in one named panel per matrix, coloured by label."""
    from matplotlib import colormaps

    kinds = sorted(map(str, labels.unique()), key=lambda kind: [p.zfill(9) for p in re.split(r"(\d+)", kind)])
    names = [f" {short_name(kind)}" for kind in kinds]  # with a space, as Matplotlib hides labels that begin with "_"
    columns = min(4, len(umap))
    rows, beside = -(-len(umap) // columns), max(1, int(2.6 * columns / (0.45 + 0.065 * max(map(len, names)))))
    figure, grid = new_figure(rows, columns, 2.6 * columns, 2.6 * rows + 0.5 + 0.17 * -(-len(kinds) // beside), title)
    palette = np.array(colormaps["tab20" if len(kinds) > 10 else "tab10"].colors)  # type: ignore[attr-defined]
    colours = dict(zip(kinds, palette[np.arange(len(kinds)) % len(palette)], strict=True))
    for axes in grid.ravel()[len(umap) :]:
        axes.set_visible(False)
    for (name, points), axes in zip(umap.items(), grid.ravel(), strict=False):
        size, colour = float(np.clip(6000 / len(labels), 0.2, 6)), [colours[str(kind)] for kind in labels]
        axes.scatter(*points.T, s=size, c=colour, linewidths=0, rasterized=True)
        axes.set(title=short_name(name), xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=LIGHT["line"])
    handles = [grid[0, 0].scatter([], [], s=18, color=colours[kind]) for kind in kinds]
    figure.legend(handles, names, loc="outside lower center", ncols=beside, fontsize=7)
    return figure
