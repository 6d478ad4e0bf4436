"""How far to trust zeros, and where to stop then: count splitting.

Masking hides only non-zeros and cannot see what becomes of zeros. Splitting the molecules of every count binomially
into a train and a test part can: both measure the same expression, their errors are independent, and all entries of
the test part, zeros too, can be predicted. In factor form the squared error over all entries costs one sampled pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scialm_dask.config import Settings
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.events import Iteration, Listener, Stage
from scialm_dask.linalg.kernels import Doubles, Floats
from scialm_dask.linalg.operator import LowRankPlusSparse
from scialm_dask.solve.ialm import iterations
from scialm_dask.solve.scaling import Confidence, Molecules, PreparedBlocks, Survey, prepare
from scialm_dask.solve.stopping import Verdict

__all__ = ["Choice", "account", "choose_zeros", "refit"]

TRAIN_SHARE = 0.8  # of the molecules; the rest test
_OMEGAS = (1.0, 0.6, 0.3, 0.1, 0.0)
_GENE_EXPONENTS = (0.5, 0.75)


@dataclass(frozen=True)
class Choice:
    """What count splitting found best.

    Parameters
    ----------
    omega
        Confidence in zeros.
    gene_exponent
        Of the scaling.
    threshold
        Of the singular values, for the whole counts.
    score
        Squared error on the test molecules less that of predicting nothing; lower is better.
    passes
        Over the data, that finding it took.
    iteration
        At which the threshold was reached, from 1.
    ranks, errors
        Of each iteration made: the rank, and ‖A − T‖ / ‖T‖ over all entries of the test molecules T, on the scale on
        which noise is even; 1 where A is zero.
    """

    omega: float
    gene_exponent: float
    threshold: float
    score: float
    passes: int = 0
    iteration: int = 0
    ranks: Sequence[int] = ()
    errors: Sequence[float] = ()


def choose_zeros(
    matrix: ExpressionMatrix,
    found: Survey,
    settings: Settings,
    operator_of: Callable[[PreparedBlocks], LowRankPlusSparse],
    listen: Listener,
    tried: MutableMapping[tuple[float, float], Choice] | None = None,
    after: Callable[[], None] = lambda: None,
) -> Choice:
    """Fit a share of the molecules along paths of falling threshold and keep what predicts the others best.

    Where ``settings.zeros`` is a number, only the threshold is chosen; where it is ``"auto"``, ω too (from 1 down,
    until the error rises) and then the exponent of the genes.

    Parameters
    ----------
    matrix, found, settings
        What is to be completed, and how.
    operator_of
        Gives the operator over some blocks.
    listen
        Called with every event.
    tried
        What was found before, by ω and exponent; that is not repeated, and what is found now is added.
    after
        Called after each fit.

    Raises
    ------
    InputError
        If the matrix does not hold raw counts.
    """
    if not found.integer or matrix.observed == "finite":
        raise InputError(
            f"{matrix.name}: not whole numbers; count splitting needs raw counts: give those (`qc` keeps them in layer "
            "counts), or use preset auto"
        )
    reference = prepare(
        matrix,
        found,
        settings,
        confidence=Confidence.uniform(1.0, matrix.shape[1]),
        molecules=Molecules(TRAIN_SHARE, True, settings.seed),
    )

    tried = {} if tried is None else tried

    def try_out(omega: float, gene_exponent: float) -> Choice:
        if (omega, gene_exponent) in tried:
            return tried[omega, gene_exponent]
        listen(Stage("choosing zeros", f"confidence {omega:g}, gene exponent {gene_exponent:g}"))
        scaled = replace(settings, scaling=(gene_exponent, settings.exponents[1]), stop="count-split")
        train = prepare(
            matrix,
            found,
            scaled,
            confidence=Confidence.uniform(omega, matrix.shape[1]),
            molecules=Molecules(TRAIN_SHARE, False, settings.seed),
        )
        operator = operator_of(train)
        stop = _SplitStop(operator, reference, _ratio(reference.scales.gene, train.scales.gene), settings)
        *_, last = iterations(operator, scaled, listen, stop)
        operator.release()
        choice = Choice(
            omega,
            gene_exponent,
            stop.threshold / math.sqrt(TRAIN_SHARE),
            stop.lowest,
            operator.passes,
            stop.iteration,
            ranks=[made.rank for made in last.history],
            errors=[stop.errors.get(made.iteration, 1.0) for made in last.history],
        )
        tried[omega, gene_exponent] = choice
        after()
        return choice

    own = settings.exponents[0]
    if settings.zeros != "auto":
        return try_out(float(settings.zeros), own)
    best = try_out(_OMEGAS[0], own)
    for omega in _OMEGAS[1:]:
        latest = try_out(omega, own)
        if latest.score >= best.score:
            break
        best = latest
    others = [try_out(best.omega, exponent) for exponent in _GENE_EXPONENTS if exponent != own]
    return min([best, *others], key=lambda choice: choice.score)


def account(chosen: Choice, tried: Iterable[Choice], settings: Settings) -> dict[str, Any]:
    """Tell what count splitting has tried, for the summary of a result.

    Returns
    -------
    dict
        ``tried``: of each fit ``zeros``, ``gene_exponent``, ``cell_exponent``, the ``iterations`` made, the one of the
        lowest error (``chosen_iteration``), its ``threshold``, ``rank`` and ``error``, and whether this fit was
        ``chosen``. ``ranks`` and ``errors``: of each iteration of the fit that was chosen; see `Choice`.
    """
    table = [
        {
            "zeros": fit.omega,
            "gene_exponent": fit.gene_exponent,
            "cell_exponent": settings.exponents[1],
            "iterations": len(fit.errors),
            "chosen_iteration": fit.iteration,
            "threshold": fit.threshold,
            "rank": fit.ranks[fit.iteration - 1],
            "error": fit.errors[fit.iteration - 1],
            "chosen": fit == chosen,
        }
        for fit in tried
    ]
    return {"tried": table, "ranks": list(chosen.ranks), "errors": list(chosen.errors)}


def refit(operator: LowRankPlusSparse) -> Doubles:
    """Least-squares factors for the columns of A in force, which undo the shrinkage of its singular values. One pass.

    On observed entries the multiplier does that; on zeros that are trusted nothing else does.
    """
    linear, square, _ = operator.quadratic()
    return np.linalg.lstsq(square, linear, rcond=1e-10)[0].astype(np.float64)


def _ratio(one: Floats | None, other: Floats | None) -> Floats | None:
    return None if one is None or other is None else one / other


class _SplitStop:
    """Stop when the refitted A has not predicted the test molecules better the last few times that its rank grew.

    While the rank stays as it is the refitted A does too, nearly, and tells nothing new.
    """

    def __init__(
        self, operator: LowRankPlusSparse, test: PreparedBlocks, columns: Floats | None, settings: Settings
    ) -> None:
        self._operator, self._test, self._columns, self._settings = operator, test, columns, settings
        self._most = min(*operator.shape, settings.max_rank or operator.shape[0])
        self._rank = self._since = 0
        self.lowest, self.threshold, self.iteration = math.inf, math.inf, 0
        self.errors: dict[int, float] = {}  # by iteration

    def judge(self, latest: Iteration) -> Verdict:
        """Refit, predict, compare."""
        coefficients = (1 - TRAIN_SHARE) / TRAIN_SHARE * refit(self._operator)
        linear, square, squares = self._operator.quadratic(self._test, self._columns)
        score = float(coefficients @ square @ coefficients - 2 * linear @ coefficients)
        self.errors[latest.iteration] = math.sqrt(max(0.0, 1 + score / squares)) if squares else 1.0
        best = score < self.lowest
        grew, self._rank = latest.rank > self._rank or latest.rank == self._most, max(self._rank, latest.rank)
        if best:
            self.lowest, self.threshold, self.iteration = score, latest.threshold, latest.iteration
            self._since = 0
        elif grew:
            self._since += 1
        done = self._since >= self._settings.patience or latest.residual < self._settings.epsilon
        return Verdict(best, f"error on test molecules lowest at threshold {self.threshold:.4g}" if done else "")
