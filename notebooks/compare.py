"""Compare methods on real cells, a page for each set: ``SCIALM_DATA=FOLDER python notebooks/compare.py [SET …]``.

Cells that were sequenced deeply and then down-sampled (a truth), and two sets of cells with known types.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from scialm_dask import evaluate_imputation, show_progress
from scialm_dask.compare.tables import write_evaluation
from scialm_dask.data.qc import Thresholds, quality_control

HERE = Path(__file__).resolve().parent / "compared"
METHODS = "denoise,complete,paper,magic,scvi,alra,knn,softimpute"
ABOUT = """# Methods side by side

`notebooks/compare.py` makes these tables. For your own cells, run `scialm-dask evaluate SRC compared --methods all
--labels COLUMN`.

Every method sees the same cells with the same entries hidden, in a separate process. Methods for counts get counts.
All are scored on normalised counts, with one seed. Times are from two cores of a busy machine, good for orders of
magnitude. kNN smoothing, ALRA and softImpute are implemented from their papers; MAGIC 3.0.0 and scVI (scvi-tools
1.4.2, at most 100 epochs) are the authors' programs.

How to read the tables:

- **Truth** and **unseen molecules** score all entries, zeros included. *r over cells, median gene* tells whether a
  gene varies between cells as it should. The relative error hardly shows that, because a few highly expressed genes
  dominate it. Genes and cells that are constant in the truth or empty in the input are left out for all methods; a
  constant estimate of the others counts as 0.
- **Hidden non-zeros** score only entries that are known not to be zero, and so reward methods that inflate.
- **Clusters**: every method gets as many clusters as there are types, by k-means and by Leiden with a searched
  resolution.

The cells:

"""
SETS: dict[str, tuple[str, Thresholds | None]] = {
    "baron": ("Pancreas, down-sampled", None),
    "pbmc_facs": ("Sorted blood cells", Thresholds(min_genes=200, max_genes=2000, max_mito=5, min_cells=3)),
    "mouse_bladder": ("Mouse bladder", Thresholds(min_genes=200, min_cells=3)),
}


def compare(name: str, data: Path, folder: Path, **options: Any) -> str:
    """Compare on one set of cells; return what the page says of it."""
    title, thresholds = SETS[name]
    alone: dict[str, Any] = {"shares": [], "split": False}
    if thresholds is None:
        source = data / f"{name}_downsampled.h5ad"
        asked = {"truth": {**alone, "reference": data / f"{name}_reference.h5ad"}}
    else:
        source = folder / f"{name}.zarr"
        quality_control(data / f"{name}.h5ad", source, thresholds)
        asked = {"scores": {}, "types": {**alone, "labels": "cell_type"}}
    parts = [f"# {title}\n"]
    for path in HERE.glob(f"{name}-*"):
        path.unlink()
    for what, own in asked.items():
        place = folder / f"{name}-{what}"
        place.mkdir()
        with show_progress() as listen:
            found = evaluate_imputation(source, **own, **options, listen=listen)
        write_evaluation(found, place, {"source": source.name})
        parts.append((place / "summary.md").read_text())
        for path in sorted((place / "figures").glob("*")):
            if path.suffix == (".png" if path.stem.endswith("cells") else ".svg"):
                shutil.copy(path, HERE / f"{name}-{path.name}")
                parts.append(f"![{title}: {path.stem.replace('-', ' ')}]({name}-{path.name})\n")
    return "\n".join(parts)


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"Out of {', '.join(SETS)}.  [default: all]")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--method-timeout", type=float, default=1200)
    given = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    (HERE / "README.md").write_text(ABOUT + "".join(f"- [{title}]({name}.md)\n" for name, (title, _) in SETS.items()))
    options = {"methods": given.methods.split(","), "method_timeout": given.method_timeout}
    with tempfile.TemporaryDirectory() as work:
        for name in given.sets or SETS:
            page = compare(name, Path(os.environ["SCIALM_DATA"], "data"), Path(work), **options)
            (HERE / f"{name}.md").write_text(page)


if __name__ == "__main__":
    main()
