"""The notebooks run from top to bottom, and what they keep of it is small and clean."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000
# absolute paths of a machine, and what only warnings print
UNCLEAN = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|opt|usr|var|mnt)/|site-packages|Warning:|tcp://")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    # in a process of its own: Jupyter's own warnings are not ours to fail on; on simulated data, which takes seconds
    environment = {name: value for name, value in os.environ.items() if name != "SCIALM_DATA"}
    command = [sys.executable, path.parent / "refresh.py", path, "--into", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert unclean(tmp_path / path.name) == []


def outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        yield from cell.get("outputs", [])


def unclean(path):
    """Lines of text that a notebook should not keep."""
    texts = []
    for output in outputs(path):
        assert output["output_type"] != "error"
        texts += [output.get("text", ""), *(v for kind, v in output.get("data", {}).items() if "text" in kind)]
    lines = [line for text in texts for line in "".join(text).splitlines()]
    return [line for line in lines if UNCLEAN.search(line)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_whole_small_and_clean(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < MOST_BYTES
    assert unclean(path) == []
