"""How much of a long fuzz is tried: what takes minutes, or with DITDIAL_FUZZ=all, all of it."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")

ALL = os.environ.get("DITDIAL_FUZZ") == "all"


def drawn(cases: Sequence[Case], count: int, *seed: object) -> list[Case]:
    """So many of the cases, others for each seed but the same each time; all if all are asked."""
    if ALL or count >= len(cases):
        return list(cases)
    return random.Random(str(seed)).sample(cases, count)


def part(count: int, share: int) -> int:
    """One of so many inputs; all if all are asked."""
    return count if ALL else count // share
