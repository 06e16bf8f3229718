"""Numbers as people read them: three or four digits, and a unit that fits."""

from __future__ import annotations

import math
from collections.abc import Sequence


def macs(count: float) -> str:
    """Multiply-adds: ``141.5 TMACs``."""
    return _large(count, 1000, ("", "k", "M", "G", "T", "P", "E"), "MACs", digits=4)


def bytes(count: float) -> str:
    """Bytes of memory: ``12.3 MiB``."""
    return _large(count, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi"), "B", digits=3)


def seconds(duration: float) -> str:
    """Seconds: ``12.3 ms``."""
    text, unit = _digits(duration, 3), "s"
    for smaller in ("ms", "µs", "ns"):
        if abs(float(text)) >= 1 or not duration:
            break
        duration *= 1000
        text, unit = _digits(duration, 3), smaller
    return f"{text} {unit}"


def share(part: float) -> str:
    """A share of a whole: ``63.9 %``."""
    percent = 100 * part
    return f"{percent:.1f} %" if abs(percent) >= 10 else f"{_digits(percent, 3)} %"


def _large(count: float, step: int, prefixes: Sequence[str], unit: str, *, digits: int) -> str:
    """A number in the largest unit of which there is at least one."""
    text, last = _digits(count, digits), prefixes[0]
    for prefix in prefixes[1:]:
        if not abs(float(text)) >= step:
            break
        count /= step
        text, last = _digits(count, digits), prefix
    return f"{text} {last}{unit}"


def _digits(value: float, digits: int) -> str:
    """So many digits that count; all of those before the point."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:#.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text.rstrip(".")
