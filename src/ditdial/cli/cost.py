"""``ditdial cost``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditdial import figures
from ditdial.checks import did_you_mean
from ditdial.cli.arguments import parse_labels, pipeline
from ditdial.cli.tables import AsJson, Column, print_json, print_table, say

if TYPE_CHECKING:
    from ditdial.cost.shape import TransformerShape

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
    if method == "sparsedit":
        from ditdial.published.costs import sparsedit_cost

        numbers = tuple(parse_labels(sides, "sides")) if sides else ()
        facts = sparsedit_cost(model, numbers, steps)
        if as_json:
            print_json(facts)
        else:
            _show_sparse(facts)
        return
    from ditdial.cost.shape import weak_first_cost

    shape = _shape(model)
    facts = weak_first_cost(
        model,
        weak_fraction,
        guide_fraction=guide_fraction,
        scale=scale,
        low_rank=low_rank,
        steps=steps,
        shape=shape,
    )
    if as_json:
        print_json(facts)
        return
    weak = f"the first {figures.share(weak_fraction)} of them weak"
    if guide_fraction is not None:
        weak += f", of the guidance branch the first {figures.share(guide_fraction)}"
    _show_weak_first(facts, "clip" if shape.grid[0] > 1 else "picture", weak)


def _shape(model: str) -> TransformerShape:
    """What the cost of a reference model or a published one depends on."""
    from ditdial.reference import reference_names

    if model not in reference_names():
        from ditdial.published.models import published_shape

        return published_shape(model)
    from ditdial.backbones import backbone_for

    transformer = pipeline(model).transformer
    backbone = backbone_for(transformer)
    return backbone.shape(transformer, *backbone.default_size(transformer))


def _line(what: str, macs: float, ratio: float, **others: Any) -> dict[str, Any]:
    return {"what": what, "macs": macs, "flops": 2 * macs, "ratio": ratio, **others}


def _show_weak_first(facts: dict[str, Any], noun: str, which: str) -> None:
    full, weak, steps = facts["macs_full"], facts["macs_weak"], facts["steps"]
    say(f"{facts['model']}, per forward pass of one {noun}:\n")
    passes = [
        _line("full mode", full, 1.0, tokens=facts["tokens_full"]),
        _line("weak mode", weak, weak / full, tokens=facts["tokens_weak"]),
    ]
    print_table(passes, COLUMNS)
    say(f"\nper run of one {noun}, {steps} guided steps of {BRANCHES} passes,\n{which}:\n")
    whole = BRANCHES * steps
    runs = [
        _line("full mode", whole * full, 1.0, paper=1.0),
        _line("weak first", whole * facts["macs_plan"], facts["ratio"], paper=facts["ratio_paper"]),
    ]
    print_table(runs, (COLUMNS[0], *COLUMNS[2:], PAPER))
    say("\n1 MAC = 2 FLOPs; the FlexiDiT paper counts transformer blocks only")


def _show_sparse(facts: dict[str, Any]) -> None:
    full, steps = facts["macs_full"], facts["steps"]
    say(f"{facts['model']}, per forward pass of one picture or clip:\n")
    passes = [_line("full mode", full, 1.0)]
    passes += [_line(name, macs, macs / full) for name, macs in facts["macs_by_grid"].items()]
    columns = (COLUMNS[0], *COLUMNS[2:])
    print_table(passes, columns)
    say(f"\nper run of one picture or clip, {steps} steps without guidance, which doubles all:\n")
    runs = [
        _line("full mode", steps * full, 1.0, paper=1.0),
        _line(
            "by noise level",
            steps * facts["macs_plan"],
            facts["ratio"],
            paper=facts["ratio_published"],
        ),
    ]
    print_table(runs, (*columns, PAPER))
    say("\n1 MAC = 2 FLOPs; the SparseDiT paper also counts what need not be multiplied")
