"""What held once holds again and again, whenever the trouble comes."""

import subprocess
import sys

import dask
import killing
import numpy as np
import pytest
from objects import Faults
from problems import low_rank_counts

from scialm_dask import Imputation, impute
from scialm_dask.data.ingest import convert
from scialm_dask.run.checkpointing import Checkpointing


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "kills"), [("denoise", 20), ("complete", 8)])
def test_runs_killed_at_random_moments_end_as_one_left_alone(preset, kills):
    words = [sys.executable, killing.__file__, preset, "1", str(kills)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout, done.stdout
    assert int(done.stdout.splitlines()[-1].split()[0]) >= kills


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 10))
def test_a_bucket_that_fails_at_random_changes_nothing(bucket, store_of, seed):
    """One request in thirty: source, checkpoints and result lie there."""
    rng, path = np.random.default_rng(seed), store_of(low_rank_counts(160, 90, density=0.5, seed=3))
    bucket.faults = Faults(at={n: rng.choice(["500", "503", "drop"]) for n in range(1, 5000) if rng.random() < 1 / 30})
    convert(path, "s3://bucket/in.zarr")
    checkpoint = Checkpointing("s3://bucket/c", every=1)
    with dask.config.set(scheduler="threads"):
        impute("s3://bucket/in.zarr", preset="denoise", checkpoint=checkpoint).to_zarr("s3://bucket/out.zarr")
        found, expected = Imputation.open("s3://bucket/out.zarr")[:, :], impute(path, preset="denoise")[:, :]
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    assert len(bucket.faults.made) > 5
