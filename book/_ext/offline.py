"""Serve MathJax and the text font from the book itself, so that it reads with no network.

The folder is registered here and not through the configuration because Jupyter Book puts a
script tag on every page for each JavaScript file below a static folder it knows of.
"""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

VENDOR = Path(__file__).resolve().parents[1] / "_vendor"


def serve_vendored_files(app: Sphinx, config: Config) -> None:
    config.html_static_path.append(str(VENDOR))
    config.mathjax_path = "mathjax/tex-chtml-full.js"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", serve_vendored_files)
    app.add_css_file("lmlosses.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
