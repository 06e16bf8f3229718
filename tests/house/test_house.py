"""The house's numbers are counted as said, and each of its limits bites."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "house.py"
MODULE = '''"""A module of two lines
of documentation."""

from collections import UserDict


class Base:
    """A base."""

    annotated: int
    given = 1  # a field is no offer

    def method(self):
        """Do nothing."""

    def _hidden(self): ...


class Layer(Base, UserDict):
    """Inherits from the base and from another package."""

    own: str = """not a
    docstring"""

    @property
    def size(self) -> int: ...


# another comment
'''


@pytest.fixture
def package(tmp_path):
    """A package that keeps all limits."""
    package = tmp_path / "planted"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "room" / "__init__.py").write_text('"""A room."""\n')
    (package / "room" / "module.py").write_text(MODULE)
    return package


def house(package: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--package", str(package), *arguments],
        capture_output=True,
        text=True,
    )


def test_numbers(package):
    done = house(package, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["broken"] == []
    assert found["root_files"] == ["__init__.py"]
    assert found["lines"] == 2 + len(MODULE.splitlines())
    assert found["code_lines"] == 11
    assert found["comments_per_100_lines"] == pytest.approx(100 * 2 / found["lines"])
    # Three modules, two classes, a method and a property: 1 + 1 + 2, 1 + 1, 1 and 0 lines.
    assert found["public_names"] == 7
    assert found["docstring_lines_per_public_name"] == pytest.approx(7 / 7)
    assert found["functions"] == [
        ["planted.room.module.Base.method", 2],
        ["planted.room.module.Base._hidden", 1],
        ["planted.room.module.Layer.size", 1],
    ]
    assert found["classes"] == [
        ["planted.room.module.Layer", 2, 20],  # nothing of what UserDict offers
        ["planted.room.module.Base", 1, 20],
    ]


def function(lines: int) -> str:
    return "def long():\n" + "    call()\n" * (lines - 1)


def methods(first: int, last: int) -> str:
    return "".join(f"    def name_{number}(self): ...\n" for number in range(first, last))


INHERITED = f"class A:\n{methods(0, 15)}\nclass B(A):\n{methods(10, 21)}"
ALLOWED = f"class A:\n{methods(0, 15)}\nclass B(A):\n{methods(10, 20)}"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("x = 1\n" * 401, "lines of room/planted.py = 401; legal: at most 400"),
        ("x = 1\n" * 400, None),
        (
            "@property\n" + function(61),
            "lines of planted.room.planted.long() = 61; legal: at most 60",
        ),
        (INHERITED, "public names of planted.room.planted.B = 21; legal: at most 20"),
        (ALLOWED, None),
    ],
    ids=["long file", "file at the limit", "long function", "many names", "names at the limit"],
)
def test_limits_bite(package, source, sentence):
    (package / "room" / "planted.py").write_text(source)
    done = house(package)
    assert done.returncode == (sentence is not None)
    assert sentence is None or sentence in done.stderr.splitlines()


def test_limit_of_the_95th_percentile_bites(package):
    functions = [function(31) if number < 3 else function(2) for number in range(40)]
    (package / "room" / "planted.py").write_text("\n".join(functions))
    done = house(package)
    assert done.returncode == 1
    assert done.stderr == "95th percentile of lines = 31; legal: at most 30\n"


def test_limit_of_files_at_the_root_bites(package):
    for number in range(7):
        (package / f"file_{number}.py").write_text("")
    assert house(package).returncode == 0
    (package / "file_7.py").write_text("")
    done = house(package)
    assert done.returncode == 1
    assert "root of the package = 9; legal: at most 8" in done.stderr
