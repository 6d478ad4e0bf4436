"""Compiled functions are kept between processes, where that can be."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import numpy as np
from scialm_dask.linalg.sparse_products import compiled

@compiled()
def doubled(x):
    return 2 * x

print(doubled(np.float64(21)), sum(doubled.stats.cache_hits.values()))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))

    def once():
        done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return once


@pytest.mark.parametrize("kind", ["nbi", pytest.param("nbc", marks=pytest.mark.slow)])
def test_files_cut_short_are_made_anew(run, tmp_path, kind):
    assert run() == ["42.0", "0"]
    assert run() == ["42.0", "1"]
    for path in Path(tmp_path / "cache").rglob(f"*.{kind}"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run() == ["42.0", "0"]
    assert run() == ["42.0", "1"]


def test_without_a_place_to_keep_them_they_are_compiled_anew(tmp_path, monkeypatch):
    """As in a container whose folders are read only."""
    (tmp_path / "program.py").write_text(
        "from numba.core import caching\ncaching.FunctionCache._impl_class._locator_classes = []\n" + PROGRAM
    )
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "42.0"
