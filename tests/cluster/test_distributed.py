"""Two worker processes give what threads give."""

import dataclasses
import gc
import itertools
import os
import signal
from pathlib import Path

import anndata
import dask
import dask.array as da
import numpy as np
import pytest
from dask.distributed import Client, LocalCluster
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, Imputation, InputError, biological_zeros, impute, resume
from scialm_dask.errors import StoppedError
from scialm_dask.evaluate.metrics import score_held_out
from scialm_dask.events import Iteration
from scialm_dask.run.checkpointing import Checkpointing
from scialm_dask.run.cluster import ask_everyone
from scialm_dask.run.job import peak_memory


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture
def path(store_of):
    return store_of(low_rank_counts(160, 90, density=0.5, seed=3))


SETTINGS = {
    "complete": {"preset": "complete", "validation": 0.05, "max_iterations": 12},
    "paper": {"preset": "paper", "max_iterations": 10},
}


@pytest.mark.parametrize("preset", list(SETTINGS))
@pytest.mark.parametrize("kind", ["memory", "zarr"])
def test_processes_give_what_threads_give(client, path, tmp_path, preset, kind):
    matrix = ExpressionMatrix.open(path, blocks=5)
    (tmp_path / "scratch").mkdir()
    scratch = kind if kind == "memory" else f"zarr:{tmp_path / 'scratch'}"
    with client.as_current():
        distributed = impute(matrix, scratch=scratch, **SETTINGS[preset])
        distributed.to_zarr(tmp_path / "r.zarr")
        scores = score_held_out(distributed, matrix, matrix)
        left = distributed.left.compute()
    with dask.config.set(scheduler="threads"):
        threaded = impute(matrix, **SETTINGS[preset])
        expected = threaded.left.compute()
        assert score_held_out(threaded, matrix, matrix) == pytest.approx(scores, rel=1e-4)
    assert list(distributed.history["rank"]) == list(threaded.history["rank"])
    assert np.linalg.norm(left - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(distributed.right - threaded.right) < 1e-4 * np.linalg.norm(threaded.right)
    np.testing.assert_array_equal(Imputation.open(tmp_path / "r.zarr").right, distributed.right)
    del distributed
    assert os.listdir(tmp_path / "scratch") == []


def test_denoising_gives_the_same_by_whatever_it_is_computed(client, path, tmp_path):
    """One block, threads, processes, and runs that are stopped before each pass and resumed by the others."""
    with dask.config.set(scheduler="synchronous"):
        expected = impute(ExpressionMatrix.open(path, blocks=1), preset="denoise")[:, :]
    assert np.ptp(expected) > 1
    for blocks, scheduler in itertools.product([1, 3, 7], ["threads", client]):
        matrix, found = ExpressionMatrix.open(path, blocks=blocks), []
        with dask.config.set(scheduler=scheduler):
            found.append(impute(matrix, preset="denoise")[:, :])
            for passes in (2, 3) if blocks == 3 else (2,):
                asked, folder = [], tmp_path / f"{blocks}{passes}{scheduler == client}"
                stop = Checkpointing(folder, stop=lambda: len(asked.append(1) or asked) > passes)  # noqa: B023
                with pytest.raises(StoppedError):
                    impute(matrix, preset="denoise", checkpoint=stop)
                with dask.config.set(scheduler=client if scheduler == "threads" else "threads"):
                    found.append(resume(folder)[:, :])
        for values in found:
            assert np.linalg.norm(values - expected) <= 1e-4 * np.linalg.norm(expected)


def test_the_scheduler_holds_no_more_tasks_from_iteration_to_iteration(client, path):
    """The state is a task for each block; what is done is forgotten."""
    held = []

    def count(event):
        if isinstance(event, Iteration):
            held.append(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))

    result = impute(ExpressionMatrix.open(path, blocks=5), preset="paper", max_iterations=20, listen=count)
    assert result.rank > 0
    assert max(held[10:]) <= 1.5 * max(held[:10])


def test_a_temporary_copy_from_before_the_cluster_must_be_seen_by_its_workers(client, store_of, monkeypatch):
    matrix = ExpressionMatrix.open(store_of(low_rank_counts(160, 90, density=0.5, seed=3).tocsc()))
    with client.as_current():
        assert matrix.for_workers() is matrix
        copy = os.path.dirname(matrix.rows.path)
        monkeypatch.setattr("scialm_dask.data.temporary.is_seen", lambda folder: folder != Path(copy))
        for use in (impute, ExpressionMatrix.to_dask):
            with pytest.raises(InputError, match=rf"is put in {os.path.dirname(copy)}, which they do not see; set"):
                use(matrix)


def test_a_matrix_in_memory_is_not_sent_in_graphs(client, tmp_path):
    """Distributed warns of large graphs, and warnings are errors here."""
    counts = low_rank_counts(1200, 300, density=0.5, seed=3)
    settings = {"preset": "complete", "max_rank": 4, "max_iterations": 5}
    options = {"temporary-directory": str(tmp_path), "distributed.admin.large-graph-warning-threshold": "500 kB"}
    with client.as_current(), dask.config.set(options):
        result = impute(counts, **settings)
        new = result.transform(counts[:1000])
        assert len(os.listdir(tmp_path)) == 2
        left, others = result.left.compute(), new.left.compute()
    with dask.config.set(scheduler="threads"):
        again = impute(counts, **settings)
        np.testing.assert_allclose(left, again.left.compute(), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(others, again.transform(counts[:1000]).left.compute(), rtol=1e-3, atol=1e-3)
    del result, new
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_the_peak_is_that_of_the_largest_process(client, path):
    """A worker that has held much more than this process, at some time."""
    much = peak_memory() + (200 << 20)
    (first, second) = client.run(os.getpid)
    client.run(lambda: np.ones(much, np.int8).sum(), workers=[first])
    with client.as_current():
        summary = impute(path, **SETTINGS["complete"]).summary
    peaks = client.run(peak_memory)
    assert peaks[second] < much < peaks[first]
    assert summary["peak_memory_bytes"] == peaks[first]
    assert summary["peak_memory_bytes_in_all"] == pytest.approx(sum(peaks.values()) + peak_memory(), rel=0.05)
    with dask.config.set(scheduler="threads"):
        alone = impute(path, **SETTINGS["complete"]).summary
    assert much - (200 << 20) <= alone["peak_memory_bytes"] == alone["peak_memory_bytes_in_all"] < much


def test_a_plan_foresees_what_all_processes_take(client, path):
    from scialm_dask.config import preset
    from scialm_dask.run.checkpointing import Job
    from scialm_dask.run.plan import plan

    with client.as_current():
        told = plan(Job(ExpressionMatrix.open(path), preset("complete")))
    assert told["workers"] == 2
    assert 2 * told["peak_memory_bytes"] < told["memory_bytes_in_all"] < 4 * told["peak_memory_bytes"]


def test_who_dies_when_asked_is_left_out(client):
    victim, other = client.run(os.getpid).values()

    def answer():
        if os.getpid() == victim:
            os.kill(victim, signal.SIGKILL)
        return os.getpid()

    with client.as_current():
        assert sorted(ask_everyone(answer)) == sorted([os.getpid(), other])


def test_without_a_cluster_any_more_this_process_answers():
    cluster = LocalCluster(n_workers=1, processes=False, dashboard_address=":0")
    with Client(cluster) as left, left.as_current():
        assert ask_everyone(os.getpid) == [os.getpid()]  # all of it is in this process, which answers once
        left.close()
        cluster.close()
        assert ask_everyone(os.getpid) == [os.getpid()]


def test_workers_write_what_this_process_would_write(client, path, tmp_path):
    """Dense and sparse X, of the same bytes; chunks hold rows of several blocks, so that tasks need their neighbours."""
    matrix, written = ExpressionMatrix.open(path, blocks=5), []
    with dask.config.set(scheduler="threads"):
        result, zeros = impute(matrix, **SETTINGS["complete"]), biological_zeros(matrix)
        left = result.left.compute()
    result.left = da.from_array(left, chunks=(50, -1))
    zeros = dataclasses.replace(zeros, left=da.from_array(zeros.left.compute(scheduler="threads"), chunks=(70, -1)))
    for scheduler in ("threads", client):
        with dask.config.set(scheduler=scheduler):
            folder = tmp_path / ("here" if scheduler == "threads" else "there")
            folder.mkdir()
            result.to_zarr(folder / "dense.zarr", dense=True, keep_observed=matrix)
            result.to_zarr(folder / "sparse.zarr", preserve_zeros=zeros)
        stores = [anndata.read_zarr(folder / name).X for name in ("dense.zarr", "sparse.zarr")]
        written.append([stores[0], stores[1].toarray()])
    for here, there in zip(*written, strict=True):
        np.testing.assert_array_equal(here, there)
    made = client.run_on_scheduler(lambda dask_scheduler: {str(group) for group in dask_scheduler.task_prefixes})
    assert any("put_rows" in name for name in made)
    assert any("put_values" in name for name in made)


def test_an_asynchronous_client_is_refused_in_one_line():
    import asyncio

    async def use():
        async with Client(processes=False, n_workers=1, dashboard_address=":0", asynchronous=True):
            impute(low_rank_counts(60, 30, density=0.5, seed=3))

    with pytest.raises(InputError, match=r"asynchronous, but this call waits.*threads"):
        asyncio.run(use())


@pytest.mark.parametrize("end", ["restart", pytest.param("close", marks=pytest.mark.slow)])
def test_a_result_whose_workers_are_gone_says_so_in_one_line(path, tmp_path, end):
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as connected,
    ):
        result = impute(path, scratch="memory", preset="denoise")
        assert np.isfinite(result[0, 0])
        getattr(connected, end)()
        for use in (lambda: result[0, 0], lambda: result.left, lambda: result.to_zarr(tmp_path / "r.zarr")):
            with pytest.raises(InputError, match=r"can no longer reach: their cluster was closed or restarted"):
                use()
    assert not (tmp_path / "r.zarr").exists()
    dask.config.config.pop("scheduler", None)  # which a Client leaves there that is closed within its block
