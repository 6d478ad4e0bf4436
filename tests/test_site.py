"""The site builds without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-qnW", "--keep-going", "-c", NOTEBOOKS / "site", NOTEBOOKS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert {f"{notebook.stem}.html" for notebook in NOTEBOOKS.glob("*.ipynb")} <= pages.keys()
    assert 'href="site/clusters.html"' in pages["index.html"]  # as the README's link to deploy/README.md became
    assert 'id="scialm_dask.impute"' in pages["site/api.html"]
