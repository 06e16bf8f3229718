"""The only surgery on a live model: `elastify` goes in, `Handle.remove` comes out, exactly.

The model keeps its object, weights and keys; its class and that of a few submodules become
generated subclasses, and the new tensors are added beside the old ones.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_dit.backbones import Backbone, backbone_for
from elastic_dit.backbones.base import Call
from elastic_dit.budget import weak_first_for_budget
from elastic_dit.checkpoint import Adapter, check_base, check_tensors, load_adapter
from elastic_dit.cost import TransformerShape
from elastic_dit.guidance import run_segment
from elastic_dit.methods import Method
from elastic_dit.mode import FULL, Mode
from elastic_dit.report import CallRecord, Report, Stopwatch
from elastic_dit.routing import (
    AttentionSeam,
    EmbedSeam,
    LowRankSeam,
    ModulationSeam,
    OutputSeam,
    Router,
    rebind_hooks,
    remembered_in_checkpoints,
    restore_class,
    swap_class,
)
from elastic_dit.schedule import Plan, Schedule

ENGINE = "_elastic_engine"
SIZES = "elastic"


def elastify(
    target: Any,
    adapter: str | Path | Adapter | Method,
    *,
    schedule: Schedule | None = None,
    merge: bool = False,
) -> Handle:
    """Make a diffusers pipeline or transformer elastic, in place.

    Args:
        target: a pipeline with a ``transformer``, or the transformer itself.
        adapter: a trained adapter (folder, hub id or object), or a method to start one from the
            base's weights.
        schedule: replaces the adapter's default; a method starts with full mode throughout.
        merge: keep one more copy of the adapted weights per mode, so that coarse modes pay nothing
            for low-rank updates.

    Returns:
        The handle that owns every change. An elastic model that is made elastic again is first
        restored.

    Raises:
        ValueError: unsupported class, adapter of another base, damaged adapter, mode that does not
            fit. Nothing has been changed then.
        FileNotFoundError: no such adapter.
    """
    model, pipe = _resolve(target)
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


LowRankPair = tuple[nn.Linear, nn.ParameterDict, nn.ParameterDict]


@dataclass(eq=False)
class Engine:
    """Lives on the elastic model: picks the mode of each call, runs it, keeps the record.

    Attributes:
        pairs: adapted linear layers with their low-rank factors by mode, under the stock names.
        base: the base's own tensors under the stock names, if the method trains them.
        other_weights: while installed the base's own weights, else the adapter's; swapped by
            `install` and `uninstall`.
    """

    router: Router
    method: Method
    stock: type
    pairs: dict[str, LowRankPair]
    base: dict[str, Tensor]
    other_weights: dict[str, Tensor] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule.constant)
    packed: bool = False
    budget: float | None = None
    forced: Mode | None = None
    pipe: Any = None
    calls: list[CallRecord] = field(default_factory=list)
    swapped: list[nn.Module] = field(default_factory=list)
    seen_timesteps: Any = None
    warned: bool = False
    compiled: Any = None

    @classmethod
    def build(
        cls, model: nn.Module, backbone: Backbone, method: Method, adapter: Adapter | None
    ) -> Engine:
        """New parameters for a stock model, from an adapter if there is one.

        The model is only read.

        Raises:
            ValueError: the adapter's tensors do not fit, or the model already uses our attribute
                name.
        """
        if hasattr(model, SIZES):
            raise ValueError(
                f"the model already has an attribute {SIZES!r}, which is where new tensors go"
            )
        sizes = method.build(model, backbone)
        pairs = _low_rank_pairs(model, backbone, method)
        embed, _ = backbone.modules(model)
        router = Router(backbone, sizes, embed, low_rank=method.low_rank)
        base = model.state_dict(keep_vars=True) if method.trains_base else {}
        engine = cls(router, method, type(model), pairs, dict(base))
        if adapter is None:
            return engine
        expected = engine.new_tensors()
        check_tensors(expected | {f"base.{k}": v for k, v in base.items()}, adapter.tensors)
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(adapter.tensors[name])
        engine.other_weights = {k: adapter.tensors[f"base.{k}"].to(v) for k, v in base.items()}
        return engine

    def new_tensors(self) -> dict[str, Tensor]:
        """The added parameters under the names of an adapter file."""
        tensors = {f"{SIZES}.{k}": v for k, v in self.router.sizes.state_dict().items()}
        for name, (_, A, B) in self.pairs.items():
            for mode in A:
                tensors[f"{name}.coarse_A.{mode}"] = A[mode]
                tensors[f"{name}.coarse_B.{mode}"] = B[mode]
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        # A copied model must not call the compiled forward of the original.
        return {**self.__dict__, "compiled": None}

    def run(self, model: nn.Module, call: Call) -> Any:
        """One call of the elastic model."""
        forward = self.compiled or functools.partial(self.stock.forward, model)
        sample = call[self.router.backbone.sample_argument]
        count = sample.shape[0]
        watch = Stopwatch(sample.device)
        if self.forced is not None:
            self.router.mode = self.forced
            with remembered_in_checkpoints(model, self.router):
                output = forward(**call)
            self._record(model, None, self.forced, None, count, watch)
            return output
        level = self.router.backbone.level(call)
        segment = self.schedule.at(level)
        branches = self.router.backbone.branches(model, call)
        if branches is None and segment.weak_guidance and not self.warned:
            warnings.warn(
                "the schedule asks for weak guidance, but the batch has no guidance rows",
                stacklevel=4,
            )
            self.warned = True
        with remembered_in_checkpoints(model, self.router):
            output = run_segment(self.router, forward, call, segment, branches, packed=self.packed)
        guide = None if branches is None or segment.gain == 0 else segment.guide_mode
        self._record(model, level, segment.mode, guide, count, watch, guided=branches is not None)
        return output

    def _record(
        self,
        model: nn.Module,
        level: float | None,
        mode: Mode,
        guide: Mode | None,
        count: int,
        watch: Stopwatch,
        *,
        guided: bool = False,
    ) -> None:
        if self._starts_run(level):
            self.calls.clear()
        shape = self.shape_of(model, self.router.grid)
        pictures = count // 2 if guided else count
        spent = shape.macs(mode)
        if guide is not None:
            spent += shape.macs(guide)
            if self.packed and guide != mode:
                spent += shape.packing_macs(mode, guide)
        self.calls.append(
            CallRecord(
                level=level,
                mode=mode,
                guide=guide,
                rows=count,
                macs=pictures * spent,
                full_macs=count * shape.macs(FULL),
                watch=watch.stop(),
            )
        )

    def _starts_run(self, level: float | None) -> bool:
        """A run starts when the scheduler has new timesteps, or the noise level goes up again."""
        pipe = self.pipe() if self.pipe is not None else None
        timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        if timesteps is not None and timesteps is not self.seen_timesteps:
            self.seen_timesteps = timesteps
            return True
        last = self.calls[-1].level if self.calls else None
        return level is not None and last is not None and level > last

    def shape_of(self, model: nn.Module, grid: tuple[int, int] | None = None) -> TransformerShape:
        """What the cost of the elastic model depends on."""
        shape = self.router.backbone.shape(model)
        rank = 0 if self.router.merged else self.method.low_rank
        return replace(shape, low_rank=rank, grid=grid or shape.grid)

    def install(self, model: nn.Module) -> None:
        """Attach the new parameters and swap classes; the inverse of `uninstall`."""
        backbone = self.router.backbone
        self._exchange_weights()
        model.add_module(SIZES, self.router.sizes)
        embed, output = backbone.modules(model)
        self._swap(embed, EmbedSeam)
        self._swap(output, OutputSeam)
        for module in backbone.modulation_layers(model):
            self._swap(module, ModulationSeam)
        for module in backbone.attention_layers(model):
            self._swap(module, AttentionSeam)
        for layer, A, B in self.pairs.values():
            layer.coarse_A, layer.coarse_B = A, B
            self._swap(layer, LowRankSeam)
        model.__class__ = _elastic_class(self.stock)
        model.__dict__[ENGINE] = self
        rebind_hooks(model)

    def _swap(self, module: nn.Module, mixin: type) -> None:
        swap_class(module, mixin, self.router)
        self.swapped.append(module)

    def uninstall(self, model: nn.Module) -> None:
        """Undo `install` exactly."""
        for module in reversed(self.swapped):
            restore_class(module)
        self.swapped.clear()
        for layer, _, _ in self.pairs.values():
            del layer.coarse_A, layer.coarse_B
        del model._modules[SIZES]
        model.__class__ = self.stock
        del model.__dict__[ENGINE]
        self._exchange_weights()
        rebind_hooks(model)

    def _exchange_weights(self) -> None:
        for name, other in self.other_weights.items():
            tensor = self.base[name]
            tensor.data, self.other_weights[name] = other.to(tensor), tensor.data


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
        self._live().packed = packed

    @property
    def shape(self) -> TransformerShape:
        """What the cost depends on."""
        return self._live().shape_of(self.model)

    def plan(
        self, num_inference_steps: int, *, guidance: bool = True, scheduler: Any = None
    ) -> Plan:
        """The modes and the cost of a run, before it is made.

        Args:
            guidance: whether the run uses a guidance branch (a guidance scale above 1).
            scheduler: a diffusers scheduler; the pipeline's own by default. It is not changed.

        Raises:
            ValueError: no scheduler, or fewer than one step.
        """
        engine = self._live()
        pipe = engine.pipe() if engine.pipe is not None else None
        scheduler = scheduler if scheduler is not None else getattr(pipe, "scheduler", None)
        if scheduler is None:
            raise ValueError("scheduler = None; a bare model has none of its own, so pass one")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps = {num_inference_steps}; legal: >= 1")
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(num_inference_steps)
        levels = [engine.router.backbone.level_of(t) for t in scheduler.timesteps.tolist()]
        return self.plan_levels(levels, guidance=guidance)

    def plan_levels(self, levels: Sequence[float], *, guidance: bool = True) -> Plan:
        """`plan` for given noise levels, one per model call."""
        engine = self._live()
        shape = engine.shape_of(self.model)
        packing = shape.packing_macs if engine.packed else None
        return Plan.bind(engine.schedule, levels, shape.macs, guidance=guidance, packing=packing)

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
        previous, engine.forced = engine.forced, mode
        try:
            yield
        finally:
            engine.forced = previous

    def adapter(self, **notes: Any) -> Adapter:
        """The present weights as an adapter."""
        engine = self._live()
        tensors = engine.new_tensors() | {f"base.{k}": v for k, v in engine.base.items()}
        identity = engine.router.backbone.identity(self.model)
        return Adapter(
            method=engine.method,
            base=identity,
            tensors=tensors,
            schedule=engine.schedule,
            notes=notes,
        )

    def remove(self) -> None:
        """Restore the stock model, bit for bit. Safe to call twice."""
        if self.model.__dict__.get(ENGINE) is self._engine:
            self._engine.uninstall(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def handle_of(target: Any) -> Handle | None:
    """The handle of an elastic pipeline or model (a copy of one included), or None."""
    model, _ = _resolve(target)
    engine = model.__dict__.get(ENGINE)
    return None if engine is None else Handle(model, engine)


def stock_class(model: nn.Module) -> type:
    """The diffusers class of a model, elastic or not."""
    engine = model.__dict__.get(ENGINE)
    return type(model) if engine is None else engine.stock


@functools.cache
def _elastic_class(stock: type) -> type:
    signature = inspect.signature(stock.forward)

    @functools.wraps(stock.forward)  # caches and modular pipelines read the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = dict(signature.bind(self, *args, **kwargs).arguments)
        call.pop("self")
        return self.__dict__[ENGINE].run(self, call)

    def compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Compile the stock forward, once per mode; choosing the mode stays outside the graph."""
        engine: Engine = self.__dict__[ENGINE]
        engine.compiled = torch.compile(functools.partial(stock.forward, self), *args, **kwargs)

    # The stock name goes into saved configs and is what caches and loaders look for.
    parts = {"forward": forward, "compile": compile, "__module__": __name__}
    return type(stock.__name__, (stock,), parts)


def _resolve(target: Any) -> tuple[nn.Module, Any]:
    if isinstance(target, nn.Module):
        return getattr(target, "_orig_mod", target), None
    model = getattr(target, "transformer", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(target).__name__} has no transformer; "
            "legal: a diffusers DiT pipeline or its model"
        )
    return getattr(model, "_orig_mod", model), target


def _check_schedule(schedule: Schedule, method: Method) -> None:
    legal = {FULL, *method.modes}
    unknown = sorted(mode.name for mode in schedule.modes - legal)
    if unknown:
        names = ", ".join(["full", *(m.name for m in method.modes)])
        raise ValueError(f"schedule asks for {', '.join(unknown)}; legal for this adapter: {names}")


def is_new(key: str) -> bool:
    """Whether a parameter name of an elastic model is one of the added tensors."""
    return key.startswith(f"{SIZES}.") or ".coarse_A." in key or ".coarse_B." in key


def _low_rank_pairs(model: nn.Module, backbone: Backbone, method: Method) -> dict[str, LowRankPair]:
    """New low-rank pairs by layer name; the second factor starts as zero."""
    pairs: dict[str, LowRankPair] = {}
    if method.low_rank:
        for name, layer in backbone.low_rank_layers(model):
            A, B = nn.ParameterDict(), nn.ParameterDict()
            for mode in method.modes:
                A[mode.name] = nn.Parameter(
                    torch.randn(method.low_rank, layer.in_features).to(layer.weight)
                    / layer.in_features**0.5
                )
                B[mode.name] = nn.Parameter(
                    torch.zeros(layer.out_features, method.low_rank).to(layer.weight)
                )
            pairs[name] = (layer, A, B)
    return pairs
