"""What imputation does to the clusters of cells: normalise, logarithm, PCA, k-means and Leiden, against known labels.

The completed matrix is read panel by panel and never whole; what follows works on its leading components.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scialm_dask.errors import InputError
from scialm_dask.evaluate.predictions import Prediction, as_dask

__all__ = ["Clustering", "check_libraries", "cluster", "labels_of", "principal_components"]

Floats = NDArray[np.float32]
_NEEDS = ("sklearn", "dask_ml", "igraph", "umap", "scanpy")
_TOTAL = 1e4  # of each cell before the logarithm
_COMPONENTS, _NEIGHBOURS = 50, 15  # scanpy's defaults
_STARTS = 5  # of k-means; the tightest is kept
_SILHOUETTE_CELLS = 5000


@dataclass(frozen=True)
class Clustering:
    """Clusters found, scored against labels.

    Parameters
    ----------
    scores
        ARI and NMI of k-means and of Leiden, the number of clusters that Leiden found, and the silhouette of the
        labels on the components.
    umap
        A picture of the cells, shape ``(m, 2)``.
    """

    scores: dict[str, float]
    umap: Floats


def check_libraries() -> None:
    """Raise `InputError` if something that clustering needs is not installed."""
    for name in _NEEDS:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"clustering needs {name}; install it by `pip install 'scialm-dask[evaluate]'`, or give no labels"
            )


def labels_of(obs: pd.DataFrame, column: str, name: str) -> pd.Series:
    """Pick the labels of cells. Raises `InputError` if they cannot be used."""
    if column not in obs:
        raise InputError(f"{name}: obs has no column {column!r}; it has {', '.join(map(str, obs.columns)) or 'none'}")
    labels = obs[column].astype(str).where(obs[column].notna())
    if labels.isna().any() or not 2 <= labels.nunique() < len(labels):
        raise InputError(
            f"{name}: obs[{column!r}] has {labels.nunique()} labels for {labels.notna().sum()} of {len(labels)} cells; "
            "every cell needs one, and two labels at least must differ"
        )
    return labels


def principal_components(prediction: Prediction, seed: int) -> Floats:
    """Leading components of log(1 + x) of cells scaled to the same total, out of core, shape ``(m, k)``."""
    from dask_ml.decomposition import PCA

    log = as_dask(prediction).map_blocks(_log_normalised, dtype=np.float32)
    components = min(_COMPONENTS, *(side - 1 for side in log.shape))
    with dask.config.set(scheduler="threads"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between dask-ml and scikit-learn
        pca = PCA(components, svd_solver="randomized", iterated_power=3, random_state=seed)
        return np.asarray(pca.fit_transform(log).compute(), np.float32)


def _log_normalised(rows: Floats) -> Floats:
    totals = rows.sum(axis=1, keepdims=True, dtype=np.float64)
    scale = np.divide(_TOTAL, totals, out=np.zeros_like(totals), where=totals > 0)
    return np.log1p(rows * scale.astype(np.float32))  # type: ignore[no-any-return]


def cluster(components: Floats, labels: pd.Series, seed: int) -> Clustering:
    """Cluster cells by their components and compare with labels.

    Parameters
    ----------
    components
        Shape ``(m, k)``.
    labels
        Of the cells; k-means is told how many there are, Leiden is not.
    seed
        Of all starts.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    with dask.config.set(scheduler="threads"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = _k_means(components, labels.nunique(), seed)
        communities, umap = _leiden(components, seed)
        few = min(len(labels), _SILHOUETTE_CELLS)
        silhouette = silhouette_score(components, labels, sample_size=few, random_state=seed)
    scores = {
        "kmeans_ari": adjusted_rand_score(labels, means),
        "kmeans_nmi": normalized_mutual_info_score(labels, means),
        "leiden_ari": adjusted_rand_score(labels, communities),
        "leiden_nmi": normalized_mutual_info_score(labels, communities),
        "leiden_clusters": len(np.unique(communities)),
        "silhouette": silhouette,
    }
    return Clustering({name: float(value) for name, value in scores.items()}, umap)


def _k_means(components: Floats, n_clusters: int, seed: int) -> NDArray[Any]:
    import dask.array as da
    from dask_ml.cluster import KMeans

    cells = da.from_array(components, chunks=(1 << 16, -1))
    starts = [KMeans(n_clusters, init="k-means||", random_state=seed + start).fit(cells) for start in range(_STARTS)]
    best = min(starts, key=lambda fit: float(fit.inertia_))
    return np.asarray(best.labels_)


def _leiden(components: Floats, seed: int) -> tuple[NDArray[Any], Floats]:
    import anndata
    import scanpy as sc

    cells = anndata.AnnData(obsm={"X_pca": components}, shape=(len(components), 0))
    sc.pp.neighbors(cells, n_neighbors=min(_NEIGHBOURS, len(components) - 1), use_rep="X_pca", random_state=seed)
    sc.tl.leiden(cells, flavor="igraph", n_iterations=2, random_state=seed)
    sc.tl.umap(cells, random_state=seed)
    return cells.obs["leiden"].to_numpy(), np.asarray(cells.obsm["X_umap"], np.float32)
