import json

import numpy as np
import pandas as pd
import pytest
import zarr
from pooled_twins import sparse_simulation

from scialm_dask import Imputation
from scialm_dask.pooled.als import PooledALS
from scialm_dask.pooled.design import read_design


@pytest.fixture
def experiment(tmp_path, store_of):
    """A store of measurements and the table of its design."""
    M, P = sparse_simulation(1)
    D = (M @ P).astype(np.float32)
    table = tmp_path / "P.csv"
    pd.DataFrame(P, index=[f"G{gene}" for gene in range(len(P))]).to_csv(table)
    return store_of(D), table, D, P


def test_unpool_writes_a_result_like_every_other(cli, tmp_path, experiment):
    source, table, D, P = experiment
    done = cli("unpool", source, tmp_path / "out.zarr", "--pools", table, "--rank", 4, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output.splitlines()[-1])
    result = Imputation.open(tmp_path / "out.zarr")
    expected = PooledALS(4).fit(D, P).to_dask().compute(scheduler="threads")
    assert report["rank"] == result.rank == 4
    assert result.obs.index[0] == "cell0"
    np.testing.assert_allclose(result[:, "G3"], expected[:, 3], rtol=1e-3, atol=1e-4)
    assert result.history["objective"].is_monotonic_decreasing


def test_unpool_by_nuclear_norm(cli, tmp_path, experiment):
    source, table, D, P = experiment
    delta = 0.05 * np.linalg.norm(D)
    words = ["--pools", table, "--method", "nuclear", "--delta", delta, "--json"]
    done = cli("unpool", source, tmp_path / "out.zarr", *words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.output.splitlines()[-1])
    X = Imputation.open(tmp_path / "out.zarr").to_dask().compute(scheduler="threads")
    assert X.min() >= 0
    assert np.linalg.norm(X @ P - D) <= delta * (1 + 1e-4)
    assert report["certificate"] <= 1e-3 * report["objective"]


def test_chunks_that_zarr_left_out(cli, tmp_path, experiment):
    _, table, D, _ = experiment
    D[30:] = 0
    zarr.create_array(tmp_path / "bare.zarr", data=D, chunks=(30, 10))
    words = ("unpool", tmp_path / "bare.zarr", tmp_path / "out.zarr", "--pools", table, "--rank", 2, "--quiet")
    assert "1 of 2 chunks" in cli(*words).stderr
    done = cli(*words, "--missing-chunks-are-zeros")
    assert done.exit_code == 0, done.output
    assert not Imputation.open(tmp_path / "out.zarr")[30:].any()


def test_pools_are_matched_by_name_if_there_are_the_same_names(cli, tmp_path, experiment, store_of):
    source, table, D, P = experiment
    pools, genes = [f"pool{pool}" for pool in range(10)], [f"G{gene}" for gene in range(len(P))]
    named = store_of(D, "named.zarr", names=pools)
    order = np.random.default_rng(0).permutation(10)
    pd.DataFrame(P, genes, pools).iloc[:, order].to_csv(tmp_path / "mixed.csv")
    results = {}
    for path, design in ((source, table), (named, tmp_path / "mixed.csv"), (source, tmp_path / "mixed.csv")):
        done = cli("unpool", path, tmp_path / "out.zarr", "--pools", design, "--rank", 4, "--overwrite")
        assert done.exit_code == 0, done.output
        assert ("pools are matched by position" in done.stderr) == (path == source)
        results[path, design] = Imputation.open(tmp_path / "out.zarr")[:, :]
    right, by_name, by_position = results.values()
    np.testing.assert_allclose(by_name, right, rtol=1e-3, atol=1e-4)
    assert not np.allclose(by_position, right, rtol=1e-2, atol=1e-2)


def test_bad_input_is_one_line(cli, tmp_path, experiment):
    source, table, _, P = experiment
    np.save(tmp_path / "P.npy", P[:, :9])
    for words, said in [
        (["--pools", tmp_path / "P.npy"], "10 columns, the design has 9 pools"),
        (["--pools", tmp_path / "none.csv"], "cannot be read as a design"),
        (["--pools", source], "unknown kind of file"),
        (["--pools", table, "--method", "nuclear", "--delta", "-1"], "delta is -1.0; give a number of at least 0"),
        (["--pools", table, "--rank", "0"], "rank is 0; give a whole number of at least 1"),
    ]:
        done = cli("unpool", source, tmp_path / "out.zarr", *words)
        assert done.exit_code == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.zarr").exists()


def test_pools_draws_and_describes(cli, tmp_path):
    words = ["--genes", 40, "--pools", 12, "--per-gene", 3, "--json"]
    done = cli("pools", tmp_path / "P.csv", *words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.output.splitlines()[-1])
    assert report["pools_per_gene"] == [3, 3]
    assert report["genes_per_pool"] == [10, 10]
    assert read_design(tmp_path / "P.csv").shape == (40, 12)
    again = cli("pools", tmp_path / "P.csv", "--json")
    assert json.loads(again.output.splitlines()[-1]) == report
    refused = cli("pools", tmp_path / "P.csv", *words)
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
    assert cli("pools", tmp_path / "Q.csv", "--genes", 40).exit_code == 2
