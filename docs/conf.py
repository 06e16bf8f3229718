"""Sphinx configuration. Nothing here needs the network."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

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

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ditdial"


def rooms() -> list[str]:
    """The rooms from the ground up, as the contract on imports has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = (each["layers"] for each in contracts if each["type"] == "layers")
    return [room.strip() for layer in reversed(layers) for room in layer.split("|")]


def modules(room: str) -> Iterator[tuple[str, str]]:
    """Path and dotted name of each module of a room, the room's own one first.

    ``__main__`` is left out: to import it is to run the command.
    """
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else []
    for file in [*files, *sorted((PACKAGE / room).rglob("*.py"))]:
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not name.endswith(".__main__"):
            yield str(file.relative_to(PACKAGE)), name


def every_module(_: Any, page: str, source: list[str]) -> None:
    """Put a section for each module in the place of the mark in the page of the API."""
    if page != "api":
        return
    found = {path: name for room in rooms() for path, name in modules(room)}
    missing = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")} - found.keys()
    assert missing == {"__init__.py", "__main__.py"}, f"in no room: {missing}"
    told, room = [], ""
    for path, name in found.items():
        if path.split("/")[0] != room:
            room = path.split("/")[0]
            told.append(f"## `{room}`\n")
        # Names that a package only passes on are documented where they come from.
        directive = f".. automodule:: {name}\n   :ignore-module-all:"
        heading = "" if path == room or path.endswith("__init__.py") else f"### `{path}`\n\n"
        told.append(f"{heading}```{{eval-rst}}\n{directive}\n```\n")
    assert "<!-- modules -->" in source[0]
    source[0] = source[0].replace("<!-- modules -->", "\n".join(told))


def setup(app: Any) -> None:
    """What Sphinx calls at the start."""
    app.connect("source-read", every_module)
