"""The operator over blocks: the same whatever the blocks, the store and the residence; passes and versions counted."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import InMemory, low_rank_counts, operator_of, product_of

from scialm_dask.data.scratch import MemoryScratch, ZarrScratch
from scialm_dask.linalg.kernels import BlockState, Update
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.linalg.svd import extended_basis, rayleigh_ritz

M, N = 70, 41
COUNTS = low_rank_counts(M, N, seed=8)
START = extended_basis(np.zeros((N, 0), np.float32), 8, 0)


def take_steps(operator, n_steps=3, rank=3):
    """A few steps of the loop, without its rules."""
    basis, products = START, []
    for _ in range(n_steps):
        product = operator.multiply(basis)
        svd = rayleigh_ritz(product)
        rotation = (svd.to_left[:, :rank] * svd.values[:rank]).astype(np.float32)
        operator.multiply(None, Update(rotation, 0.7), svd.right[:, :rank].copy())
        basis = svd.right
        products.append(product)
    return products


@pytest.fixture(scope="module")
def whole():
    operator = operator_of(COUNTS, 1)
    return take_steps(operator), operator.factors()


@pytest.mark.parametrize(
    ("kind", "n_blocks"), [(kind, blocks) for kind in ("memory", "zarr") for blocks in (1, 3, 7)] + [("memory", M)]
)
def test_blocks_and_stores_do_not_change_the_factors(whole, tmp_path, kind, n_blocks):
    store = MemoryScratch() if kind == "memory" else ZarrScratch(str(tmp_path))
    operator = operator_of(COUNTS, n_blocks, store=store)
    take_steps(operator)
    lefts, right = operator.factors()
    assert len(lefts) == n_blocks
    left, expected_left = (np.vstack([part.compute() for part in parts]) for parts in (lefts, whole[1][0]))
    assert np.linalg.norm(left - expected_left) < 1e-4 * np.linalg.norm(expected_left)
    assert np.linalg.norm(right - whole[1][1]) < 1e-4 * np.linalg.norm(right)


def test_disk_and_memory_give_the_same_bits(tmp_path):
    results = []
    for store in (MemoryScratch(), ZarrScratch(str(tmp_path))):
        operator = operator_of(COUNTS, 3, store=store)
        products = take_steps(operator)
        results.append([*products[-1], product_of(*operator.factors())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_run_repeats_to_the_bit(scheduler):
    with dask.config.set(scheduler=scheduler):
        first, second = (take_steps(operator_of(COUNTS, 7))[-1] for _ in range(2))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)


@given(st.lists(st.integers(1, M - 1), unique=True, max_size=8))
@settings(max_examples=20, deadline=None)
def test_any_cut_gives_the_same_product(cuts):
    source = InMemory(COUNTS)
    source.bounds = (0, *sorted(cuts), M)
    with dask.config.set(scheduler="synchronous"):
        product = LowRankPlusSparse(source, MemoryScratch()).multiply(START)
    D = COUNTS.astype(np.float32).toarray().astype(np.float64)
    np.testing.assert_allclose(product.cross, D.T @ (D @ START), rtol=1e-4, atol=1e-4 * np.abs(product.cross).max())
    np.testing.assert_allclose(product.gram, (D @ START).T @ (D @ START), atol=1e-5 * product.gram.max())


def test_what_is_observed_and_held_out_is_counted():
    rng = np.random.default_rng(0)
    hidden = rng.random(COUNTS.nnz) < 0.2
    alone = slice(*COUNTS.indptr[5:7])
    hidden[alone] = True
    for n_blocks in (1, 4):
        seen = operator_of(COUNTS, n_blocks, hidden=hidden).observations
        assert (seen.n_observed, seen.n_held_out) == ((~hidden).sum(), hidden.sum())
        assert seen.sum_squares == pytest.approx((COUNTS.data[~hidden] ** 2).sum())
        assert seen.held_out_squares == pytest.approx((COUNTS.data[hidden] ** 2).sum())
        assert seen.n_emptied == 1
    everything = operator_of(COUNTS).observations
    assert (everything.n_observed, everything.n_held_out, everything.n_emptied) == (COUNTS.nnz, 0, 0)


def test_the_source_is_read_once(tmp_path):
    source = InMemory(COUNTS, 5)
    operator = LowRankPlusSparse(source, ZarrScratch(str(tmp_path)))
    work = [
        lambda: operator.multiply(START),
        lambda: operator.multiply(START, Update(np.ones((8, 2), np.float32), 0.5), np.ones((N, 2), np.float32)),
        lambda: operator.multiply(None, Update(np.ones((8, 2), np.float32), 0.5), np.ones((N, 2), np.float32)),
        lambda: operator.project(np.ones((M, 4), np.float32)),
        operator.column_gram,
        operator.row_gram,
    ]
    for number, one_pass in enumerate(work, start=1):
        one_pass()
        assert operator.passes == number
    assert sorted(source.loads) == [0, 1, 2, 3, 4]


def on_disk(folder):
    """Versions of the state; the blocks themselves stay as they are."""
    names = sorted(os.listdir(folder))
    blocks = ["indices.0", "indptr.0", "observed.0"]
    assert set(blocks) <= set(names)
    return [name for name in names if name not in blocks and not name.startswith(".")]


def test_versions_that_nobody_needs_are_dropped_from_disk(tmp_path):
    operator = operator_of(COUNTS, 2, store=ZarrScratch(str(tmp_path)))
    assert os.listdir(tmp_path) == []
    operator.multiply(START)
    assert on_disk(tmp_path) == ["estimate.0", "left.0", "sketch.1"]
    step, right = Update(np.eye(8, 2, dtype=np.float32), 0.5), np.ones((N, 2), np.float32)
    operator.multiply(START, step, right)
    assert on_disk(tmp_path) == ["estimate.2", "left.2", "sketch.2"]
    operator.keep()
    operator.multiply(START, step, right)
    assert on_disk(tmp_path) == ["estimate.2", "estimate.3", "left.2", "left.3", "sketch.3"]
    operator.multiply(START, step, right)
    assert on_disk(tmp_path) == ["estimate.2", "estimate.4", "left.2", "left.4", "sketch.4"]
    operator.keep()
    assert on_disk(tmp_path) == ["estimate.4", "left.4", "sketch.4"]
    operator.keep()
    assert on_disk(tmp_path) == ["estimate.4", "left.4", "sketch.4"]
    operator.multiply(START, step, right)
    operator.restore()
    assert on_disk(tmp_path) == ["estimate.4", "left.4", "sketch.5"]


def test_factors_are_those_that_were_kept(tmp_path):
    for store in (MemoryScratch(), ZarrScratch(str(tmp_path))):
        operator = operator_of(COUNTS, 3, store=store)
        take_steps(operator, 1)
        operator.keep()
        kept = product_of(*operator.factors())
        take_steps(operator, 2)
        np.testing.assert_array_equal(product_of(*operator.factors()), kept)
        operator.keep()
        assert np.abs(product_of(*operator.factors()) - kept).max() > 1


def test_the_graph_does_not_grow():
    """The state that is held refers to results, not to the tasks of all passes before."""
    with dask.config.set(scheduler="threads", num_workers=4):
        operator = operator_of(COUNTS, 9)
        sizes = []
        for _ in range(4):
            take_steps(operator, 1)
            sizes.append(sum(len(dict(part.__dask_graph__())) for part in operator._states))
    assert set(sizes) == {4}


def test_scratch_is_zarr_and_gives_back_what_it_got(tmp_path):
    """The chunk is written without the library, so it is read with it here."""
    rng, scratch = np.random.default_rng(0), ZarrScratch(str(tmp_path))
    arrays = [rng.random(7).astype(np.float32), rng.random((4, 3)), np.arange(5), np.zeros((3, 0), np.float32)]
    for number, array in enumerate([*arrays, np.asfortranarray(arrays[1])]):
        state = BlockState(array, arrays[0], arrays[1])
        kept = scratch.put(state, 2, number)
        got = scratch.get(kept)
        np.testing.assert_array_equal(got.estimate, array)
        assert got.estimate.dtype == array.dtype
        np.testing.assert_array_equal(zarr.open_array(Path(kept.estimate.chunk).parent, mode="r")[...], array)
        assert scratch.get(kept, ("estimate",)).estimate.size == 0
        other = scratch.put(replace(state, left=arrays[2]), 2, number + 10, state, kept)
        assert (other.estimate, other.sketch) == (kept.estimate, kept.sketch)  # not written again
        np.testing.assert_array_equal(scratch.get(other).left, arrays[2])
        for name in ("estimate", "left", "sketch"):
            scratch.drop(name, number)
            scratch.drop(name, number + 10)
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".")]


def test_a_released_operator_leaves_nothing_on_disk(tmp_path):
    operator = operator_of(COUNTS, 2, store=ZarrScratch(str(tmp_path)))
    take_steps(operator, 2)
    operator.keep()
    take_steps(operator, 1)
    operator.release()
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".")]


def test_the_first_work_of_a_process_leaves_the_configuration_whole():
    """Dask imports distributed on its way, and with it the defaults of its configuration."""
    program = """
import dask, numpy, sys
from scialm_dask import ExpressionMatrix, biological_zeros
assert "distributed" not in sys.modules
biological_zeros(ExpressionMatrix.of(numpy.eye(20)))
dask.config.get("distributed.comm.timeouts.connect")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
