"""Bounds of the numbers in a recipe: finite, no larger than their purpose, no larger than memory.

A recipe is refused for a number that no training has a use for before anything of that size is
made: a billion layers would not end in an error but in a machine without memory.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from ditdial.plain.checks import require

WHOLE = 10**6
"""The largest whole number where a field names no bound of its own."""

REAL = 1000.0
"""The largest magnitude of any other number, likewise."""

TOML_BITS = 63
"""Of a whole number in TOML, beside its sign."""


@dataclass(frozen=True)
class AtMost:
    """In ``Annotated[int, AtMost(4096)]``: the largest magnitude that a field may have."""

    value: float


Level = Annotated[float, AtMost(20)]
"""Mean or spread of the noise level's logit; at 20 a level is 0 or 1 but for the last bits."""


def check_numbers(settings: Any, table: str) -> None:
    """Refuse numbers that are not finite or are too large, and such numbers in lists.

    Args:
        settings: a config dataclass; its fields may be annotated with `AtMost`.
        table: its name in a recipe, for errors.

    Raises:
        ValueError: naming the field, the value and the legal range.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        bounds = [x.value for x in getattr(hint, "__metadata__", ()) if isinstance(x, AtMost)]
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                most = bounds[0] if bounds else WHOLE if isinstance(number, int) else REAL
                inside = math.isfinite(number) and abs(number) <= most
                legal = f"finite, and at most {most:g} in magnitude"
                require(inside, f"{table}.{field.name}", value, legal)


def check_plain(value: object, name: str) -> None:
    """Refuse what TOML can hold and a recipe cannot: dates, whole numbers of more than 64 bits.

    Raises:
        ValueError: naming the entry.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_plain(inner, f"{name}: {key}")
    elif isinstance(value, list):
        for inner in value:
            check_plain(inner, name)
    elif isinstance(value, str):
        require("\0" not in value, name, value, "text without NUL characters")
    elif isinstance(value, int):
        # Not shown: Python refuses to print a number of thousands of digits.
        shown = f"a whole number of {value.bit_length()} bits"
        fits = value.bit_length() <= TOML_BITS
        require(fits, name, shown, f"at most {TOML_BITS} bits and a sign")
    elif isinstance(value, (datetime.date, datetime.time)):
        raise ValueError(f"{name} = {value}; legal: texts, numbers, booleans and lists of them")


def mapping(data: object) -> dict[str, Any]:
    """What a file must hold, names with values.

    Raises:
        ValueError: it holds something else.
    """
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__}; legal: an object with named values")
    return data


def require_memory(size: int, name: str, value: object, what: str) -> None:
    """Refuse what this machine's memory cannot hold even when it is empty.

    Args:
        size: bytes that it takes at least.
        what: takes them.

    Raises:
        ValueError: naming the value and both sizes.
    """
    if not hasattr(os, "sysconf"):  # Windows tells its memory in another way
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    legal = f"what this machine's memory of {memory / 2**30:.1f} GiB can hold; "
    require(size <= memory, name, value, f"{legal}{what} take {size / 2**30:.1f} GiB")
