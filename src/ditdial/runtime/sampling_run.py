"""One run of a pipeline, as an elastic model sees it: where a call stands, and what came before."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ditdial.backbones import Backbone
from ditdial.host.callers import Caller
from ditdial.host.pipelines import noise_level, steps_of, told_level
from ditdial.host.weights import versions
from ditdial.plan.report import CallRecord
from ditdial.runtime.chooser import Choosing
from ditdial.runtime.guidance import Remembered
from ditdial.runtime.pictures import Group
from ditdial.runtime.prompts import Prompts


@dataclass(eq=False)
class SamplingRun:
    """From the first model call of a run to its last.

    Attributes:
        number: of the run; what was computed in another may be stale.
        prompts: that it has seen.
        choosing: how its modes are chosen.
        levels: noise levels of its calls; empty where no scheduler tells them.
        timesteps: of its scheduler, as they were when it began.
        exact: noise levels as the scheduler knows them, by what a model is told.
        calls: those that were made.
        branch: name of the branch that the present call is for, if the pipeline or its guider
            tells.
        groups: how the pictures of the present step run.
        remembered: the conditional call of the present step, if its guidance call needs it.
        previous: latent, its state and noise level of the call before, where only that tells the
            branch.
    """

    number: int
    prompts: Prompts
    choosing: Choosing
    levels: tuple[float, ...] = ()
    timesteps: Any = None
    exact: dict[float, float] = field(default_factory=dict)
    calls: list[CallRecord] = field(default_factory=list)
    branch: str | None = None
    groups: list[Group] = field(default_factory=list)
    remembered: Remembered | None = None
    previous: tuple[weakref.ref[Tensor], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "previous": None, "remembered": None, "timesteps": None}

    def begin(self, caller: Caller, levels: tuple[float, ...]) -> None:
        """The first call is about to be made."""
        self.levels, scheduler = levels, caller.scheduler
        self.timesteps = getattr(scheduler, "timesteps", None)
        if self.timesteps is not None:
            self.exact = {
                told_level(scheduler, time): noise_level(scheduler, time)
                for time in steps_of(scheduler).tolist()
            }

    def goes_on(self, caller: Caller, level: float) -> bool:
        """Whether a call belongs to this run.

        A scheduler that has new timesteps begins another. So does a noise level that goes up in a
        loop of the user's own; within one call of a pipeline it may (inversion).
        """
        if getattr(caller.scheduler, "timesteps", None) is not self.timesteps:
            return False
        last = self.calls[-1].level if self.calls else None
        return bool(caller.facts) or last is None or level <= last

    def as_planned(self, level: float, rounding: float) -> float:
        """A noise level that the model was told, as the scheduler knows it.

        Some pipelines (FLUX) cast times to the latents' dtype, and a rounded level may lie on the
        other side of a segment's edge than the planned one.

        Args:
            rounding: relative error that the told one may have.
        """
        if level in self.exact or not self.exact:
            return self.exact.get(level, level)
        told = min(self.exact, key=lambda each: abs(each - level))
        return self.exact[told] if abs(told - level) <= rounding * level else level

    def calls_by_branch(self, backbone: Backbone, caller: Caller) -> bool:
        """Whether the pipeline calls the model once per guidance branch."""
        by_itself = backbone.arguments.conditional_first is None
        return self.branch is not None or (by_itself and caller.pipe is not None)

    def is_guidance(self, backbone: Backbone, caller: Caller, latent: Tensor, level: float) -> bool:
        """Whether a call is the guidance branch of a pipeline that calls once per branch.

        The pipeline's ``cache_context`` tells, or its guider. One that has neither gives the same
        latent again.
        """
        if self.branch is not None:
            return backbone.arguments.is_guidance(self.branch)
        if backbone.arguments.conditional_first is not None or caller.pipe is None:
            return False
        seen = (versions(latent), level)
        before, self.previous = self.previous, (weakref.ref(latent), seen)
        if before is None or before[0]() is not latent or before[1] != seen:
            return False
        self.previous = None
        return True
