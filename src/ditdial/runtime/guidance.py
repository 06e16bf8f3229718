"""Guidance when the two branches of a run use different modes (FlexiDiT section 3.4).

A stock pipeline computes ``g + s (c - g)`` from the conditional prediction c and the guidance
prediction g. Weak-model guidance gives it a g that comes from the weak mode on the *true*
condition. A gain other than 1 is folded into g, ``g' = c + gain (g - c)``, so that the pipeline's
own scale s acts as ``1 + gain (s - 1)`` and no pipeline changes.

Some pipelines put both branches into one call, others make two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditdial.backbones.call import Branches, Call
from ditdial.layers.packing import MASKED, Layout, Packing, Part
from ditdial.layers.state import Router
from ditdial.plan.choice import Choice
from ditdial.plan.mode import Mode

Forward = Callable[..., Any]
"""``forward(call, mode, branch="")`` runs the stock forward, on all rows or those of a branch."""

CONDITIONAL, GUIDANCE = "/conditional", "/guidance"
"""Branches of a batched call that run by themselves."""


@dataclass(frozen=True)
class Remembered:
    """The conditional call of a step, for the guidance call that follows it."""

    call: Call
    sample: Tensor


def run_batch(
    router: Router,
    forward: Forward,
    call: Call,
    segment: Choice,
    branches: Branches | None,
    *,
    packed: Packing,
) -> Any:
    """One model call that holds all branches, in the modes of a choice.

    Args:
        branches: which rows guide which; None if all rows are conditional.
        packed: run branches of different modes in one packed call instead of two; ``"masked"`` has
            one call of attention for both of them too.

    Returns:
        What the stock forward returns, for all rows in their order.
    """
    if branches is None:
        return forward(call, segment.mode)
    same = segment.guide_mode == segment.mode
    if same and segment.gain == 1:
        return forward(call, segment.mode)
    conditional = router.backbone.rows(call, branches.conditional)
    if segment.gain == 0:
        c = _sample(router, forward, conditional, segment.mode, CONDITIONAL)
        return _wrap(router, call, _interleave(branches, c, c))
    guide = router.backbone.rows(call, branches.guidance)
    if segment.weak_guidance:
        guide = router.backbone.give_condition(guide, conditional)
    if packed and not same:
        masked = packed == MASKED
        c, g = _packed(router, forward, (conditional, guide), segment, masked=masked)
    else:
        c = _sample(router, forward, conditional, segment.mode, CONDITIONAL)
        g = _sample(router, forward, guide, segment.guide_mode, GUIDANCE)
    if segment.gain != 1:
        g = torch.lerp(c, g, segment.gain)
    return _wrap(router, call, _interleave(branches, c, g))


def run_guidance(
    router: Router, forward: Forward, call: Call, segment: Choice, conditional: Remembered | None
) -> Any:
    """The guidance branch of a pipeline that calls the model once per branch.

    Args:
        conditional: the conditional call of the same step, if there was one.

    Raises:
        RuntimeError: the choice needs the conditional call, and there was none before this one.
    """
    if segment.gain == 1 and not segment.weak_guidance:
        return forward(call, segment.guide_mode)
    if conditional is None:
        raise RuntimeError(
            "weak-model guidance and a gain need the conditional prediction first, but this "
            "pipeline called the guidance branch before it; legal: guidance 'cfg' with gain 1"
        )
    if segment.gain == 0:
        return _wrap(router, call, conditional.sample)
    if segment.weak_guidance:
        call = router.backbone.give_condition(call, conditional.call)
    g = _sample(router, forward, call, segment.guide_mode)
    return _wrap(router, call, torch.lerp(conditional.sample, g, segment.gain))


def _packed(
    router: Router, forward: Forward, calls: tuple[Call, Call], segment: Choice, *, masked: bool
) -> tuple[Tensor, Tensor]:
    """Predictions of a conditional and a guidance call that run as one."""
    count = len(calls[0][router.backbone.sample])

    def join(value: Any, other: Any) -> Any:
        if isinstance(value, dict):
            return {key: join(inner, other[key]) for key, inner in value.items()}
        if isinstance(value, list):
            return [join(*pair) for pair in zip(value, other, strict=True)]
        if torch.is_tensor(value) and value.ndim and value.shape[0] == count:
            return torch.cat([value, other])
        return value

    joined = join(*calls)
    modes = (segment.mode, segment.guide_mode)
    parts = tuple(Part(mode, count, router.tokens(mode)) for mode in modes)
    labels = tuple(call.get(router.backbone.labels) for call in calls)
    router.layout = Layout(parts, masked, labels)
    try:
        sample = _sample(router, forward, joined, segment.mode)
    finally:
        router.layout = None
    return sample[:count], sample[count:]


def _sample(router: Router, forward: Forward, call: Call, mode: Mode, branch: str = "") -> Tensor:
    return router.backbone.stack(forward({**call, "return_dict": False}, mode, branch)[0])


def _interleave(branches: Branches, c: Tensor, g: Tensor) -> Tensor:
    first_is_conditional = (branches.conditional.start or 0) == 0
    return torch.cat([c, g] if first_is_conditional else [g, c])


def _wrap(router: Router, call: Call, sample: Tensor) -> Any:
    output = router.backbone.unstack(sample)
    return router.backbone.wrap_output(output) if call.get("return_dict", True) else (output,)
