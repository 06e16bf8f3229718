"""The handle of an elastic model: what its owner sets, asks and undoes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ditdial.adapter import Adapter, identity
from ditdial.backbones import Backbone
from ditdial.checks import did_you_mean
from ditdial.cost.shape import TransformerShape
from ditdial.host.device import device_name
from ditdial.host.pipelines import called_levels
from ditdial.layers.packing import MASKED, Packing
from ditdial.measure.calibrate import Measuring, calibrate, time_modes
from ditdial.methods import Method
from ditdial.ops.patching import Triple
from ditdial.plan.budget import Budget
from ditdial.plan.calibration import Calibration
from ditdial.plan.controller import Controller, Facts
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.plan import Plan
from ditdial.plan.report import Report
from ditdial.plan.schedule import Schedule
from ditdial.plan.solved import Offers, SolvedBudget
from ditdial.plan.weak_first import WeakFirstBudget
from ditdial.runtime.engine import Engine
from ditdial.runtime.model_class import ENGINE
from ditdial.runtime.widths import Widths


class Handle:
    """Owns what `elastify` changed. Use it as a context manager to undo at the end of a block."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self.model = model
        self._engine = engine

    def _live(self) -> Engine:
        if self.model.__dict__.get(ENGINE) is not self._engine:
            raise RuntimeError("this handle was removed or replaced; elastify again")
        return self._engine

    def _check_modes(self, modes: set[Mode], who: str) -> None:
        check_modes(self.model, self.backbone, self.method, modes, who)

    @property
    def _pipe(self) -> Any:
        """The pipeline that the model is part of, if it was given with one."""
        return self._engine.timeline.pipe_of(self.model)

    @property
    def method(self) -> Method:
        """The method in use."""
        return self._engine.method

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Full mode and the method's coarse modes, as far as they fit the model."""
        return (FULL, *self._engine.modes)

    @property
    def backbone(self) -> Backbone:
        """What is known of the model's class."""
        return self._engine.router.backbone

    @property
    def sizes(self) -> nn.Module:
        """The parameters that belong to no stock module."""
        return self._engine.router.sizes

    @property
    def widths(self) -> Widths:
        """How much routed modes leave in; ``buckets`` and ``slices`` are for the user to set.

        Raises:
            ValueError: a method without routed modes.
        """
        if self._engine.surgery.widths is None:
            raise ValueError(
                f"method {self.method.name!r} has no routed modes; legal: dydit, or a combination "
                "with it"
            )
        return self._engine.surgery.widths

    @property
    def schedule(self) -> Schedule:
        """Noise level -> mode of the next runs."""
        return self._engine.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._live()
        self._check_modes(schedule.modes, "schedule")
        self._engine.schedule, self._engine.budget = schedule, None
        self._engine.controller = None

    @property
    def controller(self) -> Controller | None:
        """What chooses the modes of the next runs; None if that is the schedule.

        Setting a schedule or a budget replaces it.
        """
        return self._engine.controller

    @controller.setter
    def controller(self, controller: Controller | None) -> None:
        """Choose what chooses.

        Raises:
            ValueError: it may choose a mode the adapter lacks.
        """
        engine = self._live()
        if controller is not None:
            self._check_modes(controller.modes, "controller")
        engine.controller, engine.budget = controller, None

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
            ValueError: outside (0, 1], below the cheapest plan, or one that asks for what was not
                measured, or not on this device.
        """
        return self._engine.budget

    @budget.setter
    def budget(self, budget: float | Budget) -> None:
        engine, macs = self._live(), self.shape.macs
        asked = budget if isinstance(budget, Budget) else Budget(budget)
        if engine.calibration is None:
            if asked != Budget(asked.share):
                raise ValueError(
                    f"budget = {asked} needs a calibration, and this adapter has none; legal: a "
                    "share of the FLOPs (handle.calibrate measures one)"
                )
            controller = WeakFirstBudget(share=asked.share, coarse=engine.modes)
            schedule = controller.begin(Facts(levels=(), macs=macs))
            if len(schedule.modes) == 1:  # whatever the levels
                controller = None
        else:
            controller = self._solved(asked)
            schedule = controller.begin(Facts(levels=(), macs=macs))
        engine.controller, engine.schedule, engine.budget = controller, schedule, budget

    def _solved(self, budget: Budget) -> SolvedBudget:
        calibration, pipe = self._engine.calibration, self._pipe
        if calibration is None:
            raise ValueError("this adapter has no calibration; handle.calibrate measures one")
        seconds = None
        if budget.currency == "seconds":
            own = next(self.model.parameters()).device
            device = own if pipe is None else pipe._execution_device  # offloaded weights lie idle
            seconds = calibration.seconds_on(device_name(device))
        return SolvedBudget(calibration=calibration, budget=budget, seconds=seconds)

    @property
    def calibration(self) -> Calibration | None:
        """What was measured of the present weights, None if nothing was."""
        return self._engine.calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        """Use a calibration for the budgets that are set from now on.

        Raises:
            ValueError: it is of another base or method.
        """
        engine = self._live()
        if calibration is not None:
            calibration.check(self.backbone.identity(self.model), identity(self.method))
        engine.calibration = calibration

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
        known, place = self.calibration, (self._live(), self.model, self._pipe)
        if not only_seconds:
            measured = calibrate(*place, sample, Measuring(**settings))
        elif known is None:
            raise ValueError("only_seconds = True; legal with a calibration: this adapter has none")
        else:
            measured = known.with_seconds(time_modes(*place, sample, **settings))
        self.calibration = measured
        return measured

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
        controller = self._solved(Budget(1.0, currency, criterion=criterion))
        steps = self.plan(num_inference_steps, guidance=guidance, scheduler=scheduler).steps
        levels = tuple(step.level for step in steps)
        shape = self.shape
        facts = Facts(
            levels=levels,
            macs=shape.macs,
            guided=guidance,
            packing=self._engine.packing(shape),
        )
        return controller.offers(facts, count)

    @property
    def packed(self) -> Packing:
        """Run guidance branches of different modes in one packed call instead of two.

        True runs the attention of each branch by itself, ``"masked"`` that of both at once, under a
        block-diagonal mask: fewer calls, and more of them multiplied in vain. The results are the
        same but for rounding.
        """
        return self._engine.packed

    @packed.setter
    def packed(self, packed: Packing) -> None:
        """Choose how branches of different modes run.

        Raises:
            ValueError: the model's class cannot pack like that.
        """
        engine, backbone = self._live(), self.backbone
        legal: list[Packing] = [False]
        if backbone.packs and engine.method.packs:
            legal += [True, MASKED] if backbone.masks_attention else [True]
        if packed not in legal:
            raise ValueError(
                f"packed = {packed!r}; legal for {backbone.model_class} with method "
                f"{engine.method.name!r}: {', '.join(map(repr, legal))} (False runs its branches "
                "one after the other)"
            )
        engine.packed = packed

    @property
    def keep_text(self) -> bool:
        """Compute layers that only see the prompt (keys and values of cross-attention) once a run.

        The results are the same. Compiled models compute them at every step.
        """
        return self._engine.keep_text

    @keep_text.setter
    def keep_text(self, keep: bool) -> None:
        """Choose whether text layers are kept.

        Raises:
            ValueError: the model's class has no layers that only see the prompt.
        """
        if keep and not any(True for _ in self.backbone.text_layers(self.model)):
            raise ValueError(
                f"keep_text = True; legal for {self.backbone.model_class}: False (its text tokens "
                "change from step to step)"
            )
        self._live().keep_text = keep

    @property
    def plan_ahead(self) -> bool:
        """Compute for many steps at once what noise level and label alone decide.

        Steps that are the base's in all branches stay as they are.

        It is on with ``merge=True``, and does something where such layers are known (DiT, SD3,
        FLUX). The results are equal but for rounding. A run in a pipeline takes up to 64 MiB for
        it. Compiled models compute them at every step.
        """
        return self._engine.plan_ahead

    @plan_ahead.setter
    def plan_ahead(self, ahead: bool) -> None:
        self._live().plan_ahead = ahead

    @property
    def shape(self) -> TransformerShape:
        """What the cost depends on."""
        return self._live().ledger.shape_of(self.model)

    def plan(
        self,
        num_inference_steps: int,
        *,
        guidance: bool = True,
        scheduler: Any = None,
        grid: Triple | None = None,
        text_tokens: int | None = None,
    ) -> Plan:
        """The modes and the cost of a run, before it is made.

        Of a pipeline with two transformers, the steps of this one.

        Args:
            guidance: whether the run uses a guidance branch (a guidance scale above 1).
            scheduler: a diffusers scheduler; the pipeline's own by default. It is not changed.
            grid: base tokens ``(frames, height, width)``; the model's native size by default.
            text_tokens: text tokens of one prompt; the pipeline's usual number by default.

        Raises:
            ValueError: no scheduler, fewer than one step, or none at which this model is called.
        """
        pipe = self._pipe
        scheduler = scheduler if scheduler is not None else getattr(pipe, "scheduler", None)
        if scheduler is None:
            raise ValueError("scheduler = None; a bare model has none of its own, so pass one")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps = {num_inference_steps}; legal: >= 1")
        scheduler = copy.deepcopy(scheduler)
        self.backbone.set_timesteps(scheduler, num_inference_steps, grid or self.shape.grid, pipe)
        levels = called_levels(pipe, self.model, scheduler)
        if not levels:
            raise ValueError(
                f"num_inference_steps = {num_inference_steps}; at none of them does the pipeline "
                "call this transformer (boundary_ratio gives them all to the other one)"
            )
        return self.plan_levels(levels, guidance=guidance, grid=grid, text_tokens=text_tokens)

    def plan_levels(
        self,
        levels: Sequence[float],
        *,
        guidance: bool = True,
        grid: Triple | None = None,
        text_tokens: int | None = None,
    ) -> Plan:
        """`plan` for given noise levels, one per step."""
        engine = self._live()
        usual_grid, usual_text = self.backbone.default_size(self.model)
        text = usual_text if text_tokens is None else text_tokens
        size = self.backbone.planned_size(grid or usual_grid, text, self._pipe)
        shape = engine.ledger.shape_of(self.model, size)
        packing = engine.packing(shape)
        keeps = engine.keep_text and engine.compiled is None
        schedule = engine.schedule
        if engine.controller is not None:
            facts = Facts(levels=tuple(levels), macs=shape.macs, guided=guidance, packing=packing)
            begun = engine.controller.begin(facts)
            if not isinstance(begun, Schedule):
                raise ValueError(
                    f"{type(engine.controller).__name__} chooses while sampling, so there is no "
                    "plan; legal: a schedule or a budget (its cap bounds the cost, and the report "
                    "tells it)"
                )
            schedule = begun
        return Plan.bind(
            schedule,
            levels,
            shape.macs,
            guidance=guidance,
            packing=packing,
            kept=shape.text_tokens * shape.text_once if keeps else 0.0,
            together=self.backbone.conditional_first is not None,
            budget=engine.share(),
        )

    def report(self) -> Report:
        """What the last run really did."""
        engine = self._live()
        return Report(tuple(engine.ledger.calls), budget=engine.allowed)

    @contextlib.contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """Run every call in one mode, whatever the timesteps (for training and tests).

        Raises:
            ValueError: a mode the adapter lacks.
        """
        engine = self._live()
        if not engine.method.has(mode):
            raise ValueError(f"mode {mode.name!r}; legal: {', '.join(m.name for m in self.modes)}")
        self.backbone.check(self.model, {mode})
        engine.ledger.calls.clear()
        engine.router.run += 1
        previous, engine.forced = engine.forced, mode
        try:
            yield
        finally:
            engine.forced = previous

    def adapter(self, **notes: Any) -> Adapter:
        """The present weights as an adapter, with the calibration that is in use."""
        adapter = self._live().adapter(self.model, **notes)
        return replace(adapter, calibration=self.calibration)

    def remove(self) -> None:
        """Restore the stock model, bit for bit. Safe to call twice."""
        if self.model.__dict__.get(ENGINE) is self._engine:
            self._engine.uninstall(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def check_modes(
    model: nn.Module, backbone: Backbone, method: Method, modes: set[Mode], who: str
) -> None:
    """Refuse modes that an adapter or its model lacks.

    Args:
        who: asks for them.

    Raises:
        ValueError: naming them, and the legal ones.
    """
    unknown = sorted(mode.name for mode in modes if not method.has(mode))
    if unknown:
        fitting = (mode.name for mode in method.modes if backbone.fits(model, mode))
        names = ", ".join(["full", *fitting])
        near = did_you_mean(unknown[0], names.split(", "))
        raise ValueError(
            f"{who} asks for {', '.join(unknown)}; legal for this adapter: {names}{near}"
        )
    backbone.check(model, modes)
