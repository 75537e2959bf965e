"""The site, which `make docs` builds from the pages of this folder; they read as well without it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from references.docstrings import readable  # noqa: E402
from references.pages import GENERATED, SHOWN, page  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "manyhats"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # code hosts know more languages than Pygments
smartquotes = False  # would make dashes of flags


autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_use_rtype = False
add_module_names = False

html_theme = "furo"
html_title = f"manyhats {release}"
html_favicon = str(ROOT / "server/manyhats/server/http/page/icon.svg")
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _document, priority=400)  # before napoleon, which has 500
    app.connect("env-get-outdated", lambda *_: [*GENERATED, *SHOWN])


def _read(_: Sphinx, name: str, source: list[str]) -> None:
    source[0] = page(name, source[0])


def _document(_: Sphinx, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = readable(lines)
