"""Damages a store at random, many times over, and tells what comes of reading each; run as a program of its own.

    python damaged.py KIND FIRST_SEED N_TRIALS

Stores are converted, imputed ("imputed …") or opened as results; runs are resumed from checkpoints, or have their scratch
damaged while they go. Prints a line for each trial: its seed, what was done, and what came of it. A crash of this process is an outcome too.
"""

import contextlib
import faulthandler
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
import zarr
from anndata.utils import make_index_unique

from scialm_dask import ExpressionMatrix, impute, resume
from scialm_dask.config import preset
from scialm_dask.data.annotation import storable
from scialm_dask.data.ingest import convert
from scialm_dask.errors import ScialmError, StoppedError
from scialm_dask.events import Iteration
from scialm_dask.imputation import Imputation
from scialm_dask.run.checkpointing import Checkpointing, Job
from scialm_dask.run.plan import plan

N_CELLS, N_GENES = 300, 40
RUN = {"preset": "paper", "max_iterations": 6}
TOLERANCE = dict.fromkeys(("imputed", "checkpoints", "scratch"), 1e-4)  # relative; other kinds are read, not computed
LONGEST = 30  # seconds for one trial


def cells():
    rng = np.random.default_rng(3)
    X = sp.csr_matrix(rng.poisson(rng.gamma(0.6, 1.5, (N_CELLS, N_GENES))).astype(np.float32))
    obs = pd.DataFrame({"batch": pd.Categorical(np.where(np.arange(N_CELLS) % 3, "a", "b")), "size": X.sum(axis=1).A1})
    obs.index = [f"cell{i}" for i in range(N_CELLS)]
    return anndata.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(N_GENES)]))


def zarr_store(path, zarr_format, **kwargs):
    adata = cells()
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for name in ("obs", "var", "X"):
        anndata.io.write_elem(root, name, getattr(adata, name), dataset_kwargs=kwargs)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    zarr.consolidate_metadata(root.store)


def tenx(path):
    adata = cells()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["shape"] = adata.shape[::-1]
        for name in ("data", "indices", "indptr"):
            values = getattr(adata.X, name).astype(np.int32 if name == "data" else np.int64)
            group.create_dataset(name, data=values, compression="gzip", chunks=(256,))
        group["barcodes"] = adata.obs_names.to_numpy().astype("S")
        group["features/name"] = group["features/id"] = adata.var_names.to_numpy().astype("S")


def mex(path):
    adata = cells()
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", adata.X.T.astype(np.int32), field="integer")
    (path / "barcodes.tsv").write_text("".join(f"{name}\n" for name in adata.obs_names))
    (path / "features.tsv").write_text("".join(f"{name}\t{name}\tGene Expression\n" for name in adata.var_names))


def packed_mex(path):
    import gzip

    mex(path)
    for file in list(path.iterdir()):
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()


def result(path):
    impute(cells(), preset="paper", max_iterations=4).to_zarr(path, dense=True)


def converted(path):
    zarr_store(path.with_suffix(".raw"), 2)
    convert(path.with_suffix(".raw"), path)


def stopped(path):
    """Two checkpoints of a run that was stopped."""
    asked = []
    stop = Checkpointing(path, every=1, stop=lambda: len(asked.append(1) or asked) > 12)
    with contextlib.suppress(StoppedError):
        impute(cells(), checkpoint=stop, key_added=None, **RUN)
    assert len([file for file in path.iterdir() if file.is_dir()]) == 2


KINDS = {
    "zarr 2": ("s.zarr", lambda path: zarr_store(path, 2)),
    "zarr 3": ("s.zarr", lambda path: zarr_store(path, 3)),
    "zarr 2 plain": ("s.zarr", lambda path: zarr_store(path, 2, compressor=None)),
    "zarr 3 plain": ("s.zarr", lambda path: zarr_store(path, 3, compressor=None)),
    "zarr 2 blosc": ("s.zarr", lambda path: zarr_store(path, 2, compressor=__import__("numcodecs").Blosc())),
    "h5ad": ("s.h5ad", lambda path: cells().write_h5ad(path)),
    "h5ad gzip": ("s.h5ad", lambda path: cells().write_h5ad(path, compression="gzip")),
    "10x": ("s.h5", tenx),
    "mex": ("s", mex),
    "mex gz": ("s", packed_mex),
    "result": ("s.zarr", result),
    "converted": ("s.zarr", converted),
    "imputed zarr": ("s.zarr", lambda path: zarr_store(path, 2)),
    "imputed h5ad": ("s.h5ad", lambda path: cells().write_h5ad(path)),
    "checkpoints": ("c", stopped),
    "scratch": ("s", Path.mkdir),
}
CHECKED = (
    "result",
    "converted",
    "mex gz",
    "checkpoints",
    "scratch",
)  # of which every byte that counts is under a checksum


def damage(path, rng):
    """Damage one file of a store; tell how."""
    below = [(folder, names) for folder, _, names in os.walk(path) if "/." not in folder]  # not what is on its way out
    files = sorted(Path(folder, name) for folder, names in below for name in names) or [path]
    file = files[rng.integers(len(files))]
    raw = bytearray(file.read_bytes())
    size = max(1, len(raw))
    how = rng.choice(["flip", "flip", "flip", "bytes", "cut", "lose", "zeros", "insert"])
    at = int(rng.integers(size))
    if how == "flip" and raw:
        raw[at] ^= 1 << int(rng.integers(8))
    elif how == "bytes":
        raw[at : at + 8] = rng.bytes(min(8, size - at))
    elif how == "cut":
        del raw[at:]
    elif how == "zeros":
        raw[at : at + 64] = bytes(min(64, size - at))
    elif how == "insert":
        raw[at:at] = rng.bytes(3)
    file.unlink()
    if how != "lose":
        file.write_bytes(raw)
    return f"{how} at {at} of {size} in {file.relative_to(path.parent)}"


def ours(kind, path, folder, damage_scratch=lambda: None):
    """What this package makes of it: a matrix, and the names and columns of cells and genes."""
    if kind == "checkpoints":
        return found_by(resume(path, cells()))
    if kind == "scratch":

        def listen(event):
            if isinstance(event, Iteration) and event.iteration == 3:
                damage_scratch()

        return found_by(impute(cells(), scratch=f"zarr:{path}", key_added=None, listen=listen, **RUN))
    if kind.startswith("imputed"):
        plan(Job(ExpressionMatrix.open(path), preset("paper")))
        return found_by(impute(path, **RUN))
    if kind == "result":
        opened = Imputation.open(path)
        values = opened[:, :]
        assert len(list(opened.X.stream()))
        return values, opened.obs, opened.var
    target = folder / "out.zarr"
    shutil.rmtree(target, ignore_errors=True)
    convert(path, target)
    read = anndata.read_zarr(target)
    return read.X.toarray(), read.obs, read.var


def found_by(imputation):
    return imputation[:, :], *(unique(frame) for frame in (imputation.obs, imputation.var))


def plain(path):
    """What others make of it."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            group = file["matrix"]
            parts = tuple(group[name][:] for name in ("data", "indices", "indptr"))
            X = sp.csr_matrix(parts, shape=group["shape"][()][::-1])
            names = [group[name].asstr()[:] for name in ("barcodes", "features/name")]
    elif path.suffix == "":
        genes = [line.split("\t") for line in (path / "features.tsv").read_text().splitlines()]
        kept = [j for j, gene in enumerate(genes) if gene[2] == "Gene Expression"]
        X = scipy.io.mmread(path / "matrix.mtx").T.tocsc()[:, kept]
        names = [(path / "barcodes.tsv").read_text().splitlines(), [genes[j][1] for j in kept]]
    else:
        root = zarr.open_group(path, mode="r", use_consolidated=False) if path.is_dir() else h5py.File(path)
        X, *frames = (anndata.io.read_elem(root[name]) for name in ("X", "obs", "var"))
        return X.toarray(), *(stored(frame) for frame in frames)
    return X.toarray(), *(stored(pd.DataFrame(index=name)) for name in names)


def stored(frame):
    """Bring a frame into the form in which this package stores it."""
    return unique(storable(frame, "obs")[0])


def unique(frame):
    return frame.set_axis(make_index_unique(frame.index), axis=0)


def equal(kind, one, other):
    close = TOLERANCE.get(kind.split()[0], 0) * other[0].max()
    return (
        one[0].shape == other[0].shape
        and np.allclose(one[0], other[0], rtol=0, atol=close)
        and all(
            list(a.index) == list(b.index) and all(list(a[column]) == list(b[column]) for column in a if column in b)
            for a, b in zip(one[1:], other[1:], strict=True)
        )
    )


def outcome(kind, path, folder, whole, damage_scratch):
    try:
        found = ours(kind, path, folder, damage_scratch)
    except ScialmError as error:
        line = str(error)
        if "\n" in line or str(path) not in line or len(line) > 700:
            return f"WRONG: a message without the path, or of several lines: {line!r}"
        return f"refused: {line}"
    except BaseException:
        return f"WRONG: {traceback.format_exc()}"
    if equal(kind, found, whole):
        return "same"
    try:
        others = None if kind in CHECKED else plain(path)
        if kind.startswith("imputed"):
            others = (impute(np.array(others[0]), **RUN)[:, :], *others[1:])
        as_others = others is not None and equal(kind, found, others)
    except Exception as error:
        return f"WRONG: another answer, where others say {error!r}"
    return "as others read it" if as_others else "WRONG: another answer"


def main(kind, first, n_trials):
    faulthandler.enable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        name, make = KINDS[kind]
        (folder / "whole").mkdir()
        make(folder / "whole" / name)
        whole = ours(kind, folder / "whole" / name, folder)
        for seed in range(first, first + n_trials):
            path = folder / "trial" / name
            shutil.rmtree(folder / "trial", ignore_errors=True)
            shutil.copytree(folder / "whole", folder / "trial")
            rng = np.random.default_rng(seed)
            how = "scratch" if kind == "scratch" else damage(path, rng)
            print(f"{seed} {how}: ", end="", flush=True)
            faulthandler.dump_traceback_later(LONGEST, exit=True)
            print(outcome(kind, path, folder, whole, lambda: print(damage(path, rng), end=": ")), flush=True)  # noqa: B023
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
