"""The engine of an elastic model: it changes the model, runs each call and keeps the record.

This is the only place where a live model is changed. The model keeps its object, weights and keys;
its class and that of a few submodules become generated subclasses, and new tensors are added beside
the old ones. `Engine.install` and `Engine.uninstall` are inverses, and both may be repeated.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastic_dit.backbones import Backbone
from elastic_dit.backbones.base import Call
from elastic_dit.checkpoint import Adapter, check_tensors
from elastic_dit.cost import TransformerShape
from elastic_dit.elastic_class import ENGINE, SIZES, elastic_class
from elastic_dit.guidance import Remembered, run_batch, run_guidance
from elastic_dit.methods import Method
from elastic_dit.mode import FULL, Mode
from elastic_dit.report import CallRecord, Stopwatch
from elastic_dit.routing import (
    ROUTER,
    Router,
    TextKey,
    rebind_hooks,
    remembered_in_checkpoints,
    restore_class,
    swap_class,
    versions,
)
from elastic_dit.schedule import Schedule, Segment
from elastic_dit.seams import (
    AttentionSeam,
    EmbedSeam,
    LowRankSeam,
    ModulationSeam,
    OutputSeam,
    RotarySeam,
    TextSeam,
)

ROUNDING = 2**-7
"""Relative error of a time that was divided and rounded in bfloat16 (2^-9 each time), with room."""

TRANSFORMERS = ("transformer", "transformer_2")
"""Components of a pipeline that may be made elastic."""

CACHES = ("FirstBlockCache", "MagCache", "TaylorSeerCache")
"""Step caches of diffusers whose state can be kept per branch and mode."""

LowRankPair = tuple[nn.Linear, nn.ParameterDict, nn.ParameterDict]


@dataclass(eq=False)
class Engine:
    """Lives on the elastic model: picks the mode of each call, runs it, keeps the record.

    Attributes:
        pairs: adapted linear layers with their low-rank factors by mode, under the stock names.
        base: the base's own tensors under the stock names, if the method trains them.
        adapted: the modules that hold adapted layers.
        other_weights: while installed the base's own weights, else the adapter's; swapped by
            `install` and `uninstall`.
        context: name and facts of the ``cache_context`` that the pipeline has opened: its branch.
        exact_levels: the scheduler's timesteps, and their noise levels as told and as they are.
        remembered: the conditional call of the present step, if its guidance call needs it.
        previous: latent, its state and noise level of the call before, where only that tells the
            branch.
        prompts: those of the present run, if text layers are kept.
        repeated: rows of the present call whose text layers are.
    """

    router: Router
    method: Method
    stock: type
    pairs: dict[str, LowRankPair]
    base: dict[str, Tensor]
    adapted: list[nn.Module]
    other_weights: dict[str, Tensor] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule.constant)
    packed: bool = False
    keep_text: bool = False
    budget: float | None = None
    forced: Mode | None = None
    pipe: Any = None
    calls: list[CallRecord] = field(default_factory=list)
    swapped: list[nn.Module] = field(default_factory=list)
    hooks: list[tuple[nn.Module, RemovableHandle]] = field(default_factory=list)
    seen_timesteps: Any = None
    exact_levels: tuple[Any, list[tuple[float, float]]] = (None, [])
    warned: bool = False
    context: tuple[str, dict[str, Any]] | None = None
    remembered: Remembered | None = None
    previous: tuple[weakref.ref[Tensor], Any] | None = None
    prompts: list[TextKey] = field(default_factory=list)
    repeated: int = 0
    shapes: dict[tuple[Any, ...], TransformerShape] = field(default_factory=dict)
    lists: dict[str, nn.Module] = field(default_factory=dict)
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
        router = Router(backbone, sizes, backbone.patch(model))
        base = model.state_dict(keep_vars=True) if method.trains_base else {}
        parents = {name.rpartition(".")[0] for name in pairs}
        adapted = [model.get_submodule(name) for name in sorted(parents)]
        engine = cls(router, method, type(model), pairs, dict(base), adapted)
        if adapter is None:
            return engine
        expected = engine.new_tensors()
        check_tensors(expected | {f"base.{k}": v for k, v in base.items()}, adapter.tensors)
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(adapter.tensors[name])
        engine.other_weights = {  # copies: a loaded tensor may be a view of its file
            k: torch.empty_like(v).copy_(adapter.tensors[f"base.{k}"]) for k, v in base.items()
        }
        return engine

    def new_tensors(self) -> dict[str, Tensor]:
        """The added parameters under the names of an adapter file."""
        tensors = {f"{SIZES}.{k}": v for k, v in self.router.sizes.state_dict().items()}
        for name, (_, A, B) in self.pairs.items():
            for mode in A:
                tensors[f"{name}.coarse_A.{mode}"] = A[mode]
                tensors[f"{name}.coarse_B.{mode}"] = B[mode]
        return tensors

    def adapter(self, model: nn.Module, **notes: Any) -> Adapter:
        """The present weights as an adapter."""
        base = {f"base.{name}": tensor for name, tensor in self.base.items()}
        return Adapter(
            method=self.method,
            base=self.router.backbone.identity(model),
            tensors=self.new_tensors() | base,
            schedule=self.schedule,
            notes=notes,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copied model must not call the compiled forward of the original.
        return {**self.__dict__, "compiled": None, "remembered": None}

    def run(self, model: nn.Module, call: Call) -> Any:
        """One call of the elastic model.

        Raises:
            ValueError: the call has no single noise level, or its latent is too small for a mode.
            RuntimeError: the weights or arguments of the call do not allow a coarse mode.
        """
        backbone, router = self.router.backbone, self.router
        sample = call[backbone.sample]
        count, size = sample.shape[0], backbone.size(model, call)
        router.grid, shape = size[0], self.shape_of(model, size)
        self.repeated = 0
        self._keep_seams(model)
        record = functools.partial(self._record, shape, count, Stopwatch(sample.device))
        with remembered_in_checkpoints(model, router):
            if self.forced is not None:
                output = self._forward(model, call, self.forced)
                record(None, self.forced, None)
                return output
            level = self._level(model, call)
            if self._starts_run(model, level):
                self.calls.clear()
                self.prompts.clear()
                self.remembered = self.previous = None
                self.router.run += 1
            segment = self.schedule.at(level)
            if self._is_guidance(model, sample, level):
                forward = functools.partial(self._forward, model)
                output = run_guidance(router, forward, call, segment, self.remembered)
                self.remembered = None
                record(level, segment.guide_mode if segment.gain else None, None)
                return output
            output, guide, guided = self._conditional(model, call, segment)
            record(level, segment.mode, guide, guided=guided)
        return output

    def _conditional(
        self, model: nn.Module, call: Call, segment: Segment
    ) -> tuple[Any, Mode | None, bool]:
        """A call with the conditional branch, and the guidance branch if both are in one batch."""
        backbone, forward = self.router.backbone, functools.partial(self._forward, model)
        branches = backbone.branches(model, call, self.pipe_of(model))
        separate = backbone.conditional_first is None and self.pipe_of(model) is not None
        separate = separate or self.context is not None
        # One call per branch: nothing has used the conditional call of the step before.
        alone = branches is None and (not separate or self.remembered is not None)
        if segment.weak_guidance and alone and not self.warned:
            warnings.warn(
                "the schedule asks for weak guidance, but this call has no guidance branch",
                stacklevel=5,
            )
            self.warned = True
        output = run_batch(
            self.router, forward, call, segment, branches, packed=self.packed and backbone.packs
        )
        if separate and (segment.weak_guidance or segment.gain != 1):
            prediction = output.sample if call.get("return_dict", True) else output[0]
            self.remembered = Remembered(call, prediction)
        guide = None if branches is None or segment.gain == 0 else segment.guide_mode
        return output, guide, branches is not None

    def _is_guidance(self, model: nn.Module, latent: Tensor, level: float) -> bool:
        """Whether a call is the guidance branch of a pipeline that calls once per branch.

        The pipeline's ``cache_context`` tells. One that opens none gives the same latent again.
        """
        backbone = self.router.backbone
        if self.context is not None:
            return self.context[0] in backbone.contexts
        if backbone.conditional_first is not None or self.pipe_of(model) is None:
            return False
        seen = (versions(latent), level)
        before, self.previous = self.previous, (weakref.ref(latent), seen)
        if before is None or before[0]() is not latent or before[1] != seen:
            return False
        self.previous = None
        return True

    def pipe_of(self, model: nn.Module) -> Any:
        """The pipeline, if it is alive and this very model is in it (a copy's is another one)."""
        pipe = self.pipe() if self.pipe is not None else None
        owned = (getattr(pipe, name, None) for name in TRANSFORMERS)
        return pipe if any(getattr(x, "_orig_mod", x) is model for x in owned) else None

    def _check_coarse(self, model: nn.Module, call: Call, mode: Mode) -> None:
        """Refuse a coarse mode that this call, or what was put on the model, does not allow."""
        backbone = self.router.backbone
        backbone.check_grid(self.router.grid, mode)
        backbone.check_call(call, mode)
        if any(getattr(module, "fused_projections", False) for module in self.adapted):
            raise RuntimeError(
                "fused query, key and value projections have no low-rank updates; call "
                "unfuse_qkv_projections() before using a coarse mode"
            )
        if getattr(model, "_parallel_config", None) is not None:
            raise RuntimeError(
                f"context parallelism splits the base tokens, and mode {mode.name!r} has others; "
                "legal together with it: full mode"
            )

    def _forward(self, model: nn.Module, call: Call, mode: Mode) -> Any:
        """The stock forward in a mode (of all rows, unless the router has a packed layout)."""
        router = self.router
        router.mode = mode
        router.merging = router.merged and not torch.is_grad_enabled()
        for each in (mode,) if router.layout is None else [part.mode for part in router.layout]:
            if not each.is_full:
                self._check_coarse(model, call, each)
            self._ready(model, each)
        if router.sizes.routes(mode):
            call = router.backbone.prepare(call, router, mode)
        router.text = self._prompt(call) if self._keeps_text() else None
        router.running = True
        try:
            with self._cache_state(model, mode):
                return (self.compiled or functools.partial(self.stock.forward, model))(**call)
        finally:
            router.running, router.text = False, None

    def _ready(self, model: nn.Module, mode: Mode) -> None:
        """Make what a mode keeps between calls, outside any compiled region."""
        router = self.router
        if router.merging and not mode.is_full:
            for layer, _, _ in self.pairs.values():
                assert isinstance(layer, LowRankSeam)
                layer.merge(mode, router.run)
        if router.sizes.routes(mode):
            router.sizes.ready(mode)
            if self.compiled is not None:  # else the module itself makes its table when asked
                embed = model.get_submodule(router.backbone.embed)
                router.backbone.positions(embed, router, mode)

    def _keeps_text(self) -> bool:
        kept = self.keep_text and self.forced is None and self.compiled is None
        return kept and not torch.is_grad_enabled()

    def _prompt(self, call: Call) -> TextKey | None:
        """The prompt of a call, for layers that see nothing else."""
        prompt = call.get(self.router.backbone.condition[0])
        if not torch.is_tensor(prompt) or self.router.layout is not None:
            return None
        key = TextKey(prompt, self.router.run)
        if any(key.same(known) for known in self.prompts):
            self.repeated += len(prompt)
        else:
            self.prompts.append(key)
        return key

    def _cache_state(self, model: nn.Module, mode: Mode) -> contextlib.AbstractContextManager[None]:
        """The state of a step cache that belongs to this branch and mode.

        Raises:
            RuntimeError: the cache in use has one state for all patch sizes.
        """
        if not getattr(model, "is_cache_enabled", False):
            return contextlib.nullcontext()
        cache = type(model._cache_config).__name__.removesuffix("Config")
        if not mode.is_full and cache not in CACHES:
            raise RuntimeError(
                f"{cache} keeps one state for all patch sizes; legal together with mode "
                f"{mode.name!r}: {', '.join(CACHES)}"
            )
        if self.context is None:
            return contextlib.nullcontext()
        name, facts = self.context
        return self.stock.cache_context(model, f"{name}@{mode.name}", **facts)

    def _record(
        self,
        shape: TransformerShape,
        count: int,
        watch: Stopwatch,
        level: float | None,
        mode: Mode | None,
        guide: Mode | None,
        *,
        guided: bool = False,
    ) -> None:
        """Keep what a call ran; ``mode`` is None where it only repeated a prediction."""
        pictures = count // 2 if guided else count
        kept = self.repeated * shape.text_tokens * shape.text_once
        spent = shape.macs(mode) if mode is not None else 0.0
        if mode is not None and guide is not None:
            spent += shape.macs(guide)
            if self.packed and self.router.backbone.packs and guide != mode:
                spent += shape.packing_macs(mode, guide)
        self.calls.append(
            CallRecord(
                level=level,
                mode=mode,
                guide=guide,
                branch=None if self.context is None else self.context[0],
                rows=count,
                macs=pictures * spent - kept,
                full_macs=count * shape.macs(FULL),
                watch=watch.stop(),
            )
        )

    def _level(self, model: nn.Module, call: Call) -> float:
        """Noise level of a call, as exact as the scheduler of the pipeline knows it.

        Some pipelines (FLUX) cast the time to the dtype of the latents, and a rounded level may lie
        on the other side of a segment's edge than the planned one.
        """
        level = self.router.backbone.level(call)
        scheduler, timesteps = self._scheduler(model)
        if timesteps is None:
            return level
        if timesteps is not self.exact_levels[0]:
            scale = scheduler.config.num_train_timesteps
            levels = [(t / 1000, t / scale) for t in timesteps.tolist()]  # as told, as it is
            self.exact_levels = timesteps, levels
        told, exact = min(self.exact_levels[1], key=lambda pair: abs(pair[0] - level))
        return exact if abs(told - level) <= ROUNDING * level else level

    def _scheduler(self, model: nn.Module) -> tuple[Any, Any]:
        """The present scheduler of the pipeline and its timesteps; None for a bare model."""
        scheduler = getattr(self.pipe_of(model), "scheduler", None)
        return scheduler, getattr(scheduler, "timesteps", None)

    def _starts_run(self, model: nn.Module, level: float | None) -> bool:
        """A run starts when the scheduler has new timesteps, or the noise level goes up again."""
        _, timesteps = self._scheduler(model)
        if timesteps is not None and timesteps is not self.seen_timesteps:
            self.seen_timesteps = timesteps
            return True
        last = self.calls[-1].level if self.calls else None
        return level is not None and last is not None and level > last

    def shape_of(self, model: nn.Module, size: tuple[Any, ...] | None = None) -> TransformerShape:
        """What the cost of the elastic model depends on.

        Args:
            size: base grid and text tokens, as `Backbone.size` returns them; the backbone's usual
                ones by default.

        Raises:
            ValueError: a grid that is not three whole numbers above zero.
        """
        backbone = self.router.backbone
        key: tuple[Any, ...] = backbone.default_size(model) if size is None else size
        if len(key[0]) != 3 or any(side < 1 for side in key[0]):
            raise ValueError(f"grid = {key[0]}; legal: (frames, height, width), each >= 1")
        if key not in self.shapes:
            self.shapes[key] = backbone.shape(self._with_own_blocks(model), *key)
        rank = 0 if self.router.merged else self.method.low_rank
        return self.shapes[key].with_low_rank(rank)

    def _with_own_blocks(self, model: nn.Module) -> nn.Module:
        """A view of the model to count in: cache-dit puts other blocks there while a call runs."""
        view = copy.copy(model)
        view.__dict__["_modules"] = {**model._modules, **self.lists}
        return view

    def install(self, model: nn.Module) -> None:
        """Attach the new parameters and swap classes; the inverse of `uninstall`."""
        backbone = self.router.backbone
        self._exchange_weights()
        model.add_module(SIZES, self.router.sizes)
        self._keep_seams(model)
        for module in backbone.modulation_layers(model):
            self._swap(module, ModulationSeam)
        for module in backbone.attention_layers(model):
            self._swap(module, AttentionSeam)
        for module, hook in backbone.block_hooks(model):
            module.__dict__[ROUTER] = self.router
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            self.hooks.append((module, handle))
        for module in backbone.text_layers(model):
            self._swap(module, TextSeam)
        for layer, A, B in self.pairs.values():
            layer.coarse_A, layer.coarse_B = A, B
            self._swap(layer, LowRankSeam)
        model.__class__ = elastic_class(self.stock)
        model.__dict__[ENGINE] = self
        self.lists = {k: m for k, m in model.named_children() if isinstance(m, nn.ModuleList)}
        rebind_hooks(model)

    def _keep_seams(self, model: nn.Module) -> None:
        """Swap the modules that make and end tokens, wherever they are now.

        Somebody may have put another module in their place: PEFT wraps a layer when a LoRA for it
        is loaded, and puts the layer back when the LoRA goes.
        """
        backbone = self.router.backbone
        seams: dict[str, type] = {backbone.embed: EmbedSeam, backbone.output: OutputSeam}
        if backbone.rotary is not None:
            seams[backbone.rotary] = RotarySeam
        for name, mixin in seams.items():
            module = model.get_submodule(name)
            if ROUTER not in module.__dict__:
                self._swap(module, mixin)

    def _swap(self, module: nn.Module, mixin: type) -> None:
        swap_class(module, mixin, self.router)
        self.swapped.append(module)

    def uninstall(self, model: nn.Module) -> None:
        """Undo `install` exactly."""
        for module in reversed(self.swapped):
            restore_class(module)
        self.swapped.clear()
        for module, handle in self.hooks:
            handle.remove()
            del module.__dict__[ROUTER]
        self.hooks.clear()
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
