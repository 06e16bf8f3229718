"""Onlookers: observers of an engine that look at every call of a real run while it is made.

At each model call of a run the other modes predict from the same inputs, in both branches. For the
predictions c and g of a choice's branches and the pipeline's scale s, what the pipeline makes of
them is ``c + gain (s - 1)(c - g)``; so one prediction per mode and branch tells the error of every
choice. What is compared are the clean latents that the predictions imply, with those of the choice
that the reference makes at this noise level.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.backbones.arguments import Call
from ditdial.host.device import device_name
from ditdial.host.parametrization import Parametrization
from ditdial.measure.bench import interleave
from ditdial.plan.calibration import Point
from ditdial.plan.choice import Choice
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule
from ditdial.plan.seconds import Seconds
from ditdial.runtime.engine import Engine, Observer
from ditdial.runtime.latents import shared_part

Predictions = dict[Mode, Tensor]
"""What each mode predicts of the same latents."""


@contextlib.contextmanager
def observed(engine: Engine, schedule: Schedule, *observers: Observer) -> Iterator[None]:
    """Run a schedule for a while, with observers of every call; then all is as it was."""
    chooser = engine.chooser
    kept = dict(vars(chooser))
    observers_before = engine.observers
    chooser.use(schedule)
    engine.observers = [*engine.observers, *observers]
    try:
        yield
    finally:
        vars(chooser).update(kept)
        engine.observers = observers_before


@contextlib.contextmanager
def final_latents(pipe: Any) -> Iterator[list[Tensor]]:
    """What the scheduler's last step returned: the final latents of the pipeline's last run.

    The scheduler's ``step`` is wrapped on the instance, since nothing else sees the latents of all
    pipelines: those of DiT and PixArt have no ``callback_on_step_end``, and what a pipeline is
    asked to return, pictures or latents, is up to whoever calls it.
    """
    found: list[Tensor] = []
    own = vars(pipe.scheduler)
    before = {"step": own["step"]} if "step" in own else {}  # what somebody else put there
    step = pipe.scheduler.step

    @functools.wraps(step)  # pipelines read its signature
    def kept(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        found[:] = [result[0]]
        return result

    pipe.scheduler.step = kept
    try:
        yield found
    finally:
        del pipe.scheduler.step
        own.update(before)


@dataclass(eq=False)
class Clock:
    """Times the first call that it sees, in every mode, both branches together and one alone.

    Attributes:
        seconds: what the call took; None until there was one.
    """

    engine: Engine
    pipe: Any
    modes: Sequence[Mode]
    rounds: int
    seconds: Seconds | None = None

    @torch.no_grad()
    def __call__(self, model: nn.Module, call: Call, output: Any) -> None:
        """Look at a call."""
        if self.seconds is not None:
            return
        arguments = self.engine.wiring.backbone.arguments
        caller = self.engine.position.caller(model)
        branches = arguments.branches(model, call, caller.guided)
        alone = call if branches is None else arguments.rows(call, branches.conditional)
        latent = arguments.latent(alone)
        calls = {"alone": alone} if branches is None else {"alone": alone, "together": call}
        runs = {
            f"{kind} {mode.name}": functools.partial(self.engine.passes.run, model, each, mode)
            for mode in self.modes
            for kind, each in calls.items()
        }
        timings = interleave(runs, rounds=self.rounds, warmup=1)
        medians = {
            kind: {mode.name: timings[f"{kind} {mode.name}"].median for mode in self.modes}
            for kind in calls
        }
        self.seconds = Seconds(device=device_name(latent.device), rows=len(latent), **medians)


@dataclass(eq=False)
class Errors:
    """Squared errors of all choices, summed up by noise level.

    Args:
        reference: what errors are differences to, in the words of the choices.
        scale: guidance scale of the pipeline.
        told: what a prediction says about the clean latent.
        mixed: predictions of a choice's branches as guidance is given them.
    """

    choices: Sequence[Choice]
    reference: Schedule
    scale: float
    told: Parametrization
    mixed: Callable[[Choice, Tensor, Tensor], tuple[Tensor, Tensor]]
    sums: dict[float, Tensor] = field(default_factory=dict)
    rows: dict[float, int] = field(default_factory=dict)

    @property
    def pictures(self) -> int:
        """How many were looked at."""
        return max(self.rows.values())

    def add(self, level: float, c: Predictions, g: Predictions | None) -> None:
        """Add those of one step.

        Args:
            c, g: predictions of the conditional and the guidance branch; no g without guidance.
        """
        made = [self._made(choice, c, g) for choice in self.choices]
        own = self.choices.index(self.reference.at(level).choice)
        modes = dict.fromkeys(choice.mode for choice in self.choices)
        errors = [self._error(level, x - made[own]) for x in made]
        errors += [self._error(level, c[mode] - c[self.choices[own].mode]) for mode in modes]
        self.sums[level] = self.sums.get(level, 0) + torch.stack(errors)
        self.rows[level] = self.rows.get(level, 0) + len(made[0])

    def _made(self, choice: Choice, c: Predictions, g: Predictions | None) -> Tensor:
        """What the pipeline makes of the predictions of a choice."""
        own = c[choice.mode]
        if g is None:
            return own
        own, guide = self.mixed(choice, own, (c if choice.weak_guidance else g)[choice.guide_mode])
        return own + choice.gain * (self.scale - 1) * (own - guide)

    def _error(self, level: float, difference: Tensor) -> Tensor:
        """Sum over the rows of the mean squared difference of the clean latents."""
        clean = self.told.clean(level, torch.zeros_like(difference), difference)
        return clean.flatten(1).square().mean(dim=1).sum().double().cpu()

    def points(self) -> tuple[Point, ...]:
        """Mean errors by falling noise level."""
        count, found = len(self.choices), []
        for level in sorted(self.sums, reverse=True):
            errors = (self.sums[level] / self.rows[level]).tolist()
            step, branch = tuple(errors[:count]), tuple(errors[count:])
            found.append(Point(level=level, step_error=step, branch_error=branch))
        return tuple(found)


@dataclass(eq=False)
class Onlooker:
    """Has every mode predict what each call predicts, and adds up the errors of whole steps.

    Attributes:
        calls: how many it saw.
        guided: whether one of them was, or held, a guidance branch.
        waiting: of a pipeline that makes a call per branch, the one that came first, by whether it
            is the guidance branch: its noise level, its latent and the predictions.
    """

    engine: Engine
    pipe: Any
    errors: Errors
    calls: int = 0
    guided: bool = False
    waiting: dict[bool, tuple[float, Tensor, Predictions]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, model: nn.Module, call: Call, output: Any) -> None:
        """Look at a call; branches that come one after the other wait for each other."""
        self.calls += 1
        arguments = self.engine.wiring.backbone.arguments
        caller = self.engine.position.caller(model)
        branches = arguments.branches(model, call, caller.guided)
        latent, level = arguments.latent(call), self.engine.position.run.calls[-1].level
        assert level is not None
        found = self._predict(model, call, output, latent, level)
        if branches is not None:
            self.guided = True
            c = {mode: x[branches.conditional] for mode, x in found.items()}
            g = {mode: x[branches.guidance] for mode, x in found.items()}
            self.errors.add(level, c, g)
            return
        guides = self._guides(level, latent)
        if self.errors.scale == 1:
            self.guided |= guides
            self.errors.add(level, found, None)
            self.waiting[False] = level, latent.clone(), found
            return
        first = self.waiting.pop(not guides, None)
        if first is None or first[0] != level:
            self.waiting[guides] = level, latent.clone(), found
            return
        self.guided = True
        self.errors.add(level, *((first[2], found) if guides else (found, first[2])))

    def _guides(self, level: float, latent: Tensor) -> bool:
        """Whether a call is the guidance branch: by its name, or by the latent's second coming."""
        branch = self.engine.position.run.branch
        if branch is not None:
            return self.engine.wiring.backbone.arguments.is_guidance(branch)
        before = self.waiting.get(False)
        return before is not None and before[0] == level and torch.equal(before[1], latent)

    def _predict(
        self, model: nn.Module, call: Call, output: Any, latent: Tensor, level: float
    ) -> Predictions:
        """Of all rows, in every mode; a learned variance behind the prediction is cut off."""
        arguments, found = self.engine.wiring.backbone.arguments, {}
        plain = self.errors.reference.at(level).choice == Choice()
        for mode in modes_of(self.errors.choices):
            known = mode == FULL and plain  # the run itself has just predicted it
            own = output if known else self.engine.passes.run(model, call, mode)
            prediction = arguments.prediction(call, own)
            found[mode] = prediction[shared_part(latent, prediction)].float()
        return found


def modes_of(choices: Sequence[Choice]) -> list[Mode]:
    """Every mode of some choices once, in their order."""
    return list(dict.fromkeys(mode for x in choices for mode in (x.mode, x.guide_mode)))
