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
PROXIMITY = 1e-8  # weight of staying near the last V, relative to the curvature
SPREAD = 0.03  # of the first V around 1; wider starts recover genes measured through few pools worse


History = tuple[dict[str, float], ...]


class PooledALS:
    """Recover expression from pools as a non-negative factorisation of given rank.

    Minimises ‖D − U Vᵀ P‖_F² + ridge (‖U‖_F² + ‖V‖_F²) over U ≥ 0 (cells × rank) and V ≥ 0 (genes × rank) in turn. U is
    a small least-squares problem for each cell. V needs only UᵀU and UᵀD; as pools are fewer than genes it is not
    unique, and the one nearest to the last V is taken.

    Parameters
    ----------
    rank : int
        Number of components.
    random_state : int, default=0
        Seed of the start. V starts near 1, with all genes nearly alike; genes that no pool tells apart stay alike.
    ridge : float, default=0
        Weight of the penalty, in squared units of D over cells.
    restarts : int, default=1
        Number of starts. The fit of the lowest objective is kept.
    max_sweeps : int, default=100
        The most sweeps of each start. A sweep reads D once.
    tol : float, default=1e-4
        Stop when a sweep lowers the objective by less than this fraction of it, or the objective is below tol²
        ‖D‖_F².

    Notes
    -----
    The objective never rises. Blocks of D and the number of workers change the answer by rounding only.

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
            Measurements: a Dask or NumPy array, the path of a Zarr store, or anything with ``to_dask()``. Read once a
            sweep; persist it first if it is costly to make.
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
        """Recover expression of other cells with the V that was learned.

        Parameters
        ----------
        D : matrix of shape (n_cells, n_pools)
            Measurements of the cells through the same pools.

        Returns
        -------
        PooledResult
            `left` is U of these cells, lazy; `right` is V as it was.

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
        """Return gene loadings from one start, the history, and whether the stopping rule was met."""
        listen(Stage("factorising", f"start {restart + 1} of {self.restarts}" if self.restarts > 1 else ""))
        loadings = start_loadings(len(P), self.rank, self.random_state, restart)
        basis = np.linalg.eigh(P @ P.T)
        history: list[dict[str, float]] = []
        while True:
            sums = measured.total(visit_cells, P.T @ loadings, self.ridge)
            history.append(_record(sums, loadings, self.ridge))
            listen(Sweep(len(history), history[-1]["objective"]))
            converged = self._stalled(history, float(sums["measured"]))
            if converged or len(history) == self.max_sweeps:
                return loadings, tuple(history), converged
            loadings = nearest_loadings(sums["UU"], P @ sums["UD"].T, basis, loadings, self.ridge)

    def _stalled(self, history: list[dict[str, float]], measured: float) -> bool:
        now, last = history[-1]["objective"], history[-2]["objective"] if len(history) > 1 else np.inf
        return now <= self.tol**2 * measured or last - now <= self.tol * now


def start_loadings(genes: int, rank: int, seed: int, restart: int) -> Float:
    """Draw a first V: 1 ± SPREAD for every gene and component."""
    draws = [np.random.default_rng([seed, restart, gene]).normal(1.0, SPREAD, rank) for gene in range(genes)]
    return np.maximum(np.array(draws), 0.0)


def cell_factors(block: Any, start: int, basis: Float, ridge: float) -> Float:
    """Solve the rows of U: min ‖d − B u‖² + ridge ‖u‖², u ≥ 0, with B = PᵀV."""
    from scialm_dask.linalg.least_squares import nnls_gram

    D = dense_block(block, start)
    gram = basis.T @ basis + ridge * np.eye(basis.shape[1])
    U = np.empty((len(D), basis.shape[1]))
    for rows in batches(len(D)):
        U[rows] = nnls_gram(gram, D[rows] @ basis)
    return U


def visit_cells(block: Any, start: int, basis: Float, ridge: float) -> Sums:
    """Solve U for a block and sum what V needs: UᵀU and UᵀD."""
    D = dense_block(block, start)
    U = cell_factors(D, start, basis, ridge)
    return {
        "UU": U.T @ U,
        "UD": U.T @ D,
        "misfit": np.sum((D - U @ basis.T) ** 2),
        "measured": np.sum(D**2),
    }


def _record(sums: Sums, loadings: Float, ridge: float) -> dict[str, float]:
    penalty = ridge * (np.trace(sums["UU"]) + np.sum(loadings**2))
    return {"objective": float(sums["misfit"] + penalty), "residual": float(np.sqrt(sums["misfit"]))}


def nearest_loadings(
    UU: Float, target: Float, pool_basis: tuple[Float, Float], last: Float, ridge: float = 0.0
) -> Float:
    """Minimise ‖D − U Vᵀ P‖_F² + ridge ‖V‖_F² over V ≥ 0, as near the last V as possible.

    `target` is P DᵀU, genes × rank, and `pool_basis` the eigenvalues and eigenvectors of PPᵀ. The curvature is
    H = PPᵀ ⊗ UᵀU + (ridge + τ) I, with a small weight τ on ‖V − V_last‖². Both factors are diagonalised, so that H⁻¹ is
    two small products, and only the entries that bind need a system of equations. Projected Newton steps from the last
    V (Bertsekas 1982, SIAM J. Control Optim. 20); none raises the objective.
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
    """H = PPᵀ ⊗ UᵀU + (ridge + τ) I in the eigenvectors of both factors."""

    def __init__(self, UU: Float, pool_basis: tuple[Float, Float], ridge: float) -> None:
        pool_values, self.Q = pool_basis
        values, self.R = np.linalg.eigh(UU)
        self.values = np.outer(np.maximum(pool_values, 0), np.maximum(values, 0))
        self.tau = PROXIMITY * float(self.values.max())
        self.values += self.tau + ridge

    def times(self, V: Float) -> Float:
        """H V."""
        return np.asarray(self.Q @ ((self.Q.T @ V @ self.R) * self.values) @ self.R.T)

    def _inverse_times(self, V: Float) -> Float:
        return np.asarray(self.Q @ ((self.Q.T @ V @ self.R) / self.values) @ self.R.T)

    def solve(self, slope: Float, bound: NDArray[np.int64]) -> Float:
        """Solve H x = slope on the entries that are free, with x = 0 on those that are bound."""
        free = self._inverse_times(slope)
        if not len(bound):
            return free
        forces = np.zeros(slope.size)
        forces[bound] = np.linalg.solve(self._inverse_between(bound), free.ravel()[bound])
        x = free - self._inverse_times(forces.reshape(slope.shape))
        x.ravel()[bound] = 0.0
        return x

    def _inverse_between(self, entries: NDArray[np.int64]) -> Float:
        """H⁻¹ between the given entries of V."""
        gene, component = np.divmod(entries, len(self.R))
        pairs, weights = np.ix_(gene, gene), self.R[component]
        block = np.zeros((len(entries), len(entries)))
        for b in range(len(self.R)):
            between_genes = (self.Q / self.values[:, b]) @ self.Q.T
            block += np.outer(weights[:, b], weights[:, b]) * between_genes[pairs]
        return block
