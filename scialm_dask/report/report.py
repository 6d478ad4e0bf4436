"""The report on a result, a self-contained HTML file."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from scialm_dask import __version__
from scialm_dask.config import checked
from scialm_dask.data.annotated import as_matrix, is_anndata
from scialm_dask.data.annotation import place_of, symbols
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.store import atomic_output, check_output
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, Stage, silent
from scialm_dask.imputation import LONG, Imputation
from scialm_dask.progress import duration, in_words, label, printable
from scialm_dask.report import plotting
from scialm_dask.report.diagnostics import GENES_OF_PLANE, Comparison, compare, warnings_of
from scialm_dask.report.plotting import Colouring, Picture

_LEAST_DETECTED = 0.01  # minimum share of cells with an observed value for a gene to be listed
_MOST_GENES = 20
_ELSEWHERE = {*LONG, "verdict", "unseen", "weights", "residual_share", "command", "date", "stop_reason", "run"}


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
    """Write a report on a result as one self-contained HTML file.

    Parameters
    ----------
    result : Imputation or path
        A result of `impute`, in memory or on disk.
    path : str or path-like
        The .html file to write.
    source : matrix, optional
        The imputed matrix, as `impute` takes it. By default it is opened at its path. A sample of 2,000 cells is read
        in one pass. Without the matrix the report has no section on genes and cells.
    color : str, optional
        Column of ``obs``, or gene by name or symbol, that colours cells. By default the number of genes seen.
    overwrite : bool, default=False
        Replace `path` if it exists.
    listen : callable, optional
        Called with every event of the computation; see `scialm_dask.events`.

    Returns
    -------
    dict
        ``destination`` and ``warnings``, the facts in the warnings of the report.

    Raises
    ------
    InputError
        If there is no such result, source, column or gene, or the source has other cells or genes.
    OutputError
        If `path` cannot be written.

    Notes
    -----
    Reports on the same result on the same day are identical.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)
    >>> result = scialm_dask.impute(counts)
    >>> scialm_dask.write_report(result, "report.html", source=counts)["destination"]
    'report.html'
    """
    given = tuple(os.fspath(each) for each in (result, source) if isinstance(each, str | os.PathLike))
    check_output(path, overwrite=overwrite, sources=given)
    name = os.path.basename(os.path.normpath(result)) if isinstance(result, str | os.PathLike) else "Result"
    if not isinstance(result, Imputation):
        result = Imputation.open(result)
    gene = None if color is None or color in result.obs else _gene_number(result, color)
    compared, why_not = _compare(result, source, gene, listen)
    listen(Stage("drawing"))
    warnings = warnings_of(result, compared)
    page = _template().render(
        name=name,
        shape=result.shape,
        summary=result.summary,
        tiles=list(_tiles(result)),
        warnings=warnings,
        figures=list(_figures(result, compared)),
        why_not=why_not,
        **{} if compared is None else _about_cells(result, compared, color),
        facts_of_run={key: value for key, value in result.summary.items() if key not in _ELSEWHERE},
        light=plotting.LIGHT,
        dark=plotting.DARK,
        version=__version__,
        today=datetime.now(UTC).date(),
    )
    with atomic_output(path, overwrite=overwrite, sources=given) as partial:
        partial.write_text(page, "utf-8")
    return {"destination": os.fspath(path), "warnings": [what.rstrip(".") for what, _ in warnings]}


def _gene_number(result: Imputation, name: str) -> int:
    """Return the number of a gene, by its name or symbol."""
    for names in symbols(result.var):
        found = np.flatnonzero(names == name)
        if len(found) == 1:
            return int(found[0])
        if len(found):
            named = ", ".join(result.var.index[found])
            raise InputError(f"{name}: {len(found)} genes are called so; name one of {named}")
    known = ", ".join(map(str, result.obs.columns)) or "none"
    raise InputError(f"{name}: neither a gene nor a column of obs; its columns are: {known}")


def _compare(result: Imputation, source: Any, gene: int | None, listen: Listener) -> tuple[Comparison | None, str]:
    """Return the comparison with the source, or None and the reason why there is none."""
    if result.observed == "finite":
        return None, "Zeros of this matrix are observed values, so inflation of expression does not apply."
    where, layer = place_of(str(result.summary.get("source", "")))
    if source is not None:
        layered = isinstance(source, str | os.PathLike) or is_anndata(source)
        return compare(result, as_matrix(source, layer if layered else None), gene=gene, listen=listen), ""
    try:
        matrix = ExpressionMatrix.open(where, layer)
        return compare(result, matrix, gene=gene, listen=listen), ""
    except InputError as error:
        why = f"The matrix that was imputed cannot be read ({error})" if where else "The result names no source"
        return None, f"{why}. Name it with --source to see how genes and cells changed."


def _tiles(result: Imputation) -> Iterator[tuple[str, str, str]]:
    """Yield the key figures: name, value, and explanation."""
    known, (m, n) = result.summary, result.shape
    limit = known.get("settings", {}).get("max_rank")
    yield "Rank", f"{result.rank:,}", f"of at most {min(m, n) if limit is None else limit:,}"
    if "unseen" in known:
        errors = known["unseen"]
        words = f"{errors['observed']:.3f} as observed, {errors['gene_mean']:.3f} by gene means"
        yield "Error on unseen molecules", f"{errors['imputed']:.3f}", words
    if "residual_share" in known:
        yield "Genes beyond the low rank", f"{known['residual_share']:.0%}", "keep a share of their counts"
    if "n_observed" in known:
        number = known["n_observed"]
        size, unit = next(((s, u) for s, u in ((1e9, " billion"), (1e6, " million")) if number >= s), (1, ""))
        yield (
            "Observed entries",
            f"{number / size:.3g}{unit}" if unit else f"{number:,}",
            f"{number / (m * n):.1%} of the matrix",
        )
    if known.get("chosen_iteration"):
        yield "Kept iteration", f"{known['chosen_iteration']:,}", f"of {known['iterations']:,} made"
    if known.get("held_out_error") is not None:
        yield "Held-out error", f"{known['held_out_error']:.3f}", "relative, at the kept iteration"
    elif known.get("residual") is not None and "unseen" not in known:
        yield "Residual", f"{known['residual']:.3g}", "relative, on observed entries as scaled"
    if (ratio := result.mean_ratio) is not None:
        yield "Imputed ÷ observed", f"{ratio:.2f}×", f"ratio of the means{', of X' if known.get('X') else ''}"
    if "seconds" in known:
        memory = known.get("peak_memory_bytes")
        yield "Time", duration(known["seconds"]), f"peak memory {in_words(memory, 'bytes')}" if memory else ""


def _figures(result: Imputation, compared: Comparison | None) -> Iterator[tuple[Picture, str]]:
    """Yield figures of the fit and of gene levels, each with its caption."""
    history, kept = result.history, result.summary.get("chosen_iteration")
    errors, ranks = plotting.known_curves(history)
    for title, names, caption in (
        ("Error", errors, _about_error(result, errors)),
        ("Rank", ranks, f"Singular values above the decreasing threshold; {result.rank:,} were kept."),
    ):
        if names:
            ends = [f"{words}: {history[name].iloc[0]:.3g} at first, {history[name].iloc[-1]:.3g} at last"
                    for name, words in names.items()]  # fmt: skip
            words = f"Line chart over {len(history)} iterations of {'; '.join(ends)}. Iteration {kept} was kept."
            yield Picture.of(title, words, plotting.curves(history, names, kept)), caption
    values, weights = (np.asarray(result.summary.get(name) or ()) for name in ("singular_values", "weights"))
    if len(values):
        share = values[0] ** 2 / np.sum(values**2)
        words = f"Chart of {len(values)} singular values in falling order, from {values[0]:.4g} to {values[-1]:.4g}."
        caption = f"The first holds {share:.0%} of the sum of squares of {len(values)}, on the scale of the fit."
        if len(weights):
            caption += " The weight of a component is the part that recurs in unseen molecules."
        yield Picture.of("Singular values", words, plotting.singular_values(values, weights)), caption
    if compared is not None:
        ratios = (compared.genes["mean_imputed"] / compared.genes["mean_observed"]).to_numpy()
        ratios = ratios[np.isfinite(ratios) & (compared.genes["detected"] >= _LEAST_DETECTED)]
        if len(ratios):
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            words = f"Histogram of {len(ratios):,} genes by mean imputed over mean observed. "
            words += f"The median is {middle:.3g}; half of the genes lie between {low:.3g} and {high:.3g}."
            written, ratio = "The written X" if result.summary.get("X") else "The imputed matrix", result.mean_ratio
            caption = "" if ratio is None else f"{written} has {ratio:.3g} times the mean of the observed one. "
            caption += f"{compared.filled:.2%} of the zeros were imputed at least as high as the mean of their gene’s "
            caption += f"non-zeros. Genes seen in at least {_LEAST_DETECTED:.0%} of the cells."
            yield Picture.of("Levels, gene by gene", words, plotting.inflation(ratios)), caption


def _about_error(result: Imputation, names: dict[str, str]) -> str:
    if "objective" in names:
        return "The minimised objective, which never rises."
    if "held_out" not in names:
        return "No entries were held out, so it is unknown how well hidden entries are recovered."
    share = result.summary.get("settings", {}).get("validation", 0)
    return (
        f"{100 * share:.3g}% of each gene’s observed entries were hidden. Their error falls while structure is fitted "
        "and rises once noise is. The iteration with the lowest error is kept, followed by one with all entries."
    )


def _about_cells(result: Imputation, compared: Comparison, color: str | None) -> dict[str, Any]:
    """Return the template's variables for single genes and cells."""
    import pandas as pd

    k, m = len(compared.cells), result.shape[0]
    if compared.gene_before is not None and compared.gene_after is not None:
        before, after = (Colouring(f"{color}, {what}", values) for what, values in
                         (("observed", compared.gene_before), ("imputed", compared.gene_after)))  # fmt: skip
    elif color is None:
        before = after = Colouring.of("number of genes seen in the cell", pd.Series(compared.genes_seen))
    else:
        before = after = Colouring.of(color, result.obs[color].iloc[compared.cells])
    ids, *others = symbols(result.var)
    symbol = others[0] if others and ids.str.match(r"ENS[A-Z]*\d+").mean() > 0.5 else ""
    genes = compared.genes.assign(symbol=symbol, name=compared.genes.index)
    genes = genes[genes["detected"] >= _LEAST_DETECTED]
    noise, ratio = genes["change"] / genes["mean_observed"] ** 0.5, genes["mean_imputed"] / genes["mean_observed"]
    genes = genes.assign(noise=noise, ratio=ratio, part=noise / noise.max())
    genes = genes.sort_values("noise", ascending=False, kind="stable").head(_MOST_GENES)
    drawn = []
    for name, points, shares, colouring in (
        ("before", compared.before, compared.shares[0], before),
        ("after", compared.after, compared.shares[1], after),
    ):
        words = f"Scatter plot of {k:,} cells {name} imputation on their first two principal components, which hold "
        words += f"{shares[0]:.0%} and {shares[1]:.0%} of the variance, coloured by {colouring.by}."
        drawn.append(Picture.of(f"Cells {name} imputation", words, plotting.cells(points, shares, colouring)))
    return {
        "sampled": f"Over all {m:,} cells." if k == m else f"Over a sample of {k:,} of the {m:,} cells.",
        "genes": list(genes.to_dict("records")),
        "least": f"{_LEAST_DETECTED:.0%}",
        "cells": drawn,
        "colouring": before,
        "plane": min(GENES_OF_PLANE, result.shape[1]),
    }


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scialm_dask.report", "."),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # Markup is safe already
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"code": _with_code, "value": in_words, "label": label}
    return environment.get_template("template.html")


def _with_code(words: str) -> Any:
    """Escape text, and mark commands and options as code."""
    return Markup(re.sub(r"`([^`]+)`|(--[a-z-]+)", lambda m: f"<code>{m[1] or m[2]}</code>", escape(printable(words))))
