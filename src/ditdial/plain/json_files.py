"""Plain data as JSON files: read with errors that say what is wrong, written whole or not at all.

All files of the package are UTF-8, indented by two, and end with a line break.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


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
    try:
        return make(data)
    except RecursionError as error:  # what can be parsed can be too deep to be shown in an error
        raise _too_deep(what) from error


def _too_deep(what: str) -> ValueError:
    return ValueError(
        f"{what} is nested too deeply to be read; legal: a few levels of lists and objects"
    )


def plain(data: object) -> Any:
    """Plain data as it comes back from a file: tuples are lists, and keys are texts."""
    return json.loads(json.dumps(data))


def write(path: str | Path, data: object) -> Path:
    """Write plain data to a file, by one rename, and make the folders above it.

    Returns:
        The path, with the user's home put in place of ``~``.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(dumps(data) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read(path: str | Path, what: str, make: Callable[[Any], Made]) -> Made:
    """Make something of the plain data in a file.

    Args:
        what: the file holds, for errors.
        make: turns the data into it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no text, no JSON, or not understood; the message names it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist")
    try:
        return loads(path.read_text(encoding="utf-8"), what, make)
    except ValueError as error:  # bytes that are not UTF-8 are one too
        raise ValueError(f"{str(path)!r}: {error}") from error
