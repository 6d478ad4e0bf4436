"""One experiment: every method run on it in a process of its own, scored, and clustered where cells have labels."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scialm_dask.compare import clustering as downstream
from scialm_dask.compare.experiments import Experiment, Source
from scialm_dask.compare.isolated import Outcome, Request, run_isolated
from scialm_dask.compare.methods import Contestant, find_method
from scialm_dask.evaluate.metrics import Moments, compare_all, compare_stored
from scialm_dask.evaluate.predictions import Given, Prediction, read_prediction
from scialm_dask.events import Listener, Stage

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METRICS", "Collected", "Row", "Trial", "fresh_folder", "run_contestant"]

Row = dict[str, Any]
METRICS = ("mse", "mae", "pearson", "cosine")
_LEAST_ENTRIES = 10  # of a gene whose correlation is to count
_GIVEN = "as observed"


@dataclass
class Collected:
    """Rows as they come, and what they are pooled from."""

    rows: list[Row] = field(default_factory=list)
    moments: dict[tuple[Any, ...], Moments] = field(default_factory=dict)
    clusters: list[Row] = field(default_factory=list)
    umap: dict[tuple[str, str], NDArray[np.float32]] = field(default_factory=dict)


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Make a folder, and remove it with all that was put there."""
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class Trial:
    """Runs all methods on one experiment, and scores them."""

    experiment: Experiment
    place: Path
    memory_limit: int | None
    time_limit: float | None
    labels: pd.Series | None
    collected: Collected
    row: Callable[[Row], None]
    listen: Listener

    def run(self, listed: Sequence[Contestant]) -> None:
        """Run all, the matrix as observed first where that says something."""
        if self.experiment.all_entries or self.labels is not None:
            self._judge(Contestant(_GIVEN), Given(self.experiment.given.matrix), Outcome("ok"))
        for number, contestant in enumerate(listed):
            if self.experiment.target is None and contestant.method == "gene-mean":
                continue  # all cells alike, nothing to cluster
            self.listen(Stage(_label(contestant), f"{number + 1} of {len(listed)}"))
            with fresh_folder(self.place / f"method{number}") as folder:
                outcome = run_contestant(
                    contestant,
                    self.experiment.given,
                    folder,
                    seed=self.experiment.seed,
                    zeros_matter=self.experiment.all_entries,
                    memory_limit=self.memory_limit,
                    time_limit=self.time_limit,
                )
                prediction = read_prediction(folder) if outcome.status == "ok" else None
                if prediction is not None and prediction.shape != self.experiment.given.matrix.shape:
                    note = f"gave {prediction.shape[0]} × {prediction.shape[1]}"
                    outcome, prediction = Outcome("failed", outcome.seconds, note=note), None
                self._judge(contestant, prediction, outcome)

    def _judge(self, contestant: Contestant, prediction: Prediction | None, outcome: Outcome) -> None:
        which = {
            "experiment": self.experiment.kind,
            "share": np.nan if self.experiment.share is None else round(self.experiment.share, 6),
            "method": contestant.method,
            "setting": contestant.words,
        }
        if self.experiment.all_entries or contestant.method != _GIVEN:  # of hidden entries the given ones say nothing
            scores = {} if prediction is None else self._scores(prediction, tuple(which.values()))
            self.row({**which, "seed": self.experiment.seed, **asdict(outcome), **scores})
        if prediction is not None and self.labels is not None and contestant.method != "gene-mean":
            components = downstream.principal_components(prediction, self.experiment.seed)
            found = downstream.cluster(components, self.labels, self.experiment.seed)
            self.collected.clusters.append({**which, **found.scores})
            self.collected.umap[self.experiment.kind, _label(contestant)] = found.umap

    def _scores(self, prediction: Prediction, key: tuple[Any, ...]) -> Row:
        target = self.experiment.target
        if target is None:
            return {}
        if not self.experiment.all_entries:
            moments, scores = compare_stored(prediction, target), {}
        else:
            moments, zeros = compare_all(prediction, target, self.experiment.given.matrix)
            scores = {
                "relative_error": moments.relative_error,
                "mean_ratio": moments.mean_ratio,
                "zeros_pearson": zeros.overall.pearson,
            }
        before = self.collected.moments.get(key)
        self.collected.moments[key] = moments if before is None else before + moments
        return {**asdict(moments.overall), **_gene_medians(moments), **scores}


def run_contestant(
    contestant: Contestant,
    given: Source,
    folder: Path,
    *,
    seed: int = 0,
    zeros_matter: bool = False,
    memory_limit: int | None = None,
    time_limit: float | None = None,
) -> Outcome:
    """Run a method on the view that it takes, in a process of its own.

    Parameters
    ----------
    contestant
        The method.
    given
        The matrix.
    folder
        For its answer; see `run_isolated`.
    seed, zeros_matter, memory_limit, time_limit
        See `Request` and `run_isolated`.

    Returns
    -------
    Outcome
        ``"needs counts"`` if that is what it lacks.
    """
    counts = find_method(contestant.method).takes == "counts"
    path, scale = (given.counts if counts else given.normalised), None
    if path is None:
        return Outcome("needs counts", note="takes raw counts, which are not known")
    if counts and given.factors is not None:
        scale = str(folder / "factors.npy")
        np.save(scale, given.factors.astype(np.float32))
    request = Request(
        contestant.method, str(path), scale, seed, zeros_matter, contestant.settings, memory_limit=memory_limit
    )
    return run_isolated(request, folder, time_limit=time_limit)


def _label(contestant: Contestant) -> str:
    """Name a method with its settings."""
    return " ".join(filter(None, [contestant.method, contestant.words]))


def _gene_medians(moments: Moments) -> Row:
    """Median score over genes of which enough is known."""
    by_gene = moments.by_gene
    enough = by_gene.n >= _LEAST_ENTRIES

    def median(values: NDArray[np.float64]) -> float:
        known = values[enough & np.isfinite(values)]
        return float(np.median(known)) if len(known) else np.nan

    return {f"gene_{name}": median(getattr(by_gene, name)) for name in METRICS}
