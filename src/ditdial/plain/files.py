"""Files and folders that are whole or as they were before, whatever ends the writing of them.

Everything is first written beside its place, under a hidden name that nobody can guess and that is
made rather than opened, then flushed to the disk and renamed. A link in the place is replaced; what
it points to is left alone. Reading has a limit, so that a wrong name (a device, somebody's data
set) does not fill the memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

LARGEST = 2**24
"""Bytes of a file of text: recipes, schedules, calibrations and reports have a few thousand."""


def read(path: str | Path, what: str) -> str:
    """The text of a file, which is UTF-8.

    Args:
        what: the file holds, for errors.

    Raises:
        FileNotFoundError: no such file.
        OSError: a file that cannot be read, or a name that no file can have.
        ValueError: no text, or more than `LARGEST` bytes of it; the message names the file.
    """
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"{what} of more than {LARGEST} bytes")
        return content.decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist") from error
    except ValueError as error:  # bytes that are not UTF-8, or a zero in a name, are one too
        raise ValueError(f"{str(path)!r}: {error}") from error


def write(path: str | Path, content: bytes | str) -> Path:
    """Write a file whole or not at all; text as UTF-8.

    Returns:
        The path, with the user's home put in place of ``~``.

    Raises:
        OSError: as from `writing`.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path) as partial:
        partial.write_bytes(data)
    return Path(path).expanduser()


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """The name of an empty file that takes the place of ``path`` once its block has ended well.

    Folders above it are made. Anything that is raised within the block leaves a file that is there
    already as it is, and nothing else behind.

    Raises:
        OSError: a folder is in the place, or the file cannot be made or written; the error names
            ``path``.
    """
    path = Path(path).expanduser()
    partial = _beside(path)
    with _named(path, partial):
        _check_no_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        made = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(made).st_mode
        os.close(made)
        try:
            yield partial
            os.chmod(partial, mode)  # safetensors makes private files of its own
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def filling(folder: str | Path, names: Collection[str]) -> Iterator[Path]:
    """The name of an empty folder whose files go into ``folder`` once its block has ended well.

    Those of a folder that is there already are replaced, all together, and what else it holds
    stays. One that is not there is made, by one rename.

    Args:
        names: that the files may have; a file of these names that is not written again goes.

    Raises:
        OSError: as from `writing_folder`, or a folder is in the place of one of the files.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        with writing_folder(folder) as partial:
            yield partial
        return
    partial = _beside(folder / "file")
    with _named(folder, partial):
        for name in names:
            _check_no_folder(folder / name)
        partial.mkdir()
        try:
            yield partial
            _flush_all(partial)
            for name in names:
                if not (partial / name).exists():
                    (folder / name).unlink(missing_ok=True)
            for file in partial.iterdir():
                os.replace(file, folder / file.name)
            _flush(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """The name of an empty folder that takes the place of ``path`` once its block has ended well.

    Folders above it are made. Anything that is raised within the block leaves a folder that is
    there already as it is, and nothing else behind. A folder that is replaced is removed with all
    it holds, but for what its links point to.

    Raises:
        OSError: a file is in the place, or the folder cannot be made or written; the error names
            ``path``.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))  # the place of "." has a name too
    partial, old = _beside(path), _beside(path)
    with _named(path, partial):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            _flush_all(partial)
            _exchange(partial, path, old)
            _flush(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Rename a folder into its place; one that is there goes only once that has worked."""
    if not path.exists():
        os.replace(new, path)
        return
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _beside(path: Path) -> Path:
    # Not made of the file's own name, which may be as long as a name can be.
    return path.parent / f".partial-{secrets.token_hex(16)}"


@contextlib.contextmanager
def _named(path: Path, partial: Path) -> Iterator[None]:
    """Errors of the system about the hidden file, or about none, name the file of the user."""
    try:
        yield
    except OSError as error:
        told = error.filename
        if error.errno is None or not (told is None or str(told).startswith(str(partial))):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _check_no_folder(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _flush_all(folder: Path) -> None:
    for at, _, names in os.walk(folder, topdown=False):
        for file in (Path(at, name) for name in names):
            if file.is_file() and not file.is_symlink():
                _flush(file)
        _flush(Path(at))


def _flush(path: Path) -> None:
    """Have the system put a file, or the names in a folder, onto the disk."""
    if os.name == "nt":  # opens no folders, and flushes no file that is only read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
