"""The public names are there, documented, and quick to import."""

import inspect
import json
import re
import subprocess
import sys

import pytest

import scialm_dask

HEAVY = ["numba", "anndata", "scanpy", "dask.array", "distributed", "pandas", "h5py", "matplotlib", "scipy", "zarr"]


def loaded_after(statement):
    """Which of HEAVY are loaded in a fresh interpreter by a statement."""
    program = f"import sys, json; {statement}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "statement", ["import scialm_dask", "import scialm_dask.cli.group", "import scialm_dask.errors"]
)
def test_importing_loads_nothing_heavy(statement):
    assert loaded_after(statement) == []


def test_help_loads_nothing_heavy():
    program = "from click.testing import CliRunner; from scialm_dask.__main__ import main"
    assert loaded_after(f"{program}; assert CliRunner().invoke(main, ['impute', '--help']).exit_code == 0") == []


@pytest.mark.parametrize("name", scialm_dask.__all__)
def test_public_names_are_there(name):
    """Each is what is called so in its own module."""
    thing = getattr(scialm_dask, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*", thing)
    else:
        assert (thing.__module__, thing.__name__) == (f"scialm_dask.{scialm_dask._HOME[name]}", name)


def test_completion_finds_them_in_a_fresh_interpreter():
    assert loaded_after("import scialm_dask; assert dir(scialm_dask) == sorted(scialm_dask.__all__)") == []


def test_there_is_nothing_else():
    assert sorted(scialm_dask.__all__) == sorted(["__version__", *scialm_dask._HOME])
    with pytest.raises(AttributeError, match="no attribute 'Impute'"):
        scialm_dask.Impute  # noqa: B018


def public_things():
    for name in scialm_dask.__all__:
        thing = getattr(scialm_dask, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            yield name, thing
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if not method.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
                    yield f"{name}.{method}", value


@pytest.mark.parametrize(("name", "thing"), list(public_things()), ids=[name for name, _ in public_things()])
def test_public_things_are_documented(name, thing):
    text = inspect.getdoc(thing)
    assert text
    assert text.splitlines()[0].endswith((".", ":"))
