"""Plain data: what is planned, measured and reported knows no tensors and is kept as JSON."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ditdial.plan

PLAIN = (
    *("mode", "choice", "schedule", "plan", "budget", "frontier"),
    *("report", "seconds", "calibration"),
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
    assert {name.rpartition(".")[2] for name in own} <= set(PLAIN) | {"damage"}
    assert not {"torch", "diffusers"} & {name.partition(".")[0] for name in found}
