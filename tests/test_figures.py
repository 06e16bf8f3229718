"""Numbers as people read them: so many digits, the unit that fits, and nothing rounded to 1000."""

from __future__ import annotations

import math

import pytest

from ditdial import figures


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 MACs"),
        (12, "12.00 MACs"),
        (999.94, "999.9 MACs"),
        (999.96, "1.000 kMACs"),
        (1_234_567, "1.235 MMACs"),
        (141.5e12, "141.5 TMACs"),
        (-5e9, "-5.000 GMACs"),
        (3e25, "30000000 EMACs"),
        (math.nan, "nan MACs"),
    ],
)
def test_macs(count, text):
    assert figures.macs(count) == text


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (0, "0 s"),
        (3.2e-7, "320 ns"),
        (1e-7, "100 ns"),
        (0.0123, "12.3 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (12345.4, "12345 s"),
        (math.inf, "inf s"),
    ],
)
def test_seconds(duration, text):
    assert figures.seconds(duration) == text


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (0, "0 %"),
        (0.000412, "0.0412 %"),
        (0.0512, "5.12 %"),
        (0.639, "63.9 %"),
        (1, "100.0 %"),
        (1.035, "103.5 %"),
    ],
)
def test_shares(part, text):
    assert figures.share(part) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (12.3 * 2**20, "12.3 MiB")],
)
def test_bytes(count, text):
    assert figures.bytes(count) == text


@pytest.mark.parametrize("count", [10**power * share for power in range(16) for share in (1, 9.87)])
def test_a_number_can_be_read_back(count):
    digits, unit = figures.macs(count).split()
    scale = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5}[unit.removesuffix("MACs")]
    assert float(digits) * 1000**scale == pytest.approx(count, rel=5e-4)
