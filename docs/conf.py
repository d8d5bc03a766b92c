"""The documentation as a site: `make docs`. Pages are the Markdown files that people read in the repository too."""

import re
import shutil
from pathlib import Path

import sdtp_kernels

ROOT = Path(__file__).resolve().parent.parent
# The sidebar: what a reader wants, and the pages that say it.
NAVIGATION = {
    "Start": ("docs/quick-start", "docs/install", "examples/README", "docs/troubleshooting"),
    "Use": ("docs/own-model", "docs/serving", "docs/api"),
    "Judge": ("docs/quality", "docs/measuring", "benchmarks/README"),
    "Understand": ("docs/design", "docs/training", "docs/features", "docs/kernels", "CONTRIBUTING", "CHANGELOG"),
    "Notes": (
        "docs/notes/pruners",
        "docs/notes/predicted-quality",
        "docs/notes/kv-prediction-gate",
        "docs/notes/cpu",
        "docs/notes/claims",
    ),
}

project = "sdtp-kernels"
version = release = sdtp_kernels.__version__
html_title = f"{project} {version}"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "README"
include_patterns = [f"{page}.md" for page in ("README", *(page for pages in NAVIGATION.values() for page in pages))]
include_patterns += ["docs/*.md", "docs/notes/*.md"]  # a page that the navigation forgets is a warning, which fails
exclude_patterns = [".*", "build", "dist", "tests", "csrc", "sdtp_kernels", "python"]
highlight_language = "text"
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4

# Signatures show names and defaults; types stand with each parameter.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
nitpicky = True  # a reference that leads nowhere fails
# Types of parameters are words of the field ("Tensor [B, N]"), not references.
nitpick_ignore_regex = [("py:class", r"(?!sdtp_kernels\b).*")]


def _prepare(app, page, source):
    """The site's own: the sidebar, and links to the report, which is a page of its own."""
    source[0] = re.sub(r"(\]\([^)\s:]+\.html[^)\s]*\))", r"\1{.external}", source[0])
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 2\n:caption: {caption}\n\n{listed}\n```\n"


def _complete(app, error):
    if error is None:
        shutil.copytree(ROOT / "docs/report", Path(app.outdir) / "docs/report", dirs_exist_ok=True)
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app):
    app.connect("source-read", _prepare)
    app.connect("build-finished", _complete)
