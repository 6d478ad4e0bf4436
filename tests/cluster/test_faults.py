"""Faults on a cluster of real processes, by count: the right answer, or a clear error and a checkpoint that resumes."""

import genericpath
import importlib
import os
import signal

import dask
import faults
import numpy as np
import pytest
from dask.distributed import Client, LocalCluster
from problems import low_rank_counts

from scialm_dask import ExpressionMatrix, connect, impute, resume
from scialm_dask.errors import ClusterError, InputError, OutputError, StoppedError
from scialm_dask.evaluate.metrics import score_held_out
from scialm_dask.events import Iteration, Note

COUNTS = low_rank_counts(240, 180, density=0.3, seed=3)
RUN = {"preset": "complete", "validation": 0.05, "max_iterations": 12, "max_rank": 8}
VISIT = "scialm_dask.linalg.kernels:visit"  # once for each block and pass, some 90 times
READ = "scialm_dask.data.rows:StoredRows.read"
MEMORY = 700 << 20
RESTARTS = {"distributed.deploy.lost-worker-timeout": "10m"}  # the machine may be busy


@pytest.fixture(scope="module")
def client():
    quiet = {"distributed.worker.memory.pause": False, "distributed.worker.memory.spill": False}
    with (
        dask.config.set({**quiet, "distributed.worker.memory.target": False, **RESTARTS}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            memory_limit=MEMORY,
            silence_logs="CRITICAL",
        ) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture(scope="module")
def expected():
    with dask.config.set(scheduler="synchronous"):
        result = impute(ExpressionMatrix.of(COUNTS, blocks=3), **RUN)
        return result.left.compute(), result.right


@pytest.fixture
def matrix(store_of):
    return ExpressionMatrix.open(store_of(COUNTS), blocks=3)


@pytest.fixture
def faulty(client, tmp_path):
    """Inject faults into the functions that workers run."""

    def inject(target, at, *, each=False):
        client.register_plugin(faults.Faults(target, tmp_path / "calls", at, each=each))

    yield inject
    client.unregister_worker_plugin("faults")


@pytest.fixture
def few_deaths(client):
    """Set how many workers may die over a task."""

    def allow(number):
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", number))

    yield allow
    allow(dask.config.get("distributed.scheduler.allowed-failures"))


def scratch(kind, tmp_path):
    return kind if kind == "memory" else f"zarr:{tmp_path}"


def same(result, expected):
    for one, two in zip((result.left.compute(), result.right), expected, strict=True):
        assert np.linalg.norm(one - two) <= 1e-4 * np.linalg.norm(two)


def kill_workers(client):
    """Kill all worker processes at once."""
    for pid in client.run(os.getpid).values():
        os.kill(pid, signal.SIGKILL)


def at_iteration(number, do):
    """Do something once, when an iteration is made for the first time."""
    done = []

    def listen(event):
        if isinstance(event, Iteration) and event.iteration == number and not done:
            done.append(event)
            do()

    return listen


@pytest.mark.parametrize(
    ("kind", "target", "calls"),
    [
        ("memory", VISIT, [40]),
        pytest.param("zarr", VISIT, [17], marks=pytest.mark.slow),
        pytest.param("memory", VISIT, [1, 25], marks=pytest.mark.slow),
        pytest.param("memory", READ, [2, 5], marks=pytest.mark.slow),
        pytest.param("zarr", READ, [2, 5], marks=pytest.mark.slow),
    ],
)
def test_workers_that_die_in_a_pass(client, faulty, matrix, tmp_path, expected, kind, target, calls):
    faulty(target, dict.fromkeys(calls, faults.die))
    same(impute(matrix, scratch=scratch(kind, tmp_path), **RUN), expected)
    assert os.path.getsize(tmp_path / "calls") > max(calls)


@pytest.mark.parametrize(
    ("kind", "checkpointed"),
    [
        ("memory", True),
        pytest.param("zarr", False, marks=pytest.mark.slow),
        pytest.param("memory", False, marks=pytest.mark.slow),
        pytest.param("zarr", True, marks=pytest.mark.slow),
    ],
)
def test_all_workers_die_at_once(client, matrix, tmp_path, expected, kind, checkpointed):
    words = {"checkpoint": tmp_path / "c", "checkpoint_every": 2} if checkpointed else {}
    listen = at_iteration(8, lambda: kill_workers(client))
    result = impute(matrix, scratch=scratch(kind, tmp_path), listen=listen, **words, **RUN)
    kill_workers(client)  # what they hold of the result is lost too
    same(result, expected)


def test_a_checkpoint_ends_what_must_be_made_again(client, matrix, tmp_path, expected):
    """The scheduler remembers no pass before the last checkpoint."""
    held = []

    def note(event):
        if isinstance(event, Iteration):
            held.append(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))

    run = RUN | {"max_iterations": 30, "patience": 30, "epsilon": 1e-9}
    impute(matrix, scratch="memory", checkpoint=tmp_path / "c", checkpoint_every=3, listen=note, **run)
    assert len(held) == 30
    assert max(held[10:]) <= 1.1 * max(held[:10])


@pytest.mark.parametrize("kind", ["memory", pytest.param("zarr", marks=pytest.mark.slow)])
def test_a_task_that_raises_once(faulty, matrix, tmp_path, expected, kind):
    faulty(VISIT, {5: faults.fail, 30: faults.fail})
    same(impute(matrix, scratch=scratch(kind, tmp_path), **RUN), expected)


@pytest.mark.slow
def test_a_task_that_raises_again_and_again(client, faulty, matrix, tmp_path, expected):
    faulty(VISIT, dict.fromkeys(range(50, 70), faults.fill_disk))
    words = {"scratch": f"zarr:{tmp_path}", "checkpoint": tmp_path / "c", "checkpoint_every": 1}
    with pytest.raises(OutputError, match=r"the disk is full.*then continue with `scialm-dask resume"):
        impute(matrix, **words, **RUN)
    with dask.config.set(scheduler="synchronous"):
        result = resume(tmp_path / "c")
    assert result.summary["resumed_after_iteration"] > 3
    same(result, expected)


def test_a_lost_connection(client, matrix, tmp_path, expected):
    """The scheduler forgets what a client holds that is gone; the run goes on from the checkpoint when it is back."""
    said = []

    def cut():
        client.loop.add_callback(client.scheduler_comm.comm.abort)

    cutting = at_iteration(8, cut)

    def listen(event):
        cutting(event)
        if isinstance(event, Note):
            said.append(event.words)

    result = impute(matrix, checkpoint=tmp_path / "c", checkpoint_every=2, listen=listen, **RUN)
    assert [words for words in said if "lost the scheduler" in words and "going on from checkpoint" in words]
    assert result.summary["resumed_after_iteration"] >= 6
    same(result, expected)


def test_a_lost_connection_without_checkpoints(client, matrix):
    def cut():
        client.loop.add_callback(client.scheduler_comm.comm.abort)

    with pytest.raises(ClusterError, match=r"lost the scheduler.*with --checkpoint DIR a run can be resumed"):
        impute(matrix, listen=at_iteration(8, cut), **RUN)


@pytest.mark.parametrize("checkpointed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_workers_gone_for_good(matrix, tmp_path, checkpointed):
    """After a time that can be set the run ends as when the scheduler is gone."""
    words = {"checkpoint": tmp_path / "c", "checkpoint_every": 1} if checkpointed else {}
    with (
        dask.config.set({"scialm.no-workers-timeout": "2s"}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs="CRITICAL") as cluster,
        Client(cluster),
        pytest.raises(
            StoppedError if checkpointed else ClusterError,
            match=r"all workers for longer than scialm\.no-workers-timeout.*(continue with `scialm-dask resume|a run can be resumed)",
        ),
    ):
        impute(matrix, listen=at_iteration(8, lambda: cluster.scale(0)), **words, **RUN)
    if checkpointed:
        with dask.config.set(scheduler="synchronous"):
            assert resume(tmp_path / "c").summary["resumed_after_iteration"] >= 2


def test_workers_that_see_another_disk_are_found_before_the_first_pass(client, matrix, tmp_path):
    begun = []
    client.run(lambda: setattr(genericpath, "isdir", lambda _: False))
    try:
        with pytest.raises(InputError, match=r"workers do not see the scratch in it; give --scratch zarr:FOLDER"):
            impute(matrix, scratch=f"zarr:{tmp_path}", listen=begun.append, **RUN)
    finally:
        client.run(lambda: importlib.reload(genericpath) and None)
    assert begun == []
    assert os.listdir(tmp_path) == ["source.zarr"]


def test_a_worker_over_its_memory_limit_once(faulty, matrix, tmp_path, expected):
    faulty(VISIT, {20: faults.fill_memory})
    same(impute(matrix, scratch=f"zarr:{tmp_path}", memory_limit=1 << 40, **RUN), expected)


@pytest.mark.slow
def test_workers_over_their_memory_limit_for_ever(faulty, few_deaths, matrix, tmp_path, expected):
    faulty(VISIT, dict.fromkeys(range(50, 500), faults.die))
    few_deaths(1)
    with pytest.raises(StoppedError, match=r"workers died 2 times .* for lack of memory, as each has 700.00 MiB"):
        impute(matrix, checkpoint=tmp_path / "c", checkpoint_every=1, **RUN)
    with dask.config.set(scheduler="synchronous"):  # on another number of workers: none
        result = resume(tmp_path / "c")
    assert result.summary["resumed_after_iteration"] > 3
    same(result, expected)


@pytest.mark.slow
def test_real_cells_with_every_worker_killed_once(shared, tmp_path):
    """Four workers, each killed at a set number of its own visits of a block: same factors, same scores."""
    masked = ExpressionMatrix.open(shared / "reference" / "pbmc_donor_a_mask10.h5ad", blocks=8)
    hidden = ExpressionMatrix.open(shared / "reference" / "pbmc_donor_a_mask10.h5ad", "held_out").with_blocks(
        masked.blocks
    )
    with dask.config.set(scheduler="threads"):
        whole = impute(masked)
        scores = score_held_out(whole, hidden, masked)
    with connect(cluster="local", workers=4, threads=1) as client:
        client.register_plugin(faults.Faults(VISIT, tmp_path / "calls", {20: faults.die}, each=True))
        result = impute(masked, checkpoint=tmp_path / "c", checkpoint_every=5)
        same(result, (whole.left.compute(scheduler="threads"), whole.right))
        assert score_held_out(result, hidden, masked) == pytest.approx(scores, rel=1e-3)
    counts = sorted(tmp_path.glob("calls.*"))
    assert len(counts) == 4
    assert all(path.stat().st_size >= 20 for path in counts)  # so each was killed, once
