import json

import numpy as np
import pytest

from scialm_dask.compare.methods import Outcome, read_answer, run_isolated
from scialm_dask.compare.peers import Task


@pytest.fixture
def run(counts, store_of, tmp_path):
    source = store_of(counts)

    def run(name, **kwargs):
        folder = tmp_path / "answer"
        folder.mkdir()
        answer = kwargs.pop("before", None)
        if answer is not None:
            (folder / "answer.json").write_text(json.dumps(vars(answer)))
        return run_isolated(name, Task(source), folder, **kwargs), folder

    return run


def test_time_memory_and_answer_come_back(run, counts):
    scale = np.arange(counts.shape[0], dtype=np.float32)
    outcome, folder = run("own_methods:doubled")
    assert outcome.status == "ok"
    assert outcome.note == "twice what was given"
    assert outcome.seconds > 0
    assert 0 <= outcome.peak_bytes < 200e6 < outcome.imports_bytes + 150e6
    answer = read_answer(folder, scale).compute(scheduler="threads")
    np.testing.assert_allclose(answer, 2 * scale[:, None] * counts.toarray())


def test_an_exception_is_an_outcome(run):
    outcome, _ = run("own_methods:fails")
    assert outcome.status == "failed"
    assert outcome.note.startswith("ValueError: the matrix is too nice (own_methods.py:")


def test_memory_over_the_limit_is_refused_to_the_method_alone(run):
    outcome, _ = run("own_methods:takes_everything", memory_limit=1 << 30)
    assert outcome.status == "out of memory"
    assert "allocate" in outcome.note


def test_what_takes_too_long_is_ended(run):
    outcome, _ = run("own_methods:never_ends", timeout=5)
    assert (outcome.status, outcome.note) == ("timed out", "ended after 5 s")


@pytest.mark.parametrize(("name", "status"), [("dies", "failed"), ("killed", "out of memory")])
def test_a_process_that_dies_is_an_outcome(run, name, status):
    """And not that of another, which had the folder before."""
    outcome, _ = run(f"own_methods:{name}", before=Outcome("ok", 1.0))
    assert outcome.status == status
    assert ("code 3" if name == "dies" else "signal 9") in outcome.note


def test_what_is_not_installed_is_named_with_the_remedy(run, monkeypatch):
    from scialm_dask.compare import methods

    absent = methods.Method("absent", "normalised", methods.METHODS["knn"].complete, ("no_such_library",))
    monkeypatch.setitem(methods.METHODS, "absent", absent)
    outcome = methods._measured("absent", None, None, Task("nowhere"))
    assert outcome.status == "not installed"
    assert "no_such_library" in outcome.note
    assert "scialm-dask[bench]" in outcome.note


def test_outcomes_survive_json():
    outcome = Outcome("ok", 1.5, 2.0, 3.0, "words")
    assert Outcome(**json.loads(json.dumps(vars(outcome)))) == outcome
