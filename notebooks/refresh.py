"""Run notebooks from top to bottom and keep what they print: ``python notebooks/refresh.py [NOTEBOOK ...]``.

Each runs in an empty folder of its own. With ``--into FOLDER`` the results go there and the notebooks stay as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).resolve().parent


def run(path: Path, target: Path) -> None:
    """Run the notebook at `path` and write it, with its outputs, to `target`."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    # which interpreter it was is nobody's business
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, target)


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    # `scialm-dask` of this very environment, also where it has not been activated
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    for path in options.notebooks:
        run(path, (options.into or path.parent) / path.name)


if __name__ == "__main__":
    main()
