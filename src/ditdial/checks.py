"""The one form of an out-of-range error, and of a warning."""

from __future__ import annotations

import sys
import warnings

INSIDE = ("ditdial", "torch.")
"""Modules that a warning is never about."""


def require(condition: bool, name: str, value: object, legal: str) -> None:
    """Raise the house's one form of configuration error.

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
