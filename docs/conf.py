"""The site: pages in Markdown by MyST, those of `pages.py` from the docstrings. `make docs` builds it."""

import fastseq

project = "fastseq"
version = release = fastseq.__version__
copyright = "the fastseq contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"fastseq {version}"
highlight_language = "text"
myst_heading_anchors = 4  # links to headings as GitHub has them
default_role = "code"  # docstrings put names between single backquotes
autodoc_inherit_docstrings = False  # torch's are torch's
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def _escape(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Bars are |v| here, not reStructuredText's substitutions."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def setup(app: object) -> None:
    app.connect("autodoc-process-docstring", _escape)
