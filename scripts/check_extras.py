"""All extras resolve with the pins in constraints.txt, and none of them asks for another torch.

``python scripts/check_extras.py`` resolves all extras together, which takes one run of pip. As all
that they bring is pinned, each then resolves alone as well; ``--each`` tries that, one by one.
Nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNPINNED = ("ditdial", "setuptools", "nvidia-", "cuda-", "triton")
"""What constraints.txt leaves to the machine, names or their beginnings."""


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Versions by name from the text of a constraints file."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return {normal(name): version for name, version in (x.split("==") for x in lines if x)}


def requirement(project: Path, extras: list[str]) -> str:
    """The package with some extras, as pip takes it; pip refuses empty brackets after a path."""
    return f"{project}[{','.join(extras)}]" if extras else str(project)


def resolve(project: Path, extras: list[str]) -> dict[str, str]:
    """Versions that pip would install into an empty environment for the package and its extras.

    Raises:
        RuntimeError: pip finds no such set; the message is pip's.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--quiet", "--disable-pip-version-check", "--report", "-"]
    command += ["-c", str(project / "constraints.txt"), requirement(project, extras)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    found = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    return {normal(entry["name"]): entry["version"] for entry in found}


def complaints(resolved: dict[str, str], pinned: dict[str, str]) -> list[str]:
    """A sentence for each package that is not what constraints.txt says."""
    told = []
    for name, version in sorted(resolved.items()):
        if name in pinned:
            # A build of torch adds a local tag to the version, as in 2.13.0+cpu.
            if version.split("+")[0] != pinned[name]:
                told.append(f"{name} = {version}; legal: {pinned[name]}")
        elif not name.startswith(UNPINNED):
            told.append(f"{name} = {version}; legal: a version pinned in constraints.txt")
    return told


def main() -> int:
    """Resolve; 1 where pip fails or something comes without a pin."""
    parser = argparse.ArgumentParser(description="Resolve the extras with the pinned versions.")
    parser.add_argument("--project", type=Path, default=ROOT, help="folder of pyproject.toml")
    parser.add_argument("--each", action="store_true", help="one after another, not together")
    options = parser.parse_args()
    project = options.project.resolve()
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    extras = list(table["optional-dependencies"])
    pinned = pins((project / "constraints.txt").read_text())
    failed = False
    for chosen in [[], *([extra] for extra in extras)] if options.each else [extras]:
        title = ", ".join(chosen) or "no extra"
        try:
            resolved = resolve(project, chosen)
            told = complaints(resolved, pinned)
            print(f"{title}: {len(resolved)} packages, torch {resolved['torch']}")
        except RuntimeError as error:
            told = [str(error)]
        failed |= bool(told)
        for sentence in told:
            print(f"{title}: {sentence}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
