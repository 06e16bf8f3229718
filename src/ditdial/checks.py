"""The forms of an error about a value: out of range, or none of the legal names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def require(condition: bool, name: str, value: object, legal: str) -> None:
    """Raise the house's one form of configuration error.

    Raises:
        ValueError: ``condition`` is false; the message names the value and the legal range.
    """
    if not condition:
        raise ValueError(f"{name} = {value!r} is out of range; legal: {legal}")


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
