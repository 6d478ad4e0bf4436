"""Data flows one way: a file imports only from lines above its own."""

import ast
import sys
from pathlib import Path

import pytest

import scialm_dask

ROOT = Path(scialm_dask.__file__).parent

LINES = """
errors arguments config events
data.layout data.csr data.remote data.remote_output data.store data.writer data.stream data.rows data.temporary data.transpose data.matrix data.annotated
data.tenx data.ingest data.quality
data.fingerprint data.scratch data.array_files data.checkpoint data.remote_checkpoint
data.cell_model data.imputed data.factors data.design
linalg.draws linalg.nnls linalg.tiles linalg.tall linalg.kernels linalg.cellwise linalg.tasks linalg.operator linalg.svd
solve.rank solve.stopping solve.scaling solve.reference solve.ialm solve.zeros solve.alra solve.transform
solve.pools solve.pooled solve.pooled_als solve.pooled_admm solve.pooled_nuclear
evaluate.masking evaluate.predictions evaluate.metrics evaluate.gene_scores evaluate.simulation evaluate.figures
evaluate.compare evaluate.panels evaluate.svg evaluate.verdict
run.termination run.losses run.cluster run.homes run.plan run.placing run.dry_run run.keeper run.result run.job run.demo run.progress
api
evaluate.soft_impute evaluate.peers evaluate.methods evaluate.isolated evaluate.experiments evaluate.downstream
evaluate.trial evaluate.contest evaluate.charts evaluate.written evaluate.publication
markup report estimator cli cli_impute cli_evaluate cli_pooled __main__
"""
ORDER = LINES.split()
HANDS_OVER = {"data.factors": {"solve.transform"}}  # a method that calls the solver, imported when it is called

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
    """The files of this package that a file imports, by their names in ORDER."""
    names = {name.removeprefix("scialm_dask.") for name in imports(path) if name.startswith("scialm_dask.")}
    return names & FILES.keys()


def outside(path, **kwargs):
    return {name.partition(".")[0] for name in imports(path, **kwargs)} - {"scialm_dask"}


def test_every_file_has_its_place():
    assert sorted(ORDER) == sorted(FILES)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_lines_above_its_own(name):
    assert ours(FILES[name]) - HANDS_OVER.get(name, set()) <= set(ORDER[: ORDER.index(name)]) | HANDS_OVER.get(
        name, set()
    )


@pytest.mark.parametrize("name", [name for name in ORDER if name.startswith("linalg.")])
def test_linalg_knows_no_cells_and_one_file_builds_graphs(name):
    assert not {other for other in ours(FILES[name]) if not other.startswith("linalg.")}
    assert not outside(FILES[name]) & {"zarr", "anndata", "pandas", "distributed"}
    assert ("dask" in outside(FILES[name])) == (name == "linalg.operator")


@pytest.mark.parametrize("name", ["solve.ialm", "solve.rank", "solve.stopping", "solve.reference"])
def test_the_loop_and_its_rules_know_neither_dask_nor_zarr(name):
    assert not outside(FILES[name]) & {"dask", "distributed", "zarr", "anndata"}
    assert not {other for other in ours(FILES[name]) if other.startswith("data.")}


def test_the_twins_share_no_code_with_what_they_check():
    assert ours(FILES["solve.reference"]) == {"config"}


@pytest.mark.parametrize("name", [name for name in ORDER if name.startswith("cli")])
def test_the_command_line_is_quick_to_start(name):
    assert outside(FILES[name], top_only=True) - set(sys.stdlib_module_names) == {"click"}
