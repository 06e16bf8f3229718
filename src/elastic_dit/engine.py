"""The engine of an elastic model: it changes the model, runs each call and keeps the record.

This is the only place where a live model is changed. The model keeps its object, weights and keys;
its class and that of a few submodules become generated subclasses, and new tensors are added beside
the old ones. `Engine.install` and `Engine.uninstall` are inverses, and both may be repeated.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.utils.hooks import RemovableHandle

from elastic_dit import step_caches
from elastic_dit.backbones import Backbone
from elastic_dit.backbones.call import Branches, Call
from elastic_dit.budget import Budget
from elastic_dit.calibration import Calibration
from elastic_dit.checkpoint import Adapter, check_tensors
from elastic_dit.controller import Controller, Facts, Run
from elastic_dit.cost import Kept, TransformerShape
from elastic_dit.elastic_class import ENGINE, SIZES, elastic_class
from elastic_dit.graphs import Graphs
from elastic_dit.groups import Group, grouped, run_groups
from elastic_dit.guidance import Remembered, run_batch, run_guidance
from elastic_dit.merging import Merges
from elastic_dit.methods import Method
from elastic_dit.mode import FULL, Mode
from elastic_dit.pipes import TRANSFORMERS, called_levels, is_guided
from elastic_dit.prediction import parametrisation
from elastic_dit.report import CallRecord, Stopwatch
from elastic_dit.routing import (
    MERGE,
    PARTS,
    PLACE,
    ROLE,
    ROUTER,
    SOURCE,
    Router,
    TextKey,
    rebind_hooks,
    remembered_in_checkpoints,
    restore_class,
    swap_class,
    versions,
)
from elastic_dit.schedule import Schedule
from elastic_dit.seams import (
    AttentionSeam,
    ConditioningSeam,
    EmbedSeam,
    FusedSeam,
    LowRankSeam,
    ModulationSeam,
    OutputSeam,
    RotarySeam,
    TextSeam,
)
from elastic_dit.steps_ahead import BatchTables, EmbeddedSeam, EmbedderSeam, RunTables
from elastic_dit.storage import (
    NewParameters,
    check_in_place,
    compute_dtype,
    is_offloaded,
    is_ordinary,
    is_silent,
    onloaded,
)
from elastic_dit.widths import Widths

ROUNDING = 2**-7
"""Relative error of a time that was divided and rounded in bfloat16 (2^-9 each time), with room."""

FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
"""Projections of diffusers' attention that stand for several, and which."""

LowRankPair = tuple[nn.Linear, nn.ParameterDict, nn.ParameterDict]


@dataclass(eq=False)
class Engine:
    """Lives on the elastic model: picks the mode of each call, runs it, keeps the record.

    Attributes:
        pairs: adapted linear layers with their low-rank factors by mode, under the stock names.
        base: the base's own tensors under the stock names, if the method trains them.
        adapted: the modules that hold adapted layers.
        merges: copies of adapted layers' weights with their updates added in.
        other_weights: while installed the base's own weights, else the adapter's; swapped by
            `install` and `uninstall`.
        context: name and facts of the ``cache_context`` that the pipeline has opened: its branch.
        exact_levels: the scheduler's timesteps, and their noise levels as told and as they are.
        remembered: the conditional call of the present step, if its guidance call needs it.
        previous: latent, its state and noise level of the call before, where only that tells the
            branch.
        prompts: those of the present run, if text layers are kept.
        repeated: rows of the present call whose text layers are.
        controller: chooses the modes of each run; None leaves that to the schedule.
        chosen: what it is at work on; the schedule of a run whose choices were made before it.
        groups: how the pictures of the present step run.
        allowed: share of the full FLOPs that the present run was planned for, if it has a budget.
        calibration: what each choice of modes loses at each noise level, if that was measured.
        plan_ahead: compute what noise level and labels alone decide for many steps at once.
        ahead: the tables of that, where such layers are known.
        modes: coarse modes that fit the model.
        widths: what routed modes leave in at each noise level.
        kept: what they left in, when each of them last ran.
        compiled: the stock forward by mode, if ``model.compile`` was called.
        compiler: of the present call, if ``torch.compile`` was given the whole model.
        apart: the stock forward by mode, for that compiler.
    """

    router: Router
    method: Method
    stock: type
    pairs: dict[str, LowRankPair]
    base: dict[str, Tensor]
    adapted: list[nn.Module]
    merges: Merges
    other_weights: dict[str, Tensor] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule.constant)
    controller: Controller | None = None
    chosen: Run | Schedule | None = None
    groups: list[Group] = field(default_factory=list)
    packed: bool = False
    keep_text: bool = False
    budget: float | Budget | None = None
    allowed: float | None = None
    calibration: Calibration | None = None
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
    silent: list[nn.Module] = field(default_factory=list)
    owners: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    quantised: dict[str, Tensor] = field(default_factory=dict)
    ahead: RunTables | None = None
    plan_ahead: bool = False
    modes: tuple[Mode, ...] = ()
    widths: Widths | None = None
    kept: dict[Mode, tuple[Kept, ...]] = field(default_factory=dict)
    compiled: Graphs | None = None
    compiler: Any = None
    apart: Graphs | None = None

    @classmethod
    def build(
        cls, model: nn.Module, backbone: Backbone, method: Method, adapters: Sequence[Adapter]
    ) -> Engine:
        """New parameters for a stock model, from adapters as far as there are any.

        The model is only read.

        Args:
            adapters: one of the method, or of some of the parts of a combination.

        Raises:
            ValueError: an adapter's tensors do not fit, the model already uses our attribute name,
                or its weights are held in a way that new tensors cannot be made from.
        """
        if hasattr(model, SIZES):
            raise ValueError(
                f"the model already has an attribute {SIZES!r}, which is where new tensors go"
            )
        check_in_place(model)
        base = model.state_dict(keep_vars=True) if method.trains_base else {}
        kinds = {type(x).__name__ for x in base.values() if not is_ordinary(x) and not x.is_meta}
        if kinds:
            raise ValueError(
                f"this method trains the base's own weights, some of which are {sorted(kinds)}; "
                "legal: elastify first and quantise then"
            )
        sizes = method.build(model, backbone)
        pairs = _low_rank_pairs(model, backbone, method)
        router = Router(backbone, sizes, backbone.patch(model))
        parents = {name.rpartition(".")[0] for name in pairs}
        adapted = [model.get_submodule(name) for name in sorted(parents)]
        merges = Merges([layer for layer, _, _ in pairs.values()])
        engine = cls(router, method, type(model), pairs, dict(base), adapted, merges)
        engine.modes = tuple(mode for mode in method.modes if backbone.fits(model, mode))
        if sizes.routed is not None:
            engine.widths = Widths(sizes.routed, backbone, model)
        if backbone.labels:
            engine.ahead = RunTables(backbone, model, by_mode=method.conditions)
        for name in base:
            owner, _, leaf = name.rpartition(".")
            engine.owners[name] = (model.get_submodule(owner), leaf)
        for adapter in adapters:
            engine._load(adapter)
        return engine

    def _load(self, adapter: Adapter) -> None:
        """Take the weights of an adapter of the method, or of a part of it."""
        expected = self.new_tensors(adapter.method)
        base = self.base if adapter.method.trains_base else {}
        check_tensors(expected | {f"base.{k}": v for k, v in base.items()}, adapter.tensors)
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(adapter.tensors[name])
        self.other_weights |= {  # copies: a loaded tensor may be a view of its file
            k: torch.empty_like(v).copy_(adapter.tensors[f"base.{k}"]) for k, v in base.items()
        }

    def new_tensors(self, method: Method | None = None) -> dict[str, Tensor]:
        """The added parameters under the names of an adapter file.

        Args:
            method: one part of a combination, under the names of an adapter of that part alone.
        """
        whole = method is None or method == self.method
        sizes = self.router.sizes if whole else self.router.sizes.of(method)
        tensors = {f"{SIZES}.{k}": v for k, v in sizes.state_dict().items()}
        own = None if whole else {mode.name for mode in method.modes}
        for name, (_, A, B) in self.pairs.items():
            for mode in A:
                if own is None or mode in own:
                    tensors[f"{name}.coarse_A.{mode}"] = A[mode]
                    tensors[f"{name}.coarse_B.{mode}"] = B[mode]
        return tensors

    def adapter(self, model: nn.Module, **notes: Any) -> Adapter:
        """The present weights as an adapter."""
        holders = model.modules() if self.base else [*self._holders(), *self.merges.layers]
        holders = [module for module in holders if is_offloaded([module])]
        with onloaded(holders):
            tensors = self.new_tensors() | {f"base.{k}": v for k, v in self.base.items()}
            if holders:  # these leave again
                tensors = {k: v.detach().clone() for k, v in tensors.items()}
        return Adapter(
            method=self.method,
            base=self.router.backbone.identity(model),
            tensors=tensors,
            schedule=self.schedule,
            notes=notes,
        )

    def _holders(self) -> list[nn.Module]:
        """The modules that hold new tensors."""
        factors = [x for _, A, B in self.pairs.values() for x in (A, B)]
        return [*self.router.sizes.modules(), *factors]

    @property
    def packs(self) -> bool:
        """Whether branches of different modes share one packed call."""
        return self.packed and self.router.backbone.packs and self.method.packs

    def __getstate__(self) -> dict[str, Any]:
        # A copied model must not call the compiled forward of the original.
        dropped = ("compiled", "apart", "remembered", "previous")
        return {**self.__dict__, **dict.fromkeys(dropped)}

    def run(self, model: nn.Module, call: Call) -> Any:
        """One call of the elastic model.

        Raises:
            ValueError: the rows have noise levels of different modes, or the latent is too small
                for a mode.
            RuntimeError: the weights or arguments of the call do not allow a coarse mode.
        """
        backbone, router = self.router.backbone, self.router
        sample = backbone.stack(call[backbone.sample])
        count, size = len(sample), backbone.size(model, call)
        router.grid, shape = size[0], self.shape_of(model, size)
        self.repeated = 0
        self._keep_seams(model)
        with remembered_in_checkpoints(model, router):
            if self.forced is not None:
                watch, output = Stopwatch(sample.device), self._forward(model, call, self.forced)
                self._record(shape, count, watch, None, self.forced, None)
                return output
            level = self._level(model, call)
            if self._starts_run(model, level):
                self.calls.clear()
                self.prompts.clear()
                self.remembered = self.previous = self.chosen = None
                self.allowed = self.share()
                self.router.run += 1
                self._begin_tables(model)
            if self._is_guidance(model, sample, level):
                output = self._guidance(model, call, shape, level)
                self.remembered = None
                return output
            return self._conditional(model, call, shape, level)

    def _guidance(self, model: nn.Module, call: Call, shape: TransformerShape, level: float) -> Any:
        """The guidance call of a pipeline that makes one per branch."""
        backbone, forward = self.router.backbone, functools.partial(self._forward, model)
        groups = self.groups or [Group(self.schedule.at(level))]

        def run(part: Call, group: Group, _: Branches | None, rows: tuple[int, ...] | None) -> Any:
            watch, before = Stopwatch(backbone.stack(part[backbone.sample]).device), self.remembered
            if before is not None and rows is not None:
                before = Remembered(backbone.rows(before.call, rows), before.sample[list(rows)])
            if not group.segment.gain:
                self._check_cache_dit(model, FULL, step_caches.NO_ROWS)
            output = run_guidance(self.router, forward, part, group.segment, before)
            mode = group.segment.guide_mode if group.segment.gain else None
            count = len(part[backbone.sample])
            self._record(shape, count, watch, level, mode, None, pictures=group.pictures)
            return output

        return run_groups(backbone, call, groups, None, run)

    def _conditional(
        self, model: nn.Module, call: Call, shape: TransformerShape, level: float
    ) -> Any:
        """A call with the conditional branch, and the guidance branch if both are in one batch."""
        backbone, forward = self.router.backbone, functools.partial(self._forward, model)
        branches = backbone.branches(model, call, self.pipe_of(model))
        separate = backbone.conditional_first is None and self.pipe_of(model) is not None
        separate = separate or self.context is not None
        self.groups = self._decide(model, call, shape, level, branches, separate=separate)
        segments = [group.segment for group in self.groups]
        weak = any(segment.weak_guidance for segment in segments)
        # One call per branch: nothing has used the conditional call of the step before.
        alone = branches is None and (not separate or self.remembered is not None)
        if weak and alone and not self.warned:
            warnings.warn(
                "the schedule asks for weak guidance, but this call has no guidance branch",
                stacklevel=5,
            )
            self.warned = True

        def run(
            part: Call, group: Group, own: Branches | None, rows: tuple[int, ...] | None
        ) -> Any:
            watch, segment = Stopwatch(backbone.stack(part[backbone.sample]).device), group.segment
            packed = self.packs
            output = run_batch(self.router, forward, part, segment, own, packed=packed)
            guide = None if own is None or segment.gain == 0 else segment.guide_mode
            self._record(
                shape,
                len(part[backbone.sample]),
                watch,
                level,
                segment.mode,
                guide,
                guided=own is not None,
                pictures=group.pictures,
                why=group.why,
            )
            return output

        output = run_groups(backbone, call, self.groups, branches, run)
        remembers = separate and (weak or any(segment.gain != 1 for segment in segments))
        learns = isinstance(self.chosen, Run) and self.chosen.learns
        if remembers or learns:
            prediction = backbone.stack(
                output.sample if call.get("return_dict", True) else output[0]
            )
            if remembers:
                # FLUX's pipeline writes the other branch's arguments into the same dictionary.
                kept = {k: dict(v) if isinstance(v, dict) else v for k, v in call.items()}
                self.remembered = Remembered(kept, prediction)
            if learns:
                self._learn(model, call, prediction, level, branches)
        return output

    def _decide(
        self,
        model: nn.Module,
        call: Call,
        shape: TransformerShape,
        level: float,
        branches: Branches | None,
        *,
        separate: bool,
    ) -> list[Group]:
        """How the pictures of this step run."""
        if self.controller is None:
            return [Group(self.schedule.at(level))]
        if self.chosen is None:
            guided: bool | None = branches is not None
            if separate:
                guided = is_guided(self.pipe_of(model))
            self.chosen = self.controller.begin(
                Facts(
                    levels=self._levels_ahead(model),
                    macs=shape.macs,
                    guided=guided,
                    packing=shape.packing_macs if self.packs else None,
                )
            )
        if isinstance(self.chosen, Schedule):
            self.schedule = self.chosen
            return [Group(self.schedule.at(level))]
        latents = self._on_grid(model, call, call[self.router.backbone.sample], branches)
        groups = grouped(self.chosen.decide(level, latents))
        if len(groups) > 1 and step_caches.has_step_cache(model):
            raise RuntimeError(
                "a step cache keeps one state for the whole batch, and pictures of this batch want "
                "different modes; legal together with a cache: a controller with per_picture=False"
            )
        return groups

    def _on_grid(
        self, model: nn.Module, call: Call, sample: Any, branches: Branches | None
    ) -> Tensor:
        """Conditional rows of latents or predictions as ``(B, T, H, W, C, p)``."""
        backbone, router = self.router.backbone, self.router
        x = backbone.stack(sample)
        if branches is not None:
            x = x[branches.conditional]
        embed = model.get_submodule(backbone.embed)
        vectors = backbone.vectors(embed, x.detach(), router)
        if len(vectors) != len(x):  # frames folded into the batch
            vectors = vectors.reshape(len(x), -1, *vectors.shape[2:])
        p = math.prod(router.patch)
        if backbone.embed_layout == "Cthw":
            return vectors.unflatten(-1, (-1, p))
        return vectors.unflatten(-1, (p, -1)).transpose(-1, -2)

    def _learn(
        self, model: nn.Module, call: Call, prediction: Tensor, level: float, branches: Any
    ) -> None:
        """Show the run the clean latents that the conditional branch predicts."""
        assert isinstance(self.chosen, Run)
        backbone = self.router.backbone
        latent = backbone.stack(call[backbone.sample])
        # A learned variance comes behind the prediction, given channels behind the latent.
        shared = tuple(
            slice(0, min(n, m)) for n, m in zip(latent.shape, prediction.shape, strict=True)
        )
        moves = backbone.direction * prediction[shared]
        told = parametrisation(self.pipe_of(model))
        clean = latent.clone()
        clean[shared] = told.clean(level, latent[shared], moves).to(clean)
        self.chosen.learn(level, self._on_grid(model, call, clean, branches))

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
        if not mode.has_base_patch or mode.is_sparse:
            backbone.check_grid(self.router.grid, mode)
            backbone.check_call(call, mode)
        self._keep_fused_seams()
        step_caches.check_sparse(model, mode)
        if getattr(model, "_parallel_config", None) is not None:
            raise RuntimeError(
                f"context parallelism splits the base tokens and heads, and mode {mode.name!r} has "
                "others; legal together with it: full mode"
            )

    def _forward(
        self, model: nn.Module, call: Call, mode: Mode, branch: str = step_caches.ALL_ROWS
    ) -> Any:
        """The stock forward in a mode (of all rows, unless the router has a packed layout)."""
        # Whoever offloads a model puts hooks on all of it, or a map on it: a short look is enough.
        away = hasattr(model, "hf_device_map") or is_offloaded(self.router.sizes.modules())
        with onloaded(self.silent if away else ()):
            return self._forward_in_place(model, call, mode, branch)

    def _forward_in_place(self, model: nn.Module, call: Call, mode: Mode, branch: str) -> Any:
        router = self.router
        router.mode, router.device = mode, call[router.backbone.sample][0].device
        router.merging = router.merged and not torch.is_grad_enabled()
        modes = (mode,) if router.layout is None else tuple([p.mode for p in router.layout])
        for each in modes:
            if not each.is_full:
                self._check_coarse(model, call, each)
            self._check_cache_dit(model, each, branch)
            self._ready(model, each)
        if router.sizes.routes(mode):
            call = router.backbone.prepare(call, router, mode)
        if self.widths is not None and mode.is_routed:
            level = self._as_planned(model, router.backbone.levels(call)[1])
            router.narrow = self.widths.of(model, call, mode, level)
        router.text = self._prompt(call) if self._keeps_text() else None
        router.ahead = self._ahead(model, call, mode)
        router.streams = router.sizes.begin(model, router, mode)
        router.running = True
        try:
            alone = self.forced is None and self.controller is None
            alone = alone and self.schedule.modes == {mode}
            with step_caches.state(model, self.stock, self.context, mode, branch, alone=alone):
                forward = self._stock_forward(model, modes)
                set_eval_frame(self.compiler)
                try:
                    output = forward(**call)
                finally:
                    set_eval_frame(None)
            if router.narrow is not None and not self.compiling:
                self.kept[mode] = router.narrow.kept()
            return output
        finally:
            router.running, router.text, router.ahead = False, None, None
            router.narrow = router.streams = None

    def _begin_tables(self, model: nn.Module) -> None:
        """A run starts: what depends on its noise levels alone is found out for all at once."""
        for tables in (self.widths, self.ahead):
            if tables is not None:
                tables.begin(self._levels_ahead(model))

    def _ahead(self, model: nn.Module, call: Call, mode: Mode) -> BatchTables | None:
        """Tables of what the call's noise level and labels decide; never for the stock network."""
        if self.ahead is None or not self.plan_ahead or mode.is_full or self.forced is not None:
            return None
        if self.compiling or self.router.layout is not None or torch.is_grad_enabled():
            return None
        low, level = self.router.backbone.levels(call)
        chooses = self.controller is not None and not isinstance(self.chosen, Schedule)
        if low != level or chooses:
            return None
        level, run = self._as_planned(model, level), self.router.run
        work = self.schedule.at(level).work

        def is_alike(other: float) -> bool:
            return self.schedule.at(other).work == work

        return self.ahead.of(model, call, mode, level, run, is_alike)

    def _levels_ahead(self, model: nn.Module) -> tuple[float, ...]:
        """Noise levels of a run's calls; none where no scheduler tells them."""
        scheduler, timesteps = self._scheduler(model)
        if timesteps is None:
            return ()
        return called_levels(self.pipe_of(model), model, scheduler)

    def share(self) -> float | None:
        """The budget of the next runs as a share of the full FLOPs; None for another or none."""
        if self.budget is None:
            return None
        budget = self.budget if isinstance(self.budget, Budget) else Budget(self.budget)
        return budget.share if budget.currency == "flops" else None

    def _stock_forward(self, model: nn.Module, modes: tuple[Mode, ...]) -> Callable[..., Any]:
        if self.compiled is not None:
            return self.compiled.at(model, modes)
        if self.compiler is None:
            return functools.partial(self.stock.forward, model)
        if self.apart is None or self.apart.forward is not self.stock.forward:  # or one put there
            self.apart = Graphs(self.stock.forward, self.router)
        return self.apart.at(model, modes)

    @property
    def compiling(self) -> bool:
        """Whether the stock forward of the present call runs as a graph."""
        return self.compiled is not None or self.compiler is not None

    def run_inside(self, model: nn.Module, call: Call) -> Any:
        """One call inside a larger graph or an export: nothing is read from tensors or recorded.

        Raises:
            RuntimeError: the mode would depend on the noise level, or the call does not allow it.
        """
        router, segments = self.router, self.schedule.segments
        mode = self.forced or segments[0].mode
        if self.forced is None and (
            self.controller is not None
            or any(s.mode != mode or s.guide_mode != mode or s.gain != 1 for s in segments)
        ):
            raise RuntimeError(
                "a call inside a larger graph has one mode at all noise levels; legal: a schedule "
                "of one mode, handle.using(mode), or to compile the model itself"
            )
        if mode.is_routed:
            raise RuntimeError(
                f"mode {mode.name!r} cuts its layers for the noise level of a call, which is not "
                "read inside a larger graph; legal there: modes of full width, or to compile the "
                "model itself"
            )
        router.mode, router.merging, router.text = mode, False, None
        if router.sizes.routes(mode) or mode.is_sparse:
            router.grid = router.backbone.grid(model, call)
            router.device = call[router.backbone.sample][0].device
            if not mode.is_full:
                self._check_coarse(model, call, mode)
            call = router.backbone.prepare(call, router, mode)
        router.streams = router.sizes.begin(model, router, mode)
        router.running = True
        try:
            return self.stock.forward(model, **call)
        finally:
            router.running, router.streams = False, None

    def _check_cache_dit(self, model: nn.Module, mode: Mode, branch: str) -> None:
        reads_blocks = self.router.backbone.reads_blocks
        step_caches.check_cache_dit(model, mode, branch, reads_blocks=reads_blocks)

    def _ready(self, model: nn.Module, mode: Mode) -> None:
        """Make what a mode keeps between calls, outside any compiled region."""
        router = self.router
        if router.merging and not mode.is_full:
            self.merges.ready(mode, router.run, router.device)
        if router.sizes.routes(mode):
            router.sizes.ready(mode)
            if self.compiling:  # else the module itself makes its table when asked
                embed = model.get_submodule(router.backbone.embed)
                router.backbone.positions(embed, router, mode)

    def _keeps_text(self) -> bool:
        kept = self.keep_text and self.forced is None and not self.compiling
        return kept and not torch.is_grad_enabled() and len(self.groups) < 2

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
        pictures: tuple[int, ...] | None = None,
        why: tuple[dict[str, Any] | None, ...] = (),
    ) -> None:
        """Keep what a call ran; ``mode`` is None where it only repeated a prediction."""
        shown = count // 2 if guided else count
        kept = self.repeated * shape.text_tokens * shape.text_once
        spent = self._spent(shape, mode, level) if mode is not None else 0.0
        if mode is not None and guide is not None:
            spent += self._spent(shape, guide, level)
            if self.packs and guide != mode:
                spent += shape.packing_macs(mode, guide)
        self.calls.append(
            CallRecord(
                level=level,
                mode=mode,
                guide=guide,
                branch=None if self.context is None else self.context[0],
                rows=count,
                macs=shown * spent - kept,
                full_macs=count * shape.macs(FULL),
                watch=watch.stop(),
                pictures=pictures,
                why=why,
                guided=guided,
            )
        )

    def _spent(self, shape: TransformerShape, mode: Mode, level: float | None) -> float:
        """Multiply-adds of a picture in a mode that has just run."""
        return shape.macs(mode, level, self.kept.get(mode))

    def _level(self, model: nn.Module, call: Call) -> float:
        """Noise level of a call, as exact as the scheduler of the pipeline knows it.

        Some pipelines (FLUX) cast the time to the dtype of the latents, and a rounded level may lie
        on the other side of a segment's edge than the planned one.
        """
        low, level = self.router.backbone.levels(call)
        chosen = self.controller is not None or self.schedule.at(low) is not self.schedule.at(level)
        if chosen and low != level:
            raise ValueError(
                f"noise levels of a batch go from {low} to {level}, and modes change between them; "
                "legal: rows of one segment (handle.using(mode) sets a mode for all)"
            )
        return level if low != level else self._as_planned(model, level)

    def _as_planned(self, model: nn.Module, level: float) -> float:
        """A noise level that the model was told, as the scheduler knows it."""
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
            own = self._with_own_blocks(model)
            shape = self.method.priced(backbone.shape(own, *key), own, backbone)
            if self.widths is not None:
                shape = replace(shape, routable=self.widths.routable)
            updates = self.method.updates(shape, own, backbone, key)
            self.shapes[key] = replace(shape, updates=updates, skips=self.method.skips)
        shape = self.shapes[key]
        if self.router.merged:
            shape = replace(shape, updates=())
        if self.widths is None:
            return shape
        kept = functools.partial(self.widths.kept, model)
        return replace(shape, kept=kept)

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
        self.hooks += self.router.sizes.attach(model, self.router)
        for module in backbone.text_layers(model):
            self._swap(module, TextSeam)
        for module in backbone.conditioning_layers(model) if self.method.conditions else ():
            self._swap(module, ConditioningSeam)
        for embedder, layers in backbone.embedded(model):
            self._swap(embedder, EmbedderSeam)
            for layer in layers:
                layer.__dict__[SOURCE] = embedder
                self._swap(layer, EmbeddedSeam)
        for layer, A, B in self.pairs.values():
            layer.coarse_A, layer.coarse_B = A, B
            self._swap(layer, LowRankSeam)
        for module, mixin, place in self.widths.seams(model) if self.widths else ():
            module.__dict__[PLACE] = place  # in front of low-rank updates, which narrow too
            self._swap(module, mixin)
        model.__class__ = elastic_class(self.stock, backbone.rewired, self.method)
        model.__dict__[ENGINE] = self
        self.lists = {k: m for k, m in model.named_children() if isinstance(m, nn.ModuleList)}
        self.silent = [module for module in self._holders() if is_silent(module)]
        rebind_hooks(model, self.stock)

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

    def _keep_fused_seams(self) -> None:
        """Swap projections that ``fuse_qkv_projections`` has made of adapted layers."""
        for module in self.adapted:
            for name, parts in FUSED.items():
                fused = module._modules.get(name)
                if fused is not None and ROUTER not in fused.__dict__:
                    layers = [module.get_submodule(part) for part in parts]
                    # A user's LoRA wraps its layer.
                    fused.__dict__[PARTS] = [getattr(x, "base_layer", x) for x in layers]
                    self._swap(fused, FusedSeam)

    def _swap(self, module: nn.Module, mixin: type) -> None:
        swap_class(module, mixin, self.router)
        self.swapped.append(module)

    def uninstall(self, model: nn.Module) -> None:
        """Undo `install` exactly.

        Raises:
            RuntimeError: the adapter's own version of base weights is offloaded.
        """
        if self.other_weights and is_offloaded(model.modules()):
            raise RuntimeError(
                "the base's own weights cannot be put back while they are offloaded; take the "
                "offloading off first (pipe.remove_all_hooks(), or "
                "accelerate.hooks.remove_hook_from_submodules(model))"
            )
        for module in reversed(self.swapped):
            restore_class(module)
        self.swapped.clear()
        for module, handle in self.hooks:
            handle.remove()
            for key in (ROUTER, ROLE, MERGE):  # it may have several, or have been swapped too
                module.__dict__.pop(key, None)
        self.hooks.clear()
        for layer, _, _ in self.pairs.values():
            del layer.coarse_A, layer.coarse_B
        del model._modules[SIZES]
        was, model.__class__ = type(model), self.stock
        del model.__dict__[ENGINE]
        self._exchange_weights()
        rebind_hooks(model, was)

    def _exchange_weights(self) -> None:
        for name, other in self.other_weights.items():
            owner, leaf = self.owners[name]
            held: Any = owner._parameters if leaf in owner._parameters else owner._buffers
            now, tensor = held[leaf], self.base[name]
            if is_ordinary(now):  # moving a buffer, or a hook that was removed, makes a new object
                tensor = self.base[name] = now
            tensor.data, self.other_weights[name] = other.to(tensor), tensor.data
            if tensor is not now:  # quantised since
                held[leaf], self.quantised[name] = tensor, now
            elif name in self.quantised:
                held[leaf] = self.quantised.pop(name)


def is_new(key: str) -> bool:
    """Whether a parameter name of an elastic model is one of the added tensors."""
    return key.startswith(f"{SIZES}.") or ".coarse_A." in key or ".coarse_B." in key


def _low_rank_pairs(model: nn.Module, backbone: Backbone, method: Method) -> dict[str, LowRankPair]:
    """New low-rank pairs by layer name; the second factor starts as zero."""
    pairs: dict[str, LowRankPair] = {}
    for single in method.singles:
        rank, layers = single.low_rank, backbone.adapting(single.adapts).low_rank_layers(model)
        for name, layer in layers if rank else ():
            _, A, B = pairs.setdefault(name, (layer, NewParameters(), NewParameters()))
            like: dict[str, Any] = {"device": layer.weight.device, "dtype": compute_dtype(layer)}
            for mode in single.modes:
                A[mode.name] = nn.Parameter(
                    torch.randn(rank, layer.in_features).to(**like) / layer.in_features**0.5
                )
                B[mode.name] = nn.Parameter(torch.zeros(layer.out_features, rank).to(**like))
    return pairs
