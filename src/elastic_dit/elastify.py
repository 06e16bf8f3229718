"""One verb in, one verb out: `elastify` changes a model, `Handle.remove` undoes it exactly."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_dit.backbones import Backbone, backbone_for
from elastic_dit.budget import weak_first_for_budget
from elastic_dit.checkpoint import Adapter, check_base, load_adapter
from elastic_dit.cost import TransformerShape
from elastic_dit.engine import ENGINE, TRANSFORMERS, Engine
from elastic_dit.methods import Method
from elastic_dit.mode import FULL, Mode
from elastic_dit.ops.patching import Triple
from elastic_dit.report import Report
from elastic_dit.schedule import Plan, Schedule


def elastify(
    target: Any,
    adapter: str | Path | Adapter | Method,
    *,
    component: str | None = None,
    schedule: Schedule | None = None,
    merge: bool = False,
) -> Handle:
    """Make a diffusers pipeline or transformer elastic, in place.

    Args:
        target: a pipeline with a ``transformer``, or the transformer itself.
        adapter: a trained adapter (folder, hub id or object), or a method to start one from the
            base's weights.
        component: which transformer of a pipeline with two (Wan 2.2), ``transformer`` or
            ``transformer_2``; each has a handle of its own. The only one by default.
        schedule: replaces the adapter's default; a method starts with full mode throughout.
        merge: keep one more copy of the adapted weights per mode, so that coarse modes pay nothing
            for low-rank updates.

    Returns:
        The handle that owns every change. An elastic model that is made elastic again is first
        restored.

    Raises:
        ValueError: unsupported class, adapter of another base, damaged adapter, mode that does not
            fit, a component that is missing or not named. Nothing has been changed then.
        FileNotFoundError: no such adapter.
    """
    model, pipe = _resolve(target, component)
    backbone = backbone_for(model)
    loaded = adapter if isinstance(adapter, Adapter | Method) else load_adapter(adapter)
    method = loaded if isinstance(loaded, Method) else loaded.method
    backbone.check(model, set(method.modes))
    if isinstance(loaded, Adapter):
        check_base(loaded, backbone.identity(model))
        schedule = schedule or loaded.schedule
    schedule = schedule or Schedule.constant(FULL)
    _check_schedule(schedule, method)
    previous: Engine | None = model.__dict__.get(ENGINE)
    if previous:
        previous.uninstall(model)
    try:
        engine = Engine.build(
            model, backbone, method, loaded if isinstance(loaded, Adapter) else None
        )
    except Exception:
        if previous:
            previous.install(model)
        raise
    engine.schedule, engine.router.merged = schedule, merge
    engine.install(model)
    if pipe is not None:
        engine.pipe = weakref.ref(pipe)
    return Handle(model, engine)


class Handle:
    """Owns what `elastify` changed. Use it as a context manager to undo at the end of a block."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self.model = model
        self._engine = engine

    def _live(self) -> Engine:
        if self.model.__dict__.get(ENGINE) is not self._engine:
            raise RuntimeError("this handle was removed or replaced; elastify again")
        return self._engine

    @property
    def _pipe(self) -> Any:
        """The pipeline that the model is part of, if it was given with one."""
        return self._engine.pipe_of(self.model)

    @property
    def method(self) -> Method:
        """The method in use."""
        return self._engine.method

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Full mode and the method's coarse modes."""
        return (FULL, *self._engine.method.modes)

    @property
    def backbone(self) -> Backbone:
        """What is known of the model's class."""
        return self._engine.router.backbone

    @property
    def sizes(self) -> nn.Module:
        """The parameters that belong to no stock module."""
        return self._engine.router.sizes

    @property
    def schedule(self) -> Schedule:
        """Noise level -> mode of the next runs."""
        return self._engine.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        _check_schedule(schedule, self._live().method)
        self._engine.schedule, self._engine.budget = schedule, None

    @property
    def budget(self) -> float | None:
        """The budget the present schedule was chosen for, None if it was set otherwise.

        Setting it chooses the weak-first schedule that costs this share of the full run.

        Raises:
            ValueError: outside (0, 1], or below the cheapest mode's cost.
        """
        return self._engine.budget

    @budget.setter
    def budget(self, budget: float) -> None:
        engine = self._live()
        macs = engine.shape_of(self.model).macs
        engine.schedule = weak_first_for_budget(budget, macs, engine.method.modes)
        engine.budget = budget

    @property
    def packed(self) -> bool:
        """Run guidance branches of different modes in one packed call instead of two."""
        return self._engine.packed

    @packed.setter
    def packed(self, packed: bool) -> None:
        """Choose how branches of different modes run.

        Raises:
            ValueError: the model's class cannot pack.
        """
        engine = self._live()
        if packed and not self.backbone.packs:
            raise ValueError(
                f"packed = True; legal for {self.backbone.model_class}: False (its branches run "
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
    def shape(self) -> TransformerShape:
        """What the cost depends on."""
        return self._live().shape_of(self.model)

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
        called = _called_at(pipe, self.model, scheduler)
        times = scheduler.timesteps[called].tolist()
        if not times:
            raise ValueError(
                f"num_inference_steps = {num_inference_steps}; at none of them does the pipeline "
                "call this transformer (boundary_ratio gives them all to the other one)"
            )
        levels = [t / scheduler.config.num_train_timesteps for t in times]
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
        shape = engine.shape_of(self.model, size)
        packing = shape.packing_macs if engine.packed else None
        keeps = engine.keep_text and engine.compiled is None
        return Plan.bind(
            engine.schedule,
            levels,
            shape.macs,
            guidance=guidance,
            packing=packing,
            kept=shape.text_tokens * shape.text_once if keeps else 0.0,
            together=self.backbone.conditional_first is not None,
        )

    def report(self) -> Report:
        """What the last run really did."""
        return Report(tuple(self._live().calls))

    @contextlib.contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """Run every call in one mode, whatever the timesteps (for training and tests).

        Raises:
            ValueError: a mode the adapter lacks.
        """
        engine = self._live()
        if mode not in self.modes:
            raise ValueError(f"mode {mode.name!r}; legal: {', '.join(m.name for m in self.modes)}")
        engine.calls.clear()
        engine.router.run += 1
        previous, engine.forced = engine.forced, mode
        try:
            yield
        finally:
            engine.forced = previous

    def adapter(self, **notes: Any) -> Adapter:
        """The present weights as an adapter."""
        return self._live().adapter(self.model, **notes)

    def remove(self) -> None:
        """Restore the stock model, bit for bit. Safe to call twice."""
        if self.model.__dict__.get(ENGINE) is self._engine:
            self._engine.uninstall(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def handle_of(target: Any, *, component: str | None = None) -> Handle | None:
    """The handle of an elastic pipeline or model (a copy of one included), or None.

    Args:
        component: which transformer of a pipeline with two.

    Raises:
        ValueError: a component that is missing or not named.
    """
    model, _ = _resolve(target, component)
    engine = model.__dict__.get(ENGINE)
    return None if engine is None else Handle(model, engine)


def stock_class(model: nn.Module) -> type:
    """The diffusers class of a model, elastic or not."""
    engine = model.__dict__.get(ENGINE)
    return type(model) if engine is None else engine.stock


def _called_at(pipe: Any, model: nn.Module, scheduler: Any) -> Tensor:
    """Whether a pipeline calls this transformer, for each of the scheduler's timesteps."""
    always = torch.ones_like(scheduler.timesteps, dtype=torch.bool)
    models = _transformers(pipe)
    if len(models) < 2:
        return always
    first, ratio = always, pipe.config.get("boundary_ratio")
    if ratio is not None:
        first = scheduler.timesteps >= ratio * scheduler.config.num_train_timesteps
    return first if models["transformer"] is model else ~first


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component."""
    found = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    return {
        name: getattr(model, "_orig_mod", model)
        for name, model in found.items()
        if isinstance(model, nn.Module)
    }


def _resolve(target: Any, component: str | None) -> tuple[nn.Module, Any]:
    """The transformer to change, and the pipeline if it was given one."""
    if isinstance(target, nn.Module):
        if component is not None:
            raise ValueError(f"component = {component!r}; legal for a bare model: None")
        return getattr(target, "_orig_mod", target), None
    models, name = _transformers(target), type(target).__name__
    if not models:
        raise ValueError(f"{name} has no transformer; legal: a diffusers DiT pipeline or its model")
    if component is None and len(models) == 1:
        (component,) = models
    if component not in models:
        legal = ", ".join(map(repr, models))
        raise ValueError(f"component = {component!r}; legal for this {name}: {legal}")
    return models[component], target


def _check_schedule(schedule: Schedule, method: Method) -> None:
    legal = {FULL, *method.modes}
    unknown = sorted(mode.name for mode in schedule.modes - legal)
    if unknown:
        names = ", ".join(["full", *(m.name for m in method.modes)])
        raise ValueError(f"schedule asks for {', '.join(unknown)}; legal for this adapter: {names}")
