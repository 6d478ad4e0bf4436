"""Alternating non-negative least squares on pooled measurements: D ≈ U Vᵀ P, U ≥ 0, V ≥ 0."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scialm_dask.config import Count, Natural, Weight, checked
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Stage, Sweep, silent
from scialm_dask.pooled.base import Float, Measurements, PooledResult, Sums, batches, dense_block
from scialm_dask.pooled.design import check_pools

NEWTON_STEPS = 10
PROXIMITY = 1e-8  # weight of the distance from the last V, relative to the largest curvature
SPREAD = 0.03  # standard deviation of the first V around 1; larger ones recover genes in few pools less well
History = tuple[dict[str, float], ...]


class PooledALS:
    """Recover expression from pools as a non-negative factorisation of given rank.

    Minimises ‖D − U Vᵀ P‖_F² + ridge (‖U‖_F² + ‖V‖_F²) over U ≥ 0 (cells × rank) and V ≥ 0 (genes × rank) in turn. U is
    a small least-squares problem for each cell. V depends only on UᵀU and UᵀD. With fewer pools than genes V is not
    unique, and the solution nearest to the last V is taken.

    Parameters
    ----------
    rank : int
        Number of components.
    random_state : int, default=0
        Seed of the start. V starts near 1 for all genes; genes in the same pools stay alike.
    ridge : float, default=0
        Weight of the penalty, in squared units of D over cells.
    restarts : int, default=1
        Number of starts. The fit with the lowest objective is kept.
    max_sweeps : int, default=100
        Maximum number of sweeps of each start. A sweep reads D once.
    tol : float, default=1e-4
        Stop when a sweep lowers the objective by less than this fraction of it, or when the objective is below tol²
        ‖D‖_F².

    Notes
    -----
    The objective never rises. The chunks of D and the number of workers change the result by rounding only.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> P = scialm_dask.balanced_pools(40, 20, per_gene=3)
    >>> D = scialm_dask.measure(counts, P)
    >>> als = scialm_dask.PooledALS(rank=2)
    >>> als.fit(D, P).to_dask().shape
    (60, 40)
    """

    @checked
    def __init__(
        self,
        rank: Count,
        random_state: Natural = 0,
        *,
        ridge: Weight = 0.0,
        restarts: Count = 1,
        max_sweeps: Count = 100,
        tol: Weight = 1e-4,
    ) -> None:
        self.rank, self.random_state, self.ridge = rank, random_state, ridge
        self.restarts, self.max_sweeps, self.tol = restarts, max_sweeps, tol
        self.loadings_: Float | None = None
        self.pools_: Float | None = None

    def fit(self, D: Any, P: ArrayLike, *, listen: Listener = silent) -> PooledResult:
        """Recover expression, and learn gene loadings V.

        Parameters
        ----------
        D : matrix of shape (n_cells, n_pools)
            Measurements: a Dask or NumPy array, the path of a Zarr store, or anything with ``to_dask()``. D is read
            in every sweep; persist it first if it is costly to compute.
        P : array-like of shape (n_genes, n_pools)
            The design, binary.
        listen : callable, optional
            Called with every event of the work; see `scialm_dask.events`.

        Returns
        -------
        PooledResult
            `left` is U, `right` is V.

        Raises
        ------
        InputError
            If D or P cannot be used, or do not fit each other.

        Warns
        -----
        UserWarning
            If the rank is above the number of pools.

        Examples
        --------
        >>> fitted = als.fit(D, P)
        >>> fitted.right.shape, fitted.converged
        ((40, 2), True)
        """
        P = check_pools(P)
        measured = Measurements.of(D, P.shape[1])
        if self.rank > P.shape[1]:
            warnings.warn(
                f"rank {self.rank} is above the number of pools, {P.shape[1]}: each cell has fewer measurements than "
                "components, so its components cannot be identified; lower the rank or add pools",
                stacklevel=2,
            )
        fits = (self._descend(measured, P, restart, listen) for restart in range(self.restarts))
        loadings, history, converged = min(fits, key=lambda fit: fit[1][-1]["objective"])
        self.pools_, self.loadings_ = P, loadings
        return self._result(measured, history, converged)

    def transform(self, D: Any) -> PooledResult:
        """Recover the expression of other cells with the fitted V.

        Parameters
        ----------
        D : matrix of shape (n_cells, n_pools)
            Measurements of the cells through the same pools.

        Returns
        -------
        PooledResult
            `left` is U of these cells, lazy; `right` is the fitted V.

        Raises
        ------
        InputError
            If D cannot be used, or nothing was fitted.

        Examples
        --------
        >>> als.transform(D[:5]).shape
        (5, 40)
        """
        if self.pools_ is None or self.loadings_ is None:
            raise InputError("nothing was fitted; call fit first")
        measured = Measurements.of(D, self.pools_.shape[1])
        sums = measured.total(visit_cells, self.pools_.T @ self.loadings_, self.ridge)
        return self._result(measured, (_record(sums, self.loadings_, self.ridge),), True)

    def _result(self, measured: Measurements, history: History, converged: bool) -> PooledResult:
        assert self.pools_ is not None
        assert self.loadings_ is not None
        left = measured.map(cell_factors, self.rank, self.pools_.T @ self.loadings_, self.ridge)
        last = history[-1]
        return PooledResult(left, self.loadings_, last["objective"], last["residual"], None, history, converged)

    def _descend(self, measured: Measurements, P: Float, restart: int, listen: Listener) -> tuple[Float, History, bool]:
        """Return the V found from one start, the history, and whether the stopping rule was met."""
        listen(Stage("factorising", f"start {restart + 1} of {self.restarts}" if self.restarts > 1 else ""))
        loadings = start_loadings(len(P), self.rank, self.random_state, restart)
        basis = np.linalg.eigh(P @ P.T)
        history: list[dict[str, float]] = []
        while True:
            sums = measured.total(visit_cells, P.T @ loadings, self.ridge)
            history.append(_record(sums, loadings, self.ridge))
            listen(Sweep(len(history), history[-1]["objective"]))
            now, last = history[-1]["objective"], history[-2]["objective"] if len(history) > 1 else np.inf
            converged = now <= self.tol**2 * float(sums["measured"]) or last - now <= self.tol * now
            if converged or len(history) == self.max_sweeps:
                return loadings, tuple(history), converged
            loadings = nearest_loadings(sums["UU"], P @ sums["UD"].T, basis, loadings, self.ridge)


def start_loadings(genes: int, rank: int, seed: int, restart: int) -> Float:
    """Return the first V, 1 ± SPREAD for every gene and component; the draws are keyed by gene."""
    draws = [np.random.default_rng([seed, restart, gene]).normal(1.0, SPREAD, rank) for gene in range(genes)]
    return np.maximum(np.array(draws), 0.0)


def cell_factors(block: Any, start: int, basis: Float, ridge: float) -> Float:
    """Return U of a block: each row minimises ‖d − B u‖² + ridge ‖u‖² over u ≥ 0, with B = PᵀV."""
    from scialm_dask.linalg.least_squares import nnls_gram

    D = dense_block(block, start)
    gram = basis.T @ basis + ridge * np.eye(basis.shape[1])
    U = np.empty((len(D), basis.shape[1]))
    for rows in batches(len(D)):
        U[rows] = nnls_gram(gram, D[rows] @ basis)
    return U


def visit_cells(block: Any, start: int, basis: Float, ridge: float) -> Sums:
    """Solve U of a block; return UᵀU and UᵀD, which V depends on, and the squared norms of D − U Bᵀ and D."""
    D = dense_block(block, start)
    U = cell_factors(D, start, basis, ridge)
    return {"UU": U.T @ U, "UD": U.T @ D, "misfit": np.sum((D - U @ basis.T) ** 2), "measured": np.sum(D**2)}


def _record(sums: Sums, loadings: Float, ridge: float) -> dict[str, float]:
    penalty = ridge * (np.trace(sums["UU"]) + np.sum(loadings**2))
    return {"objective": float(sums["misfit"] + penalty), "residual": float(np.sqrt(sums["misfit"]))}


def nearest_loadings(
    UU: Float, target: Float, pool_basis: tuple[Float, Float], last: Float, ridge: float = 0.0
) -> Float:
    """Return the V ≥ 0 that minimises ‖D − U Vᵀ P‖_F² + ridge ‖V‖_F² and is nearest to the last V.

    `target` is P DᵀU, genes × rank, and `pool_basis` the eigenvalues and eigenvectors of PPᵀ. The curvature is
    H = PPᵀ ⊗ UᵀU + (ridge + τ) I, with a small weight τ on ‖V − V_last‖². Both factors are diagonalised, so H⁻¹ costs
    two small products, and only the binding entries need a system of equations. The steps are projected Newton steps
    (Bertsekas 1982, SIAM J. Control Optim. 20), none of which raises the objective.
    """
    curvature = _Curvature(UU, pool_basis, ridge)
    if curvature.tau <= 0:
        return last
    V, target = last, target + curvature.tau * last
    for _ in range(NEWTON_STEPS):
        slope = curvature.times(V) - target
        bound = (slope > 0) & np.less_equal(V, 1e-9 * V.max())
        free_slope = np.where(bound, 0.0, slope)
        direction = curvature.solve(free_slope, np.flatnonzero(bound))
        step = 1.0
        while step > 1e-9:
            move = np.maximum(V - step * direction, 0.0) - V
            change = float(np.sum(slope * move) + 0.5 * np.sum(move * curvature.times(move)))
            if change <= 0.1 * float(np.sum(slope * move)):
                break
            step *= 0.5
        else:
            return V
        V = V + move
        if -change <= 1e-12 * abs(float(np.sum(V * (target + slope)))):
            return V
    return V


class _Curvature:
    """H = PPᵀ ⊗ UᵀU + (ridge + τ) I, in the eigenvectors of both factors."""

    def __init__(self, UU: Float, pool_basis: tuple[Float, Float], ridge: float) -> None:
        pool_values, self.Q = pool_basis
        values, self.R = np.linalg.eigh(UU)
        self.values = np.outer(np.maximum(pool_values, 0), np.maximum(values, 0))
        self.tau = PROXIMITY * float(self.values.max())
        self.values += self.tau + ridge

    def times(self, V: Float) -> Float:
        """Return H V."""
        return np.asarray(self.Q @ ((self.Q.T @ V @ self.R) * self.values) @ self.R.T)

    def _inverse_times(self, V: Float) -> Float:
        return np.asarray(self.Q @ ((self.Q.T @ V @ self.R) / self.values) @ self.R.T)

    def solve(self, slope: Float, bound: NDArray[np.int64]) -> Float:
        """Solve H x = slope on the free entries of V, with x = 0 on the bound ones."""
        free = self._inverse_times(slope)
        if not len(bound):
            return free
        gene, component = np.divmod(bound, len(self.R))
        pairs, weights = np.ix_(gene, gene), self.R[component]
        inverse, forces = np.zeros((len(bound), len(bound))), np.zeros(slope.size)  # H⁻¹ between the bound entries
        for b in range(len(self.R)):
            inverse += np.outer(weights[:, b], weights[:, b]) * ((self.Q / self.values[:, b]) @ self.Q.T)[pairs]
        forces[bound] = np.linalg.solve(inverse, free.ravel()[bound])
        x = free - self._inverse_times(forces.reshape(slope.shape))
        x.ravel()[bound] = 0.0
        return x
