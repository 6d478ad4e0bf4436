"""The published results on real cells, by the command line. Traces come from the published program's own algorithm."""

import json
import subprocess
import sys

import pytest

from scialm_dask import ExpressionMatrix, Imputation, Settings, impute
from scialm_dask.evaluate.metrics import score_held_out


def trace_of(shared, name):
    return json.loads((shared / "reference" / f"{name}_mask10_trace.json").read_text())


def masked(shared, name):
    return str(shared / "reference" / f"{name}_mask10.h5ad")


PROGRAM = """
import sys
import anndata, dask.array, distributed, h5py, numba, pandas, scipy.sparse.linalg, tqdm, zarr
import scialm_dask.run.job
def peak():  # of this process alone; what getrusage tells includes the parent's
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
from scialm_dask.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(peak() - before)
"""


def run(*words):
    """A command of the command line in a process of its own: what it prints by --json, and its memory over imports."""
    command = [sys.executable, "-c", PROGRAM, *map(str, words), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, summary, used = done.stdout.splitlines()
    return json.loads(summary), int(used)


def assert_follows(history, trace):
    """Residual and rank within 2 % (rank: or 2) wherever the trace's rank is over 5."""
    told = {step["iteration"]: step for step in trace}
    compared = [i for i in history.itertuples() if i.iteration in told and told[i.iteration]["rank"] > 5]
    assert compared
    far = {
        i.iteration: (i.rank, i.residual)
        for i in compared
        if abs(i.rank - told[i.iteration]["rank"]) > max(2, 0.02 * told[i.iteration]["rank"])
        or abs(i.residual / told[i.iteration]["residual"] - 1) > 0.02
    }
    assert far == {}


PUBLISHED = {
    "pbmc_donor_a": (49, {"mse": 3.073, "mae": 0.831, "pearson": 0.9412, "cosine": 0.9554}),
    "klein_d2_d4": (31, {"mse": 2.250, "pearson": 0.9035}),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_paper_preset_gives_what_was_published(shared, tmp_path, name):
    iterations, scores = PUBLISHED[name]
    source, result = masked(shared, name), tmp_path / "result.zarr"
    summary, used = run("impute", source, result, "--preset", "paper")
    assert used < 700e6
    assert 1.0 < summary["forecast_memory_bytes"] / summary["peak_memory_bytes"] < 1.5
    assert abs(summary["iterations"] - iterations) <= 2
    assert summary["converged"]
    assert summary["residual"] < 1e-4
    found, _ = run("score", result, "--held-out", source)
    assert {k: found[k] for k in scores} == pytest.approx(scores, rel=0.005)
    assert_follows(Imputation.open(result).history, trace_of(shared, name))


@pytest.mark.parametrize(("name", "iterations"), [("pbmc_donor_a", 17), ("klein_d2_d4", 13)])
def test_the_first_iterations_follow_the_published_trace(shared, name, iterations):
    """As far as the ranks of the trace pass 5: sv rises by R and falls back, and the zero iterations count."""
    matrix = ExpressionMatrix.open(masked(shared, name))
    result = impute(matrix, preset="paper", max_iterations=iterations)
    trace = trace_of(shared, name)
    history = result.history
    assert len(history) == iterations
    assert_follows(history, trace)
    early = trace[: trace.index(next(step for step in trace if step["rank"] > 5))]
    assert list(history["rank"][: len(early)]) == [step["rank"] for step in early]
    assert list(history.residual[: len(early)]) == pytest.approx([step["residual"] for step in early], rel=0.02)
    assert list(history.threshold) == pytest.approx([step["threshold"] for step in trace[:iterations]], rel=1e-4)
    scores = score_held_out(result, ExpressionMatrix.open(masked(shared, name), "held_out"), matrix)
    assert scores["mse"] == pytest.approx(trace[iterations - 1]["mse"], rel=0.005)


@pytest.mark.parametrize(
    ("name", "mse", "rank"), [("pbmc_donor_a", 2.93, 64), ("mouse_bladder", 1.70, 96), ("klein_d2_d4", 2.14, 96)]
)
def test_the_default_preset_does_better_at_a_small_rank(shared, name, mse, rank):
    """The published method ends at 3.073 (rank 898), 1.901 (936) and 2.250 (845)."""
    matrix = ExpressionMatrix.open(masked(shared, name))
    result = impute(matrix)
    scores = score_held_out(result, ExpressionMatrix.open(masked(shared, name), "held_out"), matrix)
    assert scores["mse"] <= mse
    assert result.rank <= rank
    assert result.summary["converged"]
    assert result.summary["iterations"] == result.summary["chosen_iteration"] + Settings().patience


@pytest.mark.parametrize(
    ("source", "preset", "scratch"),
    [
        ("reference/pbmc_donor_a_mask10", "auto", "memory"),
        ("reference/pbmc_donor_a_mask10", "auto", "zarr"),
        ("data/baron_downsampled", "denoise", "memory"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_forecast_holds(shared, tmp_path, source, preset, scratch):
    """Peak memory of the whole process, imports included."""
    where = "memory" if scratch == "memory" else f"zarr:{tmp_path}"
    words = ["impute", shared / f"{source}.h5ad", tmp_path / "r.zarr", "--preset", preset, "--scratch", where]
    command = [sys.executable, "-m", "scialm_dask", *map(str, words), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert 1.0 < summary["forecast_memory_bytes"] / summary["peak_memory_bytes"] < 1.5
