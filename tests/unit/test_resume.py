"""A run that goes on from a checkpoint ends as one that was never interrupted; what cannot be used is refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import dask
import faults
import numpy as np
import pytest
import zarr
from problems import low_rank_counts
from test_checkpoint import edited, of_manifest, redone, truncated

from scialm_dask import ExpressionMatrix, Imputation, InputError, impute, resume
from scialm_dask.data.checkpoint import Checkpoints
from scialm_dask.data.scratch import MemoryScratch
from scialm_dask.data.written import write_left
from scialm_dask.errors import CheckpointError, OutputError, StoppedError
from scialm_dask.events import Iteration, Note, Pass, Stage
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.run import job
from scialm_dask.run.checkpointing import Checkpointing, cadence
from scialm_dask.solve import stored
from scialm_dask.solve.ialm import LoopState
from scialm_dask.solve.scaling import prepare, survey

COUNTS = low_rank_counts(240, 180, density=0.3, seed=3)
RUNS = {
    "complete": {
        "preset": "complete",
        "validation": 0.05,
        "max_iterations": 14,
        "max_rank": 8,
    },  # by subspace iteration
    "paper": {"preset": "paper", "max_iterations": 12},  # by the short side
    "denoise": {"preset": "denoise", "max_rank": 8},
}


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def whole():
    """Results of runs that were never interrupted, by their name."""
    results = {}

    def of(name):
        if name not in results:
            results[name] = impute(ExpressionMatrix.of(COUNTS, blocks=3), **RUNS[name])
        return results[name]

    return of


@pytest.fixture
def matrix(store_of):
    return ExpressionMatrix.open(store_of(COUNTS), blocks=3)


def same(result, expected):
    for one, two in ((result.left.compute(), expected.left.compute()), (result.right, expected.right)):
        assert np.linalg.norm(one - two) <= 1e-4 * np.linalg.norm(two)
    for key in ("rank", "iterations", "chosen_iteration", "stop_reason", "settings", "converged", "verdict"):
        assert result.summary.get(key) == expected.summary.get(key)
    if expected.residual_weight is not None:
        np.testing.assert_allclose(result.residual_weight, expected.residual_weight, atol=1e-5)
        return
    for column in ("rank", "threshold", "residual", "held_out"):  # passes that a stop cut short are made again
        np.testing.assert_allclose(result.history[column], expected.history[column], rtol=1e-4)


def on(kind, function):
    """Listen to events of one kind."""
    return lambda event: function(event) if isinstance(event, kind) else None


def stopping(folder, after, **options):
    """Checkpoints to a folder, and a stop before the pass of that number."""
    asked = []
    return Checkpointing(folder, stop=lambda: asked.append(1) or len(asked) > after, **options)


@pytest.mark.parametrize(
    ("name", "after", "scratch"),
    [
        *(
            (name, after, s)
            for name, after in [("complete", 13), ("complete", 16), ("paper", 25)]
            for s in ("memory", "zarr")
        ),
        ("complete", 25, "zarr"),  # while held-out entries are given back
    ],
)
def test_a_resumed_run_ends_as_an_unbroken_one(whole, matrix, tmp_path, name, after, scratch):
    where = "memory" if scratch == "memory" else f"zarr:{tmp_path}"
    with pytest.raises(StoppedError, match="stopped as asked; continue with `scialm-dask resume"):
        impute(matrix, scratch=where, checkpoint=stopping(tmp_path / "c", after), **RUNS[name])
    assert sorted(os.listdir(tmp_path)) == ["c", "source.zarr"]
    result = resume(tmp_path / "c")
    assert result.summary["resumed_after_iteration"] > 0
    assert result.summary["scratch"] == scratch
    same(result, whole(name))


def test_every_pass_is_a_place_to_stop(whole, matrix, tmp_path):
    """Stopped again and again, before each pass that comes next: the same result, and never a step back."""
    reached, result = [], None
    with pytest.raises(StoppedError):
        impute(matrix, checkpoint=stopping(tmp_path / "c", 8), **RUNS["complete"])
    for passes in [2, 3, 4] * 6:  # one of them for the survey; an iteration makes two
        with Checkpoints(tmp_path / "c") as checkpoints:
            reached.append(len(checkpoints.read(checkpoints.names()[0]).notes["state"]["history"]))
        with contextlib.suppress(StoppedError):
            result = resume(tmp_path / "c", stop=stopping("", passes).stop)
            break
    assert result is not None
    assert reached == sorted(reached)
    assert len(set(reached)) > 4
    same(result, whole("complete"))


@pytest.mark.parametrize("scratch", ["memory", "zarr"])
@pytest.mark.parametrize("made", range(1, 4))
def test_denoising_goes_on_from_whichever_pass_it_was_stopped_before(whole, matrix, tmp_path, made, scratch):
    """The pass that is under way is made again, and of an SVD that is done the last one, which leaves U."""
    passes = []
    where = {"memory": "memory", "zarr": f"zarr:{tmp_path}"}[scratch]
    with pytest.raises(StoppedError):
        impute(matrix, checkpoint=stopping(tmp_path / "c", made), scratch=where, **RUNS["denoise"])
    result = resume(tmp_path / "c", listen=on(Pass, passes.append))
    same(result, whole("denoise"))
    assert len(passes) == {1: 6, 2: 6, 3: 3}[made]


def test_a_matrix_in_memory_is_given_again(whole, tmp_path):
    with pytest.raises(StoppedError):
        impute(ExpressionMatrix.of(COUNTS, blocks=3), checkpoint=stopping(tmp_path / "c", 12), **RUNS["complete"])
    with pytest.raises(InputError, match="matrix was in memory"):
        resume(tmp_path / "c")
    same(resume(tmp_path / "c", COUNTS), whole("complete"))


def test_checkpoints_are_written_when_they_are_due(matrix, tmp_path):
    written = []

    def note(_):
        written.append(max((int(n) for n in os.listdir(tmp_path / "c") if n.isdigit()), default=0))

    impute(matrix, checkpoint=tmp_path / "c", checkpoint_every=5, listen=on(Iteration, note), **RUNS["paper"])
    assert written == [1 + i // 5 for i in range(12)]  # the first one before the survey
    assert max(int(n) for n in os.listdir(tmp_path / "c") if n.isdigit()) == 4  # the last one at the end


def test_a_finished_loop_is_not_made_again(whole, matrix, tmp_path):
    impute(matrix, checkpoint=tmp_path / "c", **RUNS["complete"])
    told = []
    same(resume(tmp_path / "c", listen=on(Iteration, told.append)), whole("complete"))
    assert told == []


@pytest.mark.parametrize(("every", "expected"), [(5, (5, np.inf)), ("7", (7, np.inf)), ("10min", (np.inf, 600))])
def test_cadence(every, expected):
    assert cadence(every) == expected


@pytest.mark.parametrize("every", ["0", "soon", "-3", "0 s", "5 parsecs"])
def test_a_cadence_that_is_none(matrix, tmp_path, every):
    with pytest.raises(InputError, match="give a number of iterations, or a time such as 10min"):
        impute(matrix, checkpoint=tmp_path / "c", checkpoint_every=every)
    assert os.listdir(tmp_path) == ["source.zarr"]


# What cannot be used


@pytest.fixture
def stopped(matrix, tmp_path):
    """Folder of a run with two checkpoints of its loop."""
    with pytest.raises(StoppedError):
        impute(matrix, checkpoint=stopping(tmp_path / "c", 17, every=1), **RUNS["complete"])
    return tmp_path / "c"


def newest_two(folder):
    return sorted((name for name in os.listdir(folder) if name.isdigit()), reverse=True)[:2]


DAMAGES = {
    "torn": ("manifest.json", truncated),
    "truncated": ("estimate.1/c/0", truncated),
    "edited": ("left.2/c/0/0", edited),
    "newer": ("manifest.json", of_manifest(lambda content: content.update(format=99))),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_the_one_before_is_used_and_said_so(whole, stopped, damage):
    newest, before = newest_two(stopped)
    name, harm = DAMAGES[damage]
    harm(stopped / newest / name)
    with Checkpoints(stopped) as checkpoints:
        expected = len(checkpoints.read(before).notes["state"]["history"])
    said = []
    result = resume(stopped, listen=on(Note, said.append))
    assert len(said) == 1
    assert said[0].words.startswith(f"{stopped}/{newest}: ")
    assert said[0].words.endswith("; the one before it is used")
    assert result.summary["resumed_after_iteration"] == expected
    same(result, whole("complete"))


def test_none_can_be_used(stopped):
    for name in newest_two(stopped):
        edited(stopped / name / "right.0/c/0/0")
    with pytest.raises(InputError, match=r"no checkpoint can be used \(.*right\.0 is d.*right\.0 is d.*start again"):
        resume(stopped)


def in_run(**changes):
    return lambda content: content["notes"]["run"].update(changes)


def in_state(**changes):
    return lambda content: content["notes"]["state"].update(changes)


def without(*path):
    def change(content):
        for step in path[:-1]:
            content = content[step]
        del content[path[-1]]

    return change


CHANGES = {
    "no history": in_state(history=[]),
    "a history of text": in_state(history="long"),
    "a history of words": in_state(history=[["one", 2, 3.0, 0.5, 0.5, 4]]),
    "a history with a gap": lambda content: content["notes"]["state"]["history"].pop(1),
    "another choice": in_state(chosen=99),
    "no penalty": in_state(penalty=[0.0, 1.5]),
    "too few values": in_state(values=[1.0]),
    "no settings": in_run(settings={}),
    "a setting is missing": without("notes", "run", "settings", "seed"),
    "a setting cannot be": lambda content: content["notes"]["run"]["settings"].update(epsilon=7),
    "blocks that overlap": in_run(bounds=[0, 100, 80, 240]),
    "no run": without("notes", "run"),
    "no matrix": without("notes", "matrix"),
    "a matrix of text": lambda content: content["notes"].update(matrix="mine"),
    "no arrays": lambda content: content.update(arrays={}),
    "a block is missing": lambda content: content["arrays"]["estimate"].pop(),
    "blocks change places": lambda content: content["arrays"]["estimate"].reverse(),
    "no left factors": without("arrays", "left"),
    "passes of text": lambda content: content["notes"]["state"]["operator"].update(passes="many"),
    "a cadence of none": lambda content: content["notes"].update(every="never"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_values_that_no_run_has_written_are_refused_by_name(stopped, change, monkeypatch):
    """Though they were digested anew; the one before is used."""
    newest, before = newest_two(stopped)
    redone(CHANGES[change])(stopped / newest / "manifest.json")
    told = []

    def used(known, _):
        told.append(known._saved.path)
        known.surveyed(survey(known.job.matrix), None)
        operator = LowRankPlusSparse(prepare(known.job.matrix, known._found, known.job.settings), MemoryScratch())
        assert known.load(LoopState, operator).steps > 1
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "fit", used)
    said = []
    with pytest.raises(KeyboardInterrupt):
        resume(stopped, listen=on(Note, said.append))
    assert len(said) == 1
    assert said[0].words.startswith(f"{stopped}/{newest}: ")
    assert told[-1] == f"{stopped}/{before}"


def test_another_matrix(stopped, store_of):
    others = {
        "another pattern": low_rank_counts(240, 180, density=0.3, seed=4),
        "another value": COUNTS + (COUNTS.max() == COUNTS).astype(float),
        "fewer cells": COUNTS[:200],
        "fewer genes": COUNTS[:, :160],
    }
    before = newest_two(stopped)
    for other in others.values():
        with pytest.raises(InputError, match=r"no checkpoint can be used \(.*is of a"):
            resume(stopped, other)
        store_of(other)  # where the run has read
        with pytest.raises(InputError, match=r"no checkpoint can be used \(.*is of a"):
            resume(stopped)
    assert newest_two(stopped) == before


def test_a_matrix_that_is_given_keeps_what_its_source_was_like(stopped, matrix):
    """Though it was opened for other entries: what is written later sees whether that has changed."""
    again = ExpressionMatrix.open(matrix.rows.path, observed="finite")
    with Checkpoints(stopped) as checkpoints:
        found = job.job_of(checkpoints.read(newest_two(stopped)[0]), again, {}).matrix
    assert (found.observed, found.blocks) == ("nonzero", matrix.blocks)
    assert found.stamp == again.stamp is not None


def test_folders_without_checkpoints(tmp_path):
    with pytest.raises(InputError, match="no such folder of checkpoints"):
        resume(tmp_path / "c")
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint that can be read"):
        resume(tmp_path / "c")


def test_a_cadence_of_no_checkpoints_is_refused(matrix):
    with pytest.raises(InputError, match="checkpoint_every is 5 without a checkpoint; give the folder"):
        impute(matrix, checkpoint_every=5)


def test_another_run_is_not_written_over(stopped, matrix):
    before = newest_two(stopped)
    with pytest.raises(OutputError, match="holds checkpoints already; continue from them with `scialm-dask resume"):
        impute(matrix, checkpoint=stopped, **RUNS["paper"])
    assert newest_two(stopped) == before


def test_bad_input_leaves_no_checkpoints(store_of, tmp_path):
    path = store_of(-COUNTS)
    with pytest.raises(InputError, match="expression must be finite and not negative"):
        impute(path, checkpoint=tmp_path / "c")
    assert os.listdir(tmp_path) == ["source.zarr"]


# Faults, in one process


def harmed(tmp_path, target, at):
    return faults.inject(target, tmp_path / "calls", at)


def rewrite(path):
    store = Path(path)
    chunk = next(store.glob("X/data/0*"))
    chunk.write_bytes(chunk.read_bytes())  # the same bytes at another time


def another(path):
    """Values twice as large."""
    values = zarr.open_group(path)["X/data"]
    values[:] = values[:] * 2


@pytest.mark.parametrize("change", [rewrite, another])
def test_a_source_that_changes_after_it_was_read(matrix, tmp_path, whole, change):
    """The result is of what was read, and says so."""
    said = []

    def listen(event):
        if isinstance(event, Iteration) and event.iteration == 6:
            change(tmp_path / "source.zarr")
        if isinstance(event, Note):
            said.append(event.words)

    words = {"checkpoint": tmp_path / "c", "checkpoint_every": 2}
    same(impute(matrix, listen=listen, **words, **RUNS["paper"]), whole("paper"))
    assert said == [f"{matrix.name}: has changed since it was read; the result is of what was there before"]
    if change is another:
        with pytest.raises(InputError, match=r"no checkpoint can be used \(.*is of another matrix"):
            resume(tmp_path / "c")
    else:
        same(resume(tmp_path / "c"), whole("paper"))


@pytest.mark.parametrize("change", [rewrite, another])
def test_a_source_that_changes_between_two_readings(matrix, tmp_path, whole, change):
    """Only what differs is refused."""

    def listen(event):
        if event == Stage("reading"):
            change(tmp_path / "source.zarr")

    if change is rewrite:
        same(impute(matrix, listen=listen, **RUNS["paper"]), whole("paper"))
    else:
        with pytest.raises(InputError, match=r"X: has changed since the run began, while it was read; start again"):
            impute(matrix, listen=listen, **RUNS["paper"])


def test_a_first_checkpoint_that_cannot_be_read_back(matrix, tmp_path, monkeypatch):
    def torn(self, name):
        raise CheckpointError(f"{name}: is torn")

    monkeypatch.setattr(Checkpoints, "read", torn)
    with pytest.raises(InputError, match=r"no checkpoint can be used \(000001: is torn\); start again"):
        impute(matrix, checkpoint=tmp_path / "c", **RUNS["paper"])


FULL = {
    "scratch": ("scialm_dask.data.scratch:ZarrScratch._write", 100),
    "an array of a checkpoint": ("scialm_dask.data.checkpoint:ArrayFolder.put", 33),
    "the manifest": ("scialm_dask.data.checkpoint:_manifest_of", 4),
}


@pytest.mark.parametrize("disk", list(FULL))
def test_a_full_disk(matrix, tmp_path, whole, disk):
    target, call = FULL[disk]
    repair = harmed(tmp_path, target, {call: faults.fill_disk})
    (tmp_path / "s").mkdir()
    words = {"scratch": f"zarr:{tmp_path / 's'}", "checkpoint": tmp_path / "c", "checkpoint_every": 1}
    try:
        with pytest.raises(
            OutputError, match=r"the disk is full; free some space .* then continue with `scialm-dask resume"
        ):
            impute(matrix, **words, **RUNS["paper"])
    finally:
        repair()
    assert os.listdir(tmp_path / "s") == []
    result = resume(tmp_path / "c")
    assert result.summary["resumed_after_iteration"] >= 1
    same(result, whole("paper"))


# From the command line

QUICK = ("--preset", "paper", "--max-iterations", "12", "--blocks", "3", "--quiet")


def test_finished_runs_say_so(cli, matrix, tmp_path):
    words = ("--checkpoint", tmp_path / "c", "--checkpoint-every", "5", *QUICK)
    result = cli("impute", tmp_path / "source.zarr", tmp_path / "r.zarr", *words)
    assert result.exit_code == 0, result.output
    assert len(newest_two(tmp_path / "c")) == 1  # which holds no arrays
    assert os.listdir(tmp_path / "c" / newest_two(tmp_path / "c")[0]) == ["manifest.json"]


def test_of_two_resumes_at_once_one_is_refused(cli, stopped, tmp_path, monkeypatch):
    """While the other writes its result, too."""
    refused = []

    def second(*_, **__):
        if not refused:
            refused.append(cli("resume", stopped, tmp_path / "other.zarr", "--quiet"))

    monkeypatch.setattr(stored, "write_left", lambda *args, **kwargs: second() or write_left(*args, **kwargs))
    first = cli("resume", stopped, tmp_path / "r.zarr", "--quiet")
    assert first.exit_code == 0, first.stderr
    assert refused[0].exit_code == 2
    assert f"{stopped}: another run writes its checkpoints there; let it end" in refused[0].stderr
    assert not (tmp_path / "other.zarr").exists()


def test_where_somebody_elses_checkpoint_leads_is_confirmed(cli, matrix, tmp_path):
    """One that is beside it needs no word, unless something is there."""
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(StoppedError):
        asked = {"destination": str(tmp_path / "precious"), "overwrite": True}
        impute(matrix, checkpoint=stopping(there / "c", 17, result=asked), **RUNS["complete"])
    (tmp_path / "precious").mkdir()
    refused = cli("resume", there / "c", "--quiet")
    assert refused.exit_code == 2
    assert f"is not in the same folder; confirm that by `scialm-dask resume {there / 'c'} {tmp_path}" in refused.stderr
    refused = cli("resume", there / "c", tmp_path / "precious", "--quiet")
    assert "exists already; choose another path or pass --overwrite" in refused.stderr
    shutil.move(there / "c", tmp_path / "c")
    refused = cli("resume", tmp_path / "c", "--quiet")
    assert "exists already; choose another path or pass --overwrite" in refused.stderr
    assert os.listdir(tmp_path / "precious") == []
    done = cli("resume", tmp_path / "c", "--overwrite", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert Imputation.open(tmp_path / "precious").summary["resumed_after_iteration"] > 0


def test_finished_runs_say_so_again(cli, matrix, tmp_path):
    words = ("--checkpoint", tmp_path / "c", "--checkpoint-every", "5", *QUICK)
    cli("impute", tmp_path / "source.zarr", tmp_path / "r.zarr", *words)
    again = cli("resume", tmp_path / "c", "--json")
    assert again.exit_code == 0
    assert "that run is finished; its result is" in again.stderr
    assert json.loads(again.stdout) == {"destination": str(tmp_path / "r.zarr")}
    with pytest.raises(InputError, match="that run is finished"):
        resume(tmp_path / "c")


def test_a_run_from_python_goes_on_from_the_command_line(cli, whole, stopped, tmp_path):
    refused = cli("resume", stopped)
    assert refused.exit_code == 2
    assert "name the destination: resume DIR DST.zarr" in refused.stderr
    assert cli("resume", stopped, stopped / "r.zarr").exit_code == 2  # within the checkpoints
    result = cli("resume", stopped, tmp_path / "r.zarr", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["resumed_after_iteration"] > 0
    np.testing.assert_array_equal(Imputation.open(tmp_path / "r.zarr").right, whole("complete").right)


def test_the_command_opens_the_source_once(cli, stopped, tmp_path, monkeypatch):
    """One that is stored by genes is copied each time."""
    opened, real = [], ExpressionMatrix.open.__func__
    monkeypatch.setattr(
        ExpressionMatrix,
        "open",
        classmethod(lambda cls, *args, **kwargs: opened.append(1) or real(cls, *args, **kwargs)),
    )
    result = cli("resume", stopped, tmp_path / "r.zarr", "--quiet")
    assert result.exit_code == 0, result.output
    assert len(opened) == 1


@pytest.mark.parametrize("words", [("--checkpoint-every", "3"), ("--checkpoint", "source.zarr/c")])
def test_options_that_do_not_fit(cli, matrix, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert cli("impute", "source.zarr", "r.zarr", *words).exit_code == 2
    assert os.listdir(tmp_path) == ["source.zarr"]


TERMINATED = """
import os, signal, sys
import dask
sys.path.insert(0, sys.argv.pop(1))
import faults
call = int(sys.argv.pop(1))
faults.inject("scialm_dask.linalg.kernels:visit", sys.argv.pop(1), {call: lambda: os.kill(os.getpid(), signal.SIGTERM)})
from scialm_dask.__main__ import main
dask.config.set(scheduler="synchronous")
main(sys.argv[1:])
"""


def terminated(tmp_path, call, *words, by="SIGTERM"):
    program = (
        sys.executable,
        "-c",
        TERMINATED.replace("SIGTERM", by),
        Path(faults.__file__).parent,
        call,
        tmp_path / f"calls{call}",
    )
    command = [*program, "impute", tmp_path / "source.zarr", tmp_path / "r.zarr", *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_sigterm_writes_a_checkpoint_and_exits_with_75(matrix, tmp_path, cli, whole):
    done = terminated(tmp_path, 40, "--checkpoint", tmp_path / "c", *QUICK)
    assert done.returncode == 75, done.stderr
    assert done.stderr == (
        f"scialm-dask: error: stopped as asked; continue with `scialm-dask resume {tmp_path / 'c'}`\n"
    )
    assert sorted(n for n in os.listdir(tmp_path) if "calls" not in n) == ["c", "source.zarr"]
    result = cli("resume", tmp_path / "c", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["resumed_after_iteration"] > 0
    np.testing.assert_array_equal(Imputation.open(tmp_path / "r.zarr").right, whole("paper").right)


@pytest.mark.parametrize("by", ["SIGTERM", "SIGHUP"])
def test_sigterm_without_checkpoints_leaves_nothing(matrix, tmp_path, by):
    done = terminated(tmp_path, 40, "--scratch", f"zarr:{tmp_path}", *QUICK, by=by)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "scialm-dask: terminated; nothing was written\n"
    assert sorted(n for n in os.listdir(tmp_path) if "calls" not in n) == ["source.zarr"]
