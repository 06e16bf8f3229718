"""How every figure is written where a person reads it: a few digits, a prefix, a unit.

One decimal from 10 on and two below it make three or four significant digits; nothing is written
with an exponent. Files and ``--json`` keep the raw numbers.
"""

from __future__ import annotations

import math

UNKNOWN = "-"
"""For what is not known: None, and NaN, which is the noise of a single measurement."""

DECIMAL = ("", "K", "M", "G", "T", "P")
BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi")
LONG_TIMES = ((3600.0, "h"), (60.0, "min"))
ENOUGH = 2
"""Of a longer unit of time before it is used: 119 s and 119 min are easily imagined."""


def macs(value: float | None) -> str:
    """Multiply-adds, as in ``141.5 TMACs``."""
    return _prefixed(value, DECIMAL, 1000, "MACs")


def flops(value: float | None) -> str:
    """Floating-point operations (two for each multiply-add), as in ``283.0 TFLOPs``."""
    return _prefixed(value, DECIMAL, 1000, "FLOPs")


def size(value: float | None) -> str:
    """Bytes, in binary units, as in ``12.3 MiB``."""
    return _prefixed(value, BINARY, 1024, "B")


def seconds(value: float | None) -> str:
    """A duration given in seconds, as in ``12.3 ms``; minutes and hours once there are two."""
    if value is None or not math.isfinite(value):
        return number(value)
    for length, unit in LONG_TIMES:
        if abs(value) >= ENOUGH * length:
            return f"{_short(value / length)} {unit}"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if _rounds_to(abs(value) * factor) >= 1 or value == 0:
            return f"{_short(value * factor)} {unit}"
    return f"{_short(value * 1e6)} µs"


def share(value: float | None) -> str:
    """A part of a whole given as a fraction, as in ``63.9 %``."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{_short(100 * value)} %"


def levels(first: float, last: float) -> str:
    """The noise levels of a run's steps, as in ``noise levels from 1 to 0.04``."""
    return f"noise levels from {first:.3g} to {last:.3g}"


def number(value: float | None) -> str:
    """A plain number: whole numbers exactly, others with three or four digits."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else _short(value)


def _prefixed(value: float | None, prefixes: tuple[str, ...], base: int, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return number(value)
    scaled, place = float(value), 0
    while place + 1 < len(prefixes) and _rounds_to(abs(scaled)) >= base:
        scaled, place = scaled / base, place + 1
    digits = number(int(scaled)) if place == 0 and scaled.is_integer() else _short(scaled)
    return f"{digits} {prefixes[place]}{unit}"


def _rounds_to(value: float) -> float:
    """The number that `_short` writes: 999.96 is written as 1000."""
    return float(_short(value).replace(",", ""))


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if math.isinf(value):
        return str(value)
    large = abs(value)
    if large >= 999.95:
        return f"{value:,.0f}"
    if large >= 9.995:
        return f"{value:.1f}"
    if large >= 0.9995:
        return f"{value:.2f}"
    # Below one, as many decimals as three significant digits need.
    return f"{value:.{2 - math.floor(math.log10(large))}f}"
