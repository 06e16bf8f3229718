"""Thousands of odd inputs: each works, or is refused by an error that names the file or field."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz import mutations
from tests.fuzz.conftest import METHODS
from tests.fuzz.commands import GOOD, OPTIONS, assert_ended_well, lay_out
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
"""A short run tries one input of so many; a long one 10,000 of files and commands together."""

LINES = st.lists(mutations.arguments(GOOD, OPTIONS), min_size=1, max_size=1)


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
    try_all(
        reader.contents, reader.inputs, lambda content: assert_works_or_is_refused(reader, content)
    )


def assert_a_command_ends_well(lines: list[list[str]]) -> None:
    with within_limits() as folder:
        lay_out(folder)
        for words in lines:
            assert_ended_well(words, command(*words))


def test_an_odd_command_ends_well():
    try_all(LINES, COMMANDS // SHORT, assert_a_command_ends_well)


@pytest.mark.fuzz
def test_many_odd_commands_end_well():
    try_all(LINES, COMMANDS, assert_a_command_ends_well)
