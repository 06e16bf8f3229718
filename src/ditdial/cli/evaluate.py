"""``ditdial eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditdial.cli.arguments import (
    AdapterName,
    Revision,
    ScheduleFile,
    Steps,
    elastic,
    output_file,
    read_schedule,
)
from ditdial.cli.results import MAIN, print_results
from ditdial.cli.tables import AsJson, print_json, say
from ditdial.plain import figures


def evaluate(
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("out/eval.json"),
    adapter: AdapterName = "lora",
    revision: Revision = None,
    weak_fraction: Annotated[float, typer.Option(help="Share of noise levels run weak.")] = 0.48,
    guidance: Annotated[str, typer.Option(help="cfg or weak.")] = "cfg",
    schedule: ScheduleFile = None,
    guidance_scale: Annotated[float, typer.Option(help="The pipeline's scale.")] = 2.0,
    steps: Steps = 25,
    images: Annotated[int, typer.Option(help="Pictures in all.")] = 1000,
    sets: Annotated[int, typer.Option(help="Disjoint seed sets for the noise.")] = 4,
    model: Annotated[str, typer.Option(help="Reference model.")] = "mnist",
    as_json: AsJson = False,
) -> None:
    """Measure one schedule: distances, accuracy, likeness to the full run, cost, seconds."""
    from ditdial.evaluation.measure import measure
    from ditdial.measure.provenance import write_results
    from ditdial.plan.schedule import Schedule
    from ditdial.reference import reference_judge

    chosen = read_schedule(schedule) or Schedule.weak_first(weak_fraction, guidance=guidance)
    output_file(output)
    pipe, handle = elastic(model, adapter, revision)
    handle.schedule = chosen  # refused here, before any work, if the adapter lacks a mode
    judge = reference_judge(model)
    numbers = {"steps": steps, "images": images, "sets": sets}
    row = measure(pipe, handle, judge, chosen, scale=guidance_scale, **numbers)
    write_results(output, {"rows": [row]})
    if as_json:
        print_json([row])
        return
    print_results([row], MAIN)
    say(f"{steps} steps at {figures.levels(*row['levels'])}")
    say(f"all figures and the values of each seed set: {output}")
