"""``ditdial demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditdial.cli.arguments import output_folder
from ditdial.cli.results import MAIN, print_results
from ditdial.cli.tables import AsJson, print_json, say
from ditdial.plain import figures


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("out/demo"),
    images: Annotated[int, typer.Option(help="Pictures per budget.")] = 400,
    as_json: AsJson = False,
) -> None:
    """Sample the reference model at four costs and write picture, table and JSON."""
    from ditdial.demo import run_demo
    from ditdial.measure.memory import flush_denormals

    flush_denormals()  # before anything is computed
    rows = run_demo(output_folder(output), images=images)["rows"]
    if as_json:
        print_json(rows)
        return
    print_results(rows, MAIN)
    say(f"steps at {figures.levels(*rows[0]['levels'])}")
    say(f"picture, table and numbers: {output}")
