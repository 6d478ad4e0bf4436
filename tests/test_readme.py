"""The README's examples, run as they stand."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from scialm_dask import Imputation

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader is who has run the demonstration."""
    from click.testing import CliRunner

    from scialm_dask.__main__ import main

    where = tmp_path_factory.mktemp("readme")
    before = os.getcwd()
    os.chdir(where)
    for line in ["scialm-dask demo", *commands()]:
        result = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    yield where
    os.chdir(before)


def commands() -> list[str]:
    return [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line[:1] == "$"]


def test_the_command_line_example(folder):
    assert len(commands()) >= 5
    assert (folder / "denoised.zarr").is_dir()


def test_the_python_examples(folder):
    names: dict[str, object] = {}
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        exec(block, names)  # the README's own lines
    imputed = np.asarray(names["imputed"])
    assert imputed.min() >= 0
    np.testing.assert_allclose(imputed, Imputation.open("denoised.zarr")[:, :], rtol=1e-4, atol=1e-4)


def test_its_picture_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README, re.DOTALL):
        assert (Path(__file__).parents[1] / path).is_file(), path
