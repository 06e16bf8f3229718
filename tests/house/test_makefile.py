"""What the Makefile offers is listed, and what the CI asks of it is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    found = re.search(r"^\.PHONY:(.*)$", text, re.MULTILINE)
    assert found
    return set(found[1].split())


def test_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == targets()


def test_targets_of_the_ci_are_there():
    found = re.search(r"for target in ([a-z -]+); do", (ROOT / ".ci" / "run").read_text())
    assert found
    asked = found[1].split()
    assert {"lint", "types", "docs", "extras", "records", "test"} <= set(asked) <= targets()
