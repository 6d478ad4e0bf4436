"""Every benchmark, at sizes that take no time: that it runs, and that both sides of a comparison agree."""

from __future__ import annotations

import argparse

import bench_atlas
import bench_convert
import bench_dense_dask
import bench_kernels
import bench_overhead
import bench_published
import bench_scaling
import bench_workers
import pytest
from harness import in_child


@pytest.fixture
def counts_store(tmp_path):
    path = tmp_path / "counts.zarr"
    bench_dense_dask.simulated(destination=str(path), n_cells=400, n_genes=200, density=0.3, rank=5)
    return str(path)


def test_kernels_give_a_record_for_each_width_and_density():
    choice = argparse.Namespace(small=True, densities=[0.1, 0.5], widths=[16, 40], repetitions=1)
    records = list(bench_kernels.run(choice))
    assert [record["width"] for record in records] == [16, 40, 16, 40]
    assert [record["density"] for record in records] == pytest.approx([0.1, 0.1, 0.5, 0.5], rel=0.1)
    assert all(record["ratio_of_best"] > 0 for record in records)


def test_the_published_program_and_ours_follow_each_other(counts_store):
    records = {
        name: {**call(counts_store, 9, increment=10), "survived": True}
        for name, call in (("own", bench_published.own), ("program", bench_published.program))
    }
    assert records["own"]["ranks"] == records["program"]["ranks"]
    assert bench_published.compare(**records)["largest_difference_of_residuals"] < 0.01


def test_the_dense_loop_and_ours_end_alike(counts_store):
    dense, own = bench_dense_dask.dense(counts_store, 10, power=2), bench_dense_dask.own(counts_store, 10)
    assert dense["rank"] == pytest.approx(own["rank"], abs=2)
    assert dense["residual"] == pytest.approx(own["residual"], rel=0.02)


def test_passes_are_timed(counts_store, tmp_path):
    record = bench_scaling.passes_of(counts_store, str(tmp_path), threads=2, passes=1)
    assert record["n_observed"] > 0
    assert record["ns_per_value"] > 0


def test_traffic_is_counted(counts_store, tmp_path):
    record = bench_workers.passes_of(counts_store, str(tmp_path), "memory", workers=2, passes=1)
    assert 0 < record["tasks_per_pass"] <= 4 * 2
    assert 0 < record["in_sums_of_n_by_l"] < 5


def test_overhead_is_measured():
    (few, many) = bench_overhead.passes_of(False, "memory", 200, 2, [1, 4], 1)["records"]
    assert (few["blocks"], many["blocks"]) == (2, 8)
    assert few["tasks_per_pass"] == many["tasks_per_pass"] <= 4 * 2


def test_an_atlas_is_imputed(counts_store, tmp_path):
    record = bench_atlas.imputation(counts_store, str(tmp_path), 6, "4GB")
    assert record["iterations"] == 6
    assert (tmp_path / "imputed.zarr").is_dir()


def test_a_child_over_the_cap_is_ended():
    record = in_child("bench_kernels", "block_of", memory_cap=0.001, n_genes=10, n_values=10, density=0.1)
    assert not record["survived"]


@pytest.mark.slow
def test_ways_of_converting_give_a_record_each(tmp_path):
    choice = argparse.Namespace(small=True, density=0.05, compression=["gzip"], ways=["own"], folder=str(tmp_path))
    (record,) = bench_convert.run(choice)
    assert record["survived"]
    assert (record["way"], record["compression"]) == ("own", "gzip")
