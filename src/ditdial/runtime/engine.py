"""The engine of an elastic model: it picks the mode of each call, and runs it.

What it runs is the stock ``forward`` of the model's class, in which the swapped submodules look up
the mode (`ditdial.layers.tokens`); how they came there is `ditdial.runtime.surgery`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame

from ditdial.adapter import Adapter
from ditdial.backbones import Backbone
from ditdial.backbones.call import Branches, Call
from ditdial.cost.shape import TransformerShape
from ditdial.host import step_caches
from ditdial.host.parametrization import parametrisation
from ditdial.host.pipelines import is_guided
from ditdial.host.weights import onloaded
from ditdial.layers.checkpointing import remembered_in_checkpoints
from ditdial.layers.packing import MASKED, Packing
from ditdial.layers.state import Router, TextKey
from ditdial.layers.steps_ahead import BatchTables, RunTables
from ditdial.methods import Method
from ditdial.plan.budget import Budget
from ditdial.plan.calibration import Calibration
from ditdial.plan.controller import Controller, Facts, Run
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.report import Stopwatch
from ditdial.plan.schedule import Schedule
from ditdial.runtime.compiled import Graphs
from ditdial.runtime.costs import CallFacts, Costs
from ditdial.runtime.guidance import Remembered, run_batch, run_guidance
from ditdial.runtime.pictures import Group, grouped, run_groups
from ditdial.runtime.position import Timeline
from ditdial.runtime.surgery import Surgery


@dataclass(eq=False)
class Engine:
    """Lives on the elastic model.

    Attributes:
        surgery: what was changed on the model.
        timeline: where a call stands in its run.
        ledger: what calls cost.
        modes: coarse modes that fit the model.
        schedule: noise level -> mode.
        controller: chooses the modes of each run; None leaves that to the schedule.
        budget: that the controller was made for.
        calibration: what each choice of modes loses at each noise level, if that was measured.
        forced: the mode of all calls, whatever their noise level.
        packed, keep_text: as in the handle.
        plan_ahead: compute what noise level and labels alone decide for many steps at once.
        ahead: the tables of that, where such layers are known.
        allowed: share of the full FLOPs that the present run was planned for, if it has a budget.
        chosen: what the controller is at work on in the present run; the schedule of a run whose
            choices were made before it.
        level: noise level of the present call, as planned, if all its rows share one.
        groups: how the pictures of the present step run.
        remembered: the conditional call of the present step, if its guidance call needs it.
        prompts: those of the present run, if text layers are kept.
        warned: that weak guidance was asked for in vain.
        compiled: the stock forward by mode, if ``model.compile`` was called.
        compiler: of the present call, if ``torch.compile`` was given the whole model.
        apart: the stock forward by mode, for that compiler.
    """

    surgery: Surgery
    timeline: Timeline
    ledger: Costs
    modes: tuple[Mode, ...]
    schedule: Schedule = field(default_factory=Schedule.constant)
    controller: Controller | None = None
    budget: float | Budget | None = None
    calibration: Calibration | None = None
    forced: Mode | None = None
    packed: Packing = False
    keep_text: bool = False
    plan_ahead: bool = False
    ahead: RunTables | None = None
    allowed: float | None = None
    chosen: Run | Schedule | None = None
    level: float | None = None
    groups: list[Group] = field(default_factory=list)
    remembered: Remembered | None = None
    prompts: list[TextKey] = field(default_factory=list)
    warned: bool = False
    compiled: Graphs | None = None
    compiler: Any = None
    apart: Graphs | None = None

    @classmethod
    def build(
        cls, model: nn.Module, backbone: Backbone, method: Method, adapters: Sequence[Adapter]
    ) -> Engine:
        """An engine for a stock model, which is only read; see `Surgery.build`."""
        surgery = Surgery.build(model, backbone, method, adapters)
        modes = tuple(mode for mode in method.modes if backbone.fits(model, mode))
        engine = cls(surgery, Timeline(backbone), Costs(surgery), modes)
        if backbone.labels:
            engine.ahead = RunTables(backbone, model, by_mode=method.conditions)
        return engine

    @property
    def router(self) -> Router:
        """What the swapped submodules read."""
        return self.surgery.router

    @property
    def method(self) -> Method:
        """The method in use."""
        return self.surgery.method

    def install(self, model: nn.Module) -> None:
        """Make the model elastic; the inverse of `uninstall`."""
        self.surgery.install(model, self)

    def uninstall(self, model: nn.Module) -> None:
        """Make it the stock model again, exactly; see `Surgery.uninstall`."""
        self.surgery.uninstall(model)

    def adapter(self, model: nn.Module, **notes: Any) -> Adapter:
        """The present weights as an adapter."""
        return self.surgery.adapter(model, self.schedule, **notes)

    @property
    def packs(self) -> Packing:
        """Whether, and how, branches of different modes share one packed call."""
        return self.packed if self.router.backbone.packs and self.method.packs else False

    def packing(self, shape: TransformerShape) -> Callable[[Mode, Mode], float] | None:
        """What two branches of different modes cost more in one call; None if they have two."""
        if self.packs == MASKED:
            return shape.packing_macs
        return (lambda a, b: 0.0) if self.packs else None

    def __getstate__(self) -> dict[str, Any]:
        # A copied model must not call the compiled forward of the original.
        dropped = ("compiled", "apart", "remembered")
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
        router.grid, shape = size[0], self.ledger.shape_of(model, size)
        self.ledger.repeated = 0
        if self.surgery.away or not self.timeline.is_undisturbed(model):
            router.stretch += 1
            self.surgery.look_over(model)
        with remembered_in_checkpoints(model, router):
            if self.forced is not None:
                watch, output = Stopwatch(sample.device), self._forward(model, call, self.forced)
                facts = CallFacts(
                    shape=shape,
                    rows=count,
                    level=None,
                    mode=self.forced,
                    branch=self.timeline.branch,
                )
                self.ledger.record(facts, watch)
                return output
            level = self._level(model, call)
            calls = self.ledger.calls
            if self.timeline.starts_run(model, level, calls[-1].level if calls else None):
                self._start_run(model)
            if self.timeline.is_guidance(model, sample, level):
                output = self._guidance(model, call, shape, level)
                self.remembered = None
                return output
            return self._conditional(model, call, shape, level)

    def _start_run(self, model: nn.Module) -> None:
        """Forget the run before; what noise levels alone decide is found out for all at once."""
        self.ledger.calls.clear()
        self.prompts.clear()
        self.remembered = self.timeline.previous = self.chosen = None
        self.allowed = self.share()
        self.router.run += 1
        for tables in (self.surgery.widths, self.ahead):
            if tables is not None:
                tables.begin(self.timeline.levels_ahead(model))

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
            facts = CallFacts(
                shape=shape,
                rows=len(part[backbone.sample]),
                level=level,
                mode=mode,
                branch=self.timeline.branch,
                pictures=group.pictures,
            )
            self.ledger.record(facts, watch)
            return output

        return run_groups(backbone, call, groups, None, run)

    def _conditional(
        self, model: nn.Module, call: Call, shape: TransformerShape, level: float
    ) -> Any:
        """A call with the conditional branch, and the guidance branch if both are in one batch."""
        backbone, forward = self.router.backbone, functools.partial(self._forward, model)
        branches = backbone.branches(model, call, self.timeline.pipe_of(model))
        separate = backbone.conditional_first is None and self.timeline.pipe_of(model) is not None
        separate = separate or self.timeline.context is not None
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
            facts = CallFacts(
                shape=shape,
                rows=len(part[backbone.sample]),
                level=level,
                mode=segment.mode,
                guide=guide,
                branch=self.timeline.branch,
                guided=own is not None,
                pictures=group.pictures,
                why=group.why,
            )
            self.ledger.record(facts, watch)
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
                guided = is_guided(self.timeline.pipe_of(model))
            self.chosen = self.controller.begin(
                Facts(
                    levels=self.timeline.levels_ahead(model),
                    macs=shape.macs,
                    guided=guided,
                    packing=self.packing(shape),
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
        told = parametrisation(self.timeline.pipe_of(model))
        clean = latent.clone()
        clean[shared] = told.clean(level, latent[shared], moves).to(clean)
        self.chosen.learn(level, self._on_grid(model, call, clean, branches))

    def _check_coarse(self, model: nn.Module, call: Call, mode: Mode) -> None:
        """Refuse a coarse mode that this call, or what was put on the model, does not allow."""
        backbone = self.router.backbone
        if not mode.has_base_patch or mode.is_sparse:
            backbone.check_grid(self.router.grid, mode)
            backbone.check_call(call, mode)
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
        with onloaded(self.surgery.silent if self.surgery.away else ()):
            return self._forward_in_place(model, call, mode, branch)

    def _forward_in_place(self, model: nn.Module, call: Call, mode: Mode, branch: str) -> Any:
        router = self.router
        router.mode, router.device = mode, call[router.backbone.sample][0].device
        router.merging = router.merged and not torch.is_grad_enabled()
        modes = (mode,) if router.layout is None else router.layout.modes
        for each in modes:
            if not each.is_full:
                self._check_coarse(model, call, each)
            self._check_cache_dit(model, each, branch)
            self._ready(model, each)
        if router.sizes.routes(mode):
            call = router.backbone.prepare(call, router, mode)
        if self.surgery.widths is not None and mode.is_routed:
            level = self.timeline.as_planned(model, router.backbone.levels(call)[1])
            router.narrow = self.surgery.widths.of(model, call, mode, level)
        router.text = self._prompt(call) if self._keeps_text() else None
        router.ahead = self._ahead(model, call, mode)
        router.streams = router.sizes.begin(model, router, mode)
        router.running = True
        try:
            alone = self.forced is None and self.controller is None
            alone = alone and self.schedule.modes == {mode}
            with step_caches.state(
                model, self.surgery.stock, self.timeline.context, mode, branch, alone=alone
            ):
                forward = self._stock_forward(model, modes)
                set_eval_frame(self.compiler)
                try:
                    output = forward(**call)
                finally:
                    set_eval_frame(None)
            if router.narrow is not None and not self.compiling:
                self.ledger.kept[mode] = router.narrow.kept()
            return output
        finally:
            router.running, router.text, router.ahead = False, None, None
            router.narrow = router.streams = None

    def _ahead(self, model: nn.Module, call: Call, mode: Mode) -> BatchTables | None:
        """Tables of what the call's noise level and labels decide; none in a step of the base."""
        if self.ahead is None or not self.plan_ahead or self.compiling or torch.is_grad_enabled():
            return None
        chooses = self.controller is not None and not isinstance(self.chosen, Schedule)
        level = self.level
        if self.forced is not None or level is None or chooses:
            return None
        segment, layout = self.schedule.at(level), self.router.layout
        if segment.modes == {FULL}:
            return None

        def is_alike(other: float) -> bool:
            return self.schedule.at(other).work == segment.work

        labels = (call.get(self.router.backbone.labels),) if layout is None else layout.labels
        return self.ahead.of(model, labels, mode, level, self.router, is_alike)

    def share(self) -> float | None:
        """The budget of the next runs as a share of the full FLOPs; None for another or none."""
        if self.budget is None:
            return None
        budget = self.budget if isinstance(self.budget, Budget) else Budget(self.budget)
        return budget.share if budget.currency == "flops" else None

    def _stock_forward(self, model: nn.Module, modes: tuple[Mode, ...]) -> Callable[..., Any]:
        if self.compiled is not None:
            return self.compiled.at(model, modes)
        forward = self.surgery.stock.forward
        if self.compiler is None:
            return functools.partial(forward, model)
        if self.apart is None or self.apart.forward is not forward:  # somebody put one there
            self.apart = Graphs(forward, self.router)
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
                self.surgery.keep_fused_seams()
                self._check_coarse(model, call, mode)
            call = router.backbone.prepare(call, router, mode)
        router.streams = router.sizes.begin(model, router, mode)
        router.running = True
        try:
            return self.surgery.stock.forward(model, **call)
        finally:
            router.running, router.streams = False, None

    def _check_cache_dit(self, model: nn.Module, mode: Mode, branch: str) -> None:
        reads_blocks = self.router.backbone.reads_blocks
        step_caches.check_cache_dit(model, mode, branch, reads_blocks=reads_blocks)

    def _ready(self, model: nn.Module, mode: Mode) -> None:
        """Make what a mode keeps between calls, outside any compiled region."""
        router = self.router
        if router.merging and not mode.is_full:
            self.surgery.merges.ready(mode, router)
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
            self.ledger.repeated += len(prompt)
        else:
            self.prompts.append(key)
        return key

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
        self.level = None if low != level else self.timeline.as_planned(model, level)
        return level if self.level is None else self.level
