"""The handle of an elastic model: what its owner sets, asks and undoes.

It computes nothing itself: each of its names is a question to the engine, or a wish that is checked
before the engine is told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ditdial.adapter import Adapter, identity
from ditdial.backbones import Backbone
from ditdial.cost.shape import TransformerShape
from ditdial.measure.calibrate import Measuring, calibrate, time_modes
from ditdial.methods import Method
from ditdial.ops.patching import Triple
from ditdial.plain.checks import require
from ditdial.plain.kinds import check_kind, checked
from ditdial.plan.budget import Budget
from ditdial.plan.calibration import Calibration
from ditdial.plan.controller import Controller
from ditdial.plan.execution import Execution
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.plan import Plan
from ditdial.plan.report import Report
from ditdial.plan.schedule import Schedule
from ditdial.plan.solved import Offers
from ditdial.runtime.engine import Engine
from ditdial.runtime.model_class import check_modes, engine_of, uninstall
from ditdial.runtime.planning import Planning


class Handle:
    """Owns what `elastify` changed. Use it as a context manager to undo at the end of a block.

    A handle that was removed, or whose model was made elastic again, answers nothing but `remove`.

    Attributes:
        model: the elastic transformer.
    """

    __slots__ = ("__weakref__", "_engine", "model")

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self.model = model
        self._engine = engine

    def _live(self) -> Engine:
        if engine_of(self.model) is not self._engine:
            raise RuntimeError("this handle was removed or replaced; elastify again")
        return self._engine

    @property
    def _planning(self) -> Planning:
        return Planning(self._live(), self.model)

    def _check_modes(self, modes: set[Mode], who: str) -> None:
        check_modes(self.model, self.backbone, self.method, modes, who)

    @property
    def method(self) -> Method:
        """The method in use."""
        return self._live().method

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Full mode and the method's coarse modes, as far as they fit the model."""
        return (FULL, *self._live().chooser.modes)

    @property
    def backbone(self) -> Backbone:
        """What is known of the model's class."""
        return self._live().wiring.backbone

    @property
    def shape(self) -> TransformerShape:
        """What the cost of a pass depends on, at the model's usual size."""
        return self._live().shape(self.model)

    @property
    def schedule(self) -> Schedule:
        """Noise level -> mode of the next runs.

        Setting one replaces a controller or a budget.

        Raises:
            ValueError: no schedule, or one that asks for a mode the adapter lacks.
        """
        return self._live().chooser.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        engine = self._live()
        legal = "a Schedule, as Schedule.constant(Mode(2)) makes one"
        require(isinstance(schedule, Schedule), "schedule", schedule, legal)
        self._check_modes(schedule.modes, "schedule")
        engine.chooser.use(schedule)

    @property
    def controller(self) -> Controller | None:
        """What chooses the modes of the next runs while they sample; None if the schedule does.

        Setting a schedule or a budget replaces it.

        Raises:
            ValueError: no controller, or one that may choose a mode the adapter lacks.
        """
        return self._live().chooser.controller

    @controller.setter
    def controller(self, controller: Controller | None) -> None:
        engine = self._live()
        if controller is not None:
            legal = "a Controller, or None to leave the choice to the schedule"
            require(isinstance(controller, Controller), "controller", controller, legal)
            self._check_modes(controller.modes, "controller")
        engine.chooser.use(controller)

    @property
    def budget(self) -> float | Budget | None:
        """What the next runs may take; None if their modes were chosen otherwise.

        Setting it, to a share of the full run's FLOPs or a `Budget`, has every run planned for its
        own noise levels, at the least damage by the adapter's calibration; 1 is the first choice of
        the calibration throughout, usually the base's own run. Without a calibration it runs as few
        of the noisiest steps weak as it has to. Of a pipeline with two transformers, it is a share
        of the steps of this one.

        It is never exceeded, and may not be spent: a few steps have few costs to choose from, and
        what costs more does not always err less. ``plan(steps)`` tells the ``ratio`` that a run
        will take beside the ``budget`` it is allowed, and so does its report.

        Raises:
            ValueError: no number in (0, 1], below the cheapest plan, or one that asks for what was
                not measured, or not on this device.
        """
        return self._live().chooser.budget

    @budget.setter
    def budget(self, budget: float | Budget) -> None:
        number = isinstance(budget, int | float) and not isinstance(budget, bool)
        legal = "a share of the full cost in (0, 1], or a Budget (a schedule replaces a budget)"
        require(number or isinstance(budget, Budget), "budget", budget, legal)
        self._planning.spend(budget)

    @property
    def calibration(self) -> Calibration | None:
        """What was measured of the present weights, for the budgets that are set from now on.

        Raises:
            ValueError: no calibration, or one of another base or method.
        """
        return self._live().chooser.calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        engine = self._live()
        if calibration is not None:
            legal = "a Calibration, or None"
            require(isinstance(calibration, Calibration), "calibration", calibration, legal)
            calibration.check(self.backbone.identity(self.model), identity(self.method))
        engine.chooser.calibration = calibration

    def calibrate(
        self, sample: Callable[[int], object], *, only_seconds: bool = False, **settings: Any
    ) -> Calibration:
        """Measure a calibration and use it; see `ditdial.measure.calibrate.calibrate`.

        Args:
            sample: calls the pipeline for a batch: ``sample(0)``, ``sample(1)``, ...
            only_seconds: keep the errors, and measure what each mode takes on this device.
            settings: of `ditdial.measure.calibrate.Measuring`; its ``guidance_scale`` is needed,
                and its ``reference`` says what the choices are compared with at each noise level.
                With ``only_seconds``, ``rounds`` alone.

        Raises:
            ValueError: a setting out of range, or only seconds without a calibration.
        """
        check_kind("sample", sample, Callable)
        check_kind("only_seconds", only_seconds, bool)
        place = self._live(), self.model, self._planning.pipe
        known = self.calibration
        if not only_seconds:
            measured = calibrate(*place, sample, Measuring(**settings))
        elif known is None:
            raise ValueError("only_seconds = True; legal with a calibration: this adapter has none")
        else:
            measured = known.with_seconds(time_modes(*place, sample, **settings))
        self.calibration = measured
        return measured

    @checked
    def frontier(
        self,
        num_inference_steps: int,
        *,
        guidance: bool = True,
        scheduler: Any = None,
        currency: str = "flops",
        criterion: str = "path",
        count: int = 50,
    ) -> Offers:
        """What budgets buy: the best plans of a run, cheapest first.

        Args:
            guidance, scheduler: as in `plan`.
            currency, criterion: as in `Budget`.
            count: of evenly spaced budgets; fewer offers come back where several buy the same.

        Raises:
            ValueError: no calibration, or one without what is asked for.
        """
        require(type(count) is int and count >= 1, "count", count, "a whole number >= 1")
        levels = self._levels(num_inference_steps, scheduler)
        return self._planning.offers(
            levels, guidance=guidance, currency=currency, criterion=criterion, count=count
        )

    def _levels(
        self, steps: int, scheduler: Any, grid: Triple | None = None, strength: float = 1.0
    ) -> tuple[float, ...]:
        require(type(steps) is int, "num_inference_steps", steps, "a whole number >= 1")
        legal = "a diffusers scheduler, or None for the pipeline's"
        fits = scheduler is None or hasattr(scheduler, "set_timesteps")
        require(fits and not isinstance(scheduler, type), "scheduler", scheduler, legal)
        return self._planning.levels(steps, scheduler, grid, strength)

    @property
    def execution(self) -> Execution:
        """How calls are run: time for memory, with the same results but for rounding.

        ``handle.execution = Execution(merge=True)`` replaces all of it.

        Raises:
            ValueError: what the model's class or the method does not allow.
        """
        return self._live().execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        legal = "an Execution, as Execution(merge=True)"
        require(isinstance(execution, Execution), "execution", execution, legal)
        self._live().execution = execution

    @checked
    def plan(
        self,
        num_inference_steps: int,
        *,
        guidance: bool | Sequence[int] = True,
        strength: float = 1.0,
        scheduler: Any = None,
        grid: Triple | None = None,
        text_tokens: int | tuple[int, int] | None = None,
        reference_tokens: int = 0,
        token_times: bool | None = None,
    ) -> Plan:
        """The modes and the cost of a run, before it is made.

        Of a pipeline with two transformers, the steps of this one.

        Args:
            guidance: whether the run uses a guidance branch (a guidance scale above 1), or how many
                passes each of its steps makes, where they are not alike (1 without guidance, 2
                with, 3 where a layer is skipped in one more).
            strength: of an image-to-image run, which leaves out the first steps.
            scheduler: a diffusers scheduler; the pipeline's own by default. It is not changed.
            grid: base tokens ``(frames, height, width)``; the model's native size by default.
            text_tokens: text tokens of one prompt, or of the prompt and of the guidance branch's;
                the pipeline's usual number by default.
            reference_tokens: base tokens of given pictures in the same sequence (FLUX Kontext,
                FLUX.2, Qwen-Image's edits); they are as many in every mode.
            token_times: whether each token has a time of its own, as where first frames are given
                (Wan, LTX); what the pipeline usually does by default.

        Raises:
            ValueError: no scheduler, fewer than one step, none at which this model is called, or
                a value out of range.
        """
        return self.plan_levels(
            self._levels(num_inference_steps, scheduler, grid, strength),
            guidance=guidance,
            grid=grid,
            text_tokens=text_tokens,
            reference_tokens=reference_tokens,
            token_times=token_times,
        )

    @checked
    def plan_levels(
        self,
        levels: Sequence[float],
        *,
        guidance: bool | Sequence[int] = True,
        grid: Triple | None = None,
        text_tokens: int | tuple[int, int] | None = None,
        reference_tokens: int = 0,
        token_times: bool | None = None,
    ) -> Plan:
        """`plan` for given noise levels, one per step."""
        return self._planning.plan(
            levels,
            guidance=guidance,
            grid=grid,
            text_tokens=text_tokens,
            reference_tokens=reference_tokens,
            token_times=token_times,
        )

    def report(self) -> Report:
        """What the last run really did."""
        run = self._live().position.run
        return Report(tuple(run.calls), budget=run.choosing.allowed)

    @contextlib.contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """Run every call in one mode, whatever the timesteps (for training and tests).

        Raises:
            ValueError: a mode the adapter lacks.
        """
        engine = self._live()
        require(isinstance(mode, Mode), "mode", mode, "a Mode")
        if not engine.method.has(mode):
            raise ValueError(f"mode {mode.name!r}; legal: {', '.join(m.name for m in self.modes)}")
        self.backbone.check(self.model, {mode})
        with engine.forced(mode):
            yield

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Run every call as the base does, for a block, and go on as before then."""
        return self.using(FULL)

    def adapter(self, **notes: Any) -> Adapter:
        """The present weights as an adapter, with the calibration that is in use."""
        adapter = self._live().adapter(self.model, **notes)
        return replace(adapter, calibration=self.calibration)

    def save(self, folder: str | Path, **notes: Any) -> Path:
        """Write the present weights as an adapter; see `Adapter.save_pretrained`."""
        return self.adapter(**notes).save_pretrained(folder)

    def remove(self) -> None:
        """Restore the stock model, bit for bit. Safe to call twice."""
        if engine_of(self.model) is self._engine:
            uninstall(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
