"""An evaluation as files: tables as CSV, JSON and Markdown, figures as SVG and PNG."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scialm_dask.compare.benchmark import KEY, Evaluation
from scialm_dask.compare.methods import label_of, labelled
from scialm_dask.report import plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VERSIONS = (
    *("scialm-dask", "numpy", "scipy", "scikit-learn", "scanpy", "dask", "dask-ml"),
    *("magic-impute", "scvi-tools", "torch"),
)
_TITLES = {
    "masking": "{dataset}, {share:.0%} of the non-zeros hidden",
    "count split": "{dataset}, {share:.0%} of the molecules unseen, all entries",
    "truth": "{dataset}, all entries against a truth",
    "all data": "{dataset}, nothing hidden",
}


def write_evaluation(evaluation: Evaluation, folder: Path, about: dict[str, Any]) -> None:
    """Write an evaluation into an existing folder.

    The files are ``scores.csv`` (a row per experiment, seed and method), ``genes.csv.gz``, ``clusters.csv`` and
    ``umap.csv.gz`` if there were labels, ``evaluation.json`` (all scores, `about`, and versions of the libraries), a
    folder ``figures``, and last, as a sign of completion, ``summary.csv`` and ``summary.md`` (means over the seeds).
    """
    evaluation.scores.to_csv(folder / "scores.csv", index=False)
    evaluation.genes.to_csv(folder / "genes.csv.gz", index=False, float_format="%.5g")
    if len(evaluation.clusters):
        evaluation.clusters.to_csv(folder / "clusters.csv", index=False)
        assert evaluation.labels is not None
        of_cells = {"cell": evaluation.labels.index, "label": evaluation.labels.to_numpy()}
        pictures = {k: pd.DataFrame({**of_cells, "x": xy[:, 0], "y": xy[:, 1]}) for k, xy in evaluation.umap.items()}
        umap = pd.concat(pictures, names=["experiment", "method"]).reset_index(["experiment", "method"])
        umap.to_csv(folder / "umap.csv.gz", index=False, float_format="%.4g")
    words = {
        **about,
        "versions": {name: found.version for name in _VERSIONS for found in list(distributions(name=name))[:1]},
        "scores": _plain(evaluation.scores),
        "clusters": _plain(evaluation.clusters),
    }
    (folder / "evaluation.json").write_text(json.dumps(words, indent=1))
    (folder / "figures").mkdir()
    for name, figure in figures_of(evaluation):
        plotting.save(figure, folder / "figures" / name)
    summary = summary_table(evaluation)
    summary.to_csv(folder / "summary.csv", index=False)
    (folder / "summary.md").write_text(_sections(summary, evaluation))


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows without missing values."""
    return [{k: v for k, v in row.items() if v == v} for row in table.to_dict("records")]


def summary_table(evaluation: Evaluation) -> pd.DataFrame:
    """Return `Evaluation.summary` with scores of clusters, without empty columns."""
    table = evaluation.summary()
    if len(evaluation.clusters):
        same = ["experiment", "share", "method", "setting"]
        table = table.merge(evaluation.clusters[[*same, *_CLUSTERS]], on=same, how="outer", sort=False)
        table["dataset"] = table["dataset"].fillna(evaluation.clusters["dataset"].iloc[0])
        table["status"] = table["status"].fillna("ok")
    empty = [name for name in table.columns if name not in KEY and table[name].isna().all()]
    return table.drop(columns=empty)


_HIDDEN = plotting.HIDDEN | {"gene_pearson": "Pearson r, median gene"}
_COSTS = {"seconds": "seconds", "peak_bytes": "memory, MB"}
_SEARCHED = (
    "As many clusters as labels: Leiden's resolution is searched for every method alike; means over five seeds. "
    "X_scialm is the embedding of a result; the others are principal components of the log-normalised matrix.\n\n"
)
_CLUSTERS = {
    "leiden_ari": "ARI, Leiden",
    "kmeans_ari": "ARI, k-means",
    "kmeans_nmi": "NMI, k-means",
    "leiden_nmi": "NMI, Leiden",
    "leiden_clusters": "clusters, Leiden",
    "silhouette": "silhouette",
}


def _sections(summary: pd.DataFrame, evaluation: Evaluation) -> str:
    """Return a table per experiment, and one of its clusters, best first."""
    parts, known = [], summary[summary["status"] != "quoted"]
    for kind, of_kind in _TITLES.items():
        for share, rows in known[known["experiment"] == kind].groupby("share", dropna=False):
            title = of_kind.format(dataset=rows["dataset"].iloc[0], share=share)
            if kind != "all data":
                columns = (_HIDDEN if kind == "masking" else plotting.WHOLE) | _COSTS
                scored = rows[rows["method"] != "as observed"] if kind == "masking" else rows
                parts.append(f"## {title}\n\n{_section(scored, columns)}")
            if "kmeans_ari" in rows and rows["kmeans_ari"].notna().any():
                clustered = rows[rows["kmeans_ari"].notna()]
                table = _section(clustered, _CLUSTERS, ascending=False)
                parts.append(f"## Clusters: {title}\n\n{_SEARCHED}{table}")
    words = ""
    for row in evaluation.scores[evaluation.scores["status"] == "quoted"].to_dict("records"):
        scores = [f"{title} {row[name]:.4g}" for name, title in plotting.HIDDEN.items() if row[name] == row[name]]
        words += f"- {label_of(row['method'])} ({row['dataset']}): {', '.join([*scores, row['note']])}\n"
    return "\n".join([*parts, f"## Quoted\n\n{words}"] if words else parts)


def _section(rows: pd.DataFrame, columns: dict[str, str], *, ascending: bool = True) -> str:
    """Return a table of these columns, best first by the first one, which shows the status of failed methods."""
    first, *others = [name for name in columns if name in rows and rows[name].notna().any()]
    rows = rows.sort_values(first, ascending=ascending, kind="stable")
    table = rows[[first, *others]].astype(object)
    table[first] = table[first].where(rows["status"] == "ok", rows["status"])
    if "peak_bytes" in table:
        table["peak_bytes"] = rows["peak_bytes"] / 1e6
    table.insert(0, "method", list(map(label_of, rows["method"], rows["setting"])))
    return markdown(table.rename(columns=columns))


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown, with numbers to four digits."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        if not np.isfinite(value):
            return "–"
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def figures_of(evaluation: Evaluation) -> Iterator[tuple[str, Figure]]:
    """Yield the name of each figure that has data, and the figure."""
    scores = labelled(evaluation.scores[evaluation.scores["status"] != "quoted"])  # those are of other data sets
    numeric = scores["setting"].str.extractall(r"(?:^| )(\w+)=[\d.e+-]+(?= |$)")  # fields swept over numbers
    swept, dataset = list(dict.fromkeys(numeric[0])) if len(numeric) else [], scores["dataset"].iloc[0]
    for (kind, share), rows in scores.groupby(["experiment", "share"], dropna=False, sort=False):
        title = _TITLES[str(kind)].format(dataset=dataset, share=share)
        name = f"{str(kind).replace(' ', '-')}" + (f"-{round(100 * share)}" if share == share else "")
        if kind == "masking":
            yield f"{name}-scores", plotting.dots(rows, plotting.HIDDEN, title)
            yield f"{name}-effort", plotting.effort(rows, title)
        elif kind != "all data":
            yield f"{name}-scores", plotting.dots(rows, plotting.WHOLE, title)
    hidden = scores[(scores["experiment"] == "masking") & (scores["status"] == "ok")]
    if hidden["share"].nunique() > 1 and not swept:
        percent = hidden.assign(share=100 * hidden["share"])
        yield "over-share", plotting.lines(percent, "share", "% of the non-zeros hidden", title=dataset)
    for field in swept:
        values = hidden["setting"].str.extract(rf"(?:^| ){field}=([\d.e+-]+)")[0].astype(float)
        known = hidden.assign(value=values).dropna(subset=["value"])
        yield f"over-{field}", plotting.lines(known, "value", field, title=dataset)
    for kind, rows in evaluation.clusters.groupby("experiment", sort=False) if len(evaluation.clusters) else ():
        title = _TITLES[str(kind)].format(dataset=rows["dataset"].iloc[0], share=rows["share"].iloc[0])
        name = str(kind).replace(" ", "-")
        yield f"{name}-clusters", plotting.dots(labelled(rows.assign(status="ok")), plotting.CLUSTERS, title)
        pictures = {label_of(method): xy for (each, method), xy in evaluation.umap.items() if each == kind}
        assert evaluation.labels is not None
        yield f"{name}-cells", plotting.cell_pictures(pictures, evaluation.labels, title)
