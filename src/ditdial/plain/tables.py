"""A table of texts, for a terminal and for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 80
"""Columns of a terminal that nobody has widened."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headings, with lines of text below; columns are flush right unless told otherwise.

    Args:
        headings: of the columns.
        rows: texts, one for each column.
        below: lines under the table.
        least: widths that columns have at least, from the left.
        left: headings of the columns that are flush left.

    Raises:
        ValueError: a row of another length.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()
    least: Sequence[int] = ()
    left: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headings):
                raise ValueError(f"row = {list(row)}; legal: {len(self.headings)} texts")

    def __str__(self) -> str:
        """Lines of at most `WIDTH` characters; what does not fit is cut off with an ellipsis."""
        lines = [self._line(row, self._widths()) for row in (self.headings, *self.rows)]
        return "\n".join([*lines, *self.below])

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = []
        for heading, text, width in zip(self.headings, row, widths):
            text = text if len(text) <= width else f"{text[: width - 1]}…"
            cells.append(text.ljust(width) if heading in self.left else text.rjust(width))
        return " ".join(cells).rstrip()

    def _widths(self) -> list[int]:
        """Widths of the columns: what they hold, but for the widest ones in too wide a table."""
        least = [*self.least, *[0] * (len(self.headings) - len(self.least))]
        cells = zip(self.headings, *self.rows)
        widths = [max(low, *map(len, column)) for low, column in zip(least, cells)]
        while sum(widths) + len(widths) - 1 > WIDTH:
            widths[widths.index(max(widths))] -= 1
        return widths

    def html(self) -> str:
        """The table with all of its texts, as HTML."""
        from html import escape  # its tables of names are slow to import

        head = "".join(f"<th>{escape(text)}</th>" for text in self.headings)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in self.rows
        )
        below = "".join(f"<p>{escape(line)}</p>" for line in self.below)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{below}"
