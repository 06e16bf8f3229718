"""``ditdial report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditdial.cli.results import KNOWN, print_results
from ditdial.cli.tables import AsJson, Column, check_figures, print_json, print_table, say
from ditdial.plain import figures, json_files
from ditdial.plan.report import CACHES

CALLS = (
    Column("index", "call"),
    Column("level", "noise\nlevel"),
    Column("branch", "branch", name=True),
    Column("mode", "mode", name=True),
    Column("guide", "guidance\nbranch", name=True),
    Column("rows", "rows"),
    Column("macs", "of all rows", figures.macs),
    Column("seconds", "time", figures.seconds),
)

TOTALS = (
    Column("ratio", "of the full cost", figures.share),
    Column("budget", "of it allowed", figures.share),
    Column("macs", "MACs", figures.macs),
    Column("seconds", "time", figures.seconds),
)


def report(
    path: Annotated[Path, typer.Argument(help="report.json or results.json of a run.")],
    as_json: AsJson = False,
) -> None:
    """Print what a run did: one line per call of the model, or one per row of results."""
    data = json_files.read(path, "report", _checked)
    if as_json:
        print_json(data)
    elif "calls" in data:
        _show_run(data)
    else:
        print_results(data["rows"])


def _checked(data: Any) -> dict[str, Any]:
    """The content of a file that holds a report or rows of results.

    Raises:
        ValueError: neither of the two.
    """
    calls = isinstance(data, dict) and "calls" in data
    lines = data.get("calls" if calls else "rows") if isinstance(data, dict) else None
    needed = {"level", "mode", "macs"} if calls else set()
    if not isinstance(lines, list) or not all(
        isinstance(line, dict) and needed <= set(line) for line in lines
    ):
        raise ValueError("this is no report; legal: 'calls' of a run, or 'rows' of results")
    check_figures(lines, CALLS if calls else KNOWN)
    check_figures([data] if calls else [], TOTALS)
    return data


def _show_run(data: dict[str, Any]) -> None:
    calls = data["calls"]
    say("per call of the model:\n")
    empty = [c.key for c in CALLS if all(call.get(c.key) is None for call in calls)]
    print_table(calls, [column for column in CALLS if column.key not in empty])
    if data.get("ratio") is not None:
        asked = data.get("budget")
        of = "" if asked is None else f" (of {figures.share(asked)} allowed)"
        say(
            f"\nper run: {figures.share(data['ratio'])} of the full cost{of},\n"
            f"{figures.macs(data.get('macs'))}, {figures.seconds(data.get('seconds'))} in the model"
        )
    if data.get("step_cache"):
        say(CACHES)
