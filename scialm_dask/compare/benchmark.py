"""A benchmark of methods on the user's data: the same hidden entries and scores for all, each in its own process."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scialm_dask.compare import clustering, experiments
from scialm_dask.compare.experiments import Experiment, Source
from scialm_dask.compare.methods import (
    QUOTED,
    Contestant,
    Outcome,
    by_panels,
    contestants,
    expanded,
    find_method,
    read_answer,
    run_isolated,
    watched_folder,
)
from scialm_dask.compare.peers import Task
from scialm_dask.config import Interval, Natural, Share, bytes_of, checked
from scialm_dask.data.annotated import as_matrix, refuse_logarithms
from scialm_dask.errors import InputError
from scialm_dask.evaluate.metrics import METRICS, Scores, compare, compare_stored
from scialm_dask.events import Listener, Note, Scored, Stage, silent
from scialm_dask.progress import duration

KEY = ("dataset", "experiment", "share", "method", "setting")
WHOLE = ("relative_error", "gene_correlation", "cell_correlation", "zeros_pearson", "mean_ratio")
_COSTS = ("seconds", "peak_bytes", "imports_bytes")
_COLUMNS = (
    *("dataset", "experiment", "share", "seed", "method", "setting", "status", "n", *METRICS),
    *(*(f"gene_{name}" for name in METRICS), *WHOLE, *_COSTS, "note"),
)
_LEAST_ENTRIES = 10  # hidden entries of a gene that counts in the medians over genes
_GIVEN, _EMBEDDED = "as observed", "X_scialm"
Row = dict[str, Any]
_folder_in = partial(tempfile.TemporaryDirectory, None, None, ignore_cleanup_errors=True)


@dataclass
class Evaluation:
    """Scores of methods, as returned by `evaluate_imputation`.

    Parameters
    ----------
    scores : pandas.DataFrame
        One row per experiment, seed and method. ``experiment`` is ``masking``, scored on the hidden non-zeros; ``count
        split`` or ``truth``, scored on all entries; or ``all data``, not scored. ``mse``, ``mae``, ``pearson`` and
        ``cosine`` are over the scored entries, on the scale of normalised counts; ``gene_…`` is the median over genes.
        If all entries are scored, there are also ``relative_error``; ``gene_correlation`` and ``cell_correlation``, the
        median of Pearson's r across cells and across genes; ``zeros_pearson``, over entries that were zero; and
        ``mean_ratio``, mean imputed over mean true. For every method the medians leave out genes and cells that are
        constant in the truth or empty in the input; a constant estimate of the others counts as 0. ``seconds`` and
        ``peak_bytes`` exclude imports. ``status`` is ``ok``, ``failed``, ``out of memory``, ``timed out``, ``not
        installed``, ``needs counts`` or ``quoted``; ``note`` has details.
    genes : pandas.DataFrame
        Scores of each gene, over all seeds together.
    clusters : pandas.DataFrame
        ARI, NMI and silhouette, if labels were given, on principal components of the log-normalised matrix, or for the
        setting ``X_scialm`` on the embedding of a result.
    umap : dict
        UMAP of the cells, arrays of shape (n_cells, 2), by (experiment, method).
    labels : pandas.Series or None
        Labels of the cells.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> found = scialm_dask.evaluate_imputation(counts, methods=["gene-mean"], split=False)
    >>> found.scores[["experiment", "method", "n", "status"]]
      experiment     method    n status
    0    masking  gene-mean  180     ok
    """

    scores: pd.DataFrame
    genes: pd.DataFrame
    clusters: pd.DataFrame
    umap: dict[tuple[str, str], NDArray[np.float32]]
    labels: pd.Series | None

    def summary(self) -> pd.DataFrame:
        """Return means over the seeds, best first.

        Returns
        -------
        pandas.DataFrame
            One row per experiment and method.

        Examples
        --------
        >>> found.summary()[["method", "n", "seeds"]]
              method      n  seeds
        0  gene-mean  180.0      1
        """
        grouped = self.scores.groupby(list(KEY), dropna=False, sort=False)
        table = grouped[["n", *METRICS, "gene_pearson", *WHOLE, "seconds", "peak_bytes"]].mean()
        table["seeds"] = grouped.size()
        table["status"] = grouped["status"].agg(lambda each: next((s for s in each if s != "ok"), "ok"))
        return table.reset_index().sort_values(["experiment", "share", "mse"], kind="stable", ignore_index=True)


@checked
def evaluate_imputation(
    source: Any,
    *,
    methods: Sequence[str] = ("denoise", "complete"),
    shares: Sequence[Share] = (0.1,),
    seeds: Sequence[Natural] = (0,),
    split: bool | None = None,
    reference: Any = None,
    labels: str | None = None,
    sweeps: Sequence[str] = (),
    layer: str | None = None,
    memory_limit: float | str | None = None,
    method_timeout: Annotated[float, Interval(0, open=True)] | None = None,
    scratch_folder: str | os.PathLike[str] | None = None,
    listen: Listener = silent,
) -> Evaluation:
    """Measure on your own data whether imputation helps, next to other methods.

    Parameters
    ----------
    source : matrix of shape (n_cells, n_genes)
        Raw counts, or counts normalised as by ``scialm-dask qc``, as `impute` takes them. Do quality control first, so
        that scores are comparable.
    methods : sequence of str, default=("denoise", "complete")
        The presets ``denoise``, ``complete`` and ``paper``; ``gene-mean``, always included; ``magic``, ``scvi``,
        ``alra``, ``knn``, ``softimpute``; ``dca``, ``saver``, ``scimpute``, quoted from the publication; the groups
        ``peers`` and ``all``; or ``module:function``, your own function that takes a `scialm_dask.compare.peers.Task`
        and returns the imputed matrix.
    shares : sequence of float in (0, 1), default=(0.1,)
        Shares of each gene's non-zeros to hide, one experiment each.
    seeds : sequence of int, default=(0,)
        Seeds with which each experiment is repeated.
    split : bool, optional
        Split counts into molecules to learn from and molecules to predict, which also tests zeros. By default done if
        the counts are known.
    reference : matrix, optional
        The truth: the same cells and genes, sequenced more deeply, matched by name.
    labels : str, optional
        Column of obs with known cell types. Cells are clustered as observed, masked and imputed, into as many clusters
        as there are types.
    sweeps : sequence of str, default=()
        Values of a field of `Settings` at which to run the presets, such as ``"max_rank=10,20,…,50"``.
    layer : str, optional
        The layer to read instead of X.
    memory_limit : float or str, optional
        Maximum memory of each method in excess of its imports, in bytes or as text such as ``"8 GB"``. A method that
        needs more gets a row that says so.
    method_timeout : float, optional
        Maximum seconds of each run. A method that needs more gets a row that says so.
    scratch_folder : str or path-like, optional
        Folder for temporary matrices. By default that of the system.
    listen : callable, optional
        Called with every event of the computation, a `Scored` for each row.

    Returns
    -------
    Evaluation
        Scores of all methods in all experiments; clusters and UMAP if labels were given.

    Raises
    ------
    InputError
        If the source, the reference, the labels, a method or a setting is invalid.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> found = scialm_dask.evaluate_imputation(counts, methods=["gene-mean"], split=False)
    >>> list(found.scores["experiment"])
    ['masking']
    """
    listed, limit = contestants(dict.fromkeys([*methods, "gene-mean"]), sweeps), bytes_of("memory limit", memory_limit)
    if not seeds:
        raise InputError("no seed is given; give one or more")
    if labels is not None:
        clustering.check_libraries()
    with watched_folder(scratch_folder) as work:
        opened = experiments.open_source(source, work, layer=layer)
        known = None if labels is None else clustering.labels_of(opened.matrix.obs, labels, opened.name)
        if split and opened.counts is None:
            experiments.count_split(opened, 0, work)  # raises the error
        split = opened.counts is not None if split is None else split
        truth = None if reference is None else as_matrix(reference, observed="nonzero")
        if truth is not None:
            refuse_logarithms(truth, reference, None)
            truth = experiments.check_truth(truth, opened.matrix)
        planned: list[Callable[[Path], Experiment]]
        planned = [partial(experiments.masked, opened, share, seed) for share in shares for seed in seeds]
        planned += [partial(experiments.count_split, opened, seed) for seed in seeds] if split else []
        planned += [] if truth is None else [partial(experiments.against_truth, opened, truth, seeds[0])]
        planned += [] if known is None else [lambda _: Experiment("all data", None, seeds[0], opened, None)]
        bench = _Bench(opened, listed, limit, method_timeout, known, listen, len(planned))
        bench.forecast()
        for number, make in enumerate(planned):
            with _folder_in(work) as place, dask.config.set(scheduler="threads"):
                bench.run(make(Path(place)), place, first=number == 0)
        for name in filter(QUOTED.__contains__, expanded(methods)):
            bench.quote(name)
        return bench.evaluation()


@dataclass
class _Bench:
    """Runs all methods on all experiments, and collects the scores."""

    source: Source
    listed: list[Contestant]
    memory_limit: int | None
    timeout: float | None
    labels: pd.Series | None
    listen: Listener
    experiments: int
    done: int = 0
    rows: list[Row] = field(default_factory=list)
    pooled: dict[tuple[Any, ...], Scores] = field(default_factory=dict)
    clusters: list[Row] = field(default_factory=list)
    umap: dict[tuple[str, str], NDArray[np.float32]] = field(default_factory=dict)

    def forecast(self) -> None:
        """Announce the expected time, and the slowest method."""
        seconds = [self._expected(each) * self.experiments for each in self.listed]
        longest = int(np.argmax(seconds))
        runs, most = self.experiments * len(seconds), self.listed[longest]
        words = f"about {duration(sum(seconds))} for {runs} runs, of which {duration(seconds[longest])} for {most}"
        self.listen(Note(f"{words}; --methods selects methods, --method-timeout limits their time"))

    def _expected(self, contestant: Contestant) -> float:
        m, n = self.source.matrix.shape
        method = find_method(contestant.method)
        if any(importlib.util.find_spec(module.partition(".")[0]) is None for module in method.needs):
            return 0.0  # its row says that it is not installed
        begin, rate = method.seconds
        return min(begin + rate * m * n / 1e6, self.timeout or np.inf)

    def run(self, experiment: Experiment, place: str, *, first: bool) -> None:
        """Run all methods on an experiment, after scoring the observed matrix where that makes sense."""
        clustered = experiment.kind == "all data" or (first and experiment.kind == "masking")
        labels, given = self.labels if clustered else None, experiment.given.matrix
        if experiment.all_entries or labels is not None:
            panels = by_panels(lambda cells: given.rows.read(cells.start, cells.stop).toarray(), given.shape)
            self._judge(experiment, Contestant(_GIVEN), Outcome("ok"), panels, labels)
        runs = self.experiments * len(self.listed)
        average = sum(map(self._expected, self.listed)) / len(self.listed)
        for contestant in self.listed:
            self.done += 1
            if experiment.target is None and contestant.method == "gene-mean":
                continue  # all cells are alike: no clusters
            left = duration(average * (runs - self.done + 1))
            self.listen(Stage(str(contestant), f"{self.done} of {runs}, about {left} left"))
            with _folder_in(place) as folder:
                outcome, answer = self._run(contestant, experiment, Path(folder))
                embedding = clustering.embedding_of(Path(folder)) if answer is not None and labels is not None else None
                self._judge(experiment, contestant, outcome, answer, labels, embedding)

    def _run(self, contestant: Contestant, experiment: Experiment, folder: Path) -> tuple[Outcome, da.Array | None]:
        """Run a method on the view that it takes. Return the imputed matrix, normalised, too, unless it failed."""
        takes, given = find_method(contestant.method).takes, experiment.given
        counts = takes == "counts" or (takes == "either" and given.counts is not None)
        path = given.counts if counts else given.normalised
        if path is None:
            return Outcome("needs counts", note="takes raw counts, which are not known"), None
        task = Task(path, experiment.seed, experiment.all_entries, contestant.settings)
        outcome = run_isolated(contestant.method, task, folder, memory_limit=self.memory_limit, timeout=self.timeout)
        if outcome.status != "ok":
            return outcome, None
        answer = read_answer(folder, given.factors if counts else None)
        if answer.shape != given.matrix.shape:
            return Outcome("failed", outcome.seconds, note=f"gave {answer.shape[0]} × {answer.shape[1]}"), None
        return outcome, answer

    def _judge(
        self,
        experiment: Experiment,
        contestant: Contestant,
        outcome: Outcome,
        answer: da.Array | None,
        labels: pd.Series | None,
        embedding: NDArray[np.float32] | None = None,
    ) -> None:
        which = {
            "experiment": experiment.kind,
            "share": np.nan if experiment.share is None else round(experiment.share, 6),
            "method": contestant.method,
            "setting": contestant.words,
        }
        if experiment.all_entries or contestant.method != _GIVEN:  # the observed matrix has no hidden entries
            scores = {} if answer is None else self._scores(experiment, answer, tuple(which.values()))
            self.add({**which, "seed": experiment.seed, **asdict(outcome), **scores})
        if answer is None or labels is None or contestant.method == "gene-mean":
            return
        spaces = {contestant.words: clustering.principal_components(answer, experiment.seed)}
        if embedding is not None:
            spaces[f"{contestant.words} {_EMBEDDED}".strip()] = embedding
        for setting, components in spaces.items():
            scores, picture = clustering.cluster(components, labels, experiment.seed)
            self.clusters.append({"dataset": self.source.name, **which, "setting": setting, **scores})
            self.umap[experiment.kind, f"{contestant.method} {setting}".strip()] = picture

    def _scores(self, experiment: Experiment, answer: da.Array, key: tuple[Any, ...]) -> Row:
        if experiment.target is None:
            return {}
        if not experiment.all_entries:
            scores = compare_stored(answer, experiment.target)
            enough, found = scores.n >= _LEAST_ENTRIES, {}
        else:
            scores, zeros, genes, cells = compare(answer, experiment.target, experiment.given.matrix)
            enough = np.isfinite(genes)
            values = (scores.relative_error, _median(genes), _median(cells), float(zeros.pearson[0]), scores.mean_ratio)
            found = dict(zip(WHOLE, values, strict=True))
        self.pooled[key] = self.pooled[key] + scores if key in self.pooled else scores
        by_gene = {"pearson": scores.correlation}
        medians = {f"gene_{m}": _median(by_gene.get(m, getattr(scores, m))[enough]) for m in METRICS}
        return {**scores.as_dict(), **medians, **found}

    def add(self, values: Row) -> None:
        """Add a row to the scores, and announce it."""
        row = dict.fromkeys(_COLUMNS, np.nan) | {"dataset": self.source.name, **values}
        self.rows.append(row)
        share = "" if np.isnan(row["share"]) else f" {row['share']:.0%}"
        seed = "" if np.isnan(row["seed"]) else f", seed {row['seed']}"
        numbers = {name: float(row[name]) for name in ("mse", "relative_error", "seconds")}
        experiment, label = f"{row['experiment']}{share}{seed}", f"{row['method']} {row['setting']}".strip()
        self.listen(Scored(experiment, label, str(row["status"]), **numbers, note=str(row["note"])))

    def quote(self, name: str) -> None:
        """Add the rows that quote the publication on a method that is not run here."""
        _, by_dataset, words = QUOTED[name]
        row = {"experiment": "masking", "share": 0.1, "method": name, "setting": "", "status": "quoted"}
        row["note"] = f"quoted from the publication, not run here: {words}"
        for dataset, scores in (by_dataset or {"PBMC": {}}).items():
            self.add({**row, "dataset": f"{dataset}, as published", **scores})

    def evaluation(self) -> Evaluation:
        """Return the scores as tables."""
        names, tables = self.source.matrix.var.index, []
        for key, scores in self.pooled.items():
            chosen = scores.n > 0
            values = {metric: getattr(scores, metric)[chosen] for metric in ("n", *METRICS)}
            tables.append(pd.DataFrame({"gene": names[chosen], **dict(zip(KEY[1:], key, strict=True)), **values}))
        genes = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
        table = pd.DataFrame(self.rows, columns=list(_COLUMNS))
        return Evaluation(table, genes, pd.DataFrame(self.clusters), self.umap, self.labels)


def _median(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else np.nan
