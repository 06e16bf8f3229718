"""Figures for people: three or four digits, the right prefix, never an exponent."""

from __future__ import annotations

import math
import re

import pytest

from ditdial.plain import figures


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (figures.macs, 141.5e12, "141.5 TMACs"),
        (figures.macs, 118_672_441_344, "118.7 GMACs"),
        (figures.macs, 512, "512 MACs"),
        (figures.macs, 1234, "1.23 KMACs"),
        (figures.macs, 45.6e6, "45.6 MMACs"),
        (figures.macs, 3.1e15, "3.10 PMACs"),
        (figures.macs, 3.1e19, "31,000 PMACs"),
        (figures.macs, 999.97e9, "1.00 TMACs"),
        (figures.macs, 999.94e9, "999.9 GMACs"),
        (figures.flops, 2 * 141.5e12, "283.0 TFLOPs"),
        (figures.size, 12.3 * 2**20, "12.3 MiB"),
        (figures.size, 1023, "1,023 B"),
        (figures.size, 1024, "1.00 KiB"),
        (figures.size, 0, "0 B"),
        (figures.seconds, 0.0123, "12.3 ms"),
        (figures.seconds, 12.3e-6, "12.3 µs"),
        (figures.seconds, 0.9994, "999.4 ms"),
        (figures.seconds, 0.9996, "1.00 s"),
        (figures.seconds, 1.234, "1.23 s"),
        (figures.seconds, 75.04, "75.0 s"),
        (figures.seconds, 240, "4.00 min"),
        (figures.seconds, 9000, "2.50 h"),
        (figures.seconds, 0, "0 s"),
        (figures.share, 0.639, "63.9 %"),
        (figures.share, 1.0, "100.0 %"),
        (figures.share, 0.0512, "5.12 %"),
        (figures.share, 0.0003, "0.0300 %"),
        (figures.share, -0.25, "-25.0 %"),
        (figures.number, 33792, "33,792"),
        (figures.number, 3.14159, "3.14"),
        (figures.number, 0.000123, "0.000123"),
        (figures.number, 1e9, "1,000,000,000"),
        (figures.number, 9.999, "10.0"),
        (figures.number, 0.0, "0"),
    ],
)
def test_figures(write, value, text):
    assert write(value) == text


ALL = (figures.macs, figures.flops, figures.size, figures.seconds, figures.share, figures.number)


@pytest.mark.parametrize("write", ALL)
def test_unknown_figures_are_a_dash(write):
    assert write(None) == write(math.nan) == "-"
    assert write(math.inf) == "inf"


@pytest.mark.parametrize("write", [figures.macs, figures.size, figures.seconds])
def test_digits_say_the_value_again(write):
    """Over all magnitudes: no exponent, at least three digits, and the value to 0.5 %."""
    factors = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "m": 1e-3, "µ": 1e-6}
    factors |= {f"{k}i": 1024**i for i, k in enumerate("KMGTP", 1)} | {"min": 60, "h": 3600, "": 1}
    for step in range(400):
        value = 1.0123 * 10 ** (step * 0.04) * (1e-6 if write is figures.seconds else 1)
        digits, unit = write(value).split()
        assert re.fullmatch(r"[\d,]+(\.\d+)?", digits), (value, digits)
        prefix = unit if unit in ("min", "h") else re.sub("(MACs|B|s)$", "", unit)
        found = float(digits.replace(",", "")) * factors[prefix]
        assert found == pytest.approx(value, rel=5e-3)
