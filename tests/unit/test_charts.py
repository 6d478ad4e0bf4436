import numpy as np
import pandas as pd
import pytest

from scialm_dask.compare import charts
from scialm_dask.compare.tables import markdown, save_figure


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
    for name in ("mae", "pearson", "cosine", "relative_error", "mean_ratio", "zeros_pearson"):
        table[name] = table["mse"] / 40
    table["seconds"], table["peak_bytes"] = 3.0, 2e8
    return table


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_methods_are_ranked_and_what_failed_is_said(scores):
    figure = charts.method_scores(scores[scores["share"] == 0.1], "10 % hidden")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["scIALM auto", "softImpute", "gene mean", "scImpute", "MAGIC"]
    assert "out of memory" in texts(figure)
    assert "32.9 (quoted)" in texts(figure)
    assert charts.whole_scores(scores).axes[1].get_xscale() == "log"


def test_lines_are_named_where_they_end_and_do_not_cover_each_other(scores):
    crowded = scores.assign(mse=scores["mse"].where(scores["method"] != "softimpute", scores["mse"] - 0.199))
    figure = charts.scores_over(crowded[crowded["status"] == "ok"], "share", "share hidden")
    names = [t for t in figure.axes[0].texts if t.get_text() in ("scIALM auto", "softImpute", "gene mean")]
    assert len(names) == 3
    figure.canvas.draw()
    heights = sorted(t.get_window_extent().y0 for t in names)
    assert np.diff(heights).min() >= 0.9 * names[0].get_window_extent().height


def test_cells_have_a_panel_for_each_matrix(tmp_path):
    labels = pd.Series([f"{k}.0" for k in range(1, 13)] * 5)
    points = {name: np.random.default_rng(0).normal(size=(60, 2)).astype("f4") for name in "abcde"}
    figure = charts.cell_pictures(points, labels, "cells")
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()] == list("abcde")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{k}.0" for k in range(1, 13)]
    save_figure(figure, tmp_path / "pbmc.v2")
    assert {p.name for p in tmp_path.iterdir()} == {"pbmc.v2.svg", "pbmc.v2.png"}


def test_what_is_zero_is_left_out_of_a_logarithmic_axis(scores):
    none = scores.assign(mean_ratio=scores["mean_ratio"].where(scores["method"] != "auto", 0.0))
    figure = charts.whole_scores(none)
    figure.canvas.draw()
    assert figure.axes[1].get_xlim()[0] > 0


def test_time_and_memory_beside_the_error(scores):
    figure = charts.effort(scores)
    assert {"scIALM auto", "softImpute", "gene mean"} <= set(texts(figure))


def test_the_same_figure_is_the_same_file(scores, tmp_path):
    for name in ("one", "two"):
        save_figure(charts.method_scores(scores), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_tables_in_markdown():
    table = pd.DataFrame({"method": ["auto", "magic"], "mse": [2.90678, np.nan], "bytes": [1234567.0, 3.0]})
    assert (
        markdown(table)
        == "| method | mse | bytes |\n| --- | --- | --- |\n| auto | 2.907 | 1,234,567 |\n| magic | – | 3 |\n"
    )
