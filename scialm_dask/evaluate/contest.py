"""Methods side by side on one's own data: the same hidden entries, the same scores, each in a process of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
from numpy.typing import NDArray

from scialm_dask.api import parse_limit
from scialm_dask.data.annotated import as_matrix, refuse_logarithms
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.evaluate import downstream
from scialm_dask.evaluate.experiments import (
    Experiment,
    Source,
    against_truth,
    as_it_is,
    check_truth,
    count_split,
    masked,
    open_source,
)
from scialm_dask.evaluate.isolated import Outcome, Request, run_isolated
from scialm_dask.evaluate.methods import QUOTED, Contestant, contestants, expanded, find_method
from scialm_dask.evaluate.metrics import Moments, compare_all, compare_stored
from scialm_dask.evaluate.predictions import Given, Prediction, read_prediction
from scialm_dask.events import Listener, Scored, Stage, silent

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Evaluation", "checked_contestants", "evaluate_imputation", "fresh_folder", "run_contestant"]

Row = dict[str, Any]
_KEY = ("dataset", "experiment", "share", "method", "setting")
_METRICS = ("mse", "mae", "pearson", "cosine")
_COLUMNS = (
    *("dataset", "experiment", "share", "seed", "method", "setting", "status", "n", *_METRICS),
    *(f"gene_{name}" for name in _METRICS),
    *("relative_error", "mean_ratio", "zeros_pearson", "seconds", "peak_bytes", "imports_bytes", "note"),
)
_LEAST_ENTRIES = 10  # of a gene whose correlation is to count
_GIVEN = "as observed"


@dataclass
class Evaluation:
    """What came out.

    Attributes
    ----------
    scores
        One row for each experiment, seed and method. ``experiment`` is ``masking`` (scored on the hidden non-zeros),
        ``count split`` or ``truth`` (on all entries), or ``all data`` (not scored). ``mse``, ``mae``, ``pearson`` and
        ``cosine`` are over all entries that are scored, on the scale of normalised counts; ``gene_…`` the median
        over genes. ``relative_error``, ``mean_ratio`` (mean imputed over mean true) and ``zeros_pearson`` (over
        entries that were zero) where all entries are scored. ``seconds`` and ``peak_bytes`` are those of the method
        alone, over what its imports take. ``status`` is ``ok``, ``failed``, ``out of memory``, ``timed out``,
        ``not installed``, ``needs counts`` or ``quoted``; ``note`` says more.
    genes
        Scores of each gene, over the seeds together.
    clusters
        ARI, NMI and silhouette, if labels were given.
    umap
        Pictures of the cells by (experiment, method), each of shape ``(cells, 2)``.
    labels
        Of the cells.
    """

    scores: pd.DataFrame
    genes: pd.DataFrame
    clusters: pd.DataFrame
    umap: dict[tuple[str, str], NDArray[np.float32]]
    labels: pd.Series | None

    def summary(self) -> pd.DataFrame:
        """Means over the seeds, one row for each experiment and method, best first."""
        grouped = self.scores.groupby(list(_KEY), dropna=False, sort=False)
        numbers = ["n", *_METRICS, "gene_pearson", "relative_error", "mean_ratio", "zeros_pearson", "seconds"]
        table = grouped[[*numbers, "peak_bytes"]].mean()
        table["seeds"] = grouped.size()
        table["status"] = grouped["status"].agg(lambda each: next((s for s in each if s != "ok"), "ok"))
        return table.reset_index().sort_values(["experiment", "share", "mse"], kind="stable", ignore_index=True)


@dataclass
class _Collected:
    """Rows as they come, and what they are pooled from."""

    rows: list[Row] = field(default_factory=list)
    moments: dict[tuple[Any, ...], Moments] = field(default_factory=dict)
    clusters: list[Row] = field(default_factory=list)
    umap: dict[tuple[str, str], NDArray[np.float32]] = field(default_factory=dict)


def evaluate_imputation(
    source: Any,
    *,
    methods: Sequence[str] = ("auto", "denoise"),
    shares: Sequence[float] = (0.1,),
    seeds: Sequence[int] = (0, 1, 2),
    split: bool | None = None,
    reference: Any = None,
    labels: str | None = None,
    sweeps: Sequence[str] = (),
    layer: str | None = None,
    memory_limit: int | str | None = None,
    time_limit: float | None = None,
    scratch_folder: str | os.PathLike[str] | None = None,
    listen: Listener = silent,
) -> Evaluation:
    """See on one's own data whether imputation helps, and against what else could be done.

    Parameters
    ----------
    source
        Cells × genes as `impute` takes them: raw counts, or counts normalised as ``scialm-dask qc`` does. For
        comparable figures run quality control first.
    methods
        Our presets ``auto``, ``denoise``, ``paper``; ``gene-mean`` (always there), ``knn``, ``alra``, ``softimpute``,
        ``magic``, ``scvi``; ``dca``, ``saver``, ``scimpute``, whose rows quote the publication; ``peers`` and ``all``
        for groups; or ``module:function``, a function of your own that takes a
        `scialm_dask.evaluate.peers.Task` and returns the completed matrix.
    shares
        Of the non-zeros of each gene to hide, once for each.
    seeds
        Each experiment is done once for each.
    split
        Whether to split counts into molecules to learn from and molecules to predict, which tests zeros too. Done by
        default if the counts are known.
    reference
        The truth, as `source`: the same cells and genes, sequenced deeper.
    labels
        Column of obs with known types of cells: they are clustered as observed, masked and imputed.
    sweeps
        Such as ``"increment=10,50,100,…,400"``: our presets at each value of a field of `Settings`.
    layer
        Read this layer instead of X.
    memory_limit
        Bytes of data that each method may hold over what its imports take, or words such as ``"8 GB"``; a method that
        needs more is a row that says so.
    time_limit
        Seconds that each method may take.
    scratch_folder
        For matrices while they are worked on; the system's by default.
    listen
        Called with every event of the work, `Scored` for each row; see `scialm_dask.events`.

    Returns
    -------
    Evaluation
        Scores of all methods in all experiments, with the clusters and pictures of cells where there are labels.

    Raises
    ------
    InputError
        If the source, the reference, the labels, a method or a setting cannot be used.
    """
    listed = checked_contestants(methods, sweeps, shares, seeds, labels)
    limit = parse_limit(memory_limit)
    collected = _Collected()
    with tempfile.TemporaryDirectory(prefix="scialm-evaluate-", dir=scratch_folder) as folder:
        work = Path(folder)
        opened = open_source(source, work, layer=layer)
        known = None if labels is None else downstream.labels_of(opened.matrix.obs, labels, opened.name)
        if split and opened.counts is None:
            count_split(opened, 0, work)  # says what is missing
        split = opened.counts is not None if split is None else split
        truth = None if reference is None else _truth(reference, opened)

        def row(values: Row) -> None:
            collected.rows.append(dict.fromkeys(_COLUMNS, np.nan) | {"dataset": opened.name, **values})
            listen(_scored(collected.rows[-1]))

        for number, make in enumerate(_experiments(opened, shares, seeds, split, truth, known is not None)):
            with fresh_folder(work / f"experiment{number}") as place, dask.config.set(scheduler="threads"):
                experiment = make(place)
                first = number == 0 and experiment.kind == "masking"
                clustered = known if first or experiment.kind == "all data" else None
                runner = _Runner(experiment, place, limit, time_limit, clustered, collected, row, listen)
                runner.run(listed)
        for name in expanded(methods):
            for quoted in _quoted_rows(name):
                row(quoted)
        genes = opened.matrix.var.index
    return _evaluation(collected, opened.name, genes, known)


def checked_contestants(
    methods: Sequence[str], sweeps: Sequence[str], shares: Sequence[float], seeds: Sequence[int], labels: str | None
) -> list[Contestant]:
    """List what is compared; see `evaluate_imputation`. Raises `InputError` for what cannot be used."""
    for share in shares:
        if not 0 < share < 1:
            raise InputError(f"share to hide is {share}; give a number between 0 and 1, such as 0.1")
    if not seeds or min(seeds) < 0:
        raise InputError(f"seeds are {list(seeds)}; give one or more numbers that are not negative")
    if labels is not None:
        downstream.check_libraries()
    return contestants(dict.fromkeys([*methods, "gene-mean"]), sweeps)


def _truth(reference: Any, source: Source) -> ExpressionMatrix:
    truth = as_matrix(reference, observed="nonzero")
    refuse_logarithms(truth, reference, None)
    check_truth(truth, source.matrix)
    return truth


def _experiments(
    source: Source,
    shares: Sequence[float],
    seeds: Sequence[int],
    split: bool,
    truth: ExpressionMatrix | None,
    labelled: bool,
) -> Iterator[Callable[[Path], Experiment]]:
    """Give what to do, each to be made when its turn comes."""
    for share in shares:
        for seed in seeds:
            yield lambda place, share=share, seed=seed: masked(source, share, seed, place)  # type: ignore[misc]
    for seed in seeds if split else ():
        yield lambda place, seed=seed: count_split(source, seed, place)  # type: ignore[misc]
    if truth is not None:
        yield lambda place: against_truth(source, truth, seeds[0], place)
    if labelled:
        yield lambda _: as_it_is(source, seeds[0])


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Make a folder, and remove it with all that was put there."""
    import shutil

    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class _Runner:
    """Runs all methods on one experiment, and scores them."""

    experiment: Experiment
    place: Path
    memory_limit: int | None
    time_limit: float | None
    labels: pd.Series | None
    collected: _Collected
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
        scores = {} if prediction is None else self._scores(prediction, tuple(which.values()))
        if self.experiment.all_entries or contestant.method != _GIVEN:
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


def _scored(row: Row) -> Scored:
    share = "" if np.isnan(row["share"]) else f" {row['share']:.0%}"
    seed = "" if np.isnan(row["seed"]) else f", seed {row['seed']}"
    return Scored(
        f"{row['experiment']}{share}{seed}",
        f"{row['method']} {row['setting']}".strip(),
        row["status"],
        **{name: float(row[name]) for name in ("mse", "relative_error", "seconds")},
        note=str(row["note"]),
    )


def _gene_medians(moments: Moments) -> Row:
    """Median score over genes of which enough is known."""
    by_gene = moments.by_gene
    enough = by_gene.n >= _LEAST_ENTRIES

    def median(values: NDArray[np.float64]) -> float:
        known = values[enough & np.isfinite(values)]
        return float(np.median(known)) if len(known) else np.nan

    return {f"gene_{name}": median(getattr(by_gene, name)) for name in _METRICS}


def _quoted_rows(name: str) -> Iterator[Row]:
    if name in QUOTED:
        quoted = QUOTED[name]
        common = {"experiment": "masking", "share": 0.1, "method": name, "setting": "", "status": "quoted"}
        words = f"quoted from the publication, not run here: {quoted.words}"
        for dataset, scores in (quoted.scores or {"PBMC": {}}).items():
            yield {**common, "dataset": f"{dataset}, as published", **scores, "note": words}


def _evaluation(collected: _Collected, name: str, genes: Any, labels: pd.Series | None) -> Evaluation:
    import pandas as pd

    tables = []
    for key, moments in collected.moments.items():
        scores = moments.by_gene
        chosen = scores.n > 0
        which = dict(zip(_KEY[1:], key, strict=True))
        values = {metric: np.asarray(getattr(scores, metric))[chosen] for metric in ("n", *_METRICS)}
        tables.append(pd.DataFrame({"gene": genes[chosen], **which, **values}))
    clusters = pd.DataFrame([{"dataset": name, **row} for row in collected.clusters])
    per_gene = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    scores_table = pd.DataFrame(collected.rows, columns=list(_COLUMNS))
    return Evaluation(scores_table, per_gene, clusters, collected.umap, labels)
