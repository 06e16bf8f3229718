"""What commands print: tables that fit the terminal, lines of text, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ditdial.plain import figures
from ditdial.plain.checks import on_one_line

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with raw numbers.")]

Row = Mapping[str, Any]

WIDE = 10_000
"""Characters that no line of ours has."""


LONGEST = 500
"""Characters of a cell that are shown; rich takes seconds for some hundred thousand."""


MOST_ROWS = 1000
"""Of a table; rich takes a second for so many."""


def plain(value: Any) -> str:
    """Any value as text; numbers through `ditdial.plain.figures`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return figures.number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        key: of the rows' values.
        header: what the column is, with its unit where the figures carry none.
        write: makes the text of a value; not called for what a row lacks.
        name: left-aligned and never broken, as figures are, which are right-aligned.
        words: left-aligned text that may be broken into lines.
        noise: whether the row's ``<key>_noise`` is written behind the value.
    """

    key: str
    header: str
    write: Callable[[Any], str] = plain
    name: bool = False
    words: bool = False
    noise: bool = False

    def text(self, row: Row) -> str:
        """Of one row's value."""
        value, noise = row.get(self.key), row.get(f"{self.key}_noise")
        if value is None:
            return figures.UNKNOWN
        text = self.write(value)
        text = f"{text} ± {self.write(noise)}" if self.noise and noise is not None else text
        text = on_one_line(text)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def check_figures(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """Refuse rows with something else than numbers where columns write figures.

    Raises:
        ValueError: naming the entry.
    """
    keys = [c.key for c in columns if c.write is not plain or c.noise]
    keys += [f"{column.key}_noise" for column in columns if column.noise]
    for index, row in enumerate(rows):
        for key in keys:
            value = row.get(key)
            if value is not None and not _is_float(value):
                raise ValueError(f"row {index}: {key} = {value!r}; legal: a number")


def _is_float(value: object) -> bool:
    """Whether a value is a number that a float can hold, in the units that are shown too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 1e290


def print_json(data: object) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(data, indent=2))


def say(text: str) -> None:
    """Print a line as it is: no markup, no colours, long ones left to the terminal."""
    Console().print(Text(text), soft_wrap=True)


def print_table(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """Print rows; columns that do not fit beside the others follow below, with the first again.

    Of more than `MOST_ROWS`, the first ones, and how many there are beside them.
    """
    console, left = Console(), len(rows) - MOST_ROWS
    rows = rows[:MOST_ROWS]
    shown = list(columns)
    cells = {column: [column.text(row) for row in rows] for column in columns}
    widest = {column: [_widest(column, cells[column])] for column in columns}
    while len(shown) > 1:
        count = min(len(shown), console.width)  # a column takes a character or more
        while count > 2 and not _fits(console, _table(shown[:count], widest)):
            count -= 1
        console.print(_table(shown[:count], cells))
        shown = [shown[0], *shown[count:]]
        if len(shown) > 1:
            console.print()
    if left > 0:
        say(f"\n{left} more rows; --json prints them all")


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and texts of facts, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts:
        table.add_row(Text(name), Text(text))
    Console().print(table)


def _fits(console: Console, table: Table) -> bool:
    # In unlimited space: within the console's own width every table claims to fit.
    unlimited = console.options.update_width(WIDE)
    return Measurement.get(console, unlimited, table).minimum <= console.width


def _widest(column: Column, cells: Sequence[str]) -> str:
    """What of a column's cells needs most room; of words, which may be broken, the longest one."""
    parts = [word for cell in cells for word in cell.split()] if column.words else cells
    return max(parts, key=cell_len, default="")


def _table(columns: Sequence[Column], cells: Mapping[Column, Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        side = "left" if column.name or column.words else "right"
        # rich cuts what may not be broken where a table is too wide, unless its width is asked for.
        lines = [*column.header.split("\n"), *(() if column.words else cells[column])]
        width = max(map(cell_len, lines))
        header = Text(column.header)
        table.add_column(header, justify=side, no_wrap=not column.words, min_width=width)
    for row in zip(*(cells[column] for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table
