"""Checkpoints behind URLs: as on disk, but for the manifest, which is what makes one whole."""

import dask
import numpy as np
import pytest
import s3fs
from objects import Faults
from problems import low_rank_counts
from test_checkpoint import ARRAYS, write

from scialm_dask import ExpressionMatrix, Imputation, impute
from scialm_dask.data.checkpoint import Checkpoints
from scialm_dask.data.ingest import convert
from scialm_dask.errors import CheckpointError, InputError, OutputError
from scialm_dask.events import Iteration, Note

URL = "s3://bucket/c"


def s3():
    return s3fs.S3FileSystem(use_listings_cache=False)


def keys():
    """But for the lease of whoever has them open."""
    found = [key.removeprefix("bucket/c/") for key in s3().find(URL)]
    return [key for key in found if not key.startswith(".lease-")]


def test_two_runs_do_not_write_behind_one_url(checkpoints):
    with pytest.raises(OutputError, match=r"s3://bucket/c: another run writes its checkpoints there"):
        Checkpoints(URL)


@pytest.fixture
def checkpoints(bucket):
    with Checkpoints(URL) as opened:
        yield opened


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


def test_what_is_written_is_read(checkpoints):
    write(checkpoints)
    checkpoints.__exit__()
    with Checkpoints(f"{URL}/") as opened:
        assert opened.notes() == {"pi": np.pi, "list": [1, None, "ρ"]}
        read = opened.read("000001")
    for name, group in ARRAYS.items():
        for array, file in zip(group, read.arrays[name], strict=True):
            again = read.files.get(file)
            assert again.dtype == array.dtype
            np.testing.assert_array_equal(again, array)


def test_the_manifest_is_put_last_and_makes_it_whole(checkpoints, bucket):
    write(checkpoints)
    assert bucket.requests("PUT")[-1] == "/bucket/c/000001/manifest.json"
    files = checkpoints.begin()
    files.put("left", 0, ARRAYS["left"][0])
    assert checkpoints.names() == ["000001"]
    checkpoints.__exit__()  # as if it were killed
    with Checkpoints(URL) as later:
        assert later.names() == ["000001"]
        for _ in range(3):
            write(later)
        assert later.names() == ["000004", "000003"]
        assert {key.partition("/")[0] for key in keys()} == {"000003", "000004"}
        later.clear()
    assert keys() == []


def test_one_that_is_removed_never_looks_torn(checkpoints, bucket):
    write(checkpoints)
    bucket.log.clear()
    bucket.faults = Faults("POST", "delete", at={2: "403"})
    checkpoints.remove("000001")
    assert checkpoints.names() == []
    assert "000001/manifest.json" not in keys()
    assert len(keys()) > 5


def edited(path):
    content = bytearray(s3().cat(path))
    content[-6] ^= 1
    s3().pipe(path, bytes(content))


def truncated(path):
    s3().pipe(path, s3().cat(path)[:-1])


DAMAGES = {
    "missing": ("left.0/c/0/0", lambda path: s3().rm(path), "left.0 is not whole"),
    "truncated": ("left.0/c/0/0", truncated, "left.0 is damaged"),
    "longer": ("left.0/c/0/0", lambda path: s3().pipe(path, s3().cat(path) + b"1"), "left.0 is damaged"),
    "edited": ("estimate.0/c/0", edited, "estimate.0 is damaged"),
    "half a manifest": ("manifest.json", truncated, "manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_told_by_name(checkpoints, damage):
    write(checkpoints)
    name, harm, message = DAMAGES[damage]
    harm(f"bucket/c/000001/{name}")
    with pytest.raises(CheckpointError) as told:
        checkpoints.read("000001")
    assert str(told.value).startswith("s3://bucket/c/000001: ")
    assert message in str(told.value)


def test_a_failure_that_passes_is_tried_again(checkpoints, bucket):
    bucket.faults = Faults("PUT", r"left\.0/c", at={1: "500"})
    write(checkpoints)
    assert len(bucket.faults.made) == 1


def test_a_server_that_fails_is_no_damage(checkpoints, bucket, impatient):
    write(checkpoints)
    bucket.faults = Faults("GET", r"\.0/c/0", ever_after=(1, "500"))
    with (
        pytest.raises(InputError, match=r"s3://bucket/c/000001: \w+\.0/c/0\S* cannot") as told,
    ):
        checkpoints.read("000001")
    assert not isinstance(told.value, CheckpointError)


def test_workers_that_write_elsewhere(checkpoints):
    files = checkpoints.begin()
    written = files.put("left", 0, ARRAYS["left"][0])
    s3().rm("bucket/c/000001/left.0", recursive=True)
    with pytest.raises(OutputError, match="which a worker has written, is not there"):
        checkpoints.commit(files, {}, {"left": [written]})
    assert checkpoints.names() == []


def test_no_folder_is_removed_because_a_bucket_says_so(checkpoints, tmp_path):
    s3().pipe("bucket/c/.scratch", str(tmp_path).encode())
    checkpoints.own(None)
    assert tmp_path.exists()


def test_a_web_server_takes_no_checkpoints(store_of, counts):
    with pytest.raises(OutputError, match="https is only read"):
        impute(ExpressionMatrix.open(store_of(counts)), checkpoint="https://host/c")


@pytest.fixture
def source(bucket, store_of):
    convert(store_of(low_rank_counts(160, 90, density=0.4, seed=3)), "s3://bucket/in.zarr")
    bucket.log.clear()
    return "s3://bucket/in.zarr"


OPTIONS = ("--preset", "paper", "--max-iterations", "8", "--blocks", "3", "--quiet")
KEEP = ("--checkpoint", URL, "--checkpoint-every", "1")


def test_a_run_whose_server_fails_goes_on_later(cli, bucket, source, impatient):
    """From bucket to bucket; the server fails for good in the middle of a checkpoint, then in the result."""
    with dask.config.set(scheduler="synchronous"):
        assert cli("impute", source, "s3://bucket/whole.zarr", *OPTIONS).exit_code == 0
        bucket.faults = Faults("PUT", "c/0000", ever_after=(40, "500"))
        broken = cli("impute", source, "s3://bucket/out.zarr", *OPTIONS, *KEEP)
        assert broken.exit_code == 2
        assert "s3://bucket/c/0000" in broken.stderr
        assert "cannot be written (" in broken.stderr
        bucket.faults = Faults("PUT", "out.zarr/X_|out.zarr/obsm", ever_after=(1, "500"))
        broken = cli("resume", URL, "--quiet")
        assert (broken.exit_code, "s3://bucket/out.zarr: obsm" in broken.stderr) == (2, True)
        bucket.faults = Faults()
        done = cli("resume", URL, "--quiet")
        assert done.exit_code == 0, done.stderr
    one, two = (Imputation.open(f"s3://bucket/{name}.zarr") for name in ("whole", "out"))
    assert two.summary["resumed_after_iteration"] > 0
    for a, b in ((one.left.compute(), two.left.compute()), (one.right, two.right)):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)
    assert [key for key in keys() if "/c/" in key] == []
    again = cli("impute", source, "s3://bucket/other.zarr", *OPTIONS, *KEEP)
    assert "holds checkpoints already" in again.stderr


def test_a_source_that_changes_behind_its_url_is_told(bucket, source):
    matrix = ExpressionMatrix.open(source, blocks=3)

    def change(event):
        if isinstance(event, Iteration) and event.iteration == 3:
            s3().pipe("bucket/in.zarr/X/data/0", s3().cat("bucket/in.zarr/X/data/0") + b"1")

    said = []

    def listen(event):
        change(event)
        if isinstance(event, Note):
            said.append(event.words)

    impute(matrix, preset="paper", max_iterations=8, listen=listen)
    assert said == ["s3://bucket/in.zarr:X: has changed since it was read; the result is of what was there before"]


def test_there_is_nothing_to_go_on_from(cli, bucket):
    result = cli("resume", "s3://bucket/nothing")
    assert result.exit_code == 2
    assert (
        result.stderr
        == "scialm-dask: error: s3://bucket/nothing: holds no checkpoint that can be read; check the path\n"
    )
