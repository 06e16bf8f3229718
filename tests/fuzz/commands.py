"""Command lines that are quick when they are good, the files that they name, and how they end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer.main
from tests.fuzz.mutations import recipe_text
from tests.fuzz.readers import RECIPE, REPORT

from ditdial import Schedule
from ditdial.cli.app import app
from ditdial.plain.checks import on_one_line

GOOD: dict[str, dict[str, str]] = {
    "sample": {"output": "out", "--labels": "1", "--steps": "2"},
    "eval": {"--output": "e.json", "--images": "4", "--steps": "1", "--sets": "1"},
    "calibrate": {"--output": "c.json", "--images": "1", "--steps": "2"},
    "cost": {"--model": "dit-xl-2-256", "--steps": "5"},
    "probe": {"target": "DiTTransformer2DModel"},
    "report": {"path": "report.json"},
    "train": {"recipe": "recipe.toml", "--output": "taken"},
    "demo": {"--images": "8"},
    "methods": {},
    "backbones": {},
}
"""Demo and train stop before their work: 8 pictures are too few, and a file is in the way."""


def options_of() -> dict[str, list[str]]:
    """All options and arguments of each command."""
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        options = [param.opts[0] if param.opts else param.name for param in command.params]
        found[name] = [*options, "--help"]
    return found


OPTIONS = options_of()


def lay_out(folder: Path) -> None:
    """Put the files there that commands are given."""
    (folder / "folder").mkdir()
    (folder / "taken").write_text("mine")
    (folder / "bad.json").write_text("{")
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "recipe.toml").write_text(recipe_text(RECIPE))
    Schedule.weak_first(0.5).save(folder / "good.json")


def assert_ended_well(words: list[str], outcome: dict[str, Any]) -> None:
    """Exit code 0; or 2 with the usage, or with one line that names what was given."""
    told = outcome["err"]
    assert outcome["code"] in (0, 2), (words, outcome)
    if outcome["code"] == 0 or "─ Error ─" in told:  # typer's own box
        return
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, (words, outcome)
    assert told.rstrip("\n").endswith(lines[0]), (words, outcome)
    fields = {word.strip("-").replace("-", "_") for word in words}
    values = {repr(word)[1:-1] for word in words} | {on_one_line(word) for word in words}
    named = set(re.findall(r"[a-z_]+", lines[0])) & fields
    assert named or any(value in lines[0] for value in values if value), (words, outcome)
