"""``ditdial sample``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditdial.cli.arguments import (
    AdapterName,
    ModelName,
    Revision,
    ScheduleFile,
    Steps,
    elastic,
    output_folder,
    parse_labels,
    read_schedule,
)
from ditdial.cli.tables import say
from ditdial.plain import figures, files
from ditdial.plain.checks import whole

USUAL_SCALE = 2.0
MOST_SEED = 2**62
"""The generators of torch take a little more."""

if TYPE_CHECKING:
    from ditdial.handle import Handle
    from ditdial.plan.schedule import Schedule


def sample(
    output: Annotated[Path, typer.Argument(help="Folder for the pictures and report.json.")],
    labels: Annotated[str, typer.Option(help="Classes, as in 0,1,2 or 0-9.")] = "0-9",
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")] = 0,
    adapter: AdapterName = "lora",
    revision: Revision = None,
    budget: Annotated[float, typer.Option(help="Share of the full cost, in (0, 1].")] = 1.0,
    tau: Annotated[
        float | None, typer.Option(help="DDiT's threshold; --budget is then its cap.")
    ] = None,
    schedule: ScheduleFile = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="1 turns guidance off. That of the budget's calibration, else 2."),
    ] = None,
    steps: Steps = 25,
    model: ModelName = "mnist",
) -> None:
    """Sample pictures at a budget; each depends on its own seed alone."""
    from ditdial.evaluation.picture import decisions
    from ditdial.evaluation.sheet import save_png
    from ditdial.sampling.batches import sample as draw

    classes = parse_labels(labels)
    given = read_schedule(schedule)
    if given is not None and tau is not None:
        raise ValueError("--schedule and --tau are both given; legal: one of them")
    whole("seed", seed, 0, MOST_SEED)
    output_folder(output)
    pipe, handle = elastic(model, adapter, revision)
    _choose(handle, given, tau, budget)
    seeds = list(range(seed, seed + len(classes)))
    scale = _usual_scale(handle) if guidance_scale is None else guidance_scale
    drawn = draw(pipe, classes, seeds, guidance_scale=scale, steps=steps)
    for image, label, number in zip(drawn.images, classes, seeds, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        save_png(output / f"class{label}-seed{number}.png", pixels)
    report = handle.report()
    files.write(output / "report.json", report.to_json() + "\n")
    save_png(output / "decisions.png", decisions(report))
    say(f"{len(classes)} pictures at {figures.share(report.ratio)} of the full cost: {output}")


def _usual_scale(handle: Handle) -> float:
    """The scale that a budget below 1 was planned for; without one, the pipeline's own."""
    from ditdial.plan.solved import SolvedBudget

    planned = isinstance(handle.controller, SolvedBudget) and handle.budget != 1
    return handle.calibration.guidance_scale if planned and handle.calibration else USUAL_SCALE


def _choose(handle: Handle, schedule: Schedule | None, tau: float | None, budget: float) -> None:
    """Let the schedule choose the modes, or DDiT's threshold under a cap, or the dial."""
    from ditdial.plan.ddit import DDiTController

    if schedule is not None:
        handle.schedule = schedule
    elif tau is not None:
        coarse = tuple(mode for mode in handle.modes[1:] if mode == mode.patch)
        handle.controller = DDiTController(tau=tau, coarse=coarse, cap=budget)
    else:
        handle.budget = budget
