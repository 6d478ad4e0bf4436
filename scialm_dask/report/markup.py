"""Pieces of HTML, safe whatever genes and files are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from scialm_dask.progress import duration
from scialm_dask.report.panels import Panel
from scialm_dask.report.svg import plain, svg_of

__all__ = ["columns", "figures", "readable_bytes", "section", "short", "table", "text", "with_code"]


def section(title: str, words: str, body: str) -> str:
    """Give a part of the page: heading, words, and what they are about, beside them if it is a single picture."""
    told = f"<p>{with_code(words)}</p>" if words else ""
    beside = ' class="beside"' if body.count("<figure") == 1 else ""
    return f"<section{beside}>\n<div><h2>{text(title)}</h2>\n{told}</div>\n{body}\n</section>"


def figures(panels: Iterable[Panel]) -> str:
    """Draw panels, side by side where there is room."""
    drawn = "\n".join(
        f'<figure class="card"><figcaption>{text(panel.title)}</figcaption>\n{svg_of(panel)}</figure>'
        for panel in panels
    )
    return f'<div class="panels">\n{drawn}\n</div>' if drawn else ""


def text(value: object) -> str:
    """Make it safe to stand in HTML, whatever a gene is called."""
    return escape(plain(str(value)))


def with_code(words: str) -> str:
    """Make it safe too, and set commands and options as such."""
    return re.sub(r"`([^`]+)`|(--[a-z-]+)", lambda found: f"<code>{found[1] or found[2]}</code>", text(words))


def _value(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return readable_bytes(value)
    if key == "seconds":
        return duration(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_label(name)} {_value(name, each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value("", each) for each in value)
    return str(value)


def short(number: int) -> str:
    """Shorten a large number to millions or milliards."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def readable_bytes(number: float) -> str:
    """Put a number of bytes in words."""
    from dask.utils import format_bytes

    return str(format_bytes(int(number)))


def table(facts: Mapping[str, Any]) -> str:
    """Make a table of names and values."""
    rows = "\n".join(
        f'<tr><th scope="row">{text(_label(key))}</th><td>{text(_value(key, value))}</td></tr>'
        for key, value in facts.items()
    )
    return f'<div class="card"><table class="facts"><tbody>\n{rows}\n</tbody></table></div>'


def columns(heads: Iterable[tuple[str, str]], rows: str) -> str:
    """Make a table of rows that are HTML already, with heads and the classes of these; ``aside`` goes on a phone."""
    head = "".join(f'<th scope="col" class="{kind}">{label}</th>' for label, kind in heads)
    return f'<div class="card"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _label(key: str) -> str:
    return "time" if key == "seconds" else key.removeprefix("n_").removesuffix("_bytes").replace("_", " ")
