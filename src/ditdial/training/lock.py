"""One run per output folder: a lock of the operating system, which ends with the process.

A killed run leaves its file behind and no lock, so that nothing is ever to be cleaned up by hand.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from ditdial.plain.checks import warn

NAME = "run.lock"
"""Of the file in the output folder; it says who holds the lock, or did last."""

UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems, and of Windows here, that know no locks."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is there.

    Raises:
        BlockingIOError: another run holds it; the error says which.
        OSError: its file is not one of ours, or cannot be made.
    """
    descriptor = _open(folder / NAME, os.O_RDWR | os.O_CREAT)
    try:
        _take(descriptor, folder, shared=False)
        now = datetime.datetime.now(datetime.UTC)
        holder = (
            f"process {os.getpid()} on {socket.gethostname()}, since {now:%Y-%m-%d %H:%M:%S} UTC"
        )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{holder}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check_unlocked(folder: Path) -> None:
    """Refuse a folder whose lock is held; nothing is written.

    Raises:
        BlockingIOError: another run holds it; the error says which.
    """
    if not os.path.lexists(folder / NAME):
        return
    descriptor = _open(folder / NAME, os.O_RDONLY)
    try:
        # Shared, so that the processes of one run can look at the same time.
        _take(descriptor, folder, shared=True)
    finally:
        os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    """A descriptor of a regular file of one name only: what is written goes nowhere else."""
    extra = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | extra, 0o666)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise FileExistsError(errno.EEXIST, "is no lock file of a run", str(path))
    return descriptor


def _take(descriptor: int, folder: Path, *, shared: bool) -> None:
    try:
        _flock(descriptor, shared=shared)
    except BlockingIOError as error:
        told = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise BlockingIOError(
            f"{str(folder)!r} is in the hands of another run ({told or 'of an unknown process'}); "
            "wait until it has ended, end it, or name another output"
        ) from error
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        warn(f"{str(folder)!r} cannot be locked ({error.strerror}); start no second run into it")


def _flock(descriptor: int, *, shared: bool) -> None:
    if os.name == "nt":
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    import fcntl  # not on Windows

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
