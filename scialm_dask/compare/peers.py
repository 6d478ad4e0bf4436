"""Other methods, with the settings documented by their authors.

Each takes a `Task` and returns the imputed matrix: dense, float32, cells × genes, or a pair of factors. Its
transformations of the input (roots, logarithms, totals) are undone, so that all methods are compared on one scale.
Peers work in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scialm_dask.data.csr import entries_where, scaled_rows
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.evaluate.metrics import gene_means, ratio
from scialm_dask.linalg.kernels import Block, sampled_product
from scialm_dask.linalg.random import hidden_entries, n_to_hide
from scialm_dask.solve.biological_zeros import spectral_gap_rank

Floats = NDArray[np.float32]
Pair = tuple[Floats, Floats]

_KNN, _KNN_COMPONENTS = 15, 10  # the authors' example and default
_ALRA_TOTAL, _ALRA_VALUES, _ALRA_ITERATIONS, _ALRA_QUANTILE = 1e4, 100, 10, 1e-3
_SCVI_EPOCHS, _SCVI_PATIENCE = 100, 15
_VALIDATION = 0.05
_STEP, _LOWEST = 0.75, 1e-3  # ratio of successive λ, and of the last λ to the first
_PATIENCE = 2  # number of λ without a lower error on the hidden share
_SWEEPS, _SETTLED = 50, 1e-4  # at one λ: their maximum, and the relative decrease of the objective that ends them
_SPARE = 10  # columns by which a factor may grow from one λ to the next
_PANEL = 2048  # genes or cells at a time, so that temporary arrays stay small


@dataclass
class Task:
    """A matrix to impute.

    Parameters
    ----------
    path : str or path-like
        AnnData store with the matrix as X: counts, or counts normalised to one total.
    seed : int, default=0
        Seed of random draws.
    zeros_matter : bool, default=False
        Whether all entries are scored, not only hidden non-zeros.
    settings : dict
        Settings that replace those of the method.
    """

    path: str | Path
    seed: int = 0
    zeros_matter: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def matrix(self) -> ExpressionMatrix:
        """Row blocks of X."""
        return ExpressionMatrix.open(self.path)

    def csr(self) -> sp.csr_matrix:
        """Return X, float32."""
        return sp.vstack(list(self.matrix.stream()), format="csr")


def gene_mean(task: Task) -> Pair:
    """Predict each gene's mean, over its non-zeros if only non-zeros are scored, else over all cells."""
    matrix = task.matrix
    if task.zeros_matter:
        sums = matrix.reduce(lambda csr, _: csr.sum(axis=0, dtype=np.float64).A1, np.add)
        means = (sums / matrix.shape[0]).astype(np.float32)
    else:
        means = gene_means(matrix)
    return np.ones((matrix.shape[0], 1), np.float32), means[:, None]


def knn(task: Task) -> Floats:
    """kNN-smoothing 2 (Wagner, Yan and Yanai 2018): sums over more and more neighbours, found on smoothed cells.

    Takes counts. Each smoothed cell is scaled to its original total.
    """
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    X = task.csr()
    totals = _totals(X)
    k = min(_KNN, X.shape[0] - 1)
    components = min(_KNN_COMPONENTS, *(side - 1 for side in X.shape))
    smoothed = X
    for step in range(1, int(np.ceil(np.log2(k + 1))) + 1):
        pca = PCA(components, svd_solver="randomized", random_state=task.seed)
        scores = pca.fit_transform(_freeman_tukey(smoothed, np.median(totals[totals > 0])))
        nearest = NearestNeighbors(n_neighbors=min(2**step, k + 1), algorithm="brute").fit(scores)
        smoothed = nearest.kneighbors_graph(scores).astype(np.float32) @ X  # a cell is its own first neighbour
    task.note = f"k {k}, {components} components"
    return _with_totals(smoothed, totals).toarray()  # type: ignore[no-any-return]


def _totals(X: sp.csr_matrix) -> NDArray[np.float64]:
    return X.sum(axis=1, dtype=np.float64).A1  # type: ignore[no-any-return]


def _with_totals(X: sp.csr_matrix, totals: Any) -> sp.csr_matrix:
    """Return cells scaled to the given totals."""
    return scaled_rows(X, ratio(totals, _totals(X)).astype(np.float32))


def _freeman_tukey(counts: sp.csr_matrix, total: float) -> Floats:
    """Return √x + √(x + 1) of cells scaled to the same total."""
    dense: Floats = _with_totals(counts, total).toarray()
    for start in range(0, len(dense), _PANEL):
        panel = dense[start : start + _PANEL]
        dense[start : start + _PANEL] = np.sqrt(panel) + np.sqrt(panel + 1)
    return dense


def alra(task: Task) -> Floats:
    """ALRA (Linderman et al. 2022): rank-k approximation of the log-counts, with small values set to zero.

    k is at the last unusual gap of the singular values. Values of a gene below the magnitude of its 0.1 % quantile
    become zero; the others get the mean and standard deviation of the gene's non-zeros. Takes counts.
    """
    from sklearn.utils.extmath import randomized_svd

    X = task.csr()
    A: sp.csr_matrix = _with_totals(X, _ALRA_TOTAL).log1p()
    count = min(_ALRA_VALUES, *(side - 1 for side in A.shape))
    left, values, right = randomized_svd(A, count, n_iter=_ALRA_ITERATIONS, random_state=task.seed)
    k = spectral_gap_rank(values)
    task.note = f"rank {k}"
    completed: Floats = ((left[:, :k] * values[:k]) @ right[:k]).astype(np.float32)
    columns = A.tocsc()
    for start in range(0, A.shape[1], _PANEL):
        genes = slice(start, start + _PANEL)
        completed[:, genes] = _adjusted(completed[:, genes], columns[:, genes].toarray())
    np.expm1(completed, out=completed)
    completed *= (_totals(X) / _ALRA_TOTAL)[:, None].astype(np.float32)
    return completed


def _adjusted(low_rank: Floats, observed: Floats) -> Floats:
    """Threshold some genes of the approximation, and give them the mean and spread of the observed non-zeros."""
    lowest = np.abs(np.quantile(low_rank, _ALRA_QUANTILE, axis=0))
    kept = np.where(low_rank > lowest, low_rank, 0)
    (mean, spread), (wanted_mean, wanted_spread) = _of_nonzeros(kept), _of_nonzeros(observed)
    with np.errstate(divide="ignore", invalid="ignore"):
        stretch = wanted_spread / spread
        matched = np.where(kept != 0, (kept - mean) * stretch + wanted_mean, 0)
    known = np.isfinite(stretch)
    kept[:, known] = np.maximum(matched[:, known], 0)
    return np.where((observed > 0) & (kept == 0), observed, kept).astype(np.float32)


def _of_nonzeros(values: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of each column's non-zeros; NaN if there are too few."""
    n = np.count_nonzero(values, axis=0).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = values.sum(axis=0, dtype=np.float64) / n
        squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        return mean, np.sqrt(np.maximum(squares - n * mean**2, 0) / (n - 1))


def softimpute(task: Task) -> Pair:
    """Run softImpute (Hastie et al. 2015): nuclear norm, with zeros unknown and λ chosen on hidden entries."""
    left, right = soft_impute(task.csr(), seed=task.seed)
    task.note = f"rank {left.shape[1]}"
    return left, right


def soft_impute(D: sp.csr_matrix, *, max_rank: int = 100, seed: int = 0) -> Pair:
    """Return factors by alternating least squares (Hastie, Mazumder, Lee and Zadeh 2015), without dense matrices.

    Minimises ½ ‖P_Ω(D − A Bᵀ)‖² + λ/2 (‖A‖² + ‖B‖²). Each factor in turn is regressed on the filled-in matrix
    P_Ω(D − A Bᵀ) + A Bᵀ, which is sparse plus low rank. λ decreases along a path with warm starts, and the λ with the
    lowest error on a hidden share of Ω is kept.
    """
    from scipy.sparse.linalg import svds

    counts = np.bincount(D.indices, minlength=D.shape[1])
    hidden = hidden_entries(D.indices, np.zeros_like(counts), counts, n_to_hide(counts, _VALIDATION), seed)
    train, validation = entries_where(D, ~hidden), entries_where(D, hidden)
    # λ falls from just below σ₁, at which the solution is still zero
    v0 = np.ones(min(train.shape))
    largest = float(svds(train.astype(np.float64), k=1, return_singular_vectors=False, v0=v0)[0])
    lambdas = largest * _STEP ** np.arange(1, 1 + int(np.log(_LOWEST) / np.log(_STEP)), dtype=np.float64)
    errors: list[float] = []
    for left, right in _along(train, lambdas, max_rank, seed):
        errors.append(_square(_residual(validation, left, right).data))
        if len(errors) - 1 - int(np.argmin(errors)) >= _PATIENCE:
            break
    *_, kept = _along(D, lambdas[: int(np.argmin(errors)) + 1], max_rank, seed)
    return kept


def _along(D: sp.csr_matrix, lambdas: NDArray[np.float64], max_rank: int, seed: int) -> Iterator[Pair]:
    """Yield the minimiser at each λ, starting from the one before."""
    rng = np.random.default_rng(seed)
    A, B = np.zeros((D.shape[0], 0), np.float32), np.zeros((D.shape[1], 0), np.float32)
    size = float(np.sqrt(np.mean(D.data**2, dtype=np.float64))) if D.nnz else 1.0
    for lam in lambdas:
        spare = min(_SPARE, max_rank - A.shape[1])
        A = np.hstack([A, rng.normal(0, 0.1 * size**0.5, (len(A), spare))]).astype(np.float32)
        B = np.hstack([B, np.zeros((len(B), spare), np.float32)])
        A, B = _minimise(D, A, B, lam)
        # the same product, with singular values shared evenly and vanished directions dropped
        (P, R), (Q, T) = np.linalg.qr(A), np.linalg.qr(B)
        U, d, Vt = np.linalg.svd(R @ T.T)
        r = int(np.count_nonzero(d > 1e-4 * d[0])) if len(d) and d[0] > 0 else 0
        root = np.sqrt(d[:r])
        A, B = (P @ U[:, :r] * root).astype(np.float32), (Q @ Vt[:r].T * root).astype(np.float32)
        yield A, B


def _minimise(D: sp.csr_matrix, A: Floats, B: Floats, lam: float) -> Pair:
    before = np.inf
    for _ in range(_SWEEPS):
        B = _regressed(_residual(D, A, B).T, A, B, lam)
        S = _residual(D, A, B)
        objective = 0.5 * _square(S.data) + lam / 2 * (_square(A) + _square(B))
        A = _regressed(S, B, A, lam)
        if before - objective <= _SETTLED * objective:
            break
        before = objective
    return A, B


def _regressed(S: sp.csr_matrix, other: Floats, own: Floats, lam: float) -> Floats:
    """Return the ridge regression of S + own·otherᵀ on `other`, row by row."""
    gram = other.T.astype(np.float64) @ other
    target = S @ other + own @ gram.astype(np.float32)
    solved = np.linalg.solve(gram + lam * np.eye(len(gram)), target.T.astype(np.float64))
    return np.ascontiguousarray(solved.T, dtype=np.float32)


def _residual(D: sp.csr_matrix, A: Floats, B: Floats) -> sp.csr_matrix:
    """Return P_Ω(D − A Bᵀ)."""
    fitted = sampled_product(Block(D.indptr, D.indices, D.data, D.shape[1]), A, B)
    return sp.csr_matrix((D.data - fitted, D.indices, D.indptr), shape=D.shape)


def _square(values: Floats) -> float:
    return float(np.sum(values**2, dtype=np.float64))


def magic(task: Task) -> Floats:
    """MAGIC (van Dijk et al. 2018) with its defaults, on square roots of normalised counts as its authors advise."""
    import magic as peer

    operator = peer.MAGIC(random_state=task.seed, verbose=0)
    smoothed = np.asarray(operator.fit_transform(task.csr().sqrt()), np.float32)
    task.note = f"t {operator.t}, knn {operator.knn}"
    return np.square(np.maximum(smoothed, 0))


def scvi(task: Task) -> Floats:
    """Run scVI (Lopez et al. 2018): expected counts at the observed totals.

    Training ends when the loss on a tenth of the cells has not fallen for 15 epochs, or after 100 epochs. scVI's own
    maximum for few cells is 400, but later epochs change little and take hours without a GPU.
    """
    import anndata
    import scvi as peer

    peer.settings.seed = task.seed
    X = task.csr()
    cells = anndata.AnnData(X)
    peer.model.SCVI.setup_anndata(cells)
    model = peer.model.SCVI(cells)
    stopping = {"early_stopping": True, "early_stopping_patience": _SCVI_PATIENCE}
    model.train(_SCVI_EPOCHS, **stopping, accelerator="cpu", enable_progress_bar=False, logger=False)
    task.note = f"{model.trainer.current_epoch} epochs of at most {_SCVI_EPOCHS}"
    completed: Floats = model.get_normalized_expression(library_size=1, return_numpy=True).astype(np.float32)
    completed *= _totals(X)[:, None].astype(np.float32)
    return completed
