"""Panels as SVG to stand in an HTML page: in the page's colours and letters, with a title and a description."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

from scialm_dask.report.panels import COLOURS, Panel

__all__ = ["plain", "svg_of"]

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "scialm",  # the same identifiers every time
    "text.parse_math": False,  # names of genes may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "ytick.left": False,
}


def svg_of(panel: Panel) -> str:
    """Draw a panel as an ``svg`` element that can be put into HTML as it is.

    The same panel always gives the same text.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=panel.size, layout="constrained")
        panel.draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for unwanted in ("metadata", "defs/{*}style/.."):
        for element in root.findall(f"{{*}}{unwanted}"):
            root.remove(element)
    _name(root, panel)
    _own_identifiers(root, panel.name)
    _share_styles(root)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return _coloured(ET.tostring(root, encoding="unicode"))


def plain(text: str) -> str:
    """Replace what neither HTML nor SVG may hold: control characters, and halves of characters."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def _name(root: ET.Element, panel: Panel) -> None:
    """Make it one picture with a name and a description, as wide as there is room."""
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib.update({"role": "img", "aria-labelledby": "title words"})
    for at, (tag, text) in enumerate((("title", panel.title), ("desc", panel.words))):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": "title" if tag == "title" else "words"})
        element.text = plain(text)
        root.insert(at, element)


def _own_identifiers(root: ET.Element, prefix: str) -> None:
    """Set the panel's name before all identifiers, as they must be unique in the page."""
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{prefix}-{value}")
            elif key == "aria-labelledby":
                element.set(key, " ".join(f"{prefix}-{name}" for name in value.split()))
            elif key == f"{{{_XLINK}}}href":
                element.set(key, value.replace("#", f"#{prefix}-", 1))
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))


def _share_styles(root: ET.Element) -> None:
    """Where all marks of a group look the same, say so once: a scatter of cells is a third of the size."""
    for group in root.iter(f"{{{_SVG}}}g"):
        marks = group.findall("{*}use")
        styles = {mark.get("style") for mark in marks}
        if len(marks) > 1 and len(styles) == 1 and "style" not in group.attrib:
            group.set("style", styles.pop() or "")
            for mark in marks:
                mark.attrib.pop("style", None)


def _coloured(text: str) -> str:
    """Put the page's colours in place of the stand-ins."""
    names = {value: name for name, value in COLOURS.items()}
    return re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", text)
