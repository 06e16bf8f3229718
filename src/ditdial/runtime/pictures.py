"""Pictures of one batch in different modes: each group runs by itself, rows go back in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditdial.backbones.arguments import Arguments, Branches, Call
from ditdial.plan.choice import Choice
from ditdial.plan.controller import Decision


@dataclass(frozen=True)
class Group:
    """Pictures that share a choice.

    Attributes:
        pictures: their places in the batch; None for all of it.
        why: what led to each picture's choice.
    """

    segment: Choice
    pictures: tuple[int, ...] | None = None
    why: tuple[dict[str, Any] | None, ...] = ()


def grouped(decisions: Sequence[Decision]) -> list[Group]:
    """Decisions by choice, in the order in which the choices come up first."""
    places: dict[Choice, list[int]] = {}
    for place, decision in enumerate(decisions):
        places.setdefault(decision.choice, []).append(place)
    return [
        Group(
            choice,
            None if len(places) == 1 else tuple(own),
            tuple(decisions[place].why for place in own),
        )
        for choice, own in places.items()
    ]


RunGroup = Callable[[Call, Group, Branches | None, tuple[int, ...] | None], Any]
"""Runs the rows of one group: their call, the group, its branches, and the rows' places."""


def run_groups(
    arguments: Arguments,
    call: Call,
    groups: Sequence[Group],
    branches: Branches | None,
    run: RunGroup,
) -> Any:
    """Run a batch group by group: the pictures of one choice at a time.

    Args:
        branches: which rows guide which; None if all are conditional.
        run: runs the rows of one group.

    Returns:
        What the stock forward returns, for all rows in their order.
    """
    if len(groups) == 1:
        return run(call, groups[0], branches, None)
    out: Tensor | None = None
    for group in groups:
        assert group.pictures is not None
        rows, own = _rows_of(group.pictures, branches)
        part = arguments.rows(call, rows) | {"return_dict": False}
        prediction = arguments.stack(run(part, group, own, rows)[0])
        # Channels and dtype are the prediction's: a learned variance adds some to the latent's.
        if out is None:
            out = prediction.new_empty(arguments.count(call), *prediction.shape[1:])
        out = out.index_copy(0, torch.tensor(rows, device=out.device), prediction)
    assert out is not None
    return arguments.answer(call, out)


def _rows_of(
    pictures: tuple[int, ...], branches: Branches | None
) -> tuple[tuple[int, ...], Branches | None]:
    """The rows of some pictures in a batched call, and the branches among them."""
    if branches is None:
        return pictures, None
    conditional = [(branches.conditional.start or 0) + i for i in pictures]
    guidance = [(branches.guidance.start or 0) + i for i in pictures]
    first, second = slice(0, len(pictures)), slice(len(pictures), 2 * len(pictures))
    if conditional[0] < guidance[0]:
        return (*conditional, *guidance), Branches(first, second)
    return (*guidance, *conditional), Branches(second, first)
