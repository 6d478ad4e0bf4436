import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from in_process import in_process

from scialm_dask import Imputation, Settings
from scialm_dask.compare import charts
from scialm_dask.compare import publication as module
from scialm_dask.compare.isolated import Outcome
from scialm_dask.compare.publication import PUBLISHED, Programme, _Press, _published_name
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.qc import CellMeasures, Thresholds
from scialm_dask.events import silent
from scialm_dask.report import figures
from scialm_dask.run.job import complete_matrix


@pytest.fixture
def cells(store_of):
    """Counts that pass the publication's thresholds, but for two cells."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(4, 0.5, (100, 3)) @ rng.gamma(0.5, 1, (3, 500))
    X = rng.poisson(rates)
    X[0, 20:] = 0  # few genes
    X[1, 3] = 5000  # dying
    names = [f"mt-{j}" if j < 5 else f"gene{j}" for j in range(500)]
    return store_of(sp.csr_matrix(X, dtype=np.float32), names=names)


def test_matrices_are_cleaned_tabled_and_drawn(cli, cells, tmp_path):
    folder = tmp_path / "out"
    options = ["--methods", "gene-mean", "--mask", "0.1", "--seeds", 1, "--sizes", "", "--increments", ""]
    with in_process():
        result = cli("publication", cells, "-o", folder, "--truth", cells, cells, *options, "--json")
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout.splitlines()[-1])["figures"] == 6
    table = pd.read_csv(folder / "table2.csv").iloc[0]
    assert (table["cells before"], table["genes before"], table["cells after"]) == (100, 500, 98)
    assert "100 | 500 | 98" in (folder / "README.md").read_text()
    assert "all entries against a truth" in (folder / "source-truth" / "summary.md").read_text()  # and nothing quoted


def test_pieces_made_before_a_failure_are_kept_under_another_name(cli, cells, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(charts, "effort", fail)
    options = ["--methods", "gene-mean", "--mask", "0.1", "--seeds", 1, "--sizes", "", "--increments", ""]
    with in_process():
        result = cli("publication", cells, "-o", tmp_path / "out", *options)
    assert str(result.exception) == "no ink"
    (kept,) = set(tmp_path.iterdir()) - {tmp_path / "source.zarr"}
    assert f"kept in {kept}" in result.stderr
    assert kept.suffix == ".unfinished"
    assert (kept / "table2.md").exists()
    assert (kept / "figure3-source.svg").exists()
    assert not (kept / "README.md").exists()


@pytest.mark.slow
def test_one_command_makes_all_tables_figures_and_an_index(cli, cells, tmp_path):
    folder = tmp_path / "out"
    options = ["--methods", "alra,scimpute", "--mask", "0.1,0.3", "--seeds", 1, "--sizes", "60", "--increments", "3,6"]
    result = cli("publication", cells, "-o", folder, "--labels", "batch", "--truth", cells, cells, *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["matrices"] == 1
    made = {path.stem for path in folder.glob("*.svg")}
    assert made == {
        "figure3-source",
        "figure4-source",
        "figure5-source",
        "figure6-scores-source-masking",
        "figure6-scores-source-all-data",
        "figure6-cells-source-masking",
        "figure6-cells-source-all-data",
        "figure7-source",
        "effort-source",
        "stop-source",
        "spectrum-source",
        "source-truth",
        "sizes",
    }
    index = (folder / "README.md").read_text()
    assert all(f"({name}.svg)" in index for name in made)
    swept = pd.read_csv(folder / "source-increment" / "scores.csv")
    assert set(swept["setting"].dropna()) == {"increment=3", "increment=6"}
    assert set(pd.read_csv(folder / "sizes.csv")["cells"]) == {60}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("scialm")] == []


def test_each_method_is_measured_in_an_empty_folder(tmp_path, monkeypatch):
    def run(contestant, source, folder, **limits):
        assert not list(folder.iterdir())
        (folder / "answer.json").write_text("{}")
        assert limits == {"memory_limit": 10**8, "timeout": None}
        return Outcome("ok", 1.0, 2.0), None

    monkeypatch.setattr(module, "run_contestant", run)
    work, folder = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    folder.mkdir()
    _Press(folder, Programme(methods=["alra", "knn"], sizes=[20], memory_limit=10**8), silent).sizes(work)
    assert list(pd.read_csv(folder / "sizes.csv")["method"]) == ["alra", "knn"]
    assert sorted(p.name for p in (work / "size20").iterdir()) == ["cells.zarr", "counts.zarr", "normalised.zarr"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sizes", "many"], "numbers with commas"),
        (["--sizes", "10,10"], "each once"),
        (["--methods", "nothing"], "no method is called"),
        (["--mask", ""], "no share to hide"),
        (["--increments", "some"], "give values of increment"),
        (["--memory-limit", "much"], "memory limit is 'much'"),
        (["--labels", "batch", "--truth", "nowhere.zarr", "nowhere.zarr"], "no such file"),
    ],
)
def test_bad_input_leaves_nothing(cli, cells, tmp_path, options, words):
    result = cli("publication", cells, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source.zarr"]


@pytest.mark.parametrize("twice", [["source"], ["--truth", "source", "source", "--truth", "source", "other"]])
def test_two_sources_or_truths_of_one_name_are_refused_at_the_start(cli, cells, tmp_path, twice):
    words = [cells if word == "source" else word for word in twice]
    result = cli("publication", cells, *words, "-o", tmp_path / "out", "--sizes", "")
    assert result.exit_code == 2
    assert "give each a name of its own" in result.stderr
    assert "masking" not in result.stderr


def test_the_published_matrices_are_known_by_their_size():
    assert _published_name((2843, 13003)) == "PBMC"
    assert _published_name((2842, 13003)) is None
    assert len(PUBLISHED) == 4


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_what_quality_control_removes_is_counted():
    totals = np.array([900.0, 1000, 1100, 5000, 50])
    cells = CellMeasures(np.array([400, 500, 450, 2500, 30]), totals, np.array([9.0, 100, 11, 50, 0]))
    figure = figures.quality(cells, Thresholds(min_genes=200, max_genes=2000, max_mito=5))
    assert {"over 5: 1 cells", "over 2000: 1 cells", "under 200: 1 cells", "kept: 2 cells"} <= set(texts(figure))


def test_spectrum_draws_all_singular_values(counts):
    result: Imputation = complete_matrix(
        ExpressionMatrix.of(counts), Settings(stop="residual", max_iterations=8, max_rank=5)
    )
    line = figures.spectrum(result).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), result.summary["singular_values"])


def test_a_method_that_gives_up_ends_in_a_cross():
    rows = [
        {"cells": cells, "method": method, "status": "ok", "seconds": cells / 100, "peak_bytes": 1e4 * cells}
        for method in ("auto", "magic")
        for cells in (100, 1000)
    ]
    rows += [{"cells": 10000, "method": "auto", "status": "ok", "seconds": 50.0, "peak_bytes": 1e8}]
    rows += [{"cells": 10000, "method": "magic", "status": "out of memory"}]
    axes = charts.costs(pd.DataFrame(rows)).axes[0]
    assert [line.get_marker() for line in axes.lines] == [".", ".", "x"]
    assert list(axes.lines[2].get_xdata()) == [1000]


@pytest.mark.parametrize("sizes", [[60], [60, 200, 1000]])
def test_methods_are_named_beside_their_lines(sizes):
    """Whatever the size of the numbers, and if a method took no memory that could be measured."""
    rows = [
        {"cells": size, "method": method, "status": "ok", "seconds": seconds * size, "peak_bytes": 0.0}
        for size in sizes
        for method, seconds in {"alra": 5e-2, "gene-mean": 1.5e-1, "magic": 40.0}.items()
    ]
    figure = charts.costs(pd.DataFrame(rows))
    figure.draw_without_rendering()
    for axes in figure.axes:
        box, lines = axes.get_window_extent(), {line.get_color(): line for line in axes.lines}
        for name in axes.texts:
            end = axes.transData.transform(lines[name.get_color()].get_xydata()[-1])[1]
            assert abs(name.get_window_extent().y0 - end) < 0.25 * box.height
