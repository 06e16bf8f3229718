"""Long tests leave a record, and a record counts as long as what it covers is unchanged.

Tests that take too long for every change have targets of their own. ``records.py run NAME`` runs
one and writes ``benchmarks/records/NAME.json``: the command, the commit, the machine, the outcome
and the state of every path that the test covers. ``records.py check`` fails where a record is
missing, tells of a failure, or covers a path that has changed since.

A path's state is the id of its git object, so that a shallow clone can be checked, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = "benchmarks/records"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A long test.

    Attributes:
        name: of the make target and of the record.
        command: what is run at the root of the repository; ``python`` is the running interpreter.
        paths: files and folders whose change makes the record out of date.
    """

    name: str
    command: str
    paths: tuple[str, ...]


TARGETS = (
    Target(
        name="test-slow",
        command="python -m pytest -n 2 -m slow tests/cli tests/ecosystem tests/methods "
        "tests/runtime tests/training tests/wild",
        paths=(
            "src/ditdial",
            "tests/conftest.py",
            "tests/elastic_models.py",
            "tests/backbones",
            "tests/cli",
            "tests/ecosystem",
            "tests/methods",
            "tests/runtime",
            "tests/training",
            "tests/wild",
            "constraints.txt",
        ),
    ),
    Target(
        name="test-fuzz",
        command="python -m pytest -n 2 -m fuzz tests/fuzz tests/training tests/wild",
        paths=(
            "src/ditdial",
            "tests/conftest.py",
            "tests/elastic_models.py",
            "tests/backbones",
            "tests/fuzz",
            "tests/methods",
            "tests/training",
            "tests/wild",
            "constraints.txt",
        ),
    ),
    Target(
        name="test-wheel",
        command="make --no-print-directory wheel-check",
        paths=("src/ditdial", "pyproject.toml", "constraints.txt", "scripts/check_wheel.py"),
    ),
    Target(
        name="test-extras",
        command="python scripts/check_extras.py --each",
        paths=("pyproject.toml", "constraints.txt", "scripts/check_extras.py"),
    ),
)


class DirtyTreeError(RuntimeError):
    """The working tree is not what its commit says."""


def git(root: Path, *arguments: str) -> str:
    """What git prints.

    Raises:
        subprocess.CalledProcessError: git failed.
    """
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def states(root: Path, paths: tuple[str, ...]) -> dict[str, str]:
    """The id of each path's object in the current commit; empty for a path that is not in it."""
    # "mode type id<tab>path", a line for each; rev-parse would fail where a path is not there.
    entries = git(root, "ls-tree", "HEAD", "--", *paths).splitlines()
    found = {path: entry.split()[2] for entry, path in (line.split("\t") for line in entries)}
    return {path: found.get(path, "") for path in paths}


def record(root: Path, target: Target) -> dict[str, Any]:
    """Run a long test and write its record.

    Raises:
        DirtyTreeError: there are changes outside the records, so that no commit names what is run.
    """
    changed = git(root, "status", "--porcelain", "--", ".", f":(exclude){RECORDS}")
    if changed:
        raise DirtyTreeError(f"a record needs a clean tree; commit or remove:\n{changed}")
    command = shlex.split(target.command)
    if command[0] == "python":
        command[0] = sys.executable
    start = time.monotonic()
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL)
    result = {
        "target": target.name,
        "command": target.command,
        "outcome": "failed" if done.returncode else "passed",
        "seconds": round(time.monotonic() - start, 1),
        "commit": git(root, "rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "paths": states(root, target.paths),
    }
    file = root / RECORDS / f"{target.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def machine() -> dict[str, Any]:
    """Processor, number of cores, system and Python."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux, where platform.processor() is often empty
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "processor": processor or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def complaint(root: Path, target: Target) -> str:
    """Why a target must be run again; empty if its record still holds."""
    file = root / RECORDS / f"{target.name}.json"
    if not file.exists():
        return f"{target.name}: there is no record"
    found = json.loads(file.read_text())
    if found["outcome"] != "passed":
        return f"{target.name}: outcome = {found['outcome']!r}; legal: 'passed'"
    if found["command"] != target.command:
        return f"{target.name}: recorded for another command, {found['command']!r}"
    now = states(root, target.paths)
    changed = [path for path, state in now.items() if found["paths"].get(path) != state]
    if changed:
        return f"{target.name}: changed since {found['commit'][:9]}: {', '.join(changed)}"
    return ""


def main() -> int:
    """Check all records, or run targets; 1 where one is not in order or a test failed."""
    by_name = {target.name: target for target in TARGETS}
    parser = argparse.ArgumentParser(description="Records of tests that take long.")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("check", help="is every record there, and does it still hold?")
    run = commands.add_parser("run", help="run long tests and write their records")
    run.add_argument("names", nargs="*", help=f"of {', '.join(by_name)}; by default, what is due")
    options = parser.parse_args()
    told = {name: complaint(ROOT, target) for name, target in by_name.items()}
    if options.what == "check":
        for name, sentence in told.items():
            print(f"{sentence}; run: make {name}" if sentence else f"{name}: holds")
        return int(any(told.values()))
    if unknown := set(options.names) - by_name.keys():
        parser.error(f"target = {', '.join(sorted(unknown))}; legal: {', '.join(by_name)}")
    failed = False
    for name in options.names or [name for name, sentence in told.items() if sentence]:
        try:
            result = record(ROOT, by_name[name])
        except DirtyTreeError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{name}: {result['outcome']} in {result['seconds']} s")
        failed |= result["outcome"] != "passed"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
