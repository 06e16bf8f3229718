"""The one form of an out-of-range error."""

from __future__ import annotations


def require(condition: bool, name: str, value: object, legal: str) -> None:
    """Raise the house's one form of configuration error.

    Raises:
        ValueError: ``condition`` is false; the message names the value and the legal range.
    """
    if not condition:
        raise ValueError(f"{name} = {value!r} is out of range; legal: {legal}")
