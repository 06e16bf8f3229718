"""Checks of what is shipped: extras come with pins, a wheel has a size."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from scripts.check_extras import complaints, normal, pins, requirement
from scripts.check_wheel import LIMIT, only_wheel

ROOT = Path(__file__).resolve().parents[2]
PINS = """
# A comment
torch==2.13.0
Some_Package.of-it==1.2  # why this one
"""


def test_pins_are_read_by_normal_name():
    assert pins(PINS) == {"torch": "2.13.0", "some-package-of-it": "1.2"}


@pytest.mark.parametrize(
    ("extras", "asked"), [([], "/x"), (["eval"], "/x[eval]"), (["eval", "docs"], "/x[eval,docs]")]
)
def test_requirement_of_extras(extras, asked):
    assert requirement(Path("/x"), extras) == asked


@pytest.mark.parametrize(
    ("resolved", "told"),
    [
        ({"torch": "2.13.0", "some-package-of-it": "1.2"}, []),
        ({"torch": "2.13.0+cpu", "nvidia-cublas": "13.1", "ditdial": "0.1.0"}, []),
        ({"torch": "2.14.1"}, ["torch = 2.14.1; legal: 2.13.0"]),
        ({"other": "3"}, ["other = 3; legal: a version pinned in constraints.txt"]),
    ],
)
def test_unpinned_and_other_versions_are_told(resolved, told):
    assert complaints(resolved, pins(PINS)) == told


def test_all_that_is_asked_for_directly_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins((ROOT / "constraints.txt").read_text())
    for asked in [project["dependencies"], *project["optional-dependencies"].values()]:
        assert {normal(requirement.split(">=")[0]) for requirement in asked} <= pinned.keys()


@pytest.mark.parametrize(("size", "code"), [(LIMIT, 0), (LIMIT + 1, 1)])
def test_size_of_a_wheel(tmp_path, size, code):
    with (tmp_path / "ditdial-1-py3-none-any.whl").open("wb") as file:
        file.truncate(size)
    command = [sys.executable, str(ROOT / "scripts" / "check_wheel.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert (f"size = {size} bytes; legal: at most {LIMIT}" in done.stderr) == bool(code)


def test_several_wheels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="= 0; legal: 1"):
        only_wheel(tmp_path)
    for version in "12":
        (tmp_path / f"ditdial-{version}-py3-none-any.whl").touch()
    with pytest.raises(ValueError, match="= 2; legal: 1"):
        only_wheel(tmp_path)
