"""Data flows one way: a folder imports only from the floors below it, and no files import each other in a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import scialm_dask

ROOT = Path(scialm_dask.__file__).parent

FLOORS = (
    "errors config events reduction data linalg solve imputation pooled evaluate run progress "
    "api estimator report compare cli __main__"
).split()

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(path, *, top_only=False):
    """Full names of the modules that a file imports, wherever in it; those for type checkers alone count too."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    """The files of this package that a file imports, by their names in FILES."""
    names = {name.removeprefix("scialm_dask.") for name in imports(path) if name.startswith("scialm_dask.")}
    return names & FILES.keys()


def outside(path, **kwargs):
    return {name.partition(".")[0] for name in imports(path, **kwargs)} - {"scialm_dask"}


def floor(name):
    return FLOORS.index(name.partition(".")[0])


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_its_own_floor_and_those_below(name):
    assert {other for other in ours(FILES[name]) if floor(other) > floor(name)} == set()


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter({name: ours(path) for name, path in FILES.items()}).prepare()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("linalg.")])
def test_linalg_knows_no_cells_and_one_file_builds_graphs(name):
    ours_alone = {other for other in ours(FILES[name]) if not other.startswith("linalg.")}
    assert ours_alone == ({"reduction"} if name == "linalg.operator" else set())
    assert not outside(FILES[name]) & {"zarr", "anndata", "pandas", "distributed"}
    assert ("dask" in outside(FILES[name])) == (name == "linalg.operator")


@pytest.mark.parametrize("name", ["solve.ialm"])
def test_the_loop_and_its_rules_know_neither_dask_nor_zarr(name):
    assert not outside(FILES[name]) & {"dask", "distributed", "zarr", "anndata"}
    assert not {other for other in ours(FILES[name]) if other.startswith("data.")}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("cli.")])
def test_the_command_line_is_quick_to_start(name):
    assert outside(FILES[name], top_only=True) - set(sys.stdlib_module_names) == {"click"}


def lines_of(function):
    """Its lines from ``def`` on, without the docstring."""
    text = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (0 if text is None else len(text.split("\n")))


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_450_lines_at_most_and_a_function_50(name):
    text = FILES[name].read_text()
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    assert len(text.splitlines()) <= 450
    assert {node.name: lines_of(node) for node in functions if lines_of(node) > 50} == {}
