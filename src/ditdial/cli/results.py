"""Rows of results as tables: which of their entries are shown, under which names."""

from __future__ import annotations

from collections.abc import Sequence

from ditdial.cli.tables import Column, Row, print_table
from ditdial.plain import figures


def _gmacs(value: float) -> str:
    return figures.macs(1e9 * value)


KNOWN = (
    Column("name", "run", name=True),
    Column("series", "series", name=True),
    Column("key", "key", name=True),
    Column("model", "model", name=True),
    Column("adapter", "adapter", name=True),
    Column("scale", "guidance\nscale"),
    Column("gmacs", "per run of\none picture", _gmacs),
    Column("macs", "MACs", figures.macs),
    Column("ratio", "of the\nfull cost", figures.share),
    Column("ratio_measured", "as it\nran", figures.share),
    Column("seconds", "time of\nall pictures", figures.seconds),
    Column("time_ratio", "of the\nfull time", figures.share),
    Column("frechet", "Frechet\ndistance", noise=True),
    Column("kernel", "kernel\ndistance", noise=True),
    Column("accuracy", "accuracy", figures.share, noise=True),
    Column("psnr", "PSNR to\nfull, dB", noise=True),
    Column("ssim", "SSIM\nto full", noise=True),
)
"""Entries of results by what they are, in the order in which they are shown."""

MAIN = ("name", "gmacs", "ratio", "seconds", "time_ratio", "frechet", "accuracy", "psnr")
"""What the commands that measure print; their files hold the rest."""


def print_results(rows: Sequence[Row], keys: Sequence[str] = ()) -> None:
    """Print rows of results, the known entries first.

    Args:
        keys: of the entries to show; by default all that are single values.
    """
    found = keys or list(
        dict.fromkeys(
            key for row in rows for key, value in row.items() if not isinstance(value, list | dict)
        )
    )
    known = {column.key: column for column in KNOWN}
    noises = {f"{column.key}_noise" for column in KNOWN if column.noise and column.key in found}
    columns = [column for key, column in known.items() if key in found]
    columns += [Column(key, key) for key in found if key not in known and key not in noises]
    print_table(rows, [c for c in columns if any(row.get(c.key) is not None for row in rows)])
