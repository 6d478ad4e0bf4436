"""Clusters of cells against known labels: normalisation, logarithm, PCA, then k-means and Leiden.

The imputed matrix is read in panels of rows, and the rest works on its leading components. At a fixed resolution Leiden
finds another number of clusters for every method, which makes indices hard to compare. So the resolution is searched,
for every method and seed alike, until there are as many clusters as labels.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scialm_dask.data.annotation import as_text
from scialm_dask.errors import InputError
from scialm_dask.evaluate.metrics import ratio
from scialm_dask.imputation import Imputation

if TYPE_CHECKING:
    import anndata

Floats = NDArray[np.float32]
_NEEDS = ("sklearn", "dask_ml", "igraph", "umap", "scanpy")
_TOTAL = 1e4  # of each cell, before the logarithm
_COMPONENTS, _NEIGHBOURS = 50, 15  # scanpy's defaults
_STARTS = 5  # of k-means; the best is kept
_SEEDS, _HALVINGS, _WIDEST = 5, 12, (1e-3, 1e2)  # of Leiden: seeds, bisections, and range of resolutions
_SILHOUETTE_CELLS = 5000


def check_libraries() -> None:
    """Raise `InputError` if a library for clustering is not installed."""
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        remedy = "install it by `pip install 'scialm-dask[evaluate]'`, or give no labels"
        raise InputError(f"clustering needs {missing[0]}; {remedy}")


def labels_of(obs: pd.DataFrame, column: str, name: str) -> pd.Series:
    """Return the labels of the cells. Raises `InputError` if any is missing or all are the same."""
    if column not in obs:
        raise InputError(f"{name}: obs has no column {column!r}; it has {', '.join(map(str, obs.columns)) or 'none'}")
    labels = pd.Series(as_text(obs[column]), obs.index, object).where(obs[column].notna())
    if labels.isna().any() or not 2 <= labels.nunique() < len(labels):
        raise InputError(
            f"{name}: obs[{column!r}] has {labels.nunique()} labels for {labels.notna().sum()} of {len(labels)} cells; "
            "every cell needs one, and two labels at least must differ"
        )
    return labels


def principal_components(matrix: da.Array, seed: int) -> Floats:
    """Return principal components of log(1 + x) of cells scaled to the same total, shape (m, k). Out of core."""
    from dask_ml.decomposition import PCA

    def log_normalised(rows: Floats) -> Floats:
        return np.log1p(rows * ratio(_TOTAL, rows.sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32))

    log = matrix.map_blocks(log_normalised, dtype=np.float32)
    components = min(_COMPONENTS, *(side - 1 for side in log.shape))
    with dask.config.set(scheduler="threads"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between dask-ml and scikit-learn
        pca = PCA(components, svd_solver="randomized", iterated_power=3, random_state=seed)
        return np.asarray(pca.fit_transform(log).compute(), np.float32)


def embedding_of(folder: Path) -> Floats | None:
    """Return the embedding of the result in `folder`, if it has one."""
    path = folder / "result.zarr"
    embedding = Imputation.open(path).embedding if path.exists() else None
    return None if embedding is None else np.asarray(embedding.compute(scheduler="threads"))


def cluster(components: Floats, labels: pd.Series, seed: int) -> tuple[dict[str, float], Floats]:
    """Cluster cells by their components, shape (m, k), into as many clusters as labels, and compare with the labels.

    Returns ARI and NMI of k-means and of Leiden (means over five seeds), the number of Leiden clusters and the
    silhouette of the labels on the components; and UMAP of the cells, float32 of shape (m, 2).
    """
    import anndata
    import scanpy as sc
    from dask_ml.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    with dask.config.set(scheduler="threads"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = anndata.AnnData(obsm={"X_pca": components}, shape=(len(components), 0))
        sc.pp.neighbors(cells, n_neighbors=min(_NEIGHBOURS, len(components) - 1), use_rep="X_pca", random_state=seed)
        sc.tl.umap(cells, random_state=seed)
        n, chunked = labels.nunique(), da.from_array(components, chunks=(1 << 16, -1))
        fits = [KMeans(n, init="k-means||", random_state=seed + start).fit(chunked) for start in range(_STARTS)]
        found = {
            "kmeans": [np.asarray(min(fits, key=lambda fit: float(fit.inertia_)).labels_)],
            "leiden": [_leiden(cells, n, seed + start) for start in range(_SEEDS)],
        }
        few = min(len(labels), _SILHOUETTE_CELLS)
        scores = {"silhouette": float(silhouette_score(components, labels, sample_size=few, random_state=seed))}
        for name, runs in found.items():
            scores[f"{name}_ari"] = float(np.mean([adjusted_rand_score(labels, run) for run in runs]))
            scores[f"{name}_nmi"] = float(np.mean([normalized_mutual_info_score(labels, run) for run in runs]))
        scores["leiden_clusters"] = float(np.mean([len(np.unique(run)) for run in found["leiden"]]))
        return scores, np.asarray(cells.obsm["X_umap"], np.float32)


def _leiden(cells: anndata.AnnData, n_clusters: int, seed: int) -> NDArray[Any]:
    """Return Leiden clusters, as near to `n_clusters` as a bisection over the resolution gets."""
    import scanpy as sc

    low, high = np.log(_WIDEST)
    best: NDArray[Any] = np.zeros(cells.n_obs, int)
    middle = 0.0  # resolution 1
    for _ in range(_HALVINGS):
        sc.tl.leiden(cells, np.exp(middle), flavor="igraph", n_iterations=2, random_state=seed, directed=False)
        found = cells.obs["leiden"].to_numpy()
        n, n_best = len(np.unique(found)), len(np.unique(best))
        best = found if abs(n - n_clusters) < abs(n_best - n_clusters) else best
        if n == n_clusters:
            break
        low, high = (middle, high) if n < n_clusters else (low, middle)
        middle = (low + high) / 2
    return best
