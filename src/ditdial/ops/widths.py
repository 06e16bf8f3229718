"""Heads and groups of channels as features of linear layers, and which of them matter most.

Slots are what routers open and close. Slot 0 is always open and holds the most important head or
group (DyDiT 2410.03456, section 3.1); where the paper permutes the weights for that, we keep the
order of the slots beside the weights, which stay as they are.

Shape legend: S slots, F features, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slot_of_features(order: Tensor, size: int) -> Tensor:
    """The slot of each feature, ``(F,)``.

    Args:
        order: units (heads, or single channels) by importance, ``(F / features per unit,)``.
        size: units in one slot, 1 for heads.
    """
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device) // size
    return slots


def head_importance(rows: list[Tensor], columns: list[Tensor], heads: int) -> Tensor:
    """Squared weights of each head, ``(heads,)``: its rows on the way in, its columns out.

    Args:
        rows: weights ``(F, D)`` that make queries, keys and values.
        columns: weights ``(D, F)`` of the output projections.
    """
    total = sum(w.detach().float().square().sum(1) for w in rows)
    total = total + sum(w.detach().float().square().sum(0) for w in columns)
    return torch.as_tensor(total).unflatten(0, (heads, -1)).sum(1)


def channel_importance(rows: Tensor, columns: Tensor) -> Tensor:
    """Norm of the way in times norm of the way out of each channel, ``(F,)``.

    Args:
        rows: weights ``(F, D)``, or ``(2 F, D)`` where a second half gates the first.
        columns: weights ``(D, F)``.
    """
    channels = columns.shape[1]
    into = rows.detach().float().unflatten(0, (-1, channels)).square().sum((0, 2)).sqrt()
    return into * columns.detach().float().norm(dim=0)


def by_importance(importance: Tensor) -> Tensor:
    """Units from the most important one, ``(F,)``; the first of equals first."""
    return importance.argsort(descending=True, stable=True)


def features_of(open_slots: Tensor, slots: Tensor) -> Tensor:
    """Features ``(k,)`` whose slot is open, in rising order.

    Args:
        open_slots: ``(S,)`` booleans.
        slots: the slot of each feature, ``(F,)``.
    """
    return open_slots[slots].nonzero()[:, 0]


def shared_out(shares: list[float], mean: float) -> list[float]:
    """Shares in the same proportions, none above 1, whose mean is another one.

    Args:
        shares: in [0, 1]; a thousandth stands for less.
        mean: in (0, 1].
    """
    shares = [max(share, 1e-3) for share in shares]
    left, capped = mean * len(shares), set[int]()
    while True:
        free = [place for place in range(len(shares)) if place not in capped]
        factor = (left - len(capped)) / sum(shares[place] for place in free) if free else 0.0
        over = {place for place in free if factor * shares[place] >= 1}
        if not over:
            return [1.0 if place in capped else factor * x for place, x in enumerate(shares)]
        capped |= over


def check_range(name: str, numbers: Tensor, most: int) -> None:
    """Refuse shares or positions that are out of range.

    Raises:
        ValueError: naming them, and the first that is.
    """
    wrong = numbers[(numbers < 0) | (numbers > most)]
    if len(wrong):
        raise ValueError(f"{name} holds {wrong[0].item()}; legal: 0..{most}")
