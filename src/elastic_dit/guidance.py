"""Guidance when the two branches of a batched call run in different modes (FlexiDiT section 3.4).

A stock pipeline computes ``g + s (c - g)`` from the conditional prediction c and the guidance
prediction g. Weak-model guidance gives it a g that comes from the weak mode on the *true*
condition. A gain other than 1 is folded into g, ``g' = c + gain (g - c)``, so that the pipeline's
own scale s acts as ``1 + gain (s - 1)`` and no pipeline changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elastic_dit.backbones.base import Branches, Call, rows
from elastic_dit.routing import Part, Router
from elastic_dit.schedule import Segment

Forward = Callable[..., Any]


def run_segment(
    router: Router,
    forward: Forward,
    call: Call,
    segment: Segment,
    branches: Branches | None,
    *,
    packed: bool,
) -> Any:
    """One model call in the modes of a segment.

    Args:
        forward: the stock forward.
        branches: which rows guide which; None if all rows are conditional.
        packed: run branches of different modes in one packed call instead of two.

    Returns:
        What the stock forward returns, for all rows in their order.
    """
    if branches is None:
        router.mode = segment.mode
        return forward(**call)
    same = segment.guide_mode == segment.mode
    if same and segment.gain == 1:
        router.mode = segment.mode
        return forward(**call)
    name = router.backbone.sample_argument
    total = call[name].shape[0]
    conditional = rows(call, branches.conditional, total)
    if segment.gain == 0:
        router.mode = segment.mode
        c = _sample(forward, conditional)
        return _wrap(router, call, _interleave(branches, c, c))
    guide = rows(call, branches.guidance, total)
    if segment.weak_guidance:
        guide = router.backbone.give_condition(guide, conditional)
    if packed and not same:
        c, g = _packed(router, forward, conditional, guide, segment)
    else:
        router.mode = segment.mode
        c = _sample(forward, conditional)
        router.mode = segment.guide_mode
        g = _sample(forward, guide)
    if segment.gain != 1:
        g = torch.lerp(c, g, segment.gain)
    return _wrap(router, call, _interleave(branches, c, g))


def _packed(
    router: Router, forward: Forward, conditional: Call, guide: Call, segment: Segment
) -> tuple[Tensor, Tensor]:
    latent = conditional[router.backbone.sample_argument]
    count = latent.shape[0]
    joined = {
        key: torch.cat([value, guide[key]])
        if torch.is_tensor(value) and value.ndim and value.shape[0] == count
        else value
        for key, value in conditional.items()
    }
    router.grid = router.backbone.grid(router.embed, latent)
    modes = (segment.mode, segment.guide_mode)
    router.layout = tuple(Part(mode, count, router.tokens(mode)) for mode in modes)
    try:
        sample = _sample(forward, joined)
    finally:
        router.layout = None
    return sample[:count], sample[count:]


def _sample(forward: Forward, call: Call) -> Tensor:
    return forward(**{**call, "return_dict": False})[0]


def _interleave(branches: Branches, c: Tensor, g: Tensor) -> Tensor:
    first_is_conditional = (branches.conditional.start or 0) == 0
    return torch.cat([c, g] if first_is_conditional else [g, c])


def _wrap(router: Router, call: Call, sample: Tensor) -> Any:
    return router.backbone.wrap_output(sample) if call.get("return_dict", True) else (sample,)
