"""The forms of an error about a value, and of a warning."""

from __future__ import annotations

import difflib
import operator
import sys
import warnings
from collections.abc import Iterable
from typing import SupportsIndex

INSIDE = ("ditdial", "torch.")
"""Modules that a warning is never about."""


def require(condition: bool, name: str, value: object, legal: str) -> None:
    """Raise the house's one form of configuration error.

    Args:
        condition: what must hold.
        name: of the argument or field, as its user writes it.
        value: that was given.
        legal: the values that are allowed, in words or as a range.

    Raises:
        ValueError: ``condition`` is false; the message names the value and the legal range.
    """
    if not condition:
        raise ValueError(f"{name} = {value!r} is out of range; legal: {legal}")


def warn(message: str) -> None:
    """Warn at the place in somebody else's code that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def whole(name: str, value: object, least: int, most: int) -> None:
    """Refuse what is no whole number of a range, of Python or of another library.

    Raises:
        ValueError: naming the value and the range.
    """
    fits = isinstance(value, SupportsIndex) and not isinstance(value, bool)
    if not fits or not least <= operator.index(value) <= most:
        raise ValueError(f"{name} = {value!r}; legal: >= {least}, at most {most}")


def on_one_line(text: str) -> str:
    """A text as one line of a terminal: lines are joined, other controls are spelled out."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in " ".join(text.split())
    )


def one_of(name: str, value: object, legal: Iterable[str]) -> None:
    """Refuse a value that is none of the legal names.

    Raises:
        ValueError: naming the value, the legal names, and the one that was probably meant.
    """
    legal = tuple(legal)
    if value not in legal:
        names = ", ".join(map(repr, legal))
        raise ValueError(f"{name} = {value!r}; legal: {names}{did_you_mean(value, legal)}")


def did_you_mean(value: object, legal: Iterable[str]) -> str:
    """`` (did you mean 'patch2'?)`` for the legal name most like an unknown one, or nothing.

    Args:
        value: the unknown name; what is no text is like none.
        legal: the known names.
    """
    if not isinstance(value, str):
        return ""
    by_small = {name.lower(): name for name in legal}
    found = difflib.get_close_matches(value.lower().strip(), by_small, n=1)
    return f" (did you mean {by_small[found[0]]!r}?)" if found else ""
