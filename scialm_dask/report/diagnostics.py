"""What to beware of in a result, in words: facts, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scialm_dask.imputation import Imputation
from scialm_dask.report.comparison import Comparison
from scialm_dask.report.plotting import known_curves

_INFLATED = 2.0  # mean imputed over mean observed
_FILLED = 0.05  # share of zeros that became as large as values seen
_MUCH = 0.5  # weight of the last component from which further ones would tell something
_EMPTY = 0.001  # share of cells or genes without an observed entry

Warnings = Iterator[tuple[str, str]]


def warnings_of(result: Imputation, compared: Comparison | None = None) -> list[tuple[str, str]]:
    """Give what is wrong or doubtful, most important first: pairs of the fact and of what it means or asks for.

    Parameters
    ----------
    result
        As `impute` gives it, or one of its kind.
    compared
        Some of its cells beside the matrix it was made from.
    """
    return [
        *_of_the_end(result),
        *_of_unseen(result.summary.get("unseen") or {}),
        *_of_rank(result),
        *_of_inflation(result, compared),
        *_of_input(result.summary),
    ]


def _of_the_end(result: Imputation) -> Warnings:
    summary, history = result.summary, result.history
    known = "held_out" in known_curves(history)[0]
    if summary.get("converged") is False:
        falling = known and bool(history["held_out"].idxmin() == history.index[-1])
        so = ", and the held-out error was still falling" if falling else ""
        yield "It did not converge.", f"The most iterations allowed were made{so}: raise --max-iterations."
    if not known and "unseen" not in summary and summary.get("settings", {}).get("stop") == "residual":
        yield (
            "Nothing was held out.",
            "The fit went on until observed entries were met, noise included, and no error tells whether that was too "
            "far. Preset complete stops before.",
        )


def _of_unseen(errors: dict[str, float]) -> Warnings:
    if errors and errors["imputed"] >= min(errors["observed"], errors["gene_mean"]):
        simple = "the counts as they are" if errors["observed"] < errors["gene_mean"] else "gene means"
        yield (
            f"Unseen molecules are predicted no better than by {simple}.",
            "Imputation adds nothing here: compare with what was counted before you rely on it.",
        )


def _of_rank(result: Imputation) -> Warnings:
    most = result.summary.get("settings", {}).get("max_rank")
    if result.rank == 0:
        remedy = "It ended too early: raise --max-iterations."
        if "unseen" in result.summary:
            remedy = "No component recurs in unseen molecules: take the counts as they are."
        yield "The rank is 0, so that all is imputed as zero.", remedy
    elif result.rank == 1:
        yield (
            "The rank is 1, so that all cells are imputed alike but for their depth.",
            "Types of cells are lost: give more cells, or deeper ones.",
        )
    elif most is not None and result.rank >= most and (result.summary.get("weights") or [1.0])[-1] > _MUCH:
        yield (
            f"The rank reached its limit, {most}.",
            "Structure may have been left out: raise --max-rank, if memory allows.",
        )


def _of_inflation(result: Imputation, compared: Comparison | None) -> Warnings:
    if result.observed == "finite":
        return  # means of a general matrix may be anything, and its zeros were values
    preserved = (result.summary.get("X") or {}).get("written") == "preserve_zeros"
    ratio = result.mean_ratio
    if ratio is not None and ratio > _INFLATED:
        zeros = "that were not taken for biological were" if preserved else "were taken as unknown and"
        yield (
            f"Expression is inflated: the imputed mean is {ratio:.3g} times the observed one.",
            f"Zeros {zeros} filled in. Single entries that dropped out may be well recovered, but do not compare "
            "levels of expression between genes or with other data; for that, impute raw counts with preset denoise.",
        )
    if compared is not None and compared.filled > _FILLED:
        remedy = "--preserve-zeros leaves biological zeros."
        if preserved:
            remedy = "Preset denoise trusts zeros as far as raw counts say."
        yield (
            f"{compared.filled:.0%} of the zeros became as large as values that were seen.",
            f"Genes that are off in some cells may look as if they were on. {remedy}",
        )


def _of_input(summary: dict[str, Any]) -> Warnings:
    if "few_genes" in summary:  # completed by `transform`
        yield "Few genes of the fit were measured in these cells.", f"{summary['few_genes']}."
    for what, remedy in (("cell", "--min-genes"), ("gene", "--min-cells")):
        empty, of = int(summary.get(f"n_empty_{what}s", 0)), int(summary.get(f"n_{what}s", 0))
        if of and empty / of > _EMPTY:
            one = empty == 1
            yield (
                f"{empty:,} {what}{' has' if one else 's have'} no observed entry.",
                f"{'It is' if one else 'They are'} imputed as zero; `scialm-dask qc {remedy} 1` drops "
                f"{'it' if one else 'them'}.",
            )
    if "cells not" in str(summary.get("scaling", "")):
        yield (
            "Cells were not scaled, as their raw totals are unknown.",
            "Noise differs between cells more than it need: give raw counts, or raw totals in obs['total_counts'], as "
            "`scialm-dask qc` leaves them.",
        )
