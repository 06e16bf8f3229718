"""The engine of an elastic model: it changes the model, runs each call and keeps the record.

This is the only place where a live model is changed. The model keeps its object, weights and keys;
its class and that of a few submodules become generated subclasses, and new tensors are added beside
the old ones. `Engine.install` and `Engine.uninstall` are inverses, and both may be repeated.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from elastic_dit.backbones import Backbone
from elastic_dit.backbones.base import Call
from elastic_dit.checkpoint import Adapter, check_tensors
from elastic_dit.cost import TransformerShape
from elastic_dit.guidance import run_segment
from elastic_dit.methods import Method
from elastic_dit.mode import FULL, Mode
from elastic_dit.report import CallRecord, Stopwatch
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
from elastic_dit.schedule import Schedule

ENGINE = "_elastic_engine"
SIZES = "elastic"

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
