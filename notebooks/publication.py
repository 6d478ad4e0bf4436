"""Make the publication's tables and figures, and more: ``python notebooks/publication.py SRC ... -o FOLDER``.

Each SRC holds raw counts. The publication's quality control is applied, all methods are compared, one run is followed,
and time and memory are measured on simulated cells. Every part is in FOLDER as soon as it is made, ``README.md``, which
shows them all, at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scialm_dask import ExpressionMatrix, ScialmError, evaluate_imputation, impute, show_progress
from scialm_dask.compare.methods import contestants, labelled
from scialm_dask.compare.tables import markdown, write_evaluation
from scialm_dask.data.qc import CellMeasures, Thresholds, chosen_cells, measure_cells, mitochondrial, quality_control
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.simulate import simulate
from scialm_dask.report import plotting

# Table 2: cells × genes before and after quality control.
PUBLISHED = {
    "PBMC": ((2900, 32738), (2843, 13003)),
    "Klein": ((2717, 24021), (2713, 24021)),
    "Chen": ((14437, 23284), (14197, 17752)),
    "Campbell": ((21086, 26774), (11316, 21417)),
}
EVERYWHERE = Thresholds(min_genes=200, min_cells=3)
WITH_MITO = Thresholds(min_genes=200, max_genes=2000, max_mito=5, min_cells=3)  # the publication's, for PBMC


class Press:
    """Makes one part after the other in a folder, and lists them.

    Parameters
    ----------
    folder
        Must not exist; made.
    methods, seeds, limits
        Of all comparisons; see `evaluate_imputation`.
    listen
        Shows progress.
    """

    def __init__(self, folder: Path, methods: list[str], seeds: int, limits: dict[str, Any], listen: Any) -> None:
        folder.mkdir()
        self.folder, self.methods, self.seeds, self.limits, self.listen = folder, methods, seeds, limits, listen
        self.parts: list[str] = []

    def save(self, name: str, figure: Figure, caption: str) -> None:
        """Write a figure."""
        plotting.save(figure, self.folder / name)
        self.parts.append(f"## {caption}\n\n![{caption}, {name}]({name}.svg)\n")

    def clean(self, source: str, to: Path) -> dict[str, Any]:
        """Apply the publication's quality control; return a line of Table 2, and draw Figure 3."""
        matrix = ExpressionMatrix.open(source)
        is_mito = mitochondrial(matrix, Thresholds())
        thresholds, cells = WITH_MITO if is_mito.any() else EVERYWHERE, measure_cells(matrix, is_mito)
        result = quality_control(source, to, thresholds, listen=self.listen)
        after = result["n_cells"], result["n_genes"]
        if is_mito.any():
            title = f"{to.stem}: {result['cells_dropped']} of {matrix.shape[0]} cells removed"
            self.save(f"quality-{to.stem}", quality(cells, thresholds, title), "Figure 3: quality control")
        known = next((f"{name}: {a} before, {b} after" for name, (a, b) in PUBLISHED.items() if b == after), "–")
        filled = f"{result['n_observed'] / after[0] / after[1]:.2%}"
        return {"matrix": to.stem, "before": matrix.shape, "after": after, "non-zeros": filled, "published": known}

    def table2(self, rows: list[dict[str, Any]]) -> None:
        """Write the sizes before and after quality control."""
        pd.DataFrame(rows).to_csv(self.folder / "table2.csv", index=False)
        self.parts.insert(0, f"## Table 2: cells × genes\n\n{markdown(pd.DataFrame(rows))}")

    def evaluate(self, name: str, caption: str, source: Any, **options: Any) -> pd.DataFrame:
        """Compare methods; return the scores of what ran."""
        options = {"methods": self.methods, "seeds": list(range(self.seeds)), **self.limits, **options}
        found = evaluate_imputation(source, listen=self.listen, **options)
        (self.folder / name).mkdir()
        write_evaluation(found, self.folder / name, {"source": str(source), **options})
        self.parts.append(f"## {caption}\n\n{(self.folder / name / 'summary.md').read_text()}")
        for path in sorted((self.folder / name / "figures").glob("*.svg")):
            self.parts.append(f"![{caption}, {path.stem}]({name}/figures/{path.name})\n")
        return found.scores

    def one_run(self, clean: Path, share: float, work: Path) -> None:
        """Follow one run of the completion: where it stops, its rank and singular values."""
        masked = work / f"{clean.stem}-masked.zarr"
        mask(clean, masked, fraction=share, seed=0)
        result = impute(masked, preset="complete", listen=self.listen)
        title = f"{clean.stem}, {share:.0%} of the non-zeros hidden"
        self.save(f"stop-{clean.stem}", plotting.convergence(result, title), "Error and rank, and the stop")

    def sizes(self, sizes: list[int], work: Path) -> None:
        """Measure time and memory on simulated cells of growing number."""
        rows = []
        for number in sizes:
            cells = work / f"cells{number}.zarr"
            simulate(cells, n_cells=number, n_genes=2000, density=0.05, rank=20, seed=0)
            found = self.evaluate(f"size-{number}", f"{number:,} simulated cells", cells, seeds=[0], split=False)
            rows.append(found[(found["experiment"] == "masking") & (found["status"] != "quoted")].assign(cells=number))
        table = pd.concat(rows)
        table.to_csv(self.folder / "sizes.csv", index=False)
        self.save("sizes", costs(table), "Time and memory over size")

    def index(self) -> None:
        """Show everything on one page."""
        (self.folder / "README.md").write_text("# Tables and figures\n\n" + "\n".join(self.parts))


@plotting.style()
def quality(cells: CellMeasures, thresholds: Thresholds, title: str = "") -> Figure:
    """Draw mitochondrial share and number of genes against the total of each cell, with what the thresholds remove."""
    kept = chosen_cells(cells, thresholds)
    figure, (pair,) = plotting.new_figure(1, 2, 8, 3.4, title)
    panels = (
        (pair[0], cells.pct_mito, "mitochondrial share of the counts, %", {"over": thresholds.max_mito}),
        (pair[1], cells.n_genes, "genes with counts", {"over": thresholds.max_genes, "under": thresholds.min_genes}),
    )
    for axes, values, words, limits in panels:
        for chosen, colour, label in ((kept, "accent", "kept"), (~kept, "second", "removed")):
            label = f"{label}: {np.count_nonzero(chosen):,} cells"
            axes.plot(cells.totals[chosen], values[chosen], ".", ms=3, color=plotting.LIGHT[colour], label=label)
        for side, limit in limits.items():
            if limit is not None:
                removed = np.count_nonzero(values > limit if side == "over" else values < limit)
                axes.axhline(limit, color=plotting.LIGHT["second"], linewidth=0.8, linestyle="--")
                axes.text(0, limit, f"{side} {limit:g}: {removed:,} cells", va="bottom", fontsize=8)
        axes.set(xlabel="total counts", ylabel=words)
    figure.legend(*pair[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def costs(scores: pd.DataFrame) -> Figure:
    """Draw time and memory over the number of cells."""
    scores = labelled(scores).assign(megabytes=(scores["peak_bytes"] / 1e6).clip(lower=0.1))
    words = "simulated cells × 2,000 genes, 5 % non-zeros"
    return plotting.lines(scores, "cells", "cells", plotting.COSTS, words, log_x=True)


def make(press: Press, options: argparse.Namespace, work: Path) -> None:
    """Make all parts."""
    cleaned = [work / f"{Path(source).stem}.zarr" for source in options.sources]
    press.table2([press.clean(source, to) for source, to in zip(options.sources, cleaned, strict=True)])
    for clean in cleaned:
        labels = options.labels if options.labels in ExpressionMatrix.open(clean).obs else None
        press.evaluate(clean.stem, "Figures 5 to 7: methods", clean, shares=options.mask, labels=labels)
        if options.increments:
            sweep = {"methods": ["paper"], "shares": options.mask[:1], "seeds": [0], "split": False}
            sweep["sweeps"] = [f"increment={options.increments}"]
            press.evaluate(f"{clean.stem}-increment", "Figure 4: scores over R", clean, **sweep)
        press.one_run(clean, options.mask[0], work)
    for cells, truth in options.truth:
        name, compared = f"{Path(cells).stem}-truth", {"shares": [], "split": False, "seeds": [0]}
        press.evaluate(name, "Error against a truth", cells, reference=truth, **compared)
    if options.sizes:
        press.sizes(options.sizes, work)
    press.index()


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line, and refuse what would fail after hours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SRC")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--methods", nargs="+", default=["all"], help="as in `scialm-dask evaluate`")
    parser.add_argument("--mask", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5], help="shares to hide")
    parser.add_argument("--seeds", type=int, default=3, help="how often, each time with another seed")
    parser.add_argument("--increments", default="10,50,100,…,400", help="R of Figure 4; empty for no Figure 4")
    parser.add_argument("--labels", help="column of obs with known types of cells")
    parser.add_argument("--truth", nargs=2, action="append", default=[], metavar=("CELLS", "TRUTH"))
    parser.add_argument("--sizes", nargs="*", type=int, default=[1000, 3000, 10000], help="numbers of simulated cells")
    parser.add_argument("--memory-limit", help="what each method may hold, such as 8GB")
    parser.add_argument("--method-timeout", type=float, metavar="SECONDS", help="what each method may take")
    options = parser.parse_args(arguments)
    names = [Path(path).stem for path in options.sources] + [f"{Path(cells).stem}-truth" for cells, _ in options.truth]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"{name}: what two sources or truths would be called; give each a name of its own")
    for path in (*options.sources, *(path for pair in options.truth for path in pair)):
        if not Path(path).exists():
            parser.error(f"{path}: no such file")
    if options.output.exists():
        parser.error(f"{options.output}: exists already; name another folder or remove it")
    return options


def kept(folder: Path) -> str:
    """Say what is in a folder that was not finished."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return f"kept in {folder}: {', '.join(names)}" if names else "nothing was written"


def main(arguments: list[str] | None = None) -> int:
    """Do as the command line says; return the exit code."""
    options = parsed(arguments)
    limits = {"memory_limit": options.memory_limit, "method_timeout": options.method_timeout}
    code = 0
    with show_progress() as listen, tempfile.TemporaryDirectory(prefix="scialm-publication-") as work:
        try:
            contestants(options.methods)  # refuses what would fail later
            make(Press(options.output, options.methods, options.seeds, limits, listen), options, Path(work))
        except KeyboardInterrupt:
            code, why = 130, "interrupted"
        except ScialmError as error:
            code, why = error.exit_code, str(error)
        except BaseException:
            print(f"publication.py: not finished; {kept(options.output)}", file=sys.stderr)
            raise
    if code:
        print(f"publication.py: {why}; {kept(options.output)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
