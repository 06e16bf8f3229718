"""Plain data as JSON files: read with errors that say what is wrong, written whole or not at all.

All files of the package are UTF-8, indented by two, and end with a line break.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ditdial.plain import files

Made = TypeVar("Made")

DEEPEST = 100
"""Levels of lists and objects. What is deeper could be parsed, but not shown, copied or compared:
Python's own limit is 1000 calls within each other."""


def dumps(data: object) -> str:
    """Plain data as JSON text."""
    return json.dumps(data, indent=2)


def loads(text: str, what: str, make: Callable[[Any], Made]) -> Made:
    """Make something of the plain data in JSON text.

    Args:
        what: the text holds, for errors.
        make: turns the data into it.

    Raises:
        ValueError: the text is not JSON, is nested too deeply to be read, or is not understood.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise _too_deep(what) from error
    check_depth(data, what)
    return make(data)


def check_depth(data: object, what: str) -> None:
    """Refuse plain data of more than `DEEPEST` levels.

    Args:
        what: holds the data, for errors.

    Raises:
        ValueError: it is nested more deeply.
    """
    level = [data]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, list | tuple | dict)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise _too_deep(what)


def _too_deep(what: str) -> ValueError:
    return ValueError(
        f"{what} is nested too deeply to be read; legal: at most {DEEPEST} levels of lists and "
        "objects"
    )


def plain(data: object) -> Any:
    """Plain data as it comes back from a file: tuples are lists, and keys are texts."""
    return json.loads(json.dumps(data))


def write(path: str | Path, data: object) -> Path:
    """Write plain data to a file, by one rename, and make the folders above it.

    Returns:
        The path, with the user's home put in place of ``~``.
    """
    return files.write(path, dumps(data) + "\n")


def read(path: str | Path, what: str, make: Callable[[Any], Made]) -> Made:
    """Make something of the plain data in a file.

    Args:
        what: the file holds, for errors.
        make: turns the data into it.

    Raises:
        FileNotFoundError: no such file.
        OSError: a file that cannot be read, or a name that no file can have.
        ValueError: the file is no text, no JSON, or not understood; the message names it.
    """
    text = files.read(path, what)
    try:
        return loads(text, what, make)
    except ValueError as error:
        raise ValueError(f"{str(Path(path).expanduser())!r}: {error}") from error
