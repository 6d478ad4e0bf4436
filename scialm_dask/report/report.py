"""The report: one HTML file about a result, which needs nothing else, not even a network."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from scialm_dask import __version__
from scialm_dask.arguments import checked
from scialm_dask.data.annotated import as_matrix, is_anndata
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import atomic_output, check_output
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Stage, silent
from scialm_dask.imputation import LONG, Imputation
from scialm_dask.progress import duration
from scialm_dask.report.comparison import GENES_OF_PLANE, Comparison, compare
from scialm_dask.report.diagnostics import warnings_of
from scialm_dask.report.markup import columns, figures, readable_bytes, section, short, table, text, with_code
from scialm_dask.report.panels import (
    LEAST_DETECTED,
    Groups,
    Panel,
    cell_panels,
    fit_panels,
    groups_of,
    held_out_known,
    inflation_panel,
)
from scialm_dask.solve.zeros import TRAIN_SHARE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["write_report"]

_MOST_GENES = 20
_DEPTH = "number of genes seen in the cell"


@checked
def write_report(
    result: Imputation | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    source: Any = None,
    color: str | None = None,
    overwrite: bool = False,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Write a report on a result as one self-contained HTML file. The same result gives the same file.

    Parameters
    ----------
    result
        What `impute` gives or has written.
    path
        The .html file to write.
    source
        The matrix that the result was made from, as `impute` takes it; by default looked for where it was. Without
        it there is nothing about single genes and cells. A sample of 2,000 cells is looked at, in one pass.
    color
        Column of ``obs`` to colour cells by; by the number of genes seen if None.
    overwrite
        Replace `path` if it exists.
    listen
        Called with every event of the work; see `scialm_dask.events`.

    Returns
    -------
    dict
        ``destination`` and ``warnings``, the facts that the report warns of.

    Raises
    ------
    InputError
        If there is no such result, source or column, or source and result do not belong together.
    OutputError
        If `path` cannot be written.
    """
    given = [os.fspath(each) for each in (result, source) if isinstance(each, str | os.PathLike)]
    check_output(path, overwrite=overwrite, sources=tuple(given))
    name = os.path.basename(os.path.normpath(result)) if isinstance(result, str | os.PathLike) else "Result"
    if not isinstance(result, Imputation):
        result = Imputation.open(result)
    if color is not None and color not in result.obs:
        known = ", ".join(map(str, result.obs.columns)) or "none"
        raise InputError(f"{color}: no such column of obs; its columns are: {known}")
    compared, why_not = _compare(result, source, listen)
    listen(Stage("drawing"))
    warnings = warnings_of(result, compared)
    page = _page(name, result, compared, why_not, color, warnings)
    with atomic_output(path, overwrite=overwrite, sources=tuple(given)) as partial:
        partial.write_text(page, "utf-8", errors="replace")
    return {"destination": os.fspath(path), "warnings": [what.rstrip(".") for what, _ in warnings]}


def _compare(result: Imputation, source: Any, listen: Listener) -> tuple[Comparison | None, str]:
    """Compare with the source, or tell why not."""
    if result.observed == "finite":
        return None, "Zeros of this matrix are observed values, so this is about no expression that could be inflated."
    if source is not None:
        layered = isinstance(source, str | os.PathLike) or is_anndata(source)
        return compare(result, as_matrix(source, _layer(result) if layered else None), listen=listen), ""
    where = str(result.summary.get("source", ""))
    try:
        return compare(
            result, ExpressionMatrix.open(where.removesuffix(_element(where)), _layer(result)), listen=listen
        ), ""
    except InputError as error:
        why = f"The matrix that was imputed cannot be read ({error})" if where else "The result names no source"
        return None, f"{why}. Name it with --source to see how genes and cells have changed."


def _element(source: str) -> str:
    """``:X`` or ``:layers/NAME`` at the end of what a summary calls its source; nothing for a bare array."""
    found = re.search(r":(X|layers/[^:]+)$", source)
    return found[0] if found else ""


def _layer(result: Imputation) -> str | None:
    element = _element(str(result.summary.get("source", "")))
    return element.removeprefix(":layers/") if element.startswith(":layers/") else None


def _page(
    name: str,
    result: Imputation,
    compared: Comparison | None,
    why_not: str,
    color: str | None,
    warnings: list[tuple[str, str]],
) -> str:
    panels = fit_panels(result)
    sections = [
        _warnings(warnings),
        section("Convergence", _convergence_words(result), figures(panels["convergence"])),
        *_errors(result, panels),
        section("Spectrum", _spectrum_words(result), figures(panels["spectrum"])),
        *_compared(result, compared, why_not, color),
        _facts(result),
    ]
    cells, genes = result.shape
    template = Template((files("scialm_dask.report") / "report.html").read_text("utf-8"))
    return template.substitute(
        title=text(f"{name} – imputation report"),
        heading=text(name),
        subheading=text(f"{cells:,} cells × {genes:,} genes. {_sentence(result.summary.get('stop_reason', ''))}"),
        tiles=_tiles(result),
        sections="\n".join(section for section in sections if section),
        version=text(__version__),
    )


def _warnings(warnings: list[tuple[str, str]]) -> str:
    if not warnings:
        return section("Warnings", "", '<p class="fine">Nothing to warn of.</p>')
    items = "\n".join(f"<li><strong>{text(what)}</strong> {with_code(remedy)}</li>" for what, remedy in warnings)
    return section("Warnings", "", f'<ul class="notices">\n{items}\n</ul>')


def _convergence_words(result: Imputation) -> str:
    if not len(result.history):
        return "These cells were completed by a fit that was made before; its own report tells how it converged."
    words = f"{len(result.history)} iterations."
    if "rank" in result.history:
        words += (
            " The residual is what the completed matrix leaves of the observed entries, relative to their norm; the "
            "rank rises as singular values come over the falling threshold."
        )
    return words


def _errors(result: Imputation, panels: dict[str, list[Panel]]) -> list[str]:
    """Make the sections on what the fit has not seen: hidden entries, molecules that were split off, or neither."""
    sections = []
    if (splitting := result.summary.get("count_splitting")) is not None:
        body = figures(panels["unseen"]) + _tried_table(splitting["tried"])
        sections.append(section("Error on unseen molecules", _unseen_words(result, len(splitting["tried"])), body))
    if splitting is None or held_out_known(result.history):
        sections.append(section("Held-out error", _held_out_words(result), figures(panels["held_out"])))
    return sections


def _unseen_words(result: Imputation, fits: int) -> str:
    words = (
        f"No entries were hidden to choose this: {TRAIN_SHARE:.0%} of the molecules were fitted to predict the others, "
        "over all entries, zeros too. Their relative error, on the scale on which noise is even, falls as long as "
        "structure is fitted and rises once noise is. "
    )
    if fits > 1:
        words += f"{fits} confidences in zeros and exponents of the scaling were tried, and the best is drawn. "
    if result.summary["settings"]["stop"] == "count-split":
        words += "Its threshold at the iteration of the lowest error is where the fit of all molecules stopped."
    return words


def _tried_table(tried: list[dict[str, Any]]) -> str:
    heads = [
        ("Confidence in zeros", ""),
        ("Gene exponent", ""),
        ("Cell exponent", "aside"),
        ("Iterations", "aside"),
        ("Lowest at", "aside"),
        ("Threshold", "aside"),
        ("Rank", ""),
        ("Error", ""),
    ]
    rows = "\n".join(
        f'<tr><th scope="row">{fit["zeros"]:g}{" (chosen)" if fit["chosen"] else ""}</th>'
        f'<td>{fit["gene_exponent"]:g}</td><td class="aside">{fit["cell_exponent"]:g}</td>'
        f'<td class="aside">{fit["iterations"]}</td><td class="aside">{fit["chosen_iteration"]}</td>'
        f'<td class="aside">{fit["threshold"]:.4g}</td><td>{fit["rank"]}</td><td>{fit["error"]:.4f}</td></tr>'
        for fit in tried
    )
    return columns(heads, rows)


def _held_out_words(result: Imputation) -> str:
    share = result.summary.get("settings", {}).get("validation", 0)
    if held_out_known(result.history):
        return (
            f"{100 * share:.3g}% of each gene’s observed entries were hidden. Their relative error falls as long as "
            "structure is fitted and rises once noise is. The iteration of the lowest error is kept, and one more made "
            "with all entries, those that were hidden too."
        )
    return "No entries were held out, so nothing is known of how well hidden ones are recovered."


def _spectrum_words(result: Imputation) -> str:
    if not result.summary.get("singular_values"):
        return "The result has no singular values of its own."
    return f"Those that were kept, {result.rank:,} in number, less the threshold, on the scale of the fit."


def _compared(result: Imputation, compared: Comparison | None, why_not: str, color: str | None) -> list[str]:
    """Make the sections that need the source, or one that tells why there are none."""
    if compared is None:
        return [section("Inflation, genes and cells", why_not, "")]
    k, m = len(compared.cells), result.shape[0]
    sampled = f"Over all {m:,} cells." if k == m else f"Over a sample of {k:,} of the {m:,} cells."
    overall, what = result.mean_ratio, "X, as it was written," if result.summary.get("X") else "The imputed matrix"
    words = "" if overall is None else f"{what} has {overall:.3g} times the mean of the observed one. "
    words += f"{sampled} {compared.filled:.2%} of the zeros were imputed as high as the mean of their gene’s non-zeros"
    histogram = inflation_panel(compared)
    groups = _groups(result, compared, color)
    seen = f"genes seen in {LEAST_DETECTED:.0%} of the cells or more"
    return [
        section(
            "Inflation check",
            f"{words}, or higher. The histogram is of {seen}.",
            figures([] if histogram is None else [histogram]),
        ),
        section(
            "Most changed genes",
            f"{sampled} Of {seen}, those that changed most: root mean square of imputed less observed, in units of the "
            "counting noise, √(mean observed). Where nothing but noise was taken away it is about 1.",
            _gene_table(compared),
        ),
        section(
            "Cells before and after",
            f"{sampled} Principal components of the logarithms of the {min(GENES_OF_PLANE, result.shape[1]):,} most "
            "variable genes, cells scaled to the same total; each picture has components of its own.",
            figures(cell_panels(compared, groups)) + _legend(groups),
        ),
    ]


def _groups(result: Imputation, compared: Comparison, color: str | None) -> Groups:
    import pandas as pd

    if color is None:
        return groups_of(_DEPTH, pd.Series(compared.genes_seen))
    return groups_of(color, result.obs[color].iloc[compared.cells])


def _gene_table(compared: Comparison) -> str:
    genes = compared.genes[compared.genes["detected"] >= LEAST_DETECTED]
    genes = genes.assign(noise=genes["change"] / genes["mean_observed"] ** 0.5)
    genes = genes.sort_values("noise", ascending=False, kind="stable").head(_MOST_GENES)
    if not len(genes):
        return '<p class="card">No gene is seen often enough.</p>'
    most = genes["noise"].iloc[0]
    rows = "\n".join(_gene_row(str(name), gene, gene["noise"] / most) for name, gene in genes.iterrows())
    heads = [
        ("Gene", ""),
        ("Seen in", "aside"),
        ("Mean observed", "aside"),
        ("Mean imputed", "aside"),
        ("Ratio", ""),
        ("Zeros made large", ""),
        ("Change", ""),
    ]
    return columns(heads, rows)


def _gene_row(name: str, gene: pd.Series, share: float) -> str:
    before, after = gene["mean_observed"], gene["mean_imputed"]
    return (
        f'<tr><th scope="row">{text(name)}</th><td class="aside">{gene["detected"]:.1%}</td>'
        f'<td class="aside">{before:.3g}</td><td class="aside">{after:.3g}</td><td>{after / before:.3g}×</td>'
        f"<td>{gene['filled']:.1%}</td>"
        f'<td class="share" style="--part: {100 * share:.0f}%">{gene["noise"]:.2f}</td></tr>'
    )


def _facts(result: Imputation) -> str:
    """Make the tables of the summary and of the settings."""
    summary = {key: value for key, value in result.summary.items() if key not in LONG}
    tables = section("Summary", "", table(summary))
    settings = result.summary.get("settings")
    return f'<div class="columns">{tables}{section("Settings", "", table(settings)) if settings else ""}</div>'


def _tiles(result: Imputation) -> str:
    """Make the key numbers, of what the result knows."""
    known, (m, n) = result.summary, result.shape
    tiles = [("Rank", f"{result.rank:,}", f"of at most {min(m, n):,}")]
    if "n_observed" in known:
        tiles.append(
            ("Observed entries", short(known["n_observed"]), f"{known['n_observed'] / (m * n):.1%} of the matrix")
        )
    if "chosen_iteration" in known:
        tiles.append(("Kept iteration", f"{known['chosen_iteration']:,}", f"of {known['iterations']:,} made"))
    if known.get("held_out_error") is not None:
        tiles.append(("Held-out error", f"{known['held_out_error']:.3f}", "relative, at the kept iteration"))
    elif "residual" in known:
        tiles.append(("Residual", f"{known['residual']:.3g}", "relative, on observed entries"))
    if (ratio := result.mean_ratio) is not None:
        tiles.append(("Imputed ÷ observed", f"{ratio:.2f}×", f"ratio of the means{', of X' if known.get('X') else ''}"))
    if "seconds" in known:
        memory = known.get("peak_memory_bytes")
        tiles.append(("Time", duration(known["seconds"]), f"peak memory {readable_bytes(memory)}" if memory else ""))
    return "\n".join(
        f'<div class="tile"><dt>{text(name)}</dt><dd>{text(value)}<small>{text(about)}</small></dd></div>'
        for name, value, about in tiles
    )


def _sentence(words: str) -> str:
    return f"Stopped: {words}." if words else ""


def _legend(groups: Groups) -> str:
    items = "".join(
        f'<li><i style="background: var(--{colour})"></i>{text(name)}</li>'
        for name, colour in zip(groups.names, groups.colours, strict=True)
    )
    return f'<p class="legend">Coloured by {text(groups.by)}</p>\n<ul class="legend">{items}</ul>'
