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

from ditdial.backbones.arguments import Branches, Call
from ditdial.layers.packing import Layout, Part
from ditdial.layers.wiring import Wiring
from ditdial.plan.choice import Choice
from ditdial.plan.mode import Mode
from ditdial.runtime.low_band import one_high_band

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
    wiring: Wiring,
    forward: Forward,
    call: Call,
    segment: Choice,
    branches: Branches | None,
    *,
    packed: bool,
) -> Any:
    """One model call that holds all branches, in the modes of a choice.

    Args:
        branches: which rows guide which; None if all rows are conditional.
        packed: run branches of different modes in one packed call instead of two.

    Returns:
        What the stock forward returns, for all rows in their order.
    """
    arguments = wiring.backbone.arguments
    if branches is None:
        return forward(call, segment.mode)
    same = segment.guide_mode == segment.mode
    # Ordinary guidance in one mode is the pipeline's own call, run in one piece as the stock model
    # does.
    if same and segment.gain == 1:
        return forward(call, segment.mode)
    conditional = arguments.rows(call, branches.conditional)
    if segment.gain == 0:
        c = _sample(wiring, forward, conditional, segment.mode, CONDITIONAL)
        return arguments.answer(call, _interleave(branches, c, c))
    guide = arguments.rows(call, branches.guidance)
    if segment.weak_guidance:
        guide = arguments.give_condition(guide, conditional)
    if packed and not same and not segment.mixes_sizes:
        c, g = _packed(wiring, forward, (conditional, guide), segment)
    else:
        c = _sample(wiring, forward, conditional, segment.mode, CONDITIONAL)
        g = _sample(wiring, forward, guide, segment.guide_mode, GUIDANCE)
        c, g = one_high_band(wiring, segment, c, g)
    if segment.gain != 1:
        g = torch.lerp(c, g, segment.gain)
    return arguments.answer(call, _interleave(branches, c, g))


def run_guidance(
    wiring: Wiring, forward: Forward, call: Call, segment: Choice, conditional: Remembered | None
) -> Any:
    """The guidance branch of a pipeline that calls the model once per branch.

    Args:
        conditional: the conditional call of the same step, if there was one.

    Raises:
        RuntimeError: the choice needs the conditional call, and there was none before this one.
    """
    arguments = wiring.backbone.arguments
    if not segment.reads_conditional:
        return forward(call, segment.guide_mode)
    if conditional is None:
        raise RuntimeError(
            "weak-model guidance, a gain and branches of two sizes need the conditional prediction "
            "first, but this "
            "pipeline called the guidance branch before it; legal: guidance 'cfg' with gain 1"
        )
    if segment.gain == 0:
        return arguments.answer(call, conditional.sample)
    if segment.weak_guidance:
        call = arguments.give_condition(call, conditional.call)
    g = _sample(wiring, forward, call, segment.guide_mode)
    _, g = one_high_band(wiring, segment, conditional.sample, g, fixed=True)
    return arguments.answer(call, torch.lerp(conditional.sample, g, segment.gain))


def _packed(
    wiring: Wiring, forward: Forward, calls: tuple[Call, Call], segment: Choice
) -> tuple[Tensor, Tensor]:
    """Predictions of a conditional and a guidance call that run as one."""
    state, count = wiring.state, wiring.backbone.arguments.count(calls[0])
    modes = (segment.mode, segment.guide_mode)
    state.layout = Layout(
        tuple(
            Part(mode, count, state.tokens(mode), wiring.new.makes_tokens(mode)) for mode in modes
        )
    )
    try:
        sample = _sample(wiring, forward, _joined(*calls, count), segment.mode)
    finally:
        state.layout = None
    return sample[:count], sample[count:]


def _joined(value: Any, other: Any, count: int) -> Any:
    """The rows of two calls' arguments behind each other, inside lists and dictionaries too."""
    if isinstance(value, dict):
        return {key: _joined(inner, other[key], count) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_joined(*pair, count) for pair in zip(value, other, strict=True)])
    if torch.is_tensor(value) and value.ndim and value.shape[0] == count:
        return torch.cat([value, other])
    return value


def _sample(wiring: Wiring, forward: Forward, call: Call, mode: Mode, branch: str = "") -> Tensor:
    output = forward({**call, "return_dict": False}, mode, branch)
    return wiring.backbone.arguments.stack(output[0])


def _interleave(branches: Branches, c: Tensor, g: Tensor) -> Tensor:
    first_is_conditional = (branches.conditional.start or 0) == 0
    return torch.cat([c, g] if first_is_conditional else [g, c])
