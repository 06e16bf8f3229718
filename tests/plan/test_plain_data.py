"""Plain data: what is planned, measured and reported knows no tensors and is kept as JSON."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ditdial.plan
from ditdial import Calibration, Mode, Schedule
from ditdial.plain import json_files

PLAIN = (
    *("mode", "choice", "schedule", "plan", "facts", "budget", "frontier"),
    *("report", "seconds", "calibration", "reference_schedule", "damage"),
)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_knows_no_tensors(name):
    """A plan can be read and printed where no torch is at work."""
    source = (Path(ditdial.plan.__path__[0]) / f"{name}.py").read_text()
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    own = {name for name in found if name.startswith("ditdial.plan.")}
    assert {name.rpartition(".")[2] for name in own} <= set(PLAIN)
    assert not {"torch", "diffusers"} & {name.partition(".")[0] for name in found}


def deep(levels):
    return "[" * levels + "]" * levels


READERS = {"schedule": Schedule, "calibration": Calibration}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_json_is_said_to_be_none(name, tmp_path):
    read, file = READERS[name], tmp_path / "x.json"
    for text, words in (
        (deep(100_000), f"{name} is nested too deeply to be read"),
        ('{"format": ' + deep(100_000) + "}", f"{name} is nested too deeply to be read"),
        ('{"segments": [' + deep(990) + "]}", f"{name}.* (is nested too deeply|format = None)"),
        ('{"format": ' + deep(990) + "}", f"{name}.* (is nested too deeply|an object with a list)"),
        ("{", f"{name} is not valid JSON: Expecting"),
        ("9" * 5000, f"{name} is not valid JSON"),  # more digits than Python takes for a number
    ):
        with pytest.raises(ValueError, match=words):
            read.from_json(text)
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"x\.json': {words}"):
            read.load(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.json': 'utf-8' codec can't decode"):
        read.load(file)
    with pytest.raises(FileNotFoundError, match=rf"{name} '.*none\.json' does not exist"):
        read.load(tmp_path / "none.json")


def test_a_schedule_is_a_file(tmp_path):
    schedule = Schedule.weak_first(0.3, 4, guidance="weak")
    path = schedule.save(tmp_path / "deep" / "schedule.json")
    assert path == tmp_path / "deep" / "schedule.json"
    assert Schedule.load(path) == schedule
    assert path.read_text() == schedule.to_json() + "\n"
    assert [file.name for file in path.parent.iterdir()] == ["schedule.json"]
    path.write_text('{"segments": [{"start": 1, "stop": 0, "mode": "tiny"}]}')
    with pytest.raises(ValueError, match=r"schedule\.json': unknown mode 'tiny'; legal: 'full'"):
        Schedule.load(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = json_files.write(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_files.write(path, {"a": Mode(2)})
    assert json_files.read(path, "thing", dict) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_what_goes_into_json_comes_back_from_it():
    facts = {1: (2, 3), "name": "Käse"}
    assert json_files.plain(facts) == json_files.loads(json_files.dumps(facts), "facts", dict)
    assert json_files.plain(facts) == {"1": [2, 3], "name": "Käse"}
