"""The script that makes the publication's tables and figures."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from in_process import in_process

from scialm_dask.data.qc import CellMeasures, Thresholds

_SPEC = importlib.util.spec_from_file_location(
    "publication", Path(__file__).parents[2] / "notebooks" / "publication.py"
)
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)

LITTLE = ["--methods", "gene-mean", "--mask", "0.1", "--seeds", "1", "--increments", "", "--sizes"]


@pytest.fixture
def cells(store_of):
    """Counts that pass the publication's thresholds, but for two cells."""
    rng = np.random.default_rng(0)
    X = rng.poisson(rng.gamma(4, 0.5, (100, 3)) @ rng.gamma(0.5, 1, (3, 500)))
    X[0, 20:] = 0  # few genes
    X[1, 3] = 5000  # dying
    names = [f"mt-{j}" if j < 5 else f"gene{j}" for j in range(500)]
    return store_of(sp.csr_matrix(X, dtype=np.float32), names=names)


def test_all_parts_are_made_and_shown_on_one_page(cells, tmp_path):
    folder = tmp_path / "out"
    with in_process():
        assert script.main([cells, "-o", str(folder), "--truth", cells, cells, *LITTLE, "60"]) == 0
    assert list(pd.read_csv(folder / "table2.csv")["after"]) == ["(98, 499)"]
    page = (folder / "README.md").read_text()
    assert "| source | (100, 500) | (98, 499) |" in page
    pictures = [path.relative_to(folder).as_posix() for path in folder.rglob("*.svg")]
    assert {"quality-source.svg", "stop-source.svg", "sizes.svg", "source/figures/masking-10-scores.svg"} <= {*pictures}
    assert [picture for picture in pictures if f"({picture})" not in page] == []
    assert "all entries against a truth" in page
    assert set(pd.read_csv(folder / "sizes.csv")["cells"]) == {60}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no ink")])
def test_what_was_made_before_the_end_is_kept_and_named(cells, tmp_path, monkeypatch, capsys, error):
    def end(*_):
        raise error

    monkeypatch.setattr(script.Press, "one_run", end)
    folder = tmp_path / "out"
    with in_process():
        if isinstance(error, KeyboardInterrupt):
            assert script.main([cells, "-o", str(folder), *LITTLE]) == 130
        else:
            with pytest.raises(RuntimeError, match="no ink"):
                script.main([cells, "-o", str(folder), *LITTLE])
    made = sorted(path.name for path in folder.iterdir())
    assert made == ["quality-source.png", "quality-source.svg", "source", "table2.csv"]
    assert f"kept in {folder}: {', '.join(made)}" in capsys.readouterr().err


def test_bad_input_leaves_nothing(cells, tmp_path, capsys):
    for words, options in (
        ("no such file", ["nowhere.zarr"]),
        ("give each a name of its own", [cells, cells]),
        ("exists already", [cells, "-o", str(tmp_path)]),
    ):
        with pytest.raises(SystemExit, match="2"):
            script.main(["-o", str(tmp_path / "out"), *options])
        assert words in capsys.readouterr().err
    assert script.main([cells, "-o", str(tmp_path / "out"), "--methods", "nothing"]) == 2
    assert "no method is called" in capsys.readouterr().err


def test_what_quality_control_removes_is_counted():
    from matplotlib.text import Text

    totals = np.array([900.0, 1000, 1100, 5000, 50])
    cells = CellMeasures(np.array([400, 500, 450, 2500, 30]), totals, np.array([9.0, 100, 11, 50, 0]))
    figure = script.quality(cells, Thresholds(min_genes=200, max_genes=2000, max_mito=5))
    words = {text.get_text() for text in figure.findobj(Text)}
    assert {"over 5: 1 cells", "over 2000: 1 cells", "under 200: 1 cells", "kept: 2 cells"} <= words
