"""The engine of an elastic model: it runs one call of it.

What it runs is the stock ``forward`` of the model's class, in which the swapped submodules look up
the mode (`ditdial.layers`); how they came there is `ditdial.runtime.surgery`. Everything that an
engine needs to know it asks the objects that it holds: where the call stands in its run, who
chooses its modes, what it costs, how the stock forward is run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ditdial.adapter import Adapter
from ditdial.backbones import Backbone
from ditdial.backbones.arguments import Branches, Call
from ditdial.cost.shape import TransformerShape
from ditdial.host import step_caches
from ditdial.host.device import Stopwatch
from ditdial.host.parametrization import parametrization
from ditdial.host.pipelines import is_guided
from ditdial.layers.checkpointing import remembered_in_checkpoints
from ditdial.layers.wiring import Wiring
from ditdial.methods import Method
from ditdial.plain.checks import warn
from ditdial.plan.controller import Facts
from ditdial.plan.execution import Execution
from ditdial.plan.mode import FULL, Mode
from ditdial.runtime.chooser import Chooser
from ditdial.runtime.compiled import Compiled
from ditdial.runtime.costs import CallFacts, Costs
from ditdial.runtime.forward_pass import ForwardPass
from ditdial.runtime.guidance import Remembered, run_batch, run_guidance
from ditdial.runtime.latents import clean_latents, on_base_grid
from ditdial.runtime.pictures import Group, run_groups
from ditdial.runtime.position import Position
from ditdial.runtime.prompts import Prompts
from ditdial.runtime.surgery import Surgery

Observer = Callable[[nn.Module, Call, Any], None]
"""``observe(model, call, output)`` after a call of an elastic model."""


@dataclass(eq=False)
class Engine:
    """Lives on the elastic model.

    Attributes:
        surgery: what was changed on the model.
        position: where a call stands in its run.
        chooser: who chooses its modes.
        costs: what calls cost.
        prompts: of the present run.
        passes: runs the stock forward in a mode.
        observers: called behind every call, with the model, the call and its output.
        groups: how the pictures of the present step run.
        remembered: the conditional call of the present step, if its guidance call needs it.
        warned: that weak guidance was asked for in vain.
    """

    surgery: Surgery
    position: Position
    chooser: Chooser
    costs: Costs
    prompts: Prompts
    passes: ForwardPass
    observers: list[Observer] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    remembered: Remembered | None = None
    warned: bool = False

    @classmethod
    def build(
        cls, model: nn.Module, backbone: Backbone, method: Method, adapters: Sequence[Adapter]
    ) -> Engine:
        """An engine for a stock model, which is only read; see `Surgery.build`."""
        surgery = Surgery.build(model, backbone, method, adapters)
        modes = tuple(mode for mode in method.modes if backbone.fits(model, mode))
        parts: dict[str, Any] = {
            "surgery": surgery,
            "position": Position(backbone),
            "chooser": Chooser(modes),
            "costs": Costs(surgery),
            "prompts": Prompts(backbone.arguments.condition[0]),
        }
        compiled = Compiled(surgery.wiring, surgery.stock)
        return cls(**parts, passes=ForwardPass(**parts, compiled=compiled))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "remembered": None, "observers": []}

    @property
    def wiring(self) -> Wiring:
        """What the swapped submodules find on themselves."""
        return self.surgery.wiring

    @property
    def method(self) -> Method:
        """The method in use."""
        return self.surgery.tensors.method

    def adapter(self, model: nn.Module, **notes: Any) -> Adapter:
        """The present weights as an adapter.

        Args:
            notes: anything else worth keeping; written into the adapter's config.
        """
        return self.surgery.tensors.adapter(model, self.chooser.schedule, notes)

    def shape(self, model: nn.Module, size: tuple[Any, ...] | None = None) -> TransformerShape:
        """What the cost of the model depends on; see `Costs.shape_of`."""
        return self.costs.shape_of(model, size, merged=self.execution.merge)

    def checked(self, execution: Execution) -> Execution:
        """An execution that the model's class and the method allow.

        Raises:
            ValueError: naming what they do not allow.
        """
        backbone, method = self.wiring.backbone, self.method
        if execution.packed and (backbone.packed is None or not method.packs):
            raise ValueError(
                f"packed = True; legal for {backbone.model_class} with method {method.name!r}: "
                "False (its branches run one after the other)"
            )
        if execution.keep_text and not backbone.prompt_only:
            raise ValueError(
                f"keep_text = True; legal for {backbone.model_class}: False (its text tokens "
                "change from step to step)"
            )
        return execution

    @property
    def execution(self) -> Execution:
        """How calls are run."""
        return self.passes.execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        self.passes.execution = execution = self.checked(execution)
        if self.surgery.widths is not None:
            self.surgery.widths.buckets = execution.width_buckets
            self.surgery.widths.slices = execution.width_slices

    def run(self, model: nn.Module, call: Call) -> Any:
        """One call of the elastic model, which the observers then see.

        Raises:
            ValueError: the rows have noise levels of different modes, or the latent is too small
                for a mode.
            RuntimeError: the weights or arguments of the call do not allow a coarse mode.
        """
        wiring = self.wiring
        size = wiring.backbone.size(model, call)
        # The grid comes first: seams, checks and costs all count in it.
        wiring.state.grid, shape = size[0], self.shape(model, size)
        self.prompts.repeated = 0
        # A layer that somebody has put in since the last call needs its seam before this one runs.
        self.surgery.look_over(model)
        with remembered_in_checkpoints(model, wiring.state):
            output = self._choose_and_run(model, call, shape)
        for observe in self.observers:
            observe(model, call, output)
        return output

    def _choose_and_run(self, model: nn.Module, call: Call, shape: TransformerShape) -> Any:
        """Find out where the call stands in its run, and run it as its guidance branch asks."""
        arguments, forced = self.wiring.backbone.arguments, self.chooser.forced
        if forced is not None:
            watch = Stopwatch(arguments.device(call))
            output = self.passes.run(model, call, forced)
            self.costs.record(self._facts(shape, call, None, forced), watch)
            return output
        # A new run is noticed before the branch is told: what the last one left would mislead it.
        level = self._level(model, call)
        calls = self.costs.calls
        if self.position.starts_run(model, level, calls[-1].level if calls else None):
            self._start_run(model)
        if self.position.is_guidance(model, arguments.latent(call), level):
            output = self._guidance(model, call, shape, level)
            self.remembered = None  # it holds the step's tensors
            return output
        return self._conditional(model, call, shape, level)

    def _level(self, model: nn.Module, call: Call) -> float:
        """Noise level of a call, as planned."""
        low, level = self.position.level(model, call)
        if self.chooser.changes_between(low, level):
            raise ValueError(
                f"noise levels of a batch go from {low} to {level}, and modes change between them; "
                "legal: rows of one segment (handle.using(mode) sets a mode for all)"
            )
        return level

    def _start_run(self, model: nn.Module) -> None:
        """Forget the run before; what noise levels alone decide is found out for all at once."""
        self.costs.calls.clear()
        self.prompts.seen.clear()
        self.remembered = self.position.previous = None
        self.chooser.begin_run()
        self.wiring.state.run += 1  # what layers have kept of the last prompt is stale from here on
        if self.surgery.widths is not None:
            self.surgery.widths.begin(self.position.levels_ahead(model))

    def _facts(
        self, shape: TransformerShape, call: Call, level: float | None, mode: Mode | None
    ) -> CallFacts:
        """What a call ran."""
        return CallFacts(
            shape=shape,
            rows=self.wiring.backbone.arguments.count(call),
            level=level,
            mode=mode,
            branch=self.position.branch,
            repeated=self.prompts.repeated,
        )

    def _guidance(self, model: nn.Module, call: Call, shape: TransformerShape, level: float) -> Any:
        """The guidance call of a pipeline that makes one per branch."""
        arguments = self.wiring.backbone.arguments
        forward = functools.partial(self.passes.run, model)
        groups = self.groups or [Group(self.chooser.schedule.at(level))]

        def run(part: Call, group: Group, _: Branches | None, rows: tuple[int, ...] | None) -> Any:
            watch, before = Stopwatch(arguments.device(part)), self.remembered
            if before is not None and rows is not None:
                before = Remembered(arguments.rows(before.call, rows), before.sample[list(rows)])
            # Nothing runs then, and cache-dit counts a pass through the blocks for each call.
            if not group.segment.gain:
                self.passes.check_cache_dit(model, FULL, step_caches.NO_ROWS)
            output = run_guidance(self.wiring, forward, part, group.segment, before)
            mode = group.segment.guide_mode if group.segment.gain else None
            facts = self._facts(shape, part, level, mode)
            self.costs.record(replace(facts, pictures=group.pictures), watch)
            return output

        return run_groups(arguments, call, groups, None, run)

    def _conditional(
        self, model: nn.Module, call: Call, shape: TransformerShape, level: float
    ) -> Any:
        """A call with the conditional branch, and the guidance branch if both are in one batch."""
        arguments = self.wiring.backbone.arguments
        forward = functools.partial(self.passes.run, model)
        branches = arguments.branches(model, call, self.position.pipe_of(model))
        self.groups = self._decide(model, call, shape, level, branches)
        self.prompts.in_one_group = len(self.groups) == 1
        self._warn_of_weak_guidance(model, branches)

        def run(
            part: Call, group: Group, own: Branches | None, rows: tuple[int, ...] | None
        ) -> Any:
            watch, segment = Stopwatch(arguments.device(part)), group.segment
            output = run_batch(
                self.wiring, forward, part, segment, own, packed=self.execution.packed
            )
            guide = None if own is None or segment.gain == 0 else segment.guide_mode
            facts = replace(
                self._facts(shape, part, level, segment.mode),
                guide=guide,
                guided=own is not None,
                pictures=group.pictures,
                why=group.why,
            )
            self.costs.record(facts, watch)
            return output

        output = run_groups(arguments, call, self.groups, branches, run)
        self._remember(model, call, output, level, branches)
        return output

    def _decide(
        self,
        model: nn.Module,
        call: Call,
        shape: TransformerShape,
        level: float,
        branches: Branches | None,
    ) -> list[Group]:
        """Ask the chooser how the pictures of this step run, in groups of one choice each.

        Raises:
            RuntimeError: pictures want different modes beside a step cache, which keeps one state
                for all of them.
        """

        def facts() -> Facts:
            guided: bool | None = branches is not None
            if self.position.calls_by_branch(model):
                guided = is_guided(self.position.pipe_of(model))
            levels = self.position.levels_ahead(model)
            return Facts(levels=levels, macs=shape.macs, guided=guided)

        latent = self.wiring.backbone.arguments.latent(call)
        # Asked for only by a controller that looks at latents: schedules pay nothing for it.
        latents = functools.partial(on_base_grid, self.wiring, latent, branches)
        groups = self.chooser.decide(level, facts, latents)
        if len(groups) > 1 and step_caches.has_step_cache(model):
            raise RuntimeError(
                "a step cache keeps one state for the whole batch, and pictures of this batch want "
                "different modes; legal together with a cache: a controller with per_picture=False"
            )
        return groups

    def _warn_of_weak_guidance(self, model: nn.Module, branches: Branches | None) -> None:
        weak = any(group.segment.weak_guidance for group in self.groups)
        if not weak or branches is not None or self.warned:
            return
        # One call per branch: nothing has used the conditional call of the step before.
        if not self.position.calls_by_branch(model) or self.remembered is not None:
            warn("the schedule asks for weak guidance, but this call has no guidance branch")
            self.warned = True

    def _remember(
        self, model: nn.Module, call: Call, output: Any, level: float, branches: Branches | None
    ) -> None:
        """Keep the step's conditional call for its guidance call, and let a controller learn."""
        segments = [group.segment for group in self.groups]
        needed = any(segment.weak_guidance or segment.gain != 1 for segment in segments)
        remembers = needed and self.position.calls_by_branch(model)
        if not (remembers or self.chooser.learns):
            return
        arguments = self.wiring.backbone.arguments
        prediction = arguments.prediction(call, output)
        if remembers:
            # FLUX's pipeline writes the other branch's arguments into the same dictionary.
            kept = {k: dict(v) if isinstance(v, dict) else v for k, v in call.items()}
            self.remembered = Remembered(kept, prediction)
        if self.chooser.learns:
            told = parametrization(self.position.pipe_of(model))
            latent = arguments.latent(call)
            clean = clean_latents(self.wiring, told, level, latent, prediction)
            self.chooser.learn(level, on_base_grid(self.wiring, clean, branches))
