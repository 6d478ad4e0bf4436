"""Methods side by side on one's own data: the same hidden entries, the same scores, each in a process of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
from numpy.typing import NDArray

from scialm_dask.api import parse_limit
from scialm_dask.arguments import checked
from scialm_dask.compare import clustering as downstream
from scialm_dask.compare.experiments import (
    Experiment,
    Source,
    against_truth,
    as_it_is,
    check_truth,
    count_split,
    masked,
    open_source,
)
from scialm_dask.compare.methods import QUOTED, Contestant, contestants, expanded
from scialm_dask.compare.trial import METRICS, Collected, Row, Trial, fresh_folder
from scialm_dask.data.annotated import as_matrix, refuse_logarithms
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Scored, silent

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KEY", "Evaluation", "checked_contestants", "evaluate_imputation"]

KEY = ("dataset", "experiment", "share", "method", "setting")
_COLUMNS = (
    *("dataset", "experiment", "share", "seed", "method", "setting", "status", "n", *METRICS),
    *(f"gene_{name}" for name in METRICS),
    *("relative_error", "mean_ratio", "zeros_pearson", "seconds", "peak_bytes", "imports_bytes", "note"),
)


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
        grouped = self.scores.groupby(list(KEY), dropna=False, sort=False)
        numbers = ["n", *METRICS, "gene_pearson", "relative_error", "mean_ratio", "zeros_pearson", "seconds"]
        table = grouped[[*numbers, "peak_bytes"]].mean()
        table["seeds"] = grouped.size()
        table["status"] = grouped["status"].agg(lambda each: next((s for s in each if s != "ok"), "ok"))
        return table.reset_index().sort_values(["experiment", "share", "mse"], kind="stable", ignore_index=True)


@checked
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
    memory_limit: float | str | None = None,
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
        `scialm_dask.compare.peers.Task` and returns the completed matrix.
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
        Such as ``"max_rank=10,20,…,50"``: our presets at each value of a field of `Settings`.
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
    collected = Collected()
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
                Trial(experiment, place, limit, time_limit, clustered, collected, row, listen).run(listed)
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
    return check_truth(truth, source.matrix)


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


def _quoted_rows(name: str) -> Iterator[Row]:
    if name in QUOTED:
        quoted = QUOTED[name]
        common = {"experiment": "masking", "share": 0.1, "method": name, "setting": "", "status": "quoted"}
        words = f"quoted from the publication, not run here: {quoted.words}"
        for dataset, scores in (quoted.scores or {"PBMC": {}}).items():
            yield {**common, "dataset": f"{dataset}, as published", **scores, "note": words}


def _evaluation(collected: Collected, name: str, genes: Any, labels: pd.Series | None) -> Evaluation:
    import pandas as pd

    tables = []
    for key, moments in collected.moments.items():
        scores = moments.by_gene
        chosen = scores.n > 0
        which = dict(zip(KEY[1:], key, strict=True))
        values = {metric: np.asarray(getattr(scores, metric))[chosen] for metric in ("n", *METRICS)}
        tables.append(pd.DataFrame({"gene": genes[chosen], **which, **values}))
    clusters = pd.DataFrame([{"dataset": name, **row} for row in collected.clusters])
    per_gene = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    scores_table = pd.DataFrame(collected.rows, columns=list(_COLUMNS))
    return Evaluation(scores_table, per_gene, clusters, collected.umap, labels)
