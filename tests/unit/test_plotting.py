"""Figures of methods side by side, and of results: what they say, that nothing is cut or covered, whatever names are."""

import dask.array as da
import numpy as np
import pandas as pd
import pytest

from scialm_dask import Imputation, InputError
from scialm_dask.compare.methods import labelled
from scialm_dask.compare.tables import markdown
from scialm_dask.report import plotting


@pytest.fixture
def scores():
    rows = [
        {"method": method, "setting": "", "share": share, "mse": base + share + seed / 50, "status": "ok"}
        for base, method in ((2.9, "auto"), (3.1, "softimpute"), (5.1, "gene-mean"))
        for share in (0.1, 0.3, 0.5)
        for seed in (0, 1)
    ]
    failed = {"method": "magic", "setting": "", "share": 0.1, "status": "out of memory"}
    quoted = {"method": "scimpute", "setting": "", "share": 0.1, "mse": 32.9, "status": "quoted"}
    table = pd.DataFrame([*rows, failed, quoted])
    for name in {*plotting.HIDDEN, *plotting.WHOLE} - {"mse"}:
        table[name] = table["mse"] / 40
    table["seconds"], table["peak_bytes"] = 3.0, 2e8
    return labelled(table)


def texts(figure):
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def words(figure):
    return [text.get_text() for text in texts(figure)]


def test_methods_are_ranked_and_what_failed_is_said(scores):
    figure = plotting.dots(scores[scores["share"] == 0.1], plotting.HIDDEN, "10 % hidden")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[::-1] == ["scIALM auto", "softImpute", "gene mean", "scImpute", "MAGIC"]
    assert words(figure).count("out of memory") == 1
    assert {"32.9", "mean squared error\n← better", "Pearson r\nbetter →"} <= set(words(figure))
    whole = plotting.dots(scores, plotting.WHOLE)
    assert whole.axes[-1].get_xscale() == "log"
    assert "imputed ÷ true mean\nbest: 1" in words(whole)


@pytest.mark.parametrize("kind", ["dots", "effort", "lines", "cells"])
def test_nothing_is_cut_and_no_words_cover_others(scores, kind):
    """A long title, a panel on the right with a long name, numbers beside dots, ticks and legends."""
    title = "a rather long name of a data set, as people give them, with all that was done to it, 10% hidden"
    if kind == "dots":
        figure = plotting.dots(scores, plotting.HIDDEN, title)
    elif kind == "effort":
        figure = plotting.effort(scores, title)
    elif kind == "lines":
        figure = plotting.lines(scores[scores["status"] == "ok"], "share", "share hidden", title=title)
    else:
        points = {name: np.random.default_rng(0).normal(size=(60, 2)) for name in ("raw", "a name of a matrix, long")}
        figure = plotting.cell_pictures(points, pd.Series([f"type of cells {k}" for k in range(1, 13)] * 5), title)
    with plotting.style():
        figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    width, height = figure.bbox.size
    cut = [word for word, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    ticks = [t.get_text() for axes in figure.axes for t in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert [word for word in cut if word not in ticks] == []  # of ticks those outside the axis are not drawn
    labels = [(word, box.padded(-1)) for word, box in boxes if word not in ticks]
    covered = [
        (word, other)
        for n, (word, box) in enumerate(labels)
        for other, place in labels[:n]
        if box.overlaps(place) and word != other
    ]
    assert covered == []


def test_lines_are_named_from_the_top_down(scores):
    figure = plotting.lines(scores[scores["status"] == "ok"], "share", "share hidden")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gene mean", "softImpute", "scIALM auto"]


def test_a_method_that_gives_up_ends_in_a_cross():
    rows = [
        {"cells": cells, "method": method, "status": "ok", "seconds": cells / 100, "megabytes": 0.1}
        for method in ("auto", "magic")
        for cells in (100, 1000)
    ]
    rows += [{"cells": 10000, "method": "auto", "status": "ok", "seconds": 50.0, "megabytes": 100.0}]
    rows += [{"cells": 10000, "method": "magic", "status": "out of memory"}]
    scores = labelled(pd.DataFrame(rows).assign(setting=""))
    axes = plotting.lines(scores, "cells", "cells", plotting.COSTS, log_x=True).axes[0]
    assert [line.get_marker() for line in axes.lines] == [".", ".", "x"]
    assert list(axes.lines[2].get_xdata()) == [1000]


def test_cells_have_a_framed_panel_for_each_matrix():
    labels = pd.Series([f"{k}.0" for k in range(1, 13)] * 5)
    points = {name: np.random.default_rng(0).normal(size=(60, 2)).astype("f4") for name in "abcde"}
    figure = plotting.cell_pictures(points, "type " + labels, "cells")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == list("abcde")
    assert all(spine.get_visible() for axes in panels for spine in axes.spines.values())
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == [f"type {k}.0" for k in range(1, 13)]


HOSTILE = [
    "$x^2$",
    "$\\frac{1}{$",
    "a_b",
    "_hidden",
    "\\alpha",
    "<b>&",
    "\x1b[31mred\x07",
    "half\ud800",
    "$" * 40,
    "細胞",
]


def test_names_of_all_kinds_are_drawn_as_they_are(scores, tmp_path):
    """Mathematics, markup, escapes for a terminal, letters that the font lacks: neither an error nor another name."""
    figure = plotting.cell_pictures(
        {name: np.zeros((10, 2)) for name in HOSTILE}, pd.Series(HOSTILE, dtype=object), HOSTILE[1]
    )
    plotting.save(figure, tmp_path / "cells")
    svg = (tmp_path / "cells.svg").read_text()
    for shown in ("$x^2$", "$\\frac{1}{$", "_hidden", "\\alpha", "&lt;b&gt;&amp;", "\\x1b[31mred\\x07", "細胞"):
        assert svg.count(shown) >= 2  # over a panel and in the legend
    named = scores.assign(label=scores["method"].map(dict(zip(scores["method"].unique(), HOSTILE, strict=False))))
    for each in (plotting.dots(named, plotting.HIDDEN, HOSTILE[0]), plotting.lines(named, "share", "$", title="$_")):
        plotting.save(each, tmp_path / "scores")
    values = np.random.default_rng(0).normal(size=(50, 2))
    for name in HOSTILE:
        drawn = plotting.cells(values, (0.5, 0.1), plotting.Colouring(name, values[:, 0]))
        assert plotting.Picture.of(name, name, drawn).light.startswith("data:image/svg+xml;base64,")


def test_what_is_zero_is_left_out_of_a_logarithmic_axis(scores):
    none = scores.assign(mean_ratio=scores["mean_ratio"].where(scores["method"] != "auto", 0.0))
    figure = plotting.dots(none, plotting.WHOLE)
    figure.canvas.draw()
    assert figure.axes[-1].get_xlim()[0] > 0


def test_the_same_figure_is_the_same_file(scores, tmp_path):
    for name in ("pbmc.v2", "two"):
        plotting.save(plotting.dots(scores, plotting.HIDDEN), tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == {"pbmc.v2.svg", "pbmc.v2.png", "two.svg", "two.png"}
    assert (tmp_path / "pbmc.v2.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_result_without_iterations_has_no_convergence():
    nothing = Imputation(da.zeros((3, 1)), np.zeros((2, 1), "f4"), obs=None, var=None, summary={}, history={})
    with pytest.raises(InputError, match="no history of iterations to draw"):
        plotting.convergence(nothing)


def test_singular_values_beside_what_is_kept_of_them():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    plotting.singular_values(np.array([9.0, 4, 1]), np.array([1, 0.5, 0]))(axes, plotting.LIGHT)
    kept, found = axes.lines
    assert axes.get_ylim() == pytest.approx((0.8 * 1, 1.5 * 9))
    assert list(found.get_ydata()) == [9, 4, 1]
    np.testing.assert_array_equal(kept.get_ydata(), [9, 2, np.nan])


def test_tables_in_markdown():
    table = pd.DataFrame({"method": ["auto", "magic"], "mse": [2.90678, np.nan], "bytes": [1234567.0, 3.0]})
    assert (
        markdown(table)
        == "| method | mse | bytes |\n| --- | --- | --- |\n| auto | 2.907 | 1,234,567 |\n| magic | – | 3 |\n"
    )
