"""The site: `sphinx-build -c notebooks/site notebooks build/site`. Its pages are the notebooks, READMEs and these."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ipython_pygments_lexers import IPython3Lexer

from scialm_dask import __version__

ROOT = Path(__file__).parents[2]
# Files outside of `notebooks/` that a page includes: their links to one another are links between these pages.
PAGES = {
    "README.md": "index",
    "deploy/README.md": "site/clusters",
    "CONTRIBUTING.md": "site/contribute",
    "SECURITY.md": "site/security",
    "tests/benchmarks/README.md": "site/benchmarks",
    "CHANGELOG.md": "site/changes",
}

project = "scialm-dask"
project_copyright = "The scialm-dask developers"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_nb"]
exclude_patterns = ["**.ipynb_checkpoints"]
nb_execution_mode = "off"  # as committed; refresh.py runs them
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # included pages begin with headings of their own

default_role = "autolink"  # a link where there is something to link to: `max_rank` in a docstring is an argument
nitpicky = True
nitpick_ignore_regex = [("py:obj", "[a-z_]+")]  # arguments and fields, which have no target of their own
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the sections of docstrings have them, in words
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
numpydoc_show_class_members = False

html_theme = "pydata_sphinx_theme"
html_title = project
html_sidebars = {"index": [], "quickstart": [], "site/api": []}  # no pages below them
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
}


def link_pages(app: Any, path: Path, _: str, content: list[str]) -> None:
    """Turn the links of an included file into links to pages and pictures of the site."""
    here = (Path(app.srcdir) / path).resolve().parent

    def linked(match: re.Match[str]) -> str:
        target = (here / match[1]).resolve()
        name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if name in PAGES:
            return f"](/{PAGES[name]}.md)"
        return f"](/{name.removeprefix('notebooks/')})" if name.startswith("notebooks/") else match[0]

    content[0] = re.sub(r"\]\(([^)#:]+)\)", linked, content[0])


def setup(app: Any) -> None:
    """Tell Sphinx."""
    app.add_lexer("python", IPython3Lexer)  # the notebooks' "!" lines
    app.connect("include-read", link_pages)
