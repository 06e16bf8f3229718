"""The position of a call in its run: noise level, first call or a later one, guidance or not.

diffusers' pipelines tell their models none of this. It is read from the scheduler that is at work,
from the name of the ``cache_context`` that is open, and from the latent.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ditdial.backbones import Backbone
from ditdial.backbones.arguments import Call
from ditdial.host.pipelines import TRANSFORMERS, called_levels
from ditdial.host.weights import versions

ROUNDING = 2**-7
"""Relative error of a time that was divided and rounded in bfloat16 (2^-9 each time), with room."""


@dataclass(eq=False)
class Position:
    """Of one elastic model's runs.

    Attributes:
        pipe: a weak reference to the pipeline that the model was made elastic in.
        context: name and facts of the ``cache_context`` that the pipeline has opened: its branch.
        seen_timesteps: those of the run that was seen last.
        exact_levels: the scheduler's timesteps, and their noise levels, by what is told of them.
        previous: latent, its state and noise level of the call before, where only that tells the
            branch.
    """

    backbone: Backbone
    pipe: Any = None
    context: tuple[str, dict[str, Any]] | None = None
    seen_timesteps: Any = None
    exact_levels: tuple[Any, dict[float, float]] = (None, {})
    previous: tuple[weakref.ref[Tensor], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "previous": None}

    @property
    def branch(self) -> str | None:
        """Name of the branch that the pipeline calls the model for, if it tells."""
        return None if self.context is None else self.context[0]

    def pipe_of(self, model: nn.Module) -> Any:
        """The pipeline, if it is alive and this very model is in it (a copy's is another one).

        Both of Wan 2.2's transformers are looked at, and a model that `torch.compile` has wrapped.
        """
        pipe = self.pipe() if self.pipe is not None else None
        for name in TRANSFORMERS:
            owned = getattr(pipe, name, None)
            if owned is model or getattr(owned, "_orig_mod", None) is model:
                return pipe
        return None

    def _scheduler(self, model: nn.Module) -> tuple[Any, Any]:
        """The present scheduler of the pipeline and its timesteps; None for a bare model."""
        scheduler = getattr(self.pipe_of(model), "scheduler", None)
        return scheduler, getattr(scheduler, "timesteps", None)

    def level(self, model: nn.Module, call: Call) -> tuple[float, float]:
        """Lowest and highest noise level of a call's rows, as exact as the scheduler knows them.

        Some pipelines (FLUX) cast the time to the dtype of the latents, and a rounded level may lie
        on the other side of a segment's edge than the planned one.
        """
        low, high = self.backbone.times.levels(call)
        if low != high:
            return low, high
        return (self.as_planned(model, high),) * 2

    def calls_by_branch(self, model: nn.Module) -> bool:
        """Whether the pipeline calls the model once per guidance branch."""
        by_itself = self.backbone.arguments.conditional_first is None
        return self.context is not None or (by_itself and self.pipe_of(model) is not None)

    def levels_ahead(self, model: nn.Module) -> tuple[float, ...]:
        """Noise levels of a run's calls; none where no scheduler tells them."""
        scheduler, timesteps = self._scheduler(model)
        if timesteps is None:
            return ()
        return called_levels(self.pipe_of(model), model, scheduler)

    def as_planned(self, model: nn.Module, level: float) -> float:
        """A noise level that the model was told, as the scheduler knows it.

        FLUX's pipeline casts times to the latents' dtype. A level within bfloat16's rounding of a
        known one is that one; any other is taken as it was told.
        """
        scheduler, timesteps = self._scheduler(model)
        if timesteps is None:
            return level
        if timesteps is not self.exact_levels[0]:
            scale = scheduler.config.num_train_timesteps
            self.exact_levels = timesteps, {t / 1000: t / scale for t in timesteps.tolist()}
        levels = self.exact_levels[1]
        if level in levels:
            return levels[level]
        told = min(levels, key=lambda each: abs(each - level))
        return levels[told] if abs(told - level) <= ROUNDING * level else level

    def starts_run(self, model: nn.Module, level: float, last: float | None) -> bool:
        """A run starts when the scheduler has new timesteps, or the noise level goes up again.

        Args:
            last: level of the call before.
        """
        _, timesteps = self._scheduler(model)
        if timesteps is not None and timesteps is not self.seen_timesteps:
            self.seen_timesteps = timesteps
            return True
        return last is not None and level > last

    def is_guidance(self, model: nn.Module, latent: Tensor, level: float) -> bool:
        """Whether a call is the guidance branch of a pipeline that calls once per branch.

        The pipeline's ``cache_context`` tells. One that opens none gives the same latent again.
        """
        if self.context is not None:
            return self.context[0] in self.backbone.arguments.contexts
        if self.backbone.arguments.conditional_first is not None or self.pipe_of(model) is None:
            return False
        seen = (versions(latent), level)
        before, self.previous = self.previous, (weakref.ref(latent), seen)
        if before is None or before[0]() is not latent or before[1] != seen:
            return False
        self.previous = None
        return True
