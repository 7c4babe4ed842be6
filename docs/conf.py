"""How Sphinx builds these pages: `make docs`, into build/docs."""

from importlib.metadata import version as version_of

project = "Pagewire"
release = version_of("pagewire")
extensions = ["myst_parser"]
exclude_patterns = ["generate"]
html_theme = "furo"
html_title = f"Pagewire {release}"
html_show_sourcelink = False
html_copy_source = False
myst_heading_anchors = 3  # a link to `page.md#heading` is checked like any other
