"""Go or refuse: where the working state is kept, and what limit it is held against."""

import json

import dask
import pytest

from scialm_dask.errors import DoesNotFitError, InputError
from scialm_dask.run.cluster import Team
from scialm_dask.run.plan import Forecast, Need, limit_of, place_scratch, usable_memory

NEED = Forecast(
    in_memory=Need(800, 0),
    on_disk=Need(100, 500),
    basis_width=16,
    iterations=20,
    passes_per_iteration=2,
    passes=45,
    tasks_per_pass=9,
    bytes_per_pass=4000,
)


def place(scratch, limit, folder="/"):
    return place_scratch(scratch, NEED, limit=limit, raised_by="--memory-limit", folder=folder)


@pytest.mark.parametrize(
    ("scratch", "limit", "chosen"),
    [("auto", 800, "memory"), ("auto", 799, "zarr:/"), ("memory", 800, "memory"), ("zarr:/tmp", 10**9, "zarr:/tmp")],
)
def test_scratch_is_placed_by_the_limit(scratch, limit, chosen):
    assert place(scratch, limit) == chosen


@pytest.mark.parametrize(
    ("scratch", "limit", "remedy"),
    [
        ("memory", 799, "pass --scratch auto, or raise --memory-limit"),
        ("memory", 99, "pass more --blocks or a lower --max-rank, or raise --memory-limit"),
        ("auto", 99, "pass more --blocks or a lower --max-rank, or raise --memory-limit"),
        ("zarr:/", 99, "pass more --blocks or a lower --max-rank, or raise --memory-limit"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_helps(scratch, limit, remedy):
    with pytest.raises(DoesNotFitError, match=f"the limit {limit} B; {remedy}"):
        place(scratch, limit)


@pytest.mark.parametrize("scratch", ["disk", "zarr", "zarr:", ""])
def test_unknown_scratch(scratch):
    with pytest.raises(InputError, match="give auto, memory, or zarr:PATH"):
        place(scratch, 1000)


def test_the_lower_limit_holds():
    assert limit_of(Team(2, 1, 700), None) == (700, "--worker-memory")
    assert limit_of(Team(2, 1, 700), 800) == (700, "--worker-memory")
    assert limit_of(Team(2, 1, 700), 600) == (600, "--memory-limit")
    assert limit_of(Team(1, 4, None), 600) == (600, "--memory-limit")
    assert limit_of(Team(1, 4, None), None)[0] <= usable_memory() * 1.1


def test_plan_tells_the_limit_that_impute_obeys(cli, store_of, counts, tmp_path):
    source = store_of(counts)
    with dask.config.set({"scialm.memory-limit": "1 MB"}):
        done = cli("plan", source, "--json")
        assert json.loads(done.stdout.splitlines()[-1])["memory_limit_bytes"] == 1_000_000
        done = cli("impute", source, tmp_path / "r.zarr", "--quiet")
    assert "limit 0.95 MiB" in done.stderr


def test_a_plan_counts_all_passes(cli, store_of, counts):
    source = store_of(counts)

    def passes(*words):
        return json.loads(cli("plan", source, "--json", "--quiet", *words).stdout.splitlines()[-1])["passes"]

    assert passes("--preserve-zeros") == passes() + 10
    assert passes("--preset", "denoise") > 3 * passes()  # three fits before the last
