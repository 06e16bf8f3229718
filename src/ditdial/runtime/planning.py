"""What a run will do and cost, before it is made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ditdial.host.device import device_name
from ditdial.host.pipelines import later_steps, levels_of, steps_of
from ditdial.host.step_caches import has_step_cache
from ditdial.ops.patching import Triple
from ditdial.plain.checks import require, whole
from ditdial.plan.budget import Budget
from ditdial.plan.controller import BudgetController, Controller
from ditdial.plan.facts import Facts, Passes
from ditdial.plan.mode import FULL
from ditdial.plan.plan import MOST_STEPS, Plan
from ditdial.plan.solved import Offers, SolvedBudget
from ditdial.plan.weak_first import WeakFirstBudget
from ditdial.runtime.engine import Engine

MOST_TOKENS = 10**9
"""Of given pictures, more than any model takes."""


@dataclass(frozen=True)
class Planning:
    """For the runs of one elastic model."""

    engine: Engine
    model: nn.Module

    @property
    def pipe(self) -> Any:
        """The pipeline that the model is part of, if it was given with one."""
        return self.engine.position.pipe_of(self.model)

    def levels(
        self,
        num_inference_steps: int,
        scheduler: Any = None,
        grid: Triple | None = None,
        strength: float = 1.0,
    ) -> tuple[float, ...]:
        """Noise levels at which a pipeline will call the model, one per step.

        Raises:
            ValueError: no scheduler, fewer than one step, a strength out of range, or no step at
                which this model is called.
        """
        backbone, pipe = self.engine.wiring.backbone, self.pipe
        scheduler = scheduler if scheduler is not None else getattr(pipe, "scheduler", None)
        if scheduler is None:
            raise ValueError("scheduler = None; a bare model has none of its own, so pass one")
        whole("num_inference_steps", num_inference_steps, 1, MOST_STEPS)
        if not 0 < strength <= 1:
            raise ValueError(f"strength = {strength}; legal: above 0, up to 1")
        scheduler = copy.deepcopy(scheduler)
        grid = grid or self.engine.shape(self.model).grid
        backbone.times.set_timesteps(scheduler, num_inference_steps, grid, pipe)
        steps = steps_of(scheduler, pipe)
        if strength < 1:
            steps = later_steps(pipe, scheduler, num_inference_steps, strength)
        levels = levels_of(pipe, self.model, scheduler, steps.tolist())
        if not len(steps):
            raise ValueError(
                f"strength = {strength} leaves none of {num_inference_steps} steps; legal: at "
                f"least {1 / num_inference_steps:.4g}"
            )
        if not levels:
            raise ValueError(
                f"num_inference_steps = {num_inference_steps}; at none of them does the pipeline "
                "call this transformer (boundary_ratio gives them all to the other one)"
            )
        return levels

    def plan(
        self,
        levels: Sequence[float],
        *,
        guidance: bool | Sequence[int] = True,
        grid: Triple | None = None,
        text_tokens: int | tuple[int, int] | None = None,
        **more: Any,
    ) -> Plan:
        """The modes and the cost of a run at given noise levels.

        Args:
            more: what else the size of its calls holds; see `Backbone.planned_size`.

        Raises:
            ValueError: passes of another number of steps, or something that the class has not.
        """
        engine, backbone = self.engine, self.engine.wiring.backbone
        usual_grid, usual_text = backbone.default_size(self.model)
        text = usual_text if text_tokens is None else text_tokens
        whole("reference_tokens", more.get("reference_tokens", 0), 0, MOST_TOKENS)
        both: Any = (text, text) if type(text) is int else text
        pair = isinstance(both, tuple | list) and [type(each) for each in both] == [int, int]
        legal = "a whole number, or two: of the prompt, and of the guidance branch's"
        require(pair and min(both) >= 0, "text_tokens", text, legal)
        shape, other = (
            engine.shape(
                self.model, backbone.planned_size(grid or usual_grid, each, self.pipe, **more)
            )
            for each in both
        )
        passes = {} if isinstance(guidance, bool) else _passes(guidance, levels)
        facts = Facts(
            levels=tuple(levels),
            macs=shape.macs,
            guided=any(each.guided for each in passes.values()) if passes else bool(guidance),
            passes=passes,
            guide_macs=other.macs,
        )
        keeps = engine.execution.keep_text and engine.passes.compiled.own is None
        return Plan.of(
            engine.chooser.planned(facts),
            facts,
            packed=engine.execution.packed,
            kept=shape.text_tokens * shape.text_once if keeps else 0.0,
            together=backbone.arguments.conditional_first is not None,
            budget=engine.chooser.share,
            grid=grid or usual_grid,
            text_tokens=text,
            step_cache=has_step_cache(self.model),
            budgets=self._dial.shares(facts) if engine.chooser.modes else (),
            by_rule=engine.chooser.by_rule,
        )

    @property
    def _dial(self) -> BudgetController:
        """What spends a budget of FLOPs."""
        chooser = self.engine.chooser
        if chooser.calibration is not None:
            return self._solved(Budget(1.0))
        return WeakFirstBudget(share=1.0, coarse=chooser.modes)

    def offers(
        self,
        levels: Sequence[float],
        *,
        guidance: bool = True,
        currency: str = "flops",
        criterion: str = "path",
        count: int = 50,
    ) -> Offers:
        """What budgets buy at given noise levels: the best plans, cheapest first."""
        controller = self._solved(Budget(1.0, currency, criterion=criterion))
        macs = self.engine.shape(self.model).macs
        facts = Facts(levels=tuple(levels), macs=macs, guided=guidance)
        return controller.offers(facts, count)

    def spend(self, budget: float | Budget) -> None:
        """Have every run planned for its own noise levels within a budget.

        Raises:
            ValueError: outside (0, 1], below the cheapest plan, or one that asks for what was not
                measured, or not on this device.
        """
        chooser = self.engine.chooser
        facts = Facts(levels=(), macs=self.engine.shape(self.model).macs)
        asked = budget if isinstance(budget, Budget) else Budget(budget)
        controller: Controller | None
        if chooser.calibration is not None:
            controller = self._solved(asked)
            schedule = controller.begin(facts)
        else:
            if asked != Budget(asked.share):
                raise ValueError(
                    f"budget = {asked} needs a calibration, and this adapter has none; legal: a "
                    "share of the FLOPs (handle.calibrate measures one)"
                )
            controller = WeakFirstBudget(share=asked.share, coarse=chooser.modes)
            schedule = controller.begin(facts)
            if len(schedule.modes) == 1:  # whatever the levels
                controller = None
        chooser.controller, chooser.schedule, chooser.budget = controller, schedule, budget
        chooser.by_rule = chooser.calibration is None and schedule.modes != {FULL}

    def _solved(self, budget: Budget) -> SolvedBudget:
        calibration = self.engine.chooser.calibration
        if calibration is None:
            raise ValueError("this adapter has no calibration; handle.calibrate measures one")
        seconds = None
        if budget.currency == "seconds":
            own, pipe = next(self.model.parameters()).device, self.pipe
            device = own if pipe is None else pipe._execution_device  # offloaded weights lie idle
            seconds = calibration.seconds_on(device_name(device))
        return SolvedBudget(calibration=calibration, budget=budget, seconds=seconds)


def _passes(counts: Sequence[int], levels: Sequence[float]) -> dict[float, Passes]:
    """Passes by noise level, of those of each step.

    Raises:
        ValueError: not one number for each step.
    """
    if len(counts) != len(levels) or not all(count in (1, 2, 3) for count in counts):
        raise ValueError(
            f"guidance = {list(counts)}; legal: True, False, or the number of passes (1 to 3) in "
            f"each of the {len(levels)} steps"
        )
    return dict(zip(levels, map(Passes.of, counts), strict=True))
