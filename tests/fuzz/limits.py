"""What an odd input may take: seconds, memory, and files in its own folder only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 10
MEMORY = 200 * 2**20
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_watched: list[Path] = []
_strays: list[str] = []


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what is opened for writing, made, renamed or removed outside the watched folder."""
    if not _watched:
        return
    if event == "open":
        path, _, flags = arguments
        places = [path] if isinstance(flags, int) and flags & WRITING else []
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        places = arguments[:1]
    elif event in ("os.rename", "os.symlink", "os.link"):
        places = arguments[:2]
    else:
        return
    for place in places:
        if isinstance(place, int) or place is None:
            continue
        path = Path(os.path.realpath(os.path.join(os.getcwd(), os.fsdecode(place))))
        known = path.is_relative_to(_watched[-1]) or path == Path(os.devnull)
        if not known and "__pycache__" not in path.parts:
            _strays.append(f"{event} {path}")


sys.addaudithook(_on_event)


def memory(kind: str) -> int:
    """Bytes that this process has (``VmRSS``), or has had at most (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{kind} is not known of this process")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _too_long(*_: object) -> None:
    raise AssertionError(f"it took more than {SECONDS} s")


@contextlib.contextmanager
def within_limits() -> Iterator[Path]:
    """An empty present folder; what is done in it is bounded and writes nowhere else."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.chdir(folder)
        _forget_peak()
        before = memory("VmRSS")
        _strays.clear()
        old = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        _watched.append(folder)
        try:
            yield folder
        finally:
            _watched.pop()
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)
            os.chdir(here)
        grown = memory("VmHWM") - before
        assert grown < MEMORY, f"it took {grown >> 20} MiB"
        assert not _strays, _strays
