"""Typed events, and how they are shown: bar, lines, JSON lines, widget; quiet is quiet."""

import io
import json
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
from problems import low_rank_counts

from scialm_dask import (
    ExpressionMatrix,
    PooledALS,
    PooledNuclearNorm,
    biological_zeros,
    impute,
    progress,
    show_progress,
)
from scialm_dask.cli import group
from scialm_dask.events import Advanced, Event, Iteration, Note, Pass, Stage, Sweep, begin
from scialm_dask.pooled.design import random_pools

COUNTS = low_rank_counts(60, 40, density=0.6, seed=2)


def iteration(number, rank=3, held_out=0.25):
    return Iteration(number, rank, 0.5, 0.125, held_out, 2 * number)


def test_what_a_run_tells():
    heard = []
    result = impute(COUNTS, preset="complete", validation=0.1, max_iterations=5, listen=heard.append)
    stages = [event.name for event in heard if isinstance(event, Stage)]
    assert stages == ["surveying", "reading", "iterating", "embedding"]
    iterations = [event for event in heard if isinstance(event, Iteration)]
    assert [event.iteration for event in iterations] == [1, 2, 3, 4, 5]
    assert [event.residual for event in iterations] == list(result.history["residual"])
    passes = [event.passes for event in heard if isinstance(event, Pass)]
    assert passes == list(range(2, result.summary["passes"] + 1))  # the survey is the first
    assert heard.index(iterations[-1]) > heard.index(Pass(iterations[-1].passes))


def test_what_denoising_tells():
    heard = []
    impute(COUNTS, preset="denoise", max_rank=8, listen=heard.append)
    assert Stage("denoising") in heard


def test_what_writing_tells(tmp_path):
    heard, result = [], impute(COUNTS, preset="paper", max_iterations=3)
    zeros = biological_zeros(ExpressionMatrix.of(COUNTS), listen=heard.append)
    assert Stage("finding biological zeros") in heard
    assert any(isinstance(event, Pass) for event in heard)
    for number, how in enumerate(({}, {"dense": True}, {"preserve_zeros": zeros})):
        heard.clear()
        result.to_zarr(tmp_path / f"{number}.zarr", **how, listen=heard.append)
        assert heard[0] == Stage("writing")
        assert heard[-1] == Advanced(pytest.approx(1))


def test_what_pooled_recovery_tells():
    P = random_pools(40, 15, density=0.4, random_state=0)
    D = COUNTS.toarray() @ P
    heard = []
    result = PooledALS(3, restarts=2, max_sweeps=4).fit(D, P, listen=heard.append)
    assert [event.detail for event in heard if isinstance(event, Stage)] == ["start 1 of 2", "start 2 of 2"]
    assert result.objective in [event.objective for event in heard if isinstance(event, Sweep)]
    heard.clear()
    result = PooledNuclearNorm(0.1, max_iterations=500).fit(D, P, listen=heard.append)
    assert heard[0] == Stage("solving")
    assert len(heard) == 1 + (len(result.history) if len(result.history) > 1 else 0)


def test_shares_add_up_and_do_not_overrun():
    heard = []
    advance = begin(heard.append, "working")
    for share in (0.5, 0.3, 0.3):
        advance(share)
    assert heard == [Stage("working"), Advanced(0.5), Advanced(0.8), Advanced(1.0)]


class Clock:
    """Goes on by a second whenever it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def shown(display, clock, events):
    """What a display writes; each event takes so many seconds."""
    stream = io.StringIO()
    with display(stream, clock) as listen:
        for seconds, event in events:
            clock.now += seconds
            listen(event)
    return stream.getvalue().splitlines()


RUN = [
    (0, Stage("iterating", iterations=10)),
    (3, iteration(1, rank=0)),  # made at once; what it took was spent on something else
    (4, Pass(3)),
    (2, iteration(2)),
    (8, iteration(3, held_out=float("nan"))),
    (1, Note("beware")),
    (0, Stage("writing", "factors")),
    (2, Advanced(0.25)),
    (10, Advanced(0.5)),
]


def test_lines():
    assert shown(progress._Lines, Clock(), RUN) == [
        "iterating",
        "iteration 1: rank 0, residual 0.125",
        "iteration 2: rank 3, residual 0.125, held-out error 0.25, about 48 s left",
        "iteration 3: rank 3, residual 0.125, about 49 s left",
        "scialm-dask: note: beware",
        "writing (factors)",
        "writing: 50%, about 12 s left",
    ]


def test_lines_give_a_sign_of_life():
    """In a pass of an hour, not in each of many short ones."""
    passes = [(4, Pass(number)) for number in range(1, 7)]
    assert shown(progress._Lines, Clock(), [(0, Stage("iterating")), *passes]) == [
        "iterating",
        "iterating: 3 passes made",
        "iterating: 6 passes made",
    ]


def test_past_what_was_expected_the_time_left_is_unknown():
    events = [(0, Stage("iterating", iterations=2)), *((5, iteration(number)) for number in (1, 2, 3))]
    _, first, *rest = shown(progress._Lines, Clock(), events)
    assert first.endswith("about 5 s left")
    assert not any("left" in line for line in rest)


def test_time_left_is_that_of_the_last_iterations():
    """They become slower as the rank grows."""
    events = [(0, Stage("iterating", iterations=100)), *((number, iteration(number)) for number in range(1, 11))]
    assert shown(progress._Lines, Clock(), events)[-1].endswith("about 14 min left")  # 90 × mean of 8, 9 and 10 s


def test_json_lines():
    records = [json.loads(line) for line in shown(progress._JSONLines, Clock(), RUN)]
    assert [record["event"] for record in records] == [type(event).__name__.lower() for _, event in RUN]
    for record, (_, event) in zip(records, RUN, strict=True):
        assert {"time", "stage", "seconds_left", *(field.name for field in fields(event))} <= record.keys()
        assert record["time"].endswith("+00:00")
    assert (records[0]["seconds_left"], records[3]["seconds_left"]) == (None, 48)
    assert (records[3]["rank"], records[3]["held_out"], records[4]["held_out"]) == (3, 0.25, None)
    assert records[-1]["stage"] == "writing"
    assert records[-1]["done"] == 0.5


@dataclass(frozen=True)
class _Resumed(Event):
    at_iteration: int


def test_an_event_unknown_to_the_displays_is_shown_too():
    assert shown(progress._Lines, Clock(), [(0, _Resumed(7))]) == ["_resumed: at iteration 7"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with show_progress() as listen:
        for _, event in RUN:
            listen(event)
    text = sys.stderr.getvalue()
    assert "iterating" in text
    assert "rank 3, residual 0.125, held-out error 0.25" in text
    assert "20%|" in text
    assert "scialm-dask: note: beware\n" in text
    assert "factors" in text
    assert "50%|" in text
    assert text.split("\r")[-1].strip() == ""  # taken away at the end


def test_log_json_of_a_command(cli, store_of, tmp_path):
    words = ("--preset", "paper", "--max-iterations", "4")
    result = cli("impute", store_of(COUNTS), tmp_path / "r.zarr", *words, "--log-json")
    assert result.exit_code == 0
    records = [json.loads(line) for line in result.stderr.splitlines()]
    assert [record["iteration"] for record in records if record["event"] == "iteration"] == [1, 2, 3, 4]
    assert {"surveying", "reading", "iterating", "embedding", "writing"} == {record["stage"] for record in records}


class Gone(Terminal):
    """What nobody reads any more, from the second line on."""

    def write(self, text):
        if self.getvalue():
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("display", [progress._Lines, progress._JSONLines, progress._Bar])
def test_progress_that_cannot_be_written_ends_and_the_work_goes_on(display):
    with display(Gone()) as listen:
        result = impute(COUNTS, preset="paper", max_iterations=3, listen=listen)
    assert result.summary["iterations"] == 3


SIMULATE = "exec {python} -m scialm_dask simulate r.zarr --cells 30 --genes 10 --rank 2"


@pytest.mark.parametrize(
    ("streams", "told"),
    [
        ("2>/dev/full", "density"),
        ("2>&-", "density"),
        ("2>&- --log-json", "density"),
        ("2>err --quiet >/dev/full", "note: the result is written, its summary cannot be shown (No space left on device)"),
        ("2>err --quiet >&-", ""),
    ],
)  # fmt: skip
def test_streams_that_fail_do_not_fail_what_is_written(tmp_path, streams, told):
    command = f"{SIMULATE.format(python=sys.executable)} {streams}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout + (tmp_path / "err").read_text() if (tmp_path / "err").exists() else done.stdout
    assert ExpressionMatrix.open(tmp_path / "r.zarr").shape == (30, 10)


def test_what_is_told_alone_fails_where_it_cannot_be(store_of, tmp_path):
    command = f"exec {sys.executable} -m scialm_dask plan {store_of(COUNTS)} --quiet >/dev/full"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "scialm-dask: error: standard output cannot be written (No space left on device); send it elsewhere\n"
    )


def test_names_that_standard_output_cannot_encode_or_that_steer_a_terminal(monkeypatch, capsys):
    @group.reports
    def told(**_):
        return {"genes": ["λ", "\x1b[31mred"]}

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    told(as_json=False)
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().split() == [b"genes", b"\\u03bb,", b"\\x1b[31mred"]


@pytest.mark.parametrize("command", ["convert", "qc", "mask"])
def test_quiet_is_quiet(cli, store_of, tmp_path, command):
    path = store_of(COUNTS)
    assert cli(command, path, tmp_path / "a.zarr").stderr.splitlines() != []
    assert cli(command, path, tmp_path / "b.zarr", "--quiet").stderr == ""
    both = cli(command, path, tmp_path / "c.zarr", "--quiet", "--log-json")
    assert both.exit_code == 2
    assert "give one of them" in both.stderr


WIDGET = """
import nbformat, nbclient
code = '''
import scipy.sparse as sp, scialm_dask
scialm_dask.impute(sp.random(60, 40, 0.5, random_state=0), preset='paper', max_iterations=4, listen=scialm_dask.show_progress());
'''
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
outputs = [key for output in notebook.cells[0].outputs for key in output.get("data", output)]
print(outputs)
widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
print([widget["state"].get("value") for widget in widgets])
"""


def test_a_widget_in_a_notebook(tmp_path):
    # in a process of its own: Jupyter's own warnings are not ours to fail on
    done = subprocess.run([sys.executable, "-c", WIDGET], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shown, values = done.stdout.replace(r"\u2007", " ").splitlines()
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert "rank" in values
    assert "iteration 4" in values


@pytest.mark.parametrize(
    ("key", "value", "name", "words"),
    [
        ("n_cells", 120000, "cells", "120,000"),
        ("peak_memory_bytes_in_all", 3 << 20, "peak memory in all", "3.00 MiB"),
        ("seconds", 125.2, "time", "2 min"),
        ("X", None, "X", "none"),
        ("converged", True, "converged", "yes"),
        ("unseen", {"n_genes": 3, "gene_mean": 0.25}, "unseen", "genes 3, gene mean 0.25"),
        ("warnings", [], "warnings", "none"),
        ("sizes", [1000, None], "sizes", "1,000, none"),
    ],
)
def test_summaries_in_words(key, value, name, words):
    assert (progress.label(key), progress.in_words(value, key)) == (name, words)
