"""``ditdial probe``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ditdial.cli.tables import AsJson, Column, plain, print_facts, print_json, print_table, say
from ditdial.plain import figures

COLUMNS = (
    Column("mode", "mode", name=True),
    Column("tokens", "tokens"),
    Column("macs", "MACs", figures.macs),
    Column("flops", "FLOPs", figures.flops),
    Column("ratio", "of the\nfull cost", figures.share),
)


def probe(
    target: Annotated[
        str, typer.Argument(help="A diffusers class, a published model, or a model's folder.")
    ],
    as_json: AsJson = False,
) -> None:
    """Say whether a model can be made elastic, and what its coarse modes would cost."""
    from ditdial.published.probe import probe as look

    facts = look(target)
    if as_json:
        print_json(facts)
        return
    print_facts([(_name(key), _text(value)) for key, value in facts.items() if key not in COSTS])
    if facts.get("cost"):
        grid, text = facts["grid"], facts["text tokens"]
        noun = "clip" if grid[0] > 1 else "picture"
        size = " x ".join(map(str, grid))
        words = f" and {text} of text" if text else ""
        say(f"\nper forward pass of one {noun} of {size} base tokens{words}:\n")
        print_table([row | {"flops": 2 * row["macs"]} for row in facts["cost"]], COLUMNS)
    elif "why" in facts:
        say(f"\nno costs: {facts['why']}")


COSTS = ("cost", "why", "grid", "text tokens")
"""Facts that are told with the costs, or in their place."""


def _name(key: str) -> str:
    return {"supported": "can be made elastic", "nearest": "supported classes like it"}.get(
        key, key
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{part}: {plain(names)}" for part, names in value.items()) or "-"
    return plain(value)
