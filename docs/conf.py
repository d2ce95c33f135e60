"""How Sphinx builds the site from the pages that docs/pages.py writes.

Nothing is fetched when a page is read."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "nbs"))
import book  # noqa: E402

meta = book.metadata()

project = meta["lib_name"]
author = meta["author"]
release = meta["version"]
copyright = author

extensions = ["myst_nb"]
nb_execution_mode = "off"  # the notebooks are committed as they ran
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "colon_fence"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = "soflow_edu"
html_static_path = ["_static", "node_modules/mathjax/es5/tex-svg.js"]
html_extra_path = ["_build/pages/_extra"]  # the page of chapter play
exclude_patterns = ["_extra"]
html_css_files = ["site.css"]
mathjax_path = "tex-svg.js"  # from npm; its fonts are part of it
html_theme_options = {
    "repository_url": meta["git_url"],
    "use_repository_button": bool(meta["git_url"]),
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
html_sidebars = {
    "**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]
}
html_show_sphinx = False
# A summary would be fetched, which a browser forbids where there is no server.
html_show_search_summary = False
