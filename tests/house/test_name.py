"""The old name of the library is told where it is explained or recorded, and nowhere else."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD = re.compile("elastic" + ".dit", re.IGNORECASE)
HISTORY = ("CHANGELOG.md", "docs/lab-notes.md")
RECORDED = "benchmarks/results/"
PARTS = re.compile(r"\n\s*\n|\n  - ")
"""Between paragraphs, and between the entries of CITATION.cff."""


def mentions(text: str) -> list[str]:
    """Paragraphs with the old name that do not name the method that it now stands for."""
    return [part for part in PARTS.split(text) if OLD.search(part) and "E-DiT" not in part]


def test_the_old_name_is_history():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in listed.splitlines():
        file = ROOT / name
        recorded = name.startswith(RECORDED) and name.endswith(".json")
        if name in HISTORY or recorded or not file.exists():
            continue
        if OLD.search(name):
            found.append(name)
        content = file.read_bytes()
        if b"\0" not in content[:1024]:  # weights and pictures have one there
            found += [f"{name}: {part.strip()[:60]}" for part in mentions(content.decode())]
    assert not found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (f"pip install {'elastic'}-dit", 1),
        (f"import {'elastic'}_dit as ed", 1),
        (f"E-DiT is another method.\n\n{'Elastic'} DiT is what we were called.", 1),
        (f"E-DiT is a method whose code\nis named {'Elastic'}-DiT.", 0),
        ("  - title: E-DiT\n  - title: elastic" + "-dit", 1),
        ("an elastic model of a DiT, `elastify(dit)`", 0),
    ],
)
def test_mentions_are_found(text, count):
    assert len(mentions(text)) == count
