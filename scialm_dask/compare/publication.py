"""The publication's tables and figures, and those it lacks, from the matrices at hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scialm_dask.api import impute, parse_limit
from scialm_dask.compare import charts
from scialm_dask.compare.benchmark import (
    Evaluation,
    checked_contestants,
    evaluate_imputation,
    fresh_folder,
    run_contestant,
)
from scialm_dask.compare.clustering import labels_of
from scialm_dask.compare.experiments import check_truth, open_source
from scialm_dask.compare.methods import contestants
from scialm_dask.compare.tables import markdown, save_figure, write_evaluation
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.qc import Thresholds, measure_cells, mitochondrial, quality_control
from scialm_dask.errors import InputError
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.simulate import simulate
from scialm_dask.events import Listener, Scored, Stage, silent
from scialm_dask.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PUBLISHED", "Programme", "publication"]

# Table 2: cells × genes before and after quality control.
PUBLISHED = {
    "PBMC": ((2900, 32738), (2843, 13003)),
    "Klein": ((2717, 24021), (2713, 24021)),
    "Chen": ((14437, 23284), (14197, 17752)),
    "Campbell": ((21086, 26774), (11316, 21417)),
}
_EVERYWHERE = Thresholds(min_genes=200, min_cells=3)
_WITH_MITO = Thresholds(min_genes=200, max_genes=2000, max_mito=5, min_cells=3)  # the publication's, for PBMC
_SIMULATED_GENES = 2000


@dataclass(frozen=True)
class Programme:
    """How much to do.

    Parameters
    ----------
    methods
        For Figures 5 to 7, the truth and the sizes; see `evaluate_imputation`.
    shares
        Of the non-zeros to hide, for Figure 7; the first is that of Figures 4 to 6.
    seeds
        Each is done once for each.
    increments
        R in Figure 4, as in a sweep; empty for no Figure 4.
    labels
        Column of obs with the types of cells, for Figure 6; matrices that have none go without.
    truths
        Pairs of stores: cells, and the same cells sequenced deeper.
    sizes
        Numbers of simulated cells that time and memory are measured on.
    memory_limit, time_limit
        Of each method, see `evaluate_imputation`.
    """

    methods: Sequence[str] = ("all",)
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5)
    seeds: Sequence[int] = (0, 1, 2)
    increments: str = "10,50,100,…,400"
    labels: str | None = None
    truths: Sequence[tuple[str, str]] = ()
    sizes: Sequence[int] = (1000, 3000, 10000)
    memory_limit: int | str | None = None
    time_limit: float | None = None


def publication(
    sources: Sequence[str | os.PathLike[str]], folder: Path, programme: Programme, listen: Listener = silent
) -> dict[str, Any]:
    """Make all tables and figures, each written when it is made, and last ``README.md``, which shows them all.

    Parameters
    ----------
    sources
        Stores of raw counts. The publication's quality control is applied: cells with 200 genes, genes in 3 cells;
        where there are mitochondrial genes, at most 5 % of the counts of a cell on them, and at most 2000 genes.
    folder
        Where to write; must exist and be empty.
    programme
        How much to do.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    dict
        ``matrices``, and ``figures``, the number of each.

    Raises
    ------
    InputError
        If a source, a truth or a setting cannot be used, or two would be written under one name.
    """
    _check(sources, programme)
    press = _Press(folder, replace(programme, memory_limit=parse_limit(programme.memory_limit)), listen)
    with tempfile.TemporaryDirectory(prefix="scialm-publication-", dir=folder.parent) as work:
        cleaned = [press.clean(source, Path(work) / f"{Path(source).stem}.zarr") for source in sources]
        for clean in cleaned:
            press.labels(clean)  # refuses what cannot be used before the long work, and before anything is written
        press.table2()
        for clean in cleaned:
            press.compare(clean)
            press.sweep(clean)
            press.one_run(clean, Path(work))
        for cells, truth in programme.truths:
            press.truth(cells, truth)
        if programme.sizes:
            press.sizes(Path(work))
    press.index()
    return {"matrices": len(sources), "figures": len(press.captions)}


def _check(sources: Sequence[str | os.PathLike[str]], programme: Programme) -> None:
    """Refuse what else would fail after hours."""
    names = [Path(source).stem for source in sources]
    names += [_name_of_sweep(source) for source in sources] if programme.increments else []
    names += [_name_of_truth(cells) for cells, _ in programme.truths]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: what two sources or truths would be called; give each a name of its own")
    if not programme.shares:
        raise InputError("no share to hide; give one at least, such as 0.1")
    if min(programme.sizes, default=1) < 1 or len(set(programme.sizes)) < len(programme.sizes):
        raise InputError(f"sizes are {list(programme.sizes)}; give numbers of cells, each once")
    common = (programme.shares, programme.seeds, programme.labels)
    checked_contestants(programme.methods, (), *common)
    if programme.increments:
        checked_contestants(["paper"], [f"increment={programme.increments}"], *common)
    for cells, truth in programme.truths:
        check_truth(ExpressionMatrix.open(truth), ExpressionMatrix.open(cells))


def _name_of_sweep(source: str | os.PathLike[str]) -> str:
    return f"{Path(source).stem}-increment"


def _name_of_truth(cells: str | os.PathLike[str]) -> str:
    return f"{Path(cells).stem}-truth"


@dataclass
class _Press:
    """Makes one piece after the other, and remembers what each is called."""

    folder: Path
    programme: Programme
    listen: Listener
    table: list[dict[str, Any]] = field(default_factory=list)
    removed: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)

    @property
    def limits(self) -> dict[str, Any]:
        """Of each method."""
        return {"memory_limit": self.programme.memory_limit, "method_timeout": self.programme.time_limit}

    def clean(self, source: str | os.PathLike[str], to: Path) -> Path:
        """Apply the publication's quality control, for a line of Table 2, and Figure 3."""
        matrix, name = ExpressionMatrix.open(source), to.stem
        is_mito = mitochondrial(matrix, Thresholds())
        thresholds = _WITH_MITO if is_mito.any() else _EVERYWHERE
        cells = measure_cells(matrix, is_mito)
        result = quality_control(source, to, thresholds, listen=self.listen)
        before, after = matrix.shape, (result["n_cells"], result["n_genes"])
        published = _published_name(after)
        self.table.append(
            {
                "matrix": name,
                "cells before": before[0],
                "genes before": before[1],
                "cells after": after[0],
                "genes after": after[1],
                "non-zeros after": f"{result['n_observed'] / after[0] / after[1]:.2%}",
                "published": "–"
                if published is None
                else "{}: {} × {} before, {} × {} after".format(
                    published, *PUBLISHED[published][0], *PUBLISHED[published][1]
                ),
            }
        )
        if is_mito.any():
            words = f"{name}: {before[0] - after[0]} of {before[0]} cells removed"
            self.removed[name] = figures.quality(cells, thresholds, words)
        return to

    def table2(self) -> None:
        """Write the sizes before and after quality control, and what it removed: Figure 3."""
        import pandas as pd

        table = pd.DataFrame(self.table)
        table.to_csv(self.folder / "table2.csv", index=False)
        (self.folder / "table2.md").write_text(markdown(table))
        for name, figure in self.removed.items():
            self.save(f"figure3-{name}", figure, "Figure 3: quality control")

    def labels(self, clean: Path) -> str | None:
        """Column of obs with the types of these cells, which can be used; None if there is none."""
        column, obs = self.programme.labels, ExpressionMatrix.open(clean).obs
        if column is None or column not in obs:
            return None
        labels_of(obs, column, clean.stem)
        return column

    def compare(self, clean: Path) -> None:
        """Run all methods: Figures 5, 6 and 7."""
        matrix, programme, name = ExpressionMatrix.open(clean), self.programme, clean.stem
        labels = self.labels(clean)
        found = self.evaluate(clean, name, shares=programme.shares, labels=labels, seeds=programme.seeds)
        hidden = found.scores[found.scores["experiment"] == "masking"]
        published = f"{_published_name(matrix.shape)}, as published"
        fits = (hidden["status"] != "quoted") | (hidden["dataset"] == published)
        first = hidden[fits & np.isclose(hidden["share"], programme.shares[0])]
        title = f"{name}, {programme.shares[0]:.0%} of the non-zeros hidden"
        self.save(f"figure5-{name}", charts.method_scores(first, title), "Figure 5: scores of the methods")
        if labels is not None:
            self._clusters(found, name)
        if len(programme.shares) > 1:
            ran = hidden[hidden["status"] == "ok"]
            percent = ran.assign(share=100 * ran["share"])
            lines = charts.scores_over(percent, "share", "% of the non-zeros hidden", name)
            self.save(f"figure7-{name}", lines, "Figure 7: scores over the share hidden")
        self.save(f"effort-{name}", charts.effort(first, title), "Time and memory beside the error")

    def _clusters(self, found: Evaluation, name: str) -> None:
        for kind, rows in found.clusters.groupby("experiment", sort=False):
            title = f"{name}, {'nothing hidden' if kind == 'all data' else f'{self.programme.shares[0]:.0%} hidden'}"
            end = f"{name}-{str(kind).replace(' ', '-')}"
            self.save(f"figure6-scores-{end}", charts.cluster_scores(rows, title), "Figure 6a, b: clusters")
            pictures = {charts.label_of(method): xy for (each, method), xy in found.umap.items() if each == kind}
            if kind == "masking":  # raw, masked, imputed
                raw, hidden = found.umap["all data", "as observed"], pictures.pop("as observed")
                pictures = {"raw": raw, "masked": hidden, **pictures}
            assert found.labels is not None
            self.save(f"figure6-cells-{end}", charts.cell_pictures(pictures, found.labels, title), "Figure 6c: cells")

    def sweep(self, clean: Path) -> None:
        """Run preset paper at every R: Figure 4."""
        if not self.programme.increments:
            return
        name, sweep = _name_of_sweep(clean), [f"increment={self.programme.increments}"]
        shares = self.programme.shares[:1]
        found = self.evaluate(clean, name, methods=["paper"], shares=shares, seeds=[0], split=False, sweeps=sweep)
        rows = found.scores[(found.scores["method"] == "paper") & (found.scores["status"] == "ok")]
        values = rows.assign(R=rows["setting"].str.extract(r"increment=(\d+)")[0].astype(float))
        title = f"{clean.stem}, {shares[0]:.0%} hidden, preset paper"
        self.save(f"figure4-{clean.stem}", charts.scores_over(values, "R", "R", title), "Figure 4: scores over R")

    def one_run(self, clean: Path, work: Path) -> None:
        """Follow one run of the default preset: where it stops, its rank and singular values."""
        name = clean.stem
        mask(clean, work / f"{name}-masked.zarr", fraction=self.programme.shares[0], seed=0)
        result = impute(work / f"{name}-masked.zarr", listen=self.listen)
        title = f"{name}, {self.programme.shares[0]:.0%} of the non-zeros hidden, preset auto"
        self.save(
            f"stop-{name}", figures.convergence(result, title), "Error and rank over the iterations, and the stop"
        )
        self.save(f"spectrum-{name}", figures.spectrum(result, title), "Singular values of what was kept")

    def truth(self, cells: str, truth: str) -> None:
        """Compare with the same cells sequenced deeper."""
        name = _name_of_truth(cells)
        found = self.evaluate(cells, name, shares=[], split=False, reference=truth, seeds=[0])
        rows = found.scores[found.scores["experiment"] == "truth"]
        title = f"{Path(cells).stem}, all entries against {Path(truth).stem}"
        self.save(name, charts.whole_scores(rows, title), "Error against a truth")

    def evaluate(self, source: Any, name: str, **changes: Any) -> Evaluation:
        """Run `evaluate_imputation` and keep its tables."""
        options = {"methods": self.programme.methods, "scratch_folder": self.folder.parent, **self.limits, **changes}
        found = evaluate_imputation(source, **options, listen=self.listen)
        (self.folder / name).mkdir()
        write_evaluation(found, self.folder / name, {"source": os.fspath(source), **changes})
        return found

    def sizes(self, work: Path) -> None:
        """Measure time and memory on simulated cells of growing number."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for number in self.programme.sizes:
            self.listen(Stage("time and memory", f"{number:,} cells"))
            place = work / f"size{number}"
            place.mkdir()
            simulate(place / "cells.zarr", n_cells=number, n_genes=_SIMULATED_GENES, density=0.05, rank=20, seed=0)
            source = open_source(place / "cells.zarr", place)
            for each, contestant in enumerate(contestants(self.programme.methods)):
                with fresh_folder(place / f"method{each}") as own:
                    limit, timeout = parse_limit(self.programme.memory_limit), self.programme.time_limit
                    outcome, _ = run_contestant(contestant, source, own, memory_limit=limit, timeout=timeout)
                rows.append({"cells": number, "method": contestant.method, **asdict(outcome)})
                self.listen(_sized(rows[-1]))
        table = pd.DataFrame(rows)
        table.to_csv(self.folder / "sizes.csv", index=False)
        words = f"simulated cells × {_SIMULATED_GENES:,} genes, 5 % non-zeros"
        self.save("sizes", charts.costs(table, words), "Time and memory against size")

    def save(self, name: str, figure: Figure, caption: str) -> None:
        """Write a figure, and remember it."""
        save_figure(figure, self.folder / name)
        self.captions[name] = caption

    def index(self) -> None:
        """List everything."""
        parts = ["# Tables and figures\n", "## Table 2: sizes before and after quality control\n"]
        parts.append((self.folder / "table2.md").read_text())
        parts += [f"## {caption}\n\n![{caption}, {name}]({name}.svg)\n" for name, caption in self.captions.items()]
        (self.folder / "README.md").write_text("\n".join(parts))


def _published_name(shape: tuple[int, int]) -> str | None:
    """Which of the publication's matrices this is, by its size after quality control."""
    return next((name for name, (_, after) in PUBLISHED.items() if after == tuple(shape)), None)


def _sized(row: dict[str, Any]) -> Scored:
    return Scored(
        f"{row['cells']:,} cells", row["method"], row["status"], np.nan, np.nan, float(row["seconds"]), str(row["note"])
    )
