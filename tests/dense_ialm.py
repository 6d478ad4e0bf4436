"""Dense NumPy twins of the distributed algorithms: the oracles of the tests. Read them beside the papers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scialm_dask.config import Settings

__all__ = ["DenseCompletion", "ialm_dense"]

Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class DenseCompletion:
    """What `ialm_dense` gives.

    A, the iteration that was chosen, its A before held-out entries were given back, and one entry of the
    rest for each iteration. `held_out` is the relative error over the held-out entries, NaN if there are none.
    """

    A: Doubles
    chosen: int
    before: Doubles
    ranks: tuple[int, ...]
    residuals: tuple[float, ...]
    held_out: tuple[float, ...]


def ialm_dense(D: Doubles, observed: Mask, settings: Settings, held_out: Mask | None = None) -> DenseCompletion:
    """Run Algorithm 3 word for word, on dense matrices, in float64, with exact singular value decompositions.

    Parameters
    ----------
    D
        Shape ``(m, n)``; what it holds off `observed` does not matter.
    observed
        Ω, of the same shape.
    settings
        Of which rank policy, stop, ε, iterations, sv₀, R, largest rank and patience count.
    held_out
        Entries of Ω to take out of it, to know when to stop.
    """
    hidden = np.zeros_like(observed) if held_out is None else held_out
    omega = observed & ~hidden
    truth, D = D[hidden], np.where(omega, D, 0.0)
    most = min(*D.shape, settings.max_rank or D.size)
    sv = min(settings.first_rank, most) if settings.rank_policy == "paper" else most
    mu, rho = 0.3 / np.linalg.norm(D, 2), 1.1 + 2.5 * omega.mean()
    A = E = Y = best = np.zeros_like(D)
    ranks: list[int] = []
    residuals: list[float] = []
    errors: list[float] = []
    chosen, lowest = 0, np.inf
    for k in range(1, settings.max_iterations + 1):
        W = D - E + Y / mu
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        svp = min(sv, int(np.sum(S * mu > 1)))
        A = (U[:, :svp] * (S[:svp] - 1 / mu)) @ Vt[:svp]
        E = np.where(omega, 0.0, D - A + Y / mu)
        Y = Y + mu * (D - A - E)
        mu *= rho
        if settings.rank_policy == "paper":
            sv = svp + 1 if svp < sv else min(svp + settings.increment, most)
        ranks.append(svp)
        residuals.append(float(np.linalg.norm(D - A - E) / np.linalg.norm(D)))
        errors.append(float(np.linalg.norm(truth - A[hidden]) / np.linalg.norm(truth)) if truth.size else np.nan)
        if settings.stop == "residual" or svp == 0 or errors[-1] < lowest:
            best, chosen, lowest = A, k, errors[-1] if svp else np.inf
            chosen_W, threshold = D - E + Y / mu, rho / mu
        if residuals[-1] < settings.epsilon or (settings.stop == "held-out" and k - chosen >= settings.patience):
            break
    if truth.size:
        grown = sum(rho**-j for j in range(chosen + 1))  # w − a over d − a, had A always been as it is now
        chosen_W[hidden] = best[hidden] + grown * (truth - best[hidden])
        U, S, Vt = np.linalg.svd(chosen_W, full_matrices=False)
        svp = min(ranks[chosen - 1], np.count_nonzero(S / threshold > 1))
        A = (U[:, :svp] * (S[:svp] - threshold)) @ Vt[:svp]
    else:
        A = best
    return DenseCompletion(A, chosen, best, tuple(ranks), tuple(residuals), tuple(errors))
