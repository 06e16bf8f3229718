"""``ditdial cost``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditdial.cli.arguments import parse_labels, pipeline
from ditdial.cli.tables import AsJson, Column, print_json, print_table, say
from ditdial.plain import figures
from ditdial.plain.checks import did_you_mean

if TYPE_CHECKING:
    from ditdial.published.models import Published

METHODS = ("flexidit", "sparsedit")
BRANCHES = 2
"""Passes per step of a guided run."""

COLUMNS = (
    Column("what", "", name=True),
    Column("tokens", "tokens"),
    Column("macs", "MACs", figures.macs),
    Column("flops", "FLOPs", figures.flops),
    Column("ratio", "of the\nfull cost", figures.share),
)
PAPER = Column("paper", "as the paper\ncounts", figures.share)


def cost(
    model: Annotated[str, typer.Option(help="Published model, or a reference model.")],
    weak_fraction: Annotated[float, typer.Option(help="Share of the steps run weak.")] = 0.48,
    guide_fraction: Annotated[
        float | None, typer.Option(help="The same for the guidance branch.")
    ] = None,
    scale: Annotated[int, typer.Option(help="Weak patch, in base patches per axis.")] = 2,
    low_rank: Annotated[int, typer.Option(help="Rank of unmerged low-rank updates.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps, evenly spaced.")] = 250,
    method: Annotated[str, typer.Option(help="flexidit (weak first), or sparsedit.")] = "flexidit",
    sides: Annotated[str, typer.Option(help="Of sparsedit's grids, as in 6,7,8,10.")] = "",
    as_json: AsJson = False,
) -> None:
    """What a run costs, in closed form: per forward pass of one picture, and per run."""
    if method not in METHODS:
        near = did_you_mean(method, METHODS)
        raise ValueError(f"method = {method!r}; legal: {', '.join(METHODS)}{near}")
    from ditdial.published.costs import run_cost, sparse_plan

    if method == "sparsedit":
        numbers = tuple(parse_labels(sides, "sides")) if sides else ()
        facts = run_cost(model, sparse_plan(model, numbers), steps=steps)
        which = "sparse grids by noise level"
    else:
        from ditdial.methods import FlexiDiT
        from ditdial.plan.schedule import Schedule

        facts = run_cost(
            _known(model),
            FlexiDiT(scales=(scale,), rank=low_rank or 32),
            Schedule.weak_first(weak_fraction, scale, guide_fraction=guide_fraction),
            steps=steps,
            merged=not low_rank,
        )
        which = f"the first {figures.share(weak_fraction)} of them weak"
        if guide_fraction is not None:
            which += f", of the guidance branch the first {figures.share(guide_fraction)}"
    facts |= {"model": model}
    if as_json:
        print_json(facts)
    else:
        _show(facts, which)


def _known(model: str) -> str | Published:
    """A reference model, or the name of a published one."""
    from ditdial.published.models import Published
    from ditdial.reference import reference_names

    return Published.of(pipeline(model).transformer) if model in reference_names() else model


def _line(what: str, macs: float, ratio: float, **others: Any) -> dict[str, Any]:
    return {"what": what, "macs": macs, "flops": 2 * macs, "ratio": ratio, **others}


def _show(facts: dict[str, Any], which: str) -> None:
    full, steps = facts["macs_full"], facts["steps"]
    say(f"{facts['model']}, per forward pass of one picture or clip:\n")
    passes = [
        _line(f"mode {name}", macs, macs / full, tokens=facts["tokens"][name])
        for name, macs in facts["macs"].items()
    ]
    print_table(passes, COLUMNS)
    say(f"\nper run of one picture or clip, {steps} guided steps of {BRANCHES} passes,\n{which}:\n")
    whole = BRANCHES * steps
    paper = facts.get("ratio_published", facts["ratio_blocks"])
    runs = [
        _line("full mode", whole * full, 1.0, paper=1.0),
        _line("as planned", whole * facts["macs_plan"], facts["ratio"], paper=paper),
    ]
    print_table(runs, (COLUMNS[0], *COLUMNS[2:], PAPER))
    say(
        "\n1 MAC = 2 FLOPs; the FlexiDiT paper counts transformer blocks only,\n"
        "the SparseDiT paper also what need not be multiplied"
    )
