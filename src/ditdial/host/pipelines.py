"""What a diffusers pipeline tells of its runs: its transformers, and when it calls which."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

TRANSFORMERS = ("transformer", "transformer_2")
"""Components of a pipeline that may be made elastic."""


GUIDED = ("do_classifier_free_guidance", "do_true_cfg")
"""What pipelines call the fact that guidance is on."""

SCALES = ("true_cfg_scale", "guidance_scale")
"""What they call its scale."""


def is_guided(pipe: Any) -> bool | None:
    """Whether guidance is on in the present call of a pipeline; None where nothing tells.

    Some pipelines have an attribute for it. Others keep it in a local variable of their
    ``__call__``, which is read there: latents and prompts do not tell two prompts from equal noise
    from two branches, and in inference mode tensors do not even tell where they come from.
    """
    told = getattr(pipe, GUIDED[0], None)
    frames = _calls_of(pipe, sys._getframe()) if told is None else ()
    for frame in frames:
        facts = frame.f_locals
        told = next((facts[name] for name in GUIDED if name in facts), None)
        if told is None and "guidance_scale" in facts:  # DiTPipeline
            told = facts["guidance_scale"] > 1
        if told is not None:
            break
    return told


def guidance_scale(pipe: Any, model: nn.Module) -> float | None:
    """The s of ``g + s (c - g)`` in the present call of a pipeline; None where nothing tells.

    Read where `is_guided` looks. Of two transformers, each has its own. Where there is true
    guidance beside a scale that is embedded in the prediction, it is that of true guidance.
    """
    second = transformers(pipe).get("transformer_2") is model
    names = ("guidance_scale_2",) * second + SCALES
    found = [
        frame.f_locals[x]
        for frame in _calls_of(pipe, sys._getframe())
        for x in names
        if isinstance(frame.f_locals.get(x), int | float)
    ]
    counts_from_0 = type(pipe).__name__.startswith("ZImage")  # c + s (c - g)
    return float(found[0]) + counts_from_0 if found else None


def _calls_of(pipe: Any, frame: FrameType | None) -> Iterator[FrameType]:
    """Calls of a pipeline that a frame lies in, the inmost first."""
    while frame is not None and pipe is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            yield frame
        frame = frame.f_back


def transformers(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component."""
    found = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    return {
        name: getattr(model, "_orig_mod", model)
        for name, model in found.items()
        if isinstance(model, nn.Module)
    }


def called_at(pipe: Any, model: nn.Module, scheduler: Any) -> Tensor:
    """Whether a pipeline calls this transformer, for each of the scheduler's timesteps."""
    always = torch.ones_like(scheduler.timesteps, dtype=torch.bool)
    models = transformers(pipe)
    if len(models) < 2:
        return always
    first, ratio = always, pipe.config.get("boundary_ratio")
    if ratio is not None:
        first = scheduler.timesteps >= ratio * scheduler.config.num_train_timesteps
    return first if models["transformer"] is model else ~first


def called_levels(pipe: Any, model: nn.Module, scheduler: Any) -> tuple[float, ...]:
    """Noise levels at which a pipeline calls this transformer, one per step."""
    times = scheduler.timesteps[called_at(pipe, model, scheduler)].tolist()
    return tuple(t / scheduler.config.num_train_timesteps for t in times)
