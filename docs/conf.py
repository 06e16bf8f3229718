"""Sphinx configuration. Nothing here needs the network."""

from importlib.metadata import version as installed_version

project = "ditdial"
author = "The ditdial authors"
project_copyright = "The ditdial authors"
version = release = installed_version("ditdial")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ditdial {release}"

# Docstrings put code into single backticks, as Markdown does; make a link of it where one exists.
default_role = "py:obj"

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# Documented attributes are also members of their dataclass; as fields they are not listed twice.
napoleon_use_ivar = True

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
