"""What the tests share: real data where there is any, and stores of every kind."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and programs that they start inherit it

import numpy as np
import pytest
import scipy.sparse as sp

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as in the background of a shell; tests interrupt what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data, its parts in `data` and `reference`: $SCIALM_DATA, else ../shared."""
    folder = Path(os.environ.get("SCIALM_DATA") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        why = (
            f"no real data: {folder / 'data'} is absent; set SCIALM_DATA to the folder that holds data/ and reference/"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return folder


@pytest.fixture(scope="session")
def counts() -> sp.csr_matrix:
    """120 cells × 40 genes of counts, with empty cells and genes."""
    rng = np.random.default_rng(5)
    dense = rng.poisson(rng.gamma(0.6, 1.5, (120, 40))).astype(np.int32)
    dense[[7, 119]] = 0
    dense[:, [0, 13]] = 0
    return sp.csr_matrix(dense)


@pytest.fixture
def store_of(tmp_path: Path) -> Callable[..., str]:
    """Write a matrix as an AnnData store and give its path."""
    import anndata
    import h5py
    import pandas as pd
    import zarr

    def write(X: Any, name: str = "source.zarr", *, zarr_format: int = 2, names: Any = None, **layers: Any) -> str:
        obs = pd.DataFrame({"batch": pd.Categorical(np.where(np.arange(X.shape[0]) % 3, "a", "b"))})
        obs.index = [f"cell{i}" for i in range(X.shape[0])]
        var = pd.DataFrame(index=pd.Index(names if names is not None else [f"gene{j}" for j in range(X.shape[1])]))
        path = tmp_path / name
        root = (
            h5py.File(path, "w") if path.suffix == ".h5ad" else zarr.open_group(path, mode="w", zarr_format=zarr_format)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "zarr v3 autosharding")  # a notice of AnnData's next version
            for key, value in {"obs": obs, "var": var, "layers": layers, "X": X}.items():
                anndata.io.write_elem(root, key, value)
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if path.suffix == ".h5ad":
            root.close()
        return str(path)

    return write


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Run a command of the command line in this process."""
    from click.testing import CliRunner

    from scialm_dask.__main__ import main

    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="session")
def proxied_s3() -> Iterator[Any]:
    """Proxy before an S3 server of this machine."""
    from moto.server import ThreadedMotoServer
    from objects import Proxy, served

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with served(Proxy(server.get_host_and_port()[1])) as proxy:
        yield proxy
    server.stop()


@pytest.fixture
def bucket(proxied_s3: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Proxy before an S3 server with one empty bucket, ``s3://bucket``, to which the environment points."""
    from urllib.request import Request, urlopen

    keys = {"ACCESS_KEY_ID": "nobody", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for name, value in (keys | {"ENDPOINT_URL": proxied_s3.url}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    proxied_s3.reset()
    for method, path in {"POST": "moto-api/reset", "PUT": "bucket"}.items():
        urlopen(Request(f"{proxied_s3.url}/{path}", b"", method=method)).close()
    proxied_s3.log.clear()
    return proxied_s3
