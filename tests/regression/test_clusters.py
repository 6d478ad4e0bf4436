"""Clusters of cells of known types, by the embedding of a denoised result and by the cells as observed."""

from __future__ import annotations

import numpy as np
import pytest

from scialm_dask import ExpressionMatrix, impute
from scialm_dask.compare.clustering import cluster, principal_components


@pytest.mark.slow  # a minute: ten searches of Leiden's resolution for each set
@pytest.mark.parametrize("name", ["pbmc_facs", "mouse_bladder"])
def test_cells_cluster_better_by_the_embedding_than_as_observed(shared, name):
    matrix = ExpressionMatrix.open(shared / "data" / f"{name}.h5ad")
    kinds = matrix.obs["cell_type"].astype(str)
    observed = principal_components(matrix.to_dask().map_blocks(lambda block: block.toarray(), dtype=np.float32), 0)
    embedding = impute(matrix).embedding.compute()
    assert embedding.shape == observed.shape
    by_observed, by_embedding = (cluster(points, kinds, 0)[0]["leiden_ari"] for points in (observed, embedding))
    assert by_embedding >= by_observed
