"""Who calls a model: the pipeline that is at work around the call, and what it shows of its run.

A model may be in several pipelines, each with a scheduler of its own, and none of them tells it who
they are. They are found on the stack: latents and prompts do not tell two prompts from equal noise
from two guidance branches, and image-to-image runs keep the timesteps that they make to themselves.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from ditdial.host.pipelines import holds, levels_of, steps_of, transformers
from ditdial.plan.facts import Passes

GUIDED = ("apply_cfg", "do_classifier_free_guidance", "do_true_cfg")
"""What pipelines call the fact that guidance is on: at a step, or in the run."""

UNEVEN = ("skip_guidance_layers", "cfg_trunc_ratio", "cfg_truncation")
"""Arguments that make the steps of a run differ in their passes."""

SCALES = ("true_cfg_scale", "guidance_scale")
"""What pipelines call the scale of guidance."""

NO_CALLERS = ("torch.", "ditdial.runtime.", "accelerate.")
"""Modules that lie between a pipeline and its model's stock forward."""

GUIDER = "__guidance_identifier__"
"""Attribute by which the guiders of modular pipelines tell for which prediction a call is made."""


@dataclass(frozen=True)
class Caller:
    """A pipeline in the middle of its call.

    Args:
        pipe: None for a bare model.
        facts: local variables of the pipeline's call; empty where it is not known, as in a loop of
            the user's own.
        inner: local variables of the functions in between, the inmost first (modular pipelines).
    """

    pipe: Any = None
    facts: MutableMapping[str, Any] = field(default_factory=dict)
    inner: tuple[Mapping[str, Any], ...] = ()

    @property
    def scheduler(self) -> Any:
        """The pipeline's; None for a bare model."""
        return getattr(self.pipe, "scheduler", None)

    @property
    def prediction(self) -> str | None:
        """Which prediction a guider wants of this call; None where no guider is at work."""
        for facts in self.inner:
            for value in facts.values():
                named = getattr(value, "__dict__", {}).get(GUIDER)
                if named is not None:
                    return named
        return None

    @property
    def guided(self) -> bool | None:
        """Whether guidance is on in the present call; None where nothing tells.

        Some pipelines have a local variable for it, which holds where they have both (a callback
        may change the guidance scale of a pipeline that has doubled its batch already).
        """
        guider = self._guider
        if guider is not None:
            return guider.num_conditions > 1
        if not self.facts:
            return None
        told = next((self.facts[name] for name in GUIDED if name in self.facts), None)
        if told is None:
            told = getattr(self.pipe, "do_classifier_free_guidance", None)
        if told is None and "class_labels" in self.facts:  # DiTPipeline
            return self.facts["guidance_scale"] > 1
        return told

    def guidance_scale(self, model: nn.Module) -> float | None:
        """The s of ``g + s (c - g)`` in the present call; None where nothing tells.

        Of two transformers, each has its own. Where there is true guidance beside a scale that is
        embedded in the prediction, it is that of true guidance.
        """
        if self._guider is not None:
            return getattr(self._guider, "guidance_scale", None)
        second = transformers(self.pipe).get("transformer_2") is model
        names = ("guidance_scale_2",) * second + SCALES
        found = [self.facts[x] for x in names if isinstance(self.facts.get(x), int | float)]
        counts_from_0 = type(self.pipe).__name__.startswith("ZImage")  # c + s (c - g)
        return float(found[0]) + counts_from_0 if found else None

    @property
    def perturbs(self) -> bool:
        """Whether a third group of rows is in the batch, for perturbed-attention guidance."""
        return bool(self.facts and getattr(self.pipe, "do_perturbed_attention_guidance", False))

    def levels(self, model: nn.Module) -> tuple[float, ...]:
        """Noise levels of the calls of this run; none where no scheduler tells them."""
        steps = self._steps()
        return levels_of(self.pipe, model, self.scheduler, steps) if steps else ()

    def passes(self, model: nn.Module) -> dict[float, Passes]:
        """Forward passes at the noise levels of this run, where they are not the same in all."""
        steps = self._steps()
        guider, found = self._guider, {}
        if guider is not None:
            guider = copy.copy(guider)
        elif all(self.facts.get(name) is None for name in UNEVEN):
            return {}
        for index, time in enumerate(steps):
            each = self._passes_of(guider, index, len(steps), time)
            found |= dict.fromkeys(levels_of(self.pipe, model, self.scheduler, [time]), each)
        return found

    def _passes_of(self, guider: Any, index: int, count: int, time: float) -> Passes:
        if guider is not None:
            guider.set_state(step=index, num_inference_steps=count, timestep=torch.tensor(time))
            return Passes.of(guider.num_conditions)
        guided, facts = bool(self.guided), self.facts
        if "cfg_trunc_ratio" in facts:  # Lumina 2: in the first steps
            return Passes(guided and (index + 1) / count <= facts["cfg_trunc_ratio"])
        if "cfg_truncation" in facts:  # Z-Image: at the first times, unless it is above 1
            end = float(facts["cfg_truncation"])
            clean = 1 - time / self.scheduler.config.num_train_timesteps
            on = getattr(self.pipe, "do_classifier_free_guidance", False)
            return Passes(bool(on) and (end > 1 or clean <= end))
        # Stable Diffusion 3 repeats the conditional branch without some layers.
        start, stop = (facts[f"skip_layer_guidance_{edge}"] for edge in ("start", "stop"))
        return Passes(guided, int(start * count < index < stop * count))

    def _steps(self) -> list[float]:
        """Timesteps of this run's steps: image-to-image leaves out the first of its scheduler's."""
        known = getattr(self.scheduler, "timesteps", None) is not None
        scheduled = steps_of(self.scheduler, self.pipe).tolist() if known else []
        for facts in (self.facts, *self.inner):
            block = facts.get("block_state")
            told = facts.get("timesteps", getattr(block, "timesteps", None))
            if isinstance(told, Tensor) and told.ndim == 1:
                own = told.tolist()
                # DiT's pipeline calls the equal times of a batch's rows by the same name.
                if own == scheduled[-len(own) :] or len(set(own)) == len(own) > 1:
                    return own
        return scheduled

    @property
    def _guider(self) -> Any:
        """What guides a modular pipeline."""
        return getattr(self.pipe, "guider", None) if self.inner else None


def caller_of(model: nn.Module, known: Any = None) -> Caller | None:
    """The pipeline that is in the middle of its call around this one; None for a bare call.

    A pipeline inside another one's callback is the one that calls.

    Args:
        known: a pipeline of the model that need not be of a class of diffusers.
    """
    inner: list[FrameType] = []
    for frame in _frames(sys._getframe(1)):
        pipe = _self_of(frame)
        if pipe is not None and pipe is known:
            break
        # Models are of this class too, and slow to ask for what they have not.
        may_be = isinstance(pipe, ConfigMixin) and not isinstance(pipe, nn.Module)
        if may_be and holds(pipe, model):
            break
        inner.append(frame)
    else:
        return None
    call = frame
    # Helpers come and go with each step. A pipeline whose call has another name is taken to be in
    # its outermost function.
    for outer in _frames(frame):
        if _self_of(outer) is pipe:
            call = outer
            if outer.f_code.co_name == "__call__":
                break
    blocks = (each for each in inner if "components" in each.f_code.co_varnames)
    return Caller(pipe, call.f_locals, tuple(each.f_locals for each in blocks))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _self_of(frame: FrameType) -> Any:
    """Whose method a frame is of."""
    # A look at the names first: to ask for the variables copies all of them.
    code, owner = frame.f_code, frame.f_globals.get("__name__", "")
    if not code.co_argcount or code.co_varnames[0] != "self" or owner.startswith(NO_CALLERS):
        return None
    return frame.f_locals.get("self")
