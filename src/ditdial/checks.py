"""What all checks of arguments share: the form of an out-of-range error, and near matches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def closest(name: object, legal: Iterable[str]) -> str:
    """The legal name that is most like a given one, for the end of an error's text.

    Args:
        name: that is not legal.
        legal: all names that are.

    Returns:
        ``" (did you mean 'x'?)"``, or nothing where no legal name resembles the given one.
    """
    by_lower = {word.lower(): word for word in legal}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f" (did you mean {by_lower[found[0]]!r}?)" if found else ""
