"""Runs that must never get out of hand: in a process of their own, with limits, watched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        kind: ``done``, ``error`` or ``killed``.
        value: that it returned, as plain data.
        error: name of the class of the error that it raised.
        text: of that error, or why the run was killed.
    """

    kind: str
    value: Any = None
    error: str = ""
    text: str = ""


def bounded(
    work: Callable[[], Any],
    *,
    seconds: float = 20.0,
    memory: int | None = None,
    file_size: int | None = None,
    folder: Path | None = None,
    folder_size: int = 2**22,
) -> Outcome:
    """Do something in a copy of this process.

    Args:
        work: returns plain data.
        memory: bytes that it may take beyond what this process has.
        file_size: bytes that a file may have, as on a disk that is full.
        folder: that is watched; the copy is killed once there are more than ``folder_size`` bytes
            or 2000 files in it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with_own_lock()
        os.close(reading)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        try:
            _limit(memory, file_size)
            told = {"kind": "done", "value": work()}
        except BaseException as error:
            told = {"kind": "error", "error": type(error).__name__, "text": str(error)[:2000]}
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    reason = _watch(child, seconds, folder, folder_size)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    if reason or not told:
        return Outcome("killed", text=reason or "it died without a word")
    return Outcome(**json.loads(told))


def with_own_lock() -> None:
    """Give a forked process a lock of its own for progress bars.

    tqdm's is shared by all copies of a process, and one that is killed while it draws a bar would
    keep it for ever.
    """
    tqdm.set_lock(threading.RLock())


def _limit(memory: int | None, file_size: int | None) -> None:
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))


def _watch(child: int, seconds: float, folder: Path | None, folder_size: int) -> str:
    """Wait for the end of a process; why it was killed, if it had to be."""
    started = time.monotonic()
    while not os.waitpid(child, os.WNOHANG)[0]:
        reason = ""
        if time.monotonic() - started > seconds:
            reason = f"it ran for more than {seconds} s"
        elif folder is not None and _is_larger(folder, folder_size):
            reason = f"it wrote more than {folder_size} bytes"
        if reason:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return reason
        time.sleep(0.02)
    return ""


def _is_larger(folder: Path, size: int) -> bool:
    found = files = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found += os.lstat(os.path.join(at, name)).st_size
            files += 1
        if found > size or files > 2000:
            return True
    return False


def command(*arguments: str) -> dict[str, Any]:
    """Run a command of the command line here: its exit code and what it wrote to stderr."""
    from ditdial.cli.app import main

    argv, sys.argv = sys.argv, ["ditdial", *arguments]
    errors, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    finally:
        sys.argv = argv
    return {"code": code, "err": errors.getvalue()}
