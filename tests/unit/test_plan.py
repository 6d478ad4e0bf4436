"""Go or refuse: where the working state is kept, what limit it is held against, and what would fit it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import dask
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from dask.utils import parse_bytes

from scialm_dask import ExpressionMatrix, impute, resume
from scialm_dask.config import bytes_of, preset
from scialm_dask.data.annotation import Annotation
from scialm_dask.data.csr import RowBlocks
from scialm_dask.data.rows import MemoryRows, chunk_bytes, reordered
from scialm_dask.errors import DoesNotFitError, InputError, StoppedError
from scialm_dask.run.checkpointing import Checkpointing, Job
from scialm_dask.run.cluster import Workers
from scialm_dask.run.plan import forecast, limit_of, place_scratch, plan, usable_memory

WORKER = Workers(1, 2, None, resident=0)  # as it has not begun, what it holds is no matter of chance


@pytest.fixture(scope="module")
def large():
    """A matrix of 20 000 × 20 000, of which nothing but the size is looked at."""
    indptr = np.arange(20_001, dtype=np.int32) * 1000
    values, indices = np.broadcast_to(np.float32(1), indptr[-1]), np.broadcast_to(np.int32(1), indptr[-1])
    rows = sp.csr_matrix((values, indices, indptr), shape=(20_000, 20_000), copy=False)
    return ExpressionMatrix(MemoryRows(rows), RowBlocks.even(20_000, 8))


def refusal(matrix, settings, scratch="auto", **options):
    return placed(matrix, settings, scratch, **options).refusal


def placed(matrix, settings, scratch, *, folder="/", **options):
    return place_scratch(Job(matrix, settings, scratch, scratch_folder=folder, **options), WORKER)


def least_of(words):
    (least,) = re.findall(r"at least ([\d.]+ \w+) are needed, with --[^,]*; raise --memory-limit$", words)
    return parse_bytes(least)


def test_scratch_is_placed_by_the_limit(large, tmp_path):
    settings = preset("complete")
    need = forecast(large, settings, WORKER)
    enough = need.in_memory

    def within(scratch, limit):
        place = placed(large, settings, scratch, folder=tmp_path, memory_limit=limit)
        assert place.refusal == ""
        return place

    assert within("auto", enough).scratch == within("memory", enough).scratch == "memory"
    assert within("auto", enough).memory == need.in_memory
    assert within("auto", enough - 1).scratch == f"zarr:{tmp_path}"
    assert within("auto", enough - 1).memory == need.on_disk
    assert within("zarr:/tmp", 10**12).scratch == "zarr:/tmp"


@pytest.mark.parametrize("name", ["complete", "paper"])
@pytest.mark.parametrize("scratch", ["auto", "memory", "zarr:/"])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
def test_what_is_advised_fits(large, name, scratch, share):
    """Whoever follows any of the advice is not refused again, and takes what was said."""
    settings = preset(name)
    need = forecast(large, settings, WORKER)
    wanted = need.in_memory if scratch == "memory" else need.on_disk
    least = least_of(refusal(large, settings, scratch, memory_limit=10**8))
    limit = int(least + share * (wanted - least))
    words = refusal(large, settings, scratch, memory_limit=limit)
    assert words.count("the limit") == 1
    assert words.endswith(", or raise --memory-limit")
    ways = re.findall(r"(--[^,;]*) would take ([\d.]+ \w+)", words)
    assert ways
    for options, taken in ways:
        chosen = dict(re.findall(r"--(\S+) (\S+)", options))
        cut = large.with_blocks(RowBlocks.even(20_000, int(chosen.get("blocks", 8))))
        changed = preset(name, max_rank=chosen.get("max-rank"))
        followed = placed(cut, changed, chosen.get("scratch", scratch), memory_limit=limit)
        assert "of memory" not in followed.refusal
        assert followed.memory == pytest.approx(parse_bytes(taken), rel=0.01)


@pytest.mark.parametrize("scratch", ["auto", "memory", "zarr:/"])
def test_where_nothing_helps_it_is_said_what_is_needed(large, scratch):
    words = refusal(large, preset("paper"), scratch, memory_limit=300 * 10**6)
    least = least_of(words)
    assert "would take" not in words
    assert "would take" in refusal(large, preset("paper"), scratch, memory_limit=int(1.02 * least))
    assert "at least" in refusal(large, preset("paper"), scratch, memory_limit=int(0.98 * least))


def test_a_run_that_is_resumed_has_its_blocks_and_rank(large):
    settings = preset("complete")
    need = forecast(large, settings, WORKER)
    limit = int(1.1 * need.on_disk)
    assert limit < need.in_memory
    words = refusal(large, settings, "memory", memory_limit=limit, resumed=True)
    assert re.search(r"; --scratch auto would take \S+ \w+, or raise --memory-limit$", words)
    words = refusal(large, settings, memory_limit=int(0.9 * need.on_disk), resumed=True)
    assert re.search(r"; at least \S+ \w+ are needed; raise --memory-limit$", words)


def test_resume_is_not_advised_what_it_cannot_be_given(store_of, counts, tmp_path):
    asked = Checkpointing(tmp_path / "run", stop=lambda: True)
    with pytest.raises(StoppedError):
        impute(store_of(counts), checkpoint=asked)
    with pytest.raises(DoesNotFitError, match=r"; at least \S+ \w+ are needed; raise --memory-limit$"):
        resume(tmp_path / "run", memory_limit="1MB")


@pytest.mark.parametrize("scratch", ["disk", "zarr", "zarr:", ""])
def test_unknown_scratch(large, scratch):
    with pytest.raises(InputError, match="give auto, memory, or zarr:PATH"):
        refusal(large, preset("complete"), scratch)


def test_the_lower_limit_holds():
    assert limit_of(Workers(2, 1, 700), None) == (700, "--worker-memory")
    assert limit_of(Workers(2, 1, 700), 800) == (700, "--worker-memory")
    assert limit_of(Workers(2, 1, 700), 600) == (600, "--memory-limit")
    assert limit_of(Workers(1, 4, None), 600) == (600, "--memory-limit")
    assert limit_of(Workers(1, 4, None), None)[0] <= usable_memory() * 1.1


@pytest.mark.parametrize("limit", ["-5GB", "0", 0, -1, "-1 MiB", "much", "1e400", "900kB"])
def test_a_limit_is_a_size(limit):
    with pytest.raises(InputError, match=r"give (1 MB at least: 8GB\?|a number with a unit, such as 8GB)"):
        bytes_of("memory limit", limit)
    assert bytes_of("memory limit", "2 MB") == 2_000_000


@pytest.mark.parametrize("limit", ["16", 16])
def test_a_limit_without_its_unit_is_refused(limit):
    with pytest.raises(InputError, match=r"memory limit is '?16'?, 16 bytes; give 1 MB at least: 16GB\?"):
        bytes_of("memory limit", limit)


@pytest.mark.parametrize("words", [("--memory-limit", "-5GB"), ("--cluster", "local", "--worker-memory", "0")])
@pytest.mark.parametrize("command", ["impute", "plan"])
def test_limits_under_nothing_are_refused(cli, store_of, counts, tmp_path, command, words):
    done = cli(command, store_of(counts), tmp_path / "r.zarr", "--quiet", *words)
    assert done.exit_code == 2
    assert re.fullmatch(r"scialm-dask: error: \w+ memory is '0'.*\n|.*memory limit is '-5GB'.*\n", done.stderr)
    assert "give 1 MB at least" in done.stderr


def planned(cli, *words):
    done = cli("plan", *words, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_plan_tells_the_limit_that_impute_obeys(cli, store_of, counts, tmp_path):
    source = store_of(counts)
    with dask.config.set({"scialm.memory-limit": "1 MB"}):
        assert planned(cli, source)["memory_limit_bytes"] == 1_000_000
        done = cli("impute", source, tmp_path / "r.zarr", "--quiet")
    assert "limit 0.95 MiB" in done.stderr


def test_plan_says_what_impute_would_do(cli, store_of, counts, tmp_path):
    """Where the state would go, what is taken in all, and if it does not fit, the words of the refusal."""
    source, result = store_of(counts), tmp_path / "r.zarr"
    fits = planned(cli, source, result)
    assert (fits["fits"], fits["scratch"], "refusal" in fits) == (True, "memory", False)
    assert fits["memory_bytes_in_all"] == fits["peak_memory_bytes"]
    elsewhere = planned(cli, source, result, "--scratch", f"zarr:{tmp_path}")
    assert elsewhere["scratch"] == f"zarr:{tmp_path}"
    assert elsewhere["memory_bytes_in_all"] == elsewhere["peak_memory_bytes_with_zarr_scratch"]
    tight = ("--memory-limit", "1MB")
    wanting = planned(cli, source, result, *tight)
    assert (wanting["fits"], wanting["scratch"]) == (False, f"zarr:{tmp_path}")
    done = cli("impute", source, result, "--quiet", *tight)
    numbers = r"[\d.]+ MiB"
    assert re.sub(numbers, "N", wanting["refusal"]) in re.sub(numbers, "N", done.stderr)
    assert not result.exists()


def test_a_plan_counts_all_passes(cli, store_of, counts):
    source = store_of(counts)

    def passes(*words):
        return planned(cli, source, *words)["passes"]

    assert passes("--preserve-zeros") == passes() + 10
    assert passes() == passes("--preset", "denoise") <= 10
    assert passes("--preset", "denoise", "--max-rank", "5") == passes()
    few = ("--preset", "complete", "--stop", "residual", "--max-iterations")
    assert passes(*few, "9") > passes(*few, "3")


def test_plan_has_the_options_of_impute(cli):
    """But for those that say what is written, and when."""
    from scialm_dask.__main__ import main

    options = {name: {option.name for option in main.commands[name].params} for name in ("impute", "plan")}
    written = {"write", "keep_observed", "checkpoint", "checkpoint_every", "overwrite"}
    assert options["impute"] - options["plan"] == written
    assert options["plan"] <= options["impute"]


def test_compiling_counts_until_it_is_done(tmp_path):
    program = """
import numpy as np
from pathlib import Path
from scialm_dask.linalg.sparse_products import are_compiled, sddmm
from scialm_dask.run.plan import _base_memory
def peak():
    return Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
before = are_compiled(), _base_memory(0), peak()
one = np.ones((1, 1), np.float32)
sddmm(np.array([0, 1]), np.array([0], np.int32), one, one)
print(*before, are_compiled(), _base_memory(0), peak())
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    was, with_compiling, peak_before, is_now, without, peak = done.stdout.split()
    assert (was, is_now) == ("False", "True")
    took = (int(peak) - int(peak_before)) << 10
    assert 0.5 * took < int(with_compiling) - int(without) < 2 * took


def test_a_plan_that_does_not_fit_times_no_block(counts, monkeypatch):
    """Timing one takes the memory that there is not."""
    monkeypatch.setattr(ExpressionMatrix, "read_block", lambda *_, **__: pytest.fail("a block was read"))
    told = plan(Job(ExpressionMatrix.of(counts), preset("paper"), memory_limit=100 << 20))
    assert not told["fits"]
    assert "seconds" not in told


def test_annotation_is_in_the_forecast(counts):
    words = pd.DataFrame({f"c{j}": ["x" * 1000] * 120 for j in range(60)}, index=[f"cell{i}" for i in range(120)])
    bare = ExpressionMatrix.of(counts)
    wide = replace(bare, annotation=Annotation(words, pd.DataFrame(index=map(str, range(40)))))
    settings, here = preset("paper"), Workers(1, 1, None)
    more = forecast(wide, settings, here).on_disk - forecast(bare, settings, here).on_disk
    assert more > 120 * 60 * 1000


def test_a_chunk_that_is_larger_than_a_block_is_in_the_forecast(counts, store_of, monkeypatch):
    """It is read whole for any of its rows, in each thread."""
    matrix = ExpressionMatrix.open(store_of(counts), blocks=10)
    width = counts.dtype.itemsize + counts.indices.itemsize
    assert chunk_bytes(matrix.rows) == width * counts.nnz
    assert chunk_bytes(reordered(matrix.rows, matrix.blocks, np.arange(120), None)) == width * counts.nnz
    assert chunk_bytes(MemoryRows(counts)) == 0
    need = forecast(matrix, preset("paper"), Workers(1, 3, None)).on_disk
    monkeypatch.setattr("scialm_dask.run.plan.chunk_bytes", lambda _: 10**9)
    assert forecast(matrix, preset("paper"), Workers(1, 3, None)).on_disk == pytest.approx(need + 3e9, rel=0.01)
