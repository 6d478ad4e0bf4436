import json
import os
import subprocess
import sys
import time

import anndata
import numpy as np
import pandas as pd
import psutil
import pytest
import zarr
from in_process import in_process
from problems import low_rank_counts

from scialm_dask import InputError, evaluate_imputation
from scialm_dask.compare import tables as written
from scialm_dask.compare.clustering import cluster
from scialm_dask.compare.methods import METHODS, QUOTED, contestants, expanded
from scialm_dask.compare.tables import write_evaluation
from scialm_dask.events import Note, Scored, Stage


@pytest.fixture(scope="module")
def cells():
    """Counts of low rank, of two kinds of cells."""
    X = low_rank_counts(160, 60, density=0.4).astype(np.float32)
    kinds = np.where(np.arange(160) < 90, "a", "b")
    half = X.tolil()
    half[:90, :30] *= 20
    half[90:, 30:] *= 20
    obs = pd.DataFrame({"kind": kinds, "one": "x"}, index=[f"cell{i}" for i in range(160)])
    return anndata.AnnData(half.tocsr(), obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(60)]))


@pytest.fixture(scope="module")
def path(cells, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def evaluation(cells):
    seen = []
    methods = ["softimpute", "saver"]
    with in_process():
        found = evaluate_imputation(
            cells, methods=methods, seeds=[0, 1], split=False, labels="kind", listen=seen.append
        )
    assert sum(isinstance(event, Scored) for event in seen) == len(found.scores)
    return found


def titles_in(path):
    return [line.removeprefix("## ") for line in path.read_text().splitlines() if line.startswith("## ")]


def rows(evaluation, **which):
    table = evaluation.scores
    for column, value in which.items():
        table = table[table[column] == value]
    return table


def test_every_method_has_a_row_for_each_experiment_and_seed(evaluation):
    for method in ("softimpute", "gene-mean"):
        assert list(rows(evaluation, method=method, experiment="masking")["seed"]) == [0, 1]


def test_completion_beats_the_mean_of_genes_on_a_matrix_of_low_rank(evaluation):
    summary = evaluation.summary()
    masking = summary[summary["experiment"] == "masking"].set_index("method")
    assert masking.loc["softimpute", "mse"] < masking.loc["gene-mean", "mse"]
    assert masking.loc["softimpute", "pearson"] > masking.loc["gene-mean", "pearson"]
    assert masking.loc["softimpute", "seconds"] > 0


def test_answers_to_counts_are_scored_on_the_normalised_scale(cells, tmp_path):
    """Twice the training counts are, normalised, twice what was observed."""
    methods = ["own_methods:doubled_counts", "own_methods:wrong_shape"]
    with in_process():
        found = evaluate_imputation(cells, methods=methods, shares=[], seeds=[0])
    assert set(found.scores["experiment"]) == {"count split"}
    ratio = found.scores.set_index("method")["mean_ratio"]
    assert ratio["as observed"] == pytest.approx(1, abs=0.02)
    assert ratio["own_methods:doubled_counts"] == pytest.approx(2 * ratio["as observed"], rel=1e-5)
    assert rows(found, method="own_methods:wrong_shape")["note"].item() == "gave 3 × 2"
    write_evaluation(found, tmp_path, {})
    assert titles_in(tmp_path / "summary.md") == ["AnnData:X, 20% of the molecules unseen, all entries"]


def test_a_truth_alone_is_tabled_and_drawn(cli, path, tmp_path):
    words = ["--reference", path, "--methods", "alra", "--mask", "", "--no-count-split", "--seeds", 1, "--json"]
    with in_process():
        result = cli("evaluate", path, tmp_path / "out", *words)
    assert result.exit_code == 0, result.exception
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["truth as observed"]["relative_error"] < 1e-6
    assert titles_in(tmp_path / "out" / "summary.md") == ["cells, all entries against a truth"]
    assert {"experiment", "share", "relative_error"} <= set(pd.read_csv(tmp_path / "out" / "summary.csv"))
    assert [p.stem for p in (tmp_path / "out" / "figures").glob("*.svg")] == ["truth-scores"]


def test_what_was_written_before_a_failure_is_kept_under_another_name(cli, path, tmp_path, monkeypatch):
    def fail(figure, path):
        raise RuntimeError("no ink")

    monkeypatch.setattr(written.plotting, "save", fail)
    words = ["--methods", "gene-mean", "--no-count-split", "--seeds", 1]
    with in_process():
        result = cli("evaluate", path, tmp_path / "out", *words)
    assert str(result.exception) == "no ink"
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("out.")
    assert f"kept in {kept}" in result.stderr
    assert len(pd.read_csv(kept / "scores.csv")) == 1
    assert not list(kept.glob("summary*"))


def test_quotations_are_marked(evaluation):
    quoted = rows(evaluation, method="saver")
    assert set(quoted["status"]) == {"quoted"}
    assert list(quoted["dataset"]) == ["PBMC, as published", "Campbell, as published"]
    assert list(quoted["pearson"]) == [0.7768, 0.3389]
    assert quoted["note"].str.contains("not run here").all()


def test_genes_are_scored_over_the_seeds_together(evaluation):
    genes = evaluation.genes
    one = genes[(genes["experiment"] == "masking") & (genes["method"] == "softimpute")]
    hidden = rows(evaluation, experiment="masking", method="softimpute")["n"].sum()
    assert one["n"].sum() == hidden
    assert set(one["gene"]) <= {f"gene{j}" for j in range(60)}


def test_labelled_cells_are_clustered_raw_masked_and_imputed(evaluation):
    clusters = evaluation.clusters
    assert set(zip(clusters["experiment"], clusters["method"], strict=True)) == {
        (kind, method) for kind in ("masking", "all data") for method in ("as observed", "softimpute")
    }
    raw = clusters[(clusters["experiment"] == "all data") & (clusters["method"] == "as observed")].iloc[0]
    assert raw["kmeans_ari"] > 0.6  # they are well apart
    assert raw["leiden_nmi"] > 0.3
    assert all(xy.shape == (160, 2) for xy in evaluation.umap.values())


def test_clusters_are_written_and_drawn(evaluation, tmp_path):
    write_evaluation(evaluation, tmp_path, {})
    assert "SAVER (PBMC, as published): Pearson r 0.7768, quoted" in (tmp_path / "summary.md").read_text()
    assert len(pd.read_csv(tmp_path / "clusters.csv")) == 4
    assert len(pd.read_csv(tmp_path / "umap.csv.gz")) == 4 * 160
    summary = pd.read_csv(tmp_path / "summary.csv")
    raw = summary[(summary["experiment"] == "all data") & (summary["method"] == "as observed")]
    assert raw["kmeans_ari"].item() > 0.6
    assert titles_in(tmp_path / "summary.md") == [
        "AnnData:X, 10% of the non-zeros hidden",
        "Clusters: AnnData:X, 10% of the non-zeros hidden",
        "Clusters: AnnData:X, nothing hidden",
        "Quoted",
    ]
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert {f"{kind}-{what}" for kind in ("masking", "all-data") for what in ("clusters", "cells")} <= drawn


def test_the_command_writes_tables_and_figures(cli, path, tmp_path):
    folder = tmp_path / "out"
    words = ["evaluate", path, folder, "--methods", "complete,own_methods:fails", "--mask", "0.2", "--seeds", 1]
    sweep = ["--sweep", "max-rank=2,4", "--no-count-split", "--json"]
    result = cli(*words, *sweep)
    assert result.exit_code == 0, result.stderr
    scores = pd.read_csv(folder / "scores.csv")
    assert set(scores.loc[scores["method"] == "complete", "setting"]) == {"max_rank=2", "max_rank=4"}
    assert scores.loc[scores["method"] == "complete", "note"].str.contains("rank").all()
    assert (scores.loc[scores["method"] == "complete", "peak_bytes"] > 0).all()
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["masking 20% own_methods:fails"] == "failed"
    best = scores[(scores["share"] == 0.2) & (scores["setting"] == "max_rank=4")]["mse"].item()
    assert told["masking 20% complete max_rank=4"]["mse"] == pytest.approx(best)
    assert {f.name for f in (folder / "figures").glob("*.svg")} >= {
        "masking-20-scores.svg",
        "masking-20-effort.svg",
        "over-max_rank.svg",
    }
    for name in ("summary.csv", "genes.csv.gz"):
        assert (folder / name).stat().st_size > 0
    assert titles_in(folder / "summary.md") == ["cells, 20% of the non-zeros hidden"]
    assert "| own_methods:fails | failed |" in (folder / "summary.md").read_text()
    failed = scores[scores["method"] == "own_methods:fails"].iloc[0]
    assert failed["status"] == "failed"
    assert np.isnan(failed["mse"])
    assert "too nice" in failed["note"]
    assert json.loads((folder / "evaluation.json").read_text())["versions"]["scialm-dask"]
    assert "failed: ValueError: the matrix is too nice" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "magick"], "no method is called 'magick'"),
        (["--methods", "json:nothing"], "cannot be imported"),
        (["--mask", "1.5"], "between 0 and 1"),
        (["--mask", "much"], "numbers separated by commas"),
        (["--sweep", "rank=3"], "give field=value"),
        (["--sweep", "increment=10,x"], "give values of increment"),
        (["--sweep", "increment=0"], "give a whole number of at least 1"),
        (["--sweep", "stop=never"], "choose one of"),
        (["--sweep", "increment=10,100"], "increment has no effect with preset "),
        (["--sweep", "max_rank=3", "--methods", "knn"], "no method has settings to sweep"),
        (["--labels", "colour"], "no column 'colour'"),
        (["--labels", "one"], "two labels at least"),
        (["--reference", "nowhere.zarr"], "no such file"),
        (["--method-timeout", "0"], "method_timeout is 0"),
        (["--memory-limit", "much"], "memory limit is 'much'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(cli, path, tmp_path, options, words):
    options = ["--methods", "complete", *options]
    result = cli("evaluate", path, tmp_path / "out", "--seeds", 1, "--mask", "", "--no-count-split", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("error") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_it_leaves_neither_method_nor_folder(path, tmp_path):
    words = ["--methods", "own_methods:never_ends", "--mask", "", "--quiet"]
    paths = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    command = [sys.executable, "-m", "scialm_dask", "evaluate", path, tmp_path / "out", *words]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}) as evaluation:
        until(lambda: list(tmp_path.rglob("pid")))
        (pid,) = tmp_path.rglob("pid")
        method = int(pid.read_text())
        evaluation.kill()
    until(lambda: not list(tmp_path.iterdir()))
    assert not psutil.pid_exists(method) or psutil.Process(method).status() == psutil.STATUS_ZOMBIE


def until(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("installed", "words", "left"),
    [
        (True, "about 48 s for 8 runs, of which 28 s for scvi", 48),  # 4 of 7 s and 4 of 5
        (False, "about 20 s for 8 runs, of which 20 s for gene-mean", 20),
    ],
)
def test_it_tells_beforehand_how_long_it_may_take(cells, monkeypatch, installed, words, left):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True if installed or name != "scvi" else None)
    told = []
    with in_process(), pytest.raises(StopIteration):

        def listen(event):
            told.append(event)
            if isinstance(event, Stage):
                raise StopIteration

        evaluate_imputation(cells, methods=["scvi"], seeds=[0, 1], method_timeout=7, listen=listen)
    (note,) = (event.words for event in told if isinstance(event, Note))
    assert note.startswith(words)
    assert told[-1].detail == f"1 of 8, about {left} s left"


@pytest.mark.parametrize("stage", ["kmeans", "leiden"])
def test_there_are_as_many_clusters_as_labels(stage):
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), 60)
    components = (rng.normal(size=(4, 6)) * 6)[kinds] + rng.normal(size=(240, 6))
    scores, picture = cluster(components.astype(np.float32), pd.Series(kinds.astype(str)), 0)
    assert scores["leiden_clusters"] == 4
    assert scores[f"{stage}_ari"] == pytest.approx(1)
    assert picture.shape == (240, 2)


def test_absent_chunks_are_zeros_if_that_is_said(cli, tmp_path):
    array = zarr.create_array(tmp_path / "bare.zarr", shape=(20, 9), chunks=(5, 9), dtype="f4")
    array[:15] = 1
    words = ["evaluate", tmp_path / "bare.zarr", tmp_path / "out", "--labels", "type"]
    assert "1 of 4 chunks" in cli(*words).stderr
    assert "no column 'type'" in cli(*words, "--missing-chunks-are-zeros").stderr


def test_a_truth_is_looked_at_before_anything_is_run(cells):
    with pytest.raises(InputError, match="90 cells"):
        evaluate_imputation(cells, methods=[], reference=cells[:90].copy(), listen=lambda _: pytest.fail("it ran"))
    logarithms = cells.copy()
    logarithms.X = logarithms.X.log1p()
    logarithms.uns["log1p"] = {}
    with pytest.raises(InputError, match="holds logarithms"):
        evaluate_imputation(cells, methods=[], reference=logarithms)


def test_count_splitting_what_is_no_counts_is_refused(cells):
    halves = cells.copy()
    halves.X = halves.X * 0.5
    with pytest.raises(InputError, match="which count splitting needs"):
        evaluate_imputation(halves, split=True)


def test_a_method_that_needs_counts_says_so(cells):
    halves = cells.copy()
    halves.X = halves.X * 0.3
    with in_process():
        found = evaluate_imputation(halves, methods=["knn"], seeds=[0])
    assert rows(found, method="knn")["status"].item() == "needs counts"


def test_sweeps_run_over_every_combination_and_fill_ellipses():
    listed = contestants(["paper", "knn"], ["increment=10,50,100,…,250", "epsilon=1e-3,1e-4"])
    assert [c.settings["increment"] for c in listed[:-1:2]] == [10, 50, 100, 150, 200, 250]
    assert [c.settings["epsilon"] for c in listed[:2]] == [1e-3, 1e-4]
    assert listed[-1].method == "knn"
    assert listed[-1].settings == {}
    assert [c.words for c in contestants(["complete"], ["scaling=0.5,0.5;0.75,0.5;none"])][1] == "scaling=0.75,0.5"


def test_groups_hold_every_method():
    assert set(expanded(["all"])) == {*METHODS, *QUOTED} - {"auto"}
    assert set(expanded(["peers"])) == {*METHODS, *QUOTED} - {"auto", "denoise", "complete", "paper"}
