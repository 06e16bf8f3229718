"""``ditdial train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ditdial.cli.tables import say


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, as in recipes/.")],
    output: Annotated[str, typer.Option(help="Replaces the recipe's output folder.")] = "",
    data: Annotated[str, typer.Option(help="Replaces data.path: a folder or a hub id.")] = "",
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="table.key=value; may be repeated.")
    ] = None,
) -> None:
    """Run a training recipe; under `accelerate launch` on several devices."""
    from ditdial.cli.arguments import output_folder
    from ditdial.training.config import load_recipe
    from ditdial.training.data import ImageData
    from ditdial.training.loop import check_output
    from ditdial.training.loop import train as run
    from ditdial.training.tasks import build_task

    overrides = list(override or [])
    overrides += [f"output={json.dumps(output)}"] if output else []
    overrides += [f"data.path={json.dumps(data)}"] if data else []
    loaded = load_recipe(recipe, overrides)
    output_folder(Path(loaded.output))
    check_output(loaded, resume=resume)
    export = run(loaded, build_task(loaded), ImageData(loaded.data), resume=resume)
    say(f"exported to {export}")
