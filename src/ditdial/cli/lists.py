"""``ditdial methods`` and ``ditdial backbones``: what runs, what can be trained, what is published.

The three are not the same: an adapter of a method runs on every class that has what the method
changes, while the trainer of this version starts from one class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditdial.cli.tables import AsJson, Column, print_json, print_table, say

if TYPE_CHECKING:
    from ditdial.backbones import Backbone
    from ditdial.methods import Method


def _mark(value: bool) -> str:
    return "yes" if value else "-"


METHOD_COLUMNS = (
    Column("name", "method", name=True),
    Column("changes", "changes", name=True),
    Column("runs_on", "runs on", name=True),
    Column("trained", "trained here", name=True),
    Column("paper", "published", words=True),
)

BACKBONE_COLUMNS = (
    Column("name", "class", name=True),
    Column("patch", "patch size\nalong", name=True),
    Column("sparse", "token\ngrid", _mark, name=True),
    Column("routed", "width", _mark, name=True),
    Column("low_band", "low\nband", _mark, name=True),
    Column("packed", "packed", _mark, name=True),
    Column("trained", "trained\nhere", _mark, name=True),
)


def methods(as_json: AsJson = False) -> None:
    """List the methods: what each changes, where that runs, what is trained here, its paper."""
    from ditdial.backbones import BACKBONES
    from ditdial.methods import METHODS
    from ditdial.training.tasks import TRAINED_CLASSES, TRAINERS

    rows = []
    for name, method in METHODS.items():
        rows.append(
            {
                "name": name,
                "changes": _changes(method),
                "runs_on": _classes(method),
                "trained": list(method.recipes) if name in TRAINERS else [],
                "paper": method.paper,
                "recipes": list(method.recipes),
            }
        )
    if as_json:
        print_json(rows)
        return
    count = len(BACKBONES)
    shown = [
        row | {"runs_on": f"{len(row['runs_on'])} of {count}", "trained": row["trained"] or None}
        for row in rows
    ]
    print_table(shown, METHOD_COLUMNS)
    say(
        "\nruns on: model classes, which `ditdial backbones` lists\n"
        f"trained here: by `ditdial train`, on {', '.join(TRAINED_CLASSES)} in pixel space"
    )


def backbones(as_json: AsJson = False) -> None:
    """List the diffusers model classes: which modes run on each, and what is trained here."""
    from ditdial.backbones import BACKBONES
    from ditdial.published.models import MODELS
    from ditdial.training.tasks import TRAINED_CLASSES

    rows = [
        {
            "name": name,
            "patch": list(backbone.axes),
            "sparse": backbone.streamed is not None,
            "routed": bool(backbone.routed),
            "low_band": not backbone.sizes.one,
            "packed": backbone.packed is not None,
            "trained": name in TRAINED_CLASSES,
            "models": [key for key, model in MODELS.items() if model.model_class == name],
        }
        for name, backbone in BACKBONES.items()
    ]
    if as_json:
        print_json(rows)
        return
    print_table(rows, BACKBONE_COLUMNS)
    say(
        "\npatch size, token grid, width: modes that run, once an adapter has been trained\n"
        "low band: modes that need none, since the class's bases know several sizes\n"
        "packed: guidance branches of different modes may share one call\n"
        "trained here: by `ditdial train`, in pixel space"
    )


def _changes(method: type[Method]) -> str:
    from ditdial.methods.combined import KINDS

    return next((kind for kind, some in KINDS.items() if method in some), "several")


def _classes(method: type[Method]) -> list[str]:
    """Classes that have what a method changes; for a combination, what any method changes."""
    from ditdial.backbones import BACKBONES

    def runs(backbone: type[Backbone]) -> bool:
        needs = {
            "token grid": backbone.streamed is not None,
            "width": bool(backbone.routed),
            "latent size": not backbone.sizes.one,
        }
        return needs.get(_changes(method), True)

    return [name for name, backbone in BACKBONES.items() if runs(backbone)]
