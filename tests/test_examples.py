"""Public docstrings: their sections are whole, and their examples print what they show."""

from __future__ import annotations

import doctest
import inspect

import pytest
from numpydoc.validate import validate

import scialm_dask

NAMES = [name for name in scialm_dask.__all__ if name != "__version__"]
# numpydoc's checks, but for the style of the first lines, which ruff's "numpy" convention has, and for sections that
# not everything needs (extended summary, See Also).
CHECKS = {"GL06", "GL07", "GL08", "SS03", "PR01", "PR02", "PR03", "PR04", "PR07", "PR08", "PR09", "PR10"}
CHECKS |= {"RT01", "RT03", "RT04", "RT05", "YD01", "EX01"}


def methods_of(thing: object) -> list[str]:
    """Public methods of a class that are its own; properties are attributes, which need no example."""
    own = vars(thing).items() if inspect.isclass(thing) else ()
    return [
        name for name, each in own if name[0] != "_" and (inspect.isfunction(each) or isinstance(each, classmethod))
    ]


@pytest.mark.parametrize("name", [*NAMES, *(f"{n}.{m}" for n in NAMES for m in methods_of(getattr(scialm_dask, n)))])
def test_sections(name):
    assert [words for code, words in validate(f"scialm_dask.{name}")["errors"] if code in CHECKS] == []


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing = getattr(scialm_dask, name)
    # methods go on from the example of their class
    texts = [inspect.getdoc(each) for each in (thing, *(getattr(thing, method) for method in methods_of(thing)))]
    example = doctest.DocTestParser().get_doctest("\n\n".join(texts), {}, name, None, 0)
    runner, told = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), []
    assert runner.run(example, out=told.append).failed == 0, "".join(told)
