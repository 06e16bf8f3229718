"""The contracts on imports hold, and they bite: a planted upward import or circle is found."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ditdial"
LINTER = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def tree(tmp_path):
    """A copy of the package's Python files beside the project's contracts."""
    for file in PACKAGE.rglob("*.py"):
        copy = tmp_path / file.relative_to(PACKAGE.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path) -> tuple[int, str]:
    """The exit code and the output of ``lint-imports`` on the copy, as one line."""
    done = subprocess.run(
        [sys.executable, "-c", LINTER, "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def append(tree: Path, file: str, text: str) -> None:
    with (tree / "ditdial" / file).open("a") as out:
        out.write(f"\n\n{text}\n")


def test_clean_tree_passes(tree):
    code, output = lint(tree)
    assert "2 kept, 0 broken" in output
    assert code == 0


UPWARD = {
    "at the top": "from ditdial.cli.app import main",
    "for type checking": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ditdial.cli.app import main"
    ),
    "inside a function": "def run():\n    from ditdial.cli.app import main\n    main()",
}


@pytest.mark.parametrize("text", UPWARD.values(), ids=UPWARD)
def test_upward_import_is_found(tree, text):
    told = "ditdial.ops is not allowed to import ditdial.cli"
    assert told not in lint(tree)[1]
    append(tree, "ops/flow.py", text)
    code, output = lint(tree)
    assert told in output
    assert "ditdial.ops.flow -> ditdial.cli.app" in output
    assert code == 1


def test_circle_inside_a_room_is_found(tree):
    told = "No cycles are allowed in ditdial.ops."
    assert told not in lint(tree)[1]
    append(tree, "ops/flow.py", "from ditdial.ops import gates")
    append(tree, "ops/gates.py", "def f():\n    from ditdial.ops import flow\n    return flow")
    code, output = lint(tree)
    assert told in output
    assert code == 1


def test_new_room_must_get_a_layer(tree):
    append(tree, "attic.py", '"""A file without a place in the order."""')
    code, output = lint(tree)
    assert "attic" in output
    assert code == 1


def dynamic_imports(source: str) -> list[int]:
    """Lines that import by a string which names a module of ours, or which is not a literal."""
    tree = ast.parse(source)
    names = {"import_module", "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "importlib":
            names |= {alias.asname or alias.name for alias in node.names}
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        if called not in names:
            continue
        target = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
        if not target or str(target).startswith((".", "ditdial")):
            lines.append(node.lineno)
    return lines


def test_our_modules_are_imported_by_statements_only():
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != PACKAGE / "__init__.py"  # lazy; the linter sees the same names there
        for line in dynamic_imports(file.read_text())
    ]
    assert not found, "the linter cannot see these imports: " + ", ".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import importlib\nimportlib.import_module('ditdial.plan.mode')", [2]),
        ("from importlib import import_module as load\nload('.mode', 'ditdial.plan')", [2]),
        ("__import__('ditdial')", [1]),
        ("def load(name):\n    return __import__('ditdial.' + name)", [2]),
        ("from importlib import import_module\nimport_module('torchao')", []),
        ("import ditdial", []),
    ],
)
def test_dynamic_imports_are_seen(source, found):
    assert dynamic_imports(source) == found
