"""What a diffusers pipeline tells of its runs: its transformers, and when it calls which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TRANSFORMERS = ("transformer", "transformer_2")
"""Components of a pipeline that may be made elastic."""


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
