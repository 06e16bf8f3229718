"""Thousands of odd inputs: each works, or is refused by an error that names the file or field."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz import mutations
from tests.fuzz.commands import GOOD, OPTIONS, assert_ended_well, lay_out
from tests.fuzz.conftest import METHODS
from tests.fuzz.drawn import part
from tests.fuzz.limits import within_limits
from tests.fuzz.readers import Reader
from tests.wild.bounded import command

READERS = (
    *(f"{kind} of {name}" for name in METHODS for kind in ("config", "weights")),
    "calibration",
    "schedule",
    "recipe",
    "report",
    "results",
    "model",
    "model_index.json",
    "transformer/config.json",
    "scheduler/scheduler_config.json",
)
COMMANDS = 400
SHORT = 40
"""A short run tries one input of so many; with DITDIAL_FUZZ=all, 10,000 files and commands."""

LINES = mutations.arguments(GOOD, OPTIONS)


def try_all(inputs: st.SearchStrategy[Any], count: int, check: Any) -> None:
    """Check the same inputs each time; the first one that fails is made as small as possible."""
    checks = list(HealthCheck)
    bounds = settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )
    bounds(given(inputs)(check))()


def assert_works_or_is_refused(reader: Reader, content: bytes) -> None:
    with within_limits() as folder:
        try:
            outcome = reader.use(folder, content)
        except (ValueError, OSError) as error:
            outcome = {"code": 2, "err": str(error)}
    if outcome is not None:
        assert outcome["code"] in (0, 2), outcome
        named = any(word in outcome["err"] for word in reader.words)
        assert outcome["code"] == 0 or named, outcome


@pytest.mark.parametrize("name", READERS)
def test_an_odd_file_is_used_or_refused_by_name(read_by, name):
    assert set(read_by) == set(READERS)
    reader = read_by[name]
    count = max(5, reader.inputs // SHORT)
    try_all(reader.contents, count, lambda content: assert_works_or_is_refused(reader, content))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
def test_many_odd_files_are_used_or_refused_by_name(read_by, name):
    reader = read_by[name]
    count = part(reader.inputs, 3)
    try_all(reader.contents, count, lambda content: assert_works_or_is_refused(reader, content))


def assert_a_command_ends_well(words: list[str]) -> None:
    with within_limits() as folder:
        lay_out(folder)
        assert_ended_well(words, command(*words))


def test_an_odd_command_ends_well():
    try_all(LINES, COMMANDS // SHORT, assert_a_command_ends_well)


@pytest.mark.fuzz
def test_many_odd_commands_end_well():
    try_all(LINES, part(COMMANDS, 2), assert_a_command_ends_well)


PROCESSES = 200
SLICES = 8
"""Each starts Python anew, which takes three seconds."""


def run_alone(words: list[str]) -> tuple[dict[str, Any], float]:
    """A command line in a process and a folder of its own: how it ended, and MiB that it took."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "here"
        folder.mkdir()
        lay_out(folder)
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "ditdial", *words],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            told = errors.read()
        assert os.listdir(parent) == ["here"], words
        assert (folder / "taken").read_text() == "mine", words
    return {"code": process.returncode, "err": told}, used.ru_maxrss / 1024


@pytest.fixture(scope="session")
def most_memory() -> float:
    """MiB that an odd command may take: what good ones take, and 200 more."""
    return 200 + max(run_alone(["sample", "out", "--labels", "1", "--steps", "2"])[1] for _ in "12")


@pytest.mark.fuzz
@pytest.mark.parametrize("place", range(SLICES))
def test_odd_commands_end_well_alone(place, most_memory):
    """In processes of their own: nothing is written beside the folder, and memory is bounded."""
    seen: list[list[str]] = []

    def check(words: list[str]) -> None:
        seen.append(words)
        if len(seen) % SLICES != place:
            return
        outcome, memory = run_alone(words)
        assert_ended_well(words, outcome)
        assert "Traceback" not in outcome["err"], (words, outcome)
        assert memory < most_memory, words

    try_all(LINES, part(PROCESSES, 5), check)
