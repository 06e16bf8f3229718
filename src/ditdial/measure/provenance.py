"""Where a number comes from: every results file states its command, commit and machine."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from ditdial.host.device import device_name
from ditdial.plain import json_files


def provenance(command: str | None = None) -> dict[str, Any]:
    """Command, commit, machine and versions of the running process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "command": command or shlex.join([Path(sys.argv[0]).name, *map(_told, sys.argv[1:])]),
        "commit": _commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write_results(path: str | Path, results: dict[str, Any], command: str | None = None) -> None:
    """Write one JSON of results with its provenance, complete or not at all."""
    json_files.write(path, {"provenance": provenance(command), **results})


def _told(argument: str) -> str:
    """An argument of the command; of a place outside the working folder, its last name."""
    path = Path(argument)
    elsewhere = path.exists() and not path.resolve().is_relative_to(Path.cwd())
    return path.name if elsewhere else argument


def _commit() -> str:
    """The source tree's commit, with a mark if its code has changed since; 'unknown' without git.

    Results and documents are no code: a benchmark that adds to its own file keeps its commit.
    """
    documents = (":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)*.md")
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "-uno", "--", ":(top)", *documents)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
