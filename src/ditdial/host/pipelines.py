"""What a diffusers pipeline tells of its runs: its transformers, and when it calls which."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

TRANSFORMERS = ("transformer", "transformer_2")
"""Components of a pipeline that may be made elastic."""


WITHOUT_LAST = ("LTXI2VLongMultiPromptPipeline",)
"""Pipelines that make no step at the last timestep of their scheduler."""


def transformers(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component."""
    found = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    return {
        name: getattr(model, "_orig_mod", model)
        for name, model in found.items()
        if isinstance(model, nn.Module)
    }


def holds(pipe: Any, model: nn.Module) -> bool:
    """Whether this very model is in a pipeline (a copy's is another one).

    Both of Wan 2.2's transformers are looked at, and a model that `torch.compile` has wrapped.
    """
    return any(model is own for own in transformers(pipe).values())


def steps_of(scheduler: Any, pipe: Any = None) -> Tensor:
    """Timesteps of a scheduler at which a pipeline calls its model, as it was set last."""
    # The last time of a consistency model's scheduler is where the last step ends.
    ends = tells_angles(scheduler) or type(pipe).__name__ in WITHOUT_LAST
    return scheduler.timesteps[:-1] if ends else scheduler.timesteps


def later_steps(pipe: Any, scheduler: Any, count: int, strength: float) -> Tensor:
    """Timesteps at which a model is called in a run that begins in the middle (image to image).

    Args:
        pipe: says itself which it leaves out; one without a word for it (None for a bare model) is
            taken to do as most.
        scheduler: whose timesteps of ``count`` steps are set.
        strength: share of the steps that are made.
    """
    told = getattr(type(pipe), "get_timesteps", None)
    left = count - int(max(count - min(count * strength, count), 0))
    if told is not None:
        view = copy.copy(pipe)
        vars(view)["scheduler"] = scheduler
        known = {
            "num_inference_steps": count,
            "strength": strength,
            "timesteps": scheduler.timesteps,
            "sigmas": getattr(scheduler, "sigmas", None),
            "device": scheduler.timesteps.device,
        }
        names = inspect.signature(told).parameters
        *_, left = told(view, **{name: known[name] for name in names if name in known})
    return steps_of(scheduler, pipe)[(count - left) * scheduler.order :]


def levels_of(
    pipe: Any, model: nn.Module, scheduler: Any, timesteps: Iterable[float]
) -> tuple[float, ...]:
    """Noise levels at which a pipeline calls a transformer, one per step.

    Args:
        timesteps: those of all steps of the run, of both transformers where there are two.
    """
    count = scheduler.config.num_train_timesteps
    models, ratio = transformers(pipe), None
    if len(models) > 1:
        ratio = pipe.config.get("boundary_ratio")
    first = len(models) < 2 or models["transformer"] is model
    edge = 0.0 if ratio is None else ratio * count
    return tuple(
        noise_level(scheduler, time) for time in map(float, timesteps) if (time >= edge) is first
    )


def noise_level(scheduler: Any, time: float) -> float:
    """Noise level in [0, 1] of a scheduler's timestep."""
    if tells_angles(scheduler):
        noise, signal = math.sin(time), math.cos(time)
        return noise / (noise + signal)
    return time / scheduler.config.num_train_timesteps


def told_level(scheduler: Any, time: float) -> float:
    """Noise level that a model hears of a timestep, which it divides by 1000."""
    return noise_level(scheduler, time) if tells_angles(scheduler) else time / 1000


def tells_angles(scheduler: Any) -> bool:
    """Whether timesteps are angles between signal and noise (sCM 2410.11081, SANA-Sprint)."""
    return any(cls.__name__ == "SCMScheduler" for cls in type(scheduler).__mro__)
