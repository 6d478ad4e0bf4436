"""The commands impute and score: what they print, write and refuse."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from scialm_dask import Imputation
from scialm_dask.cli.group import command_of

QUICK = ("--preset", "paper", "--max-iterations", "6", "--max-rank", "5")


def listing(folder):
    return sorted(os.listdir(folder))


def last_json(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_impute_tells_what_it_did(cli, counts, store_of, tmp_path):
    summary = last_json(cli("impute", store_of(counts), tmp_path / "r.zarr", *QUICK, "--json"))
    assert {k: summary[k] for k in ("n_cells", "n_genes", "n_observed", "iterations", "converged")} == {
        "n_cells": 120,
        "n_genes": 40,
        "n_observed": counts.nnz,
        "iterations": 6,
        "converged": False,
    }
    assert summary["stop_reason"] == "6 iterations made, the most allowed"
    assert 0 < summary["rank"] <= 5
    assert 0 < summary["residual"] < 1
    assert summary["passes"] > summary["iterations"]
    assert summary["seconds"] > 0
    assert summary["peak_memory_bytes"] > 50e6
    assert (summary["n_empty_cells"], summary["n_empty_genes"]) == (
        (counts.getnnz(axis=1) == 0).sum(),
        (counts.getnnz(axis=0) == 0).sum(),
    )
    result = Imputation.open(tmp_path / "r.zarr")
    assert result.rank == summary["rank"]
    assert len(result.history) == 6
    assert result.history.passes.iloc[-1] < summary["passes"]


def test_a_rank_without_limit(cli, counts, store_of, tmp_path):
    words = ("--preset", "complete", "--max-iterations", "3", "--max-rank", "none", "--json", "--quiet")
    assert cli("impute", store_of(counts), tmp_path / "r.zarr", "--validation", "0.1", *words).exit_code == 0
    assert Imputation.open(tmp_path / "r.zarr").summary["settings"]["max_rank"] is None


def test_words_for_people(cli, counts, store_of, tmp_path):
    result = cli("impute", store_of(counts), tmp_path / "r.zarr", *QUICK)
    assert result.exit_code == 0
    first, *others, last = result.stdout.splitlines()
    assert first == "completed 120 cells × 40 genes: rank 5 after 6 iterations"
    assert last.startswith(f"written to {tmp_path / 'r.zarr'}; look at it by `scialm-dask report")
    assert any(line.startswith("beware: It did not converge.") for line in others)
    assert [line for line in result.stderr.splitlines() if line.startswith("iteration 6: rank")]
    assert cli("impute", store_of(counts), tmp_path / "q.zarr", *QUICK, "--quiet").stderr == ""


def test_mask_impute_score(cli, tmp_path, store_of):
    """The way from counts to scores, with the default preset; better than the mean of each gene."""
    from problems import low_rank_counts

    path = store_of(low_rank_counts(150, 80, density=0.9, rank=2, dispersion=8, seed=1))
    assert cli("mask", path, tmp_path / "m.zarr").exit_code == 0
    summary = last_json(
        cli(
            "impute", tmp_path / "m.zarr", tmp_path / "r.zarr", "--preset", "complete", "--validation", "0.05", "--json"
        )
    )
    assert summary["converged"]
    assert summary["chosen_iteration"] < summary["iterations"]
    scores = last_json(cli("score", tmp_path / "r.zarr", "--held-out", tmp_path / "m.zarr", "--json"))
    masked = anndata.read_zarr(tmp_path / "m.zarr")
    true = masked.layers["held_out"]
    rows, columns = true.nonzero()  # which needs indptr and indices of one type
    y, x = true.data, Imputation.open(tmp_path / "r.zarr").to_dask().compute()[rows, columns].astype(np.float64)
    means = masked.X.sum(axis=0).A1 / masked.X.getnnz(axis=0)
    assert scores["n"] == true.nnz
    for prefix, guess in (("", x), ("gene_mean_", means[columns])):
        assert scores[f"{prefix}mse"] == pytest.approx(np.mean((guess - y) ** 2), rel=1e-4)
        assert scores[f"{prefix}mae"] == pytest.approx(np.mean(np.abs(guess - y)), rel=1e-4)
        assert scores[f"{prefix}pearson"] == pytest.approx(np.corrcoef(guess, y)[0, 1], rel=1e-4)
        cosine = guess @ y / np.linalg.norm(guess) / np.linalg.norm(y)
        assert scores[f"{prefix}cosine"] == pytest.approx(cosine, rel=1e-4)
    assert scores["mse"] < 0.7 * scores["gene_mean_mse"]


@pytest.mark.parametrize("scratch", ["memory", "zarr"])
def test_blocks_and_scratch_do_not_change_the_result(cli, counts, store_of, tmp_path, scratch):
    """1, 3 and 7 blocks: the same factors to 1e-4."""
    path = store_of(counts)
    (tmp_path / "scratch").mkdir()
    where = scratch if scratch == "memory" else f"zarr:{tmp_path / 'scratch'}"
    results = []
    for blocks in (1, 3, 7):
        words = (
            "--preset",
            "complete",
            "--validation",
            "0.1",
            "--max-iterations",
            "12",
            "--scratch",
            where,
            "--blocks",
            blocks,
        )
        assert last_json(cli("impute", path, tmp_path / f"{blocks}.zarr", *words, "--json"))["n_blocks"] == blocks
        results.append(Imputation.open(tmp_path / f"{blocks}.zarr"))
    for other in results[1:]:
        assert other.summary["chosen_iteration"] == results[0].summary["chosen_iteration"]
        for one, two in ((results[0].left.compute(), other.left.compute()), (results[0].right, other.right)):
            assert np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(one)
    assert listing(tmp_path / "scratch") == []


def test_a_layer_and_the_dense_matrix(cli, counts, store_of, tmp_path):
    path = store_of(counts * 0, raw=counts)
    words = ("--layer", "raw", "--write", "dense", "--keep-observed", *QUICK)
    assert cli("impute", path, tmp_path / "r.zarr", *words).exit_code == 0
    X = anndata.read_zarr(tmp_path / "r.zarr").X
    known = counts.toarray() > 0
    np.testing.assert_array_equal(X[known], counts.toarray()[known])


def refused(cli, path, tmp_path, message, *words):
    """One line on standard error, exit code 2, and nothing written."""
    before = listing(tmp_path)
    result = cli("impute", path, tmp_path / "r.zarr", "--quiet", *(words or QUICK))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("scialm-dask: error: ")
    assert message in result.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, sp.csr_matrix.toarray])
def test_values_that_are_no_expression(cli, counts, store_of, tmp_path, value, form):
    X = counts.astype(np.float64).tolil()
    X[77, 5] = value
    refused(cli, store_of(form(X.tocsr())), tmp_path, f"value {value} at cell 77, gene 5; expression must be finite")


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (sp.csr_matrix((0, 5)), "a matrix of at least one cell and one gene is needed"),
        (np.zeros((3, 0)), "a matrix of at least one cell and one gene is needed"),
        (sp.csr_matrix((6, 4)), "no entry is observed, all are zero; give a matrix with non-zeros"),
        (np.zeros((6, 4)), "chunks of X are missing"),  # Zarr writes none of zeros, which may be lost ones
        (np.full((2, 2), "a"), "not as numbers"),
        (np.ones((2, 2), complex), "not numbers; convert them first"),
    ],
)
def test_matrices_without_numbers(cli, store_of, tmp_path, X, message):
    refused(cli, store_of(X), tmp_path, message)


def test_a_dense_matrix_of_zeros(cli, store_of, tmp_path):
    path = store_of(np.zeros((6, 4)))
    refused(cli, path, tmp_path, "no entry is observed", "--missing-chunks-are-zeros", *QUICK)


def test_infinity_is_not_missing(cli, store_of, tmp_path):
    X = np.ones((5, 4))
    X[2, 1] = np.inf
    refused(cli, store_of(X), tmp_path, "mark missing entries as NaN", "--observed", "finite", *QUICK)
    refused(cli, store_of(X * np.nan), tmp_path, "no entry is observed", "--observed", "finite", *QUICK)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("indices", lambda v: np.where(np.arange(len(v)) == 50, 40, v), "gene index 40 is outside 0 to 39"),
        ("indices", lambda v: np.where(np.arange(len(v)) == 50, -1, v), "gene index -1 is outside 0 to 39"),
        ("indptr", lambda v: v + 1, "indptr does not fit"),
        ("indptr", lambda v: v[::-1], "indptr does not fit"),
    ],
)
def test_damaged_stores(cli, counts, store_of, tmp_path, name, change, message):
    path = store_of(counts)
    array = zarr.open_group(path, mode="r+")["X"][name]
    array[:] = change(array[:])
    refused(cli, path, tmp_path, message)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csr_matrix.toarray])
def test_lost_chunks(cli, counts, store_of, tmp_path, form):
    path = store_of(form(counts))
    (lost, *_) = (p for p in Path(path, "X").rglob("*") if p.name in ("0", "0.0"))
    lost.unlink()
    refused(cli, path, tmp_path, "missing")
    if form is not sp.csr_matrix:
        assert not anndata.read_zarr(path).X[:10].any()  # which is what Zarr makes of it


def test_a_plan_is_of_the_same_matrix_as_the_run(cli, counts, tmp_path):
    zarr.create_array(tmp_path / "bare.zarr", data=counts.toarray() * (np.arange(120) < 60)[:, None], chunks=(60, 40))
    refusal = cli("plan", tmp_path / "bare.zarr")
    assert refusal.exit_code == 2
    assert "1 of 2 chunks" in refusal.stderr
    assert "--missing-chunks-are-zeros" in refusal.stderr
    words = ("plan", tmp_path / "bare.zarr", "--missing-chunks-are-zeros", "--observed", "finite", "--json", "--quiet")
    assert last_json(cli(*words))["n_observed"] == 120 * 40


def test_duplicates_are_summed_and_unsorted_sorted(cli, counts, store_of, tmp_path):
    coo = counts.tocoo()
    order = np.lexsort((-coo.col, coo.row))
    twice = np.repeat(order, 2)
    X = sp.csr_matrix((coo.data[twice], coo.col[twice], counts.indptr * 2), shape=counts.shape)
    for name, matrix in (("once", 2 * counts), ("twice", X)):
        path = store_of(matrix, f"{name}_source.zarr")
        assert cli("impute", path, tmp_path / f"{name}.zarr", *QUICK).exit_code == 0
    one, two = (Imputation.open(tmp_path / f"{name}.zarr") for name in ("once", "twice"))
    assert one.summary["n_observed"] == two.summary["n_observed"] == counts.nnz
    np.testing.assert_allclose(one.to_dask().compute(), two.to_dask().compute(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layer", "spliced"), "has no layers/spliced; its layers are: raw"),
        (("--epsilon", "2"), "epsilon is 2.0; give a number between 0 and 1"),
        (("--validation", "0"), "validation is 0.0; give a number between 0 and 1"),
        (("--max-rank", "0"), "max_rank is 0; give a whole number of at least 1"),
        (("--max-iterations", "0"), "max_iterations is 0; give a whole number of at least 1"),
        (("--scaling", "log"), "scaling is 'log'; give none, poisson, or two exponents"),
        (("--scratch", "disk"), "scratch is 'disk'; give"),
        (("--scratch", "zarr:/no/such/folder"), "no such folder for scratch; create it first"),
        (("--preset", "complete", "--validation", "0.001"), "hides none of"),
        (("--memory-limit", "1MB"), "memory"),
        (("--increment", "7"), "increment has no effect with preset denoise (method denoise)"),
        (("--preset", "paper", "--validation", "0.3"), "validation has no effect with preset paper (stop residual)"),
    ],
)
def test_settings_that_cannot_be(cli, counts, store_of, tmp_path, words, message):
    refused(cli, store_of(counts, raw=counts), tmp_path, message, *words)


def test_destinations_that_cannot_be(cli, counts, store_of, tmp_path):
    path = store_of(counts)
    (tmp_path / "old.zarr").mkdir()
    for destination, message in (
        (path, "overlaps the input"),
        (f"{path}/inside", "overlaps the input"),
        (tmp_path / "old.zarr", "exists already; choose another path or pass --overwrite"),
        (tmp_path / "no" / "out.zarr", "no such folder; create it first"),
    ):
        result = cli("impute", path, destination, *QUICK)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert cli("impute", path, tmp_path / "old.zarr", "--overwrite", *QUICK).exit_code == 0
    assert Imputation.open(tmp_path / "old.zarr").shape == counts.shape
    assert listing(tmp_path) == ["old.zarr", "source.zarr"]


def test_a_source_that_is_not_there(cli, tmp_path):
    refused(cli, tmp_path / "none.zarr", tmp_path, "no such file or folder; check the path")


def test_keep_observed_goes_with_dense(cli, counts, store_of, tmp_path):
    result = cli("impute", store_of(counts), tmp_path / "r.zarr", "--keep-observed")
    assert result.exit_code == 2
    assert "--keep-observed goes with --write dense" in result.stderr


def test_score_refuses_what_does_not_belong_together(cli, counts, store_of, tmp_path):
    path = store_of(counts, held_out=counts)
    other = store_of(counts[:50], "other.zarr", held_out=counts[:50])
    nothing = store_of(counts, "nothing.zarr", held_out=sp.csr_matrix(counts.shape))
    assert cli("impute", path, tmp_path / "r.zarr", *QUICK).exit_code == 0
    for masked, message in (
        (other, "50 cells × 40 genes, but 120 × 40 are expected"),
        (nothing, "holds no entries; hide some with `scialm-dask mask`"),
        (tmp_path / "r.zarr", "has no layers/held_out"),
    ):
        result = cli("score", tmp_path / "r.zarr", "--held-out", masked, "--quiet")
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    result = cli("score", path, "--held-out", path)
    assert result.exit_code == 2
    assert "not a result of this version" in result.stderr


def run(code, *args, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs
    )


MAIN = "from scialm_dask.__main__ import main; main()"


@pytest.mark.parametrize("where", [pytest.param("result", marks=pytest.mark.slow), "scratch"])
def test_a_full_disk(store_of, tmp_path, where):
    """The system refuses files of more than 64 kB, which the factors, or the working state, exceed."""
    path = store_of(sp.random(3000, 60, 0.5, format="csr", random_state=0))
    (tmp_path / "scratch").mkdir()
    words = ("--scratch", f"zarr:{tmp_path / 'scratch'}", "--blocks", "1") if where == "scratch" else ()
    command = (
        MAIN,
        "impute",
        path,
        tmp_path / "r.zarr",
        "--quiet",
        "--preset",
        "paper",
        "--max-iterations",
        "8",
        *words,
    )
    assert run(*command).returncode == 0  # so that nothing is left to compile, whose code would be a large file too
    shutil.rmtree(tmp_path / "r.zarr")
    result = run(
        *command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr
    assert "free some space" in result.stderr
    assert result.stderr.count("\n") == 1
    assert listing(tmp_path) == ["scratch", "source.zarr"]
    assert listing(tmp_path / "scratch") == []


INTERRUPT = """
import os, signal, sys, threading
from scialm_dask.__main__ import main
from scialm_dask.data import written
from scialm_dask.linalg import kernels
stage, calls = sys.argv.pop(1), []
def interrupting(function, at):
    def interrupted(*args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args)
    return interrupted
if stage == "iterating":
    kernels.visit = interrupting(kernels.visit, 20)
else:
    written._put_rows = interrupting(written._put_rows, 2)
main()
"""


@pytest.mark.parametrize(
    ("scratch", "stage"),
    [
        ("memory", "iterating"),
        ("zarr", "writing"),
        pytest.param("memory", "writing", marks=pytest.mark.slow),
        pytest.param("zarr", "iterating", marks=pytest.mark.slow),
    ],
)
def test_interrupting_leaves_nothing(counts, store_of, tmp_path, stage, scratch):
    path = store_of(sp.vstack([counts] * 30, format="csr"))
    (tmp_path / "scratch").mkdir()
    where = scratch if scratch == "memory" else f"zarr:{tmp_path / 'scratch'}"
    result = run(INTERRUPT, stage, "impute", path, tmp_path / "r.zarr", *QUICK, "--blocks", "5", "--write", "dense",
                 "--scratch", where)  # fmt: skip
    assert result.returncode == 130, result.stderr
    assert result.stderr.splitlines()[-1] == "scialm-dask: interrupted; nothing was written"
    assert "Traceback" not in result.stderr
    assert listing(tmp_path) == ["scratch", "source.zarr"]
    assert listing(tmp_path / "scratch") == []


def test_the_command_that_a_result_keeps_has_no_credentials():
    words = ["impute", "https://me:secret@host/a b.zarr", "out.zarr", "--seed", "3"]
    assert command_of(words) == "scialm-dask impute 'https://host/a b.zarr' out.zarr --seed 3"
