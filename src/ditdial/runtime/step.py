"""One call of an elastic model: its branches, each in the mode that was chosen for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ditdial.backbones.arguments import Arguments, Branches, Call
from ditdial.cost.shape import TransformerShape
from ditdial.host import step_caches
from ditdial.host.callers import Caller
from ditdial.host.device import Stopwatch
from ditdial.host.parametrization import parametrization
from ditdial.layers.wiring import Wiring
from ditdial.plain.checks import warn
from ditdial.plan.facts import Facts
from ditdial.plan.mode import FULL, Mode
from ditdial.runtime.costs import CallFacts, Costs
from ditdial.runtime.forward_pass import ForwardPass
from ditdial.runtime.guidance import Remembered, run_batch, run_guidance
from ditdial.runtime.latents import clean_latents, on_base_grid
from ditdial.runtime.pictures import Group, run_groups
from ditdial.runtime.sampling_run import SamplingRun


@dataclass(frozen=True, kw_only=True)
class Step:
    """A call, and all that is known of it.

    Args:
        shape: of the model, for the call's size.
        caller: who makes it.
        run: that it belongs to.
        level: its noise level, as planned; None where a mode is forced.
        passes: runs the stock forward in a mode.
        costs: what calls cost.
    """

    model: nn.Module
    call: Call
    shape: TransformerShape
    caller: Caller
    run: SamplingRun
    level: float | None
    passes: ForwardPass
    costs: Costs

    @property
    def _wiring(self) -> Wiring:
        return self.passes.surgery.wiring

    @property
    def _arguments(self) -> Arguments:
        return self._wiring.backbone.arguments

    @property
    def _forward(self) -> Callable[..., Any]:
        """Runs the stock forward on some rows, in a mode."""
        return functools.partial(self.passes.run, self.model)

    @property
    def _level(self) -> float:
        assert self.level is not None
        return self.level

    @property
    def _by_branch(self) -> bool:
        """Whether the pipeline calls the model once per guidance branch."""
        return self.run.calls_by_branch(self._wiring.backbone, self.caller)

    def in_mode(self, mode: Mode) -> Any:
        """All rows in one mode, whatever the noise level."""
        watch = Stopwatch(self._arguments.device(self.call))
        output = self._forward(self.call, mode)
        self._record(self._facts(self.call, mode), watch)
        return output

    def as_chosen(self) -> Any:
        """As the schedule or the controller of the run chooses.

        Raises:
            ValueError: the choice needs branches apart that the pipeline's batch keeps together.
        """
        backbone, latent = self._wiring.backbone, self._arguments.latent(self.call)
        if self.run.is_guidance(backbone, self.caller, latent, self._level):
            output = self._guidance()
            self.run.remembered = None  # it holds the step's tensors
            return output
        return self._conditional()

    def _facts(self, call: Call, mode: Mode | None) -> CallFacts:
        """What a call ran."""
        return CallFacts(
            shape=self.shape,
            rows=self._arguments.count(call),
            level=self.level,
            mode=mode,
            branch=self.run.branch,
            repeated=self.run.prompts.repeated,
        )

    def _record(self, facts: CallFacts, watch: Stopwatch) -> None:
        """Keep what ran among the calls of the run."""
        self.run.calls.append(self.costs.record(facts, watch))

    def _guidance(self) -> Any:
        """The guidance call of a pipeline that makes one per branch."""
        groups = self.run.groups or self._choose(None)
        self.run.choosing.guide_macs = self.shape.macs

        def run(part: Call, group: Group, _: Branches | None, rows: tuple[int, ...] | None) -> Any:
            watch, before = Stopwatch(self._arguments.device(part)), self.run.remembered
            if before is not None and rows is not None:
                before = Remembered(
                    self._arguments.rows(before.call, rows), before.sample[list(rows)]
                )
            # Nothing runs then, and cache-dit counts a pass through the blocks for each call.
            if not group.segment.gain:
                self.passes.check_cache_dit(self.model, FULL, step_caches.NO_ROWS)
            output = run_guidance(self._wiring, self._forward, part, group.segment, before)
            mode = group.segment.guide_mode if group.segment.gain else None
            self._record(replace(self._facts(part, mode), pictures=group.pictures), watch)
            return output

        return run_groups(self._arguments, self.call, groups, None, run)

    def _conditional(self) -> Any:
        """A call with the conditional branch, and the guidance branch if both are in one batch."""
        branches = None
        if self.caller.prediction is None and not self.caller.perturbs:
            branches = self._arguments.branches(self.model, self.call, self.caller.guided)
        groups = self.run.groups = self._choose(branches)
        self.run.prompts.in_one_group = len(groups) == 1
        self._warn_of_weak_guidance(branches)

        def run(
            part: Call, group: Group, own: Branches | None, rows: tuple[int, ...] | None
        ) -> Any:
            watch, segment = Stopwatch(self._arguments.device(part)), group.segment
            packed = self.passes.execution.packed
            output = run_batch(self._wiring, self._forward, part, segment, own, packed=packed)
            guide = None if own is None or segment.gain == 0 else segment.guide_mode
            facts = replace(
                self._facts(part, segment.mode),
                guide=guide,
                guided=own is not None,
                pictures=group.pictures,
                why=group.why,
            )
            self._record(facts, watch)
            return output

        output = run_groups(self._arguments, self.call, groups, branches, run)
        self._remember(output, branches)
        return output

    def _choose(self, branches: Branches | None) -> list[Group]:
        """Ask how the pictures of this step run, in groups of one choice each.

        Raises:
            ValueError: what is chosen needs branches apart that the batch keeps together.
            RuntimeError: pictures want different modes beside a step cache, which keeps one state
                for all of them.
        """
        schedule = self.run.choosing.begin(functools.partial(self._ahead, branches))
        if schedule is not None and not self.run.calls:
            for segment in schedule.segments:
                self._check_perturbed([Group(segment)])
        latent = self._arguments.latent(self.call)
        # Asked for only by a controller that looks at latents: schedules pay nothing for it.
        latents = functools.partial(on_base_grid, self._wiring, latent, branches)
        groups = self.run.choosing.decide(self._level, latents, self.run.calls)
        self._check_perturbed(groups)
        if len(groups) > 1 and step_caches.has_step_cache(self.model):
            raise RuntimeError(
                "a step cache keeps one state for the whole batch, and pictures of this batch want "
                "different modes; legal together with a cache: a controller with per_picture=False"
            )
        return groups

    def _ahead(self, branches: Branches | None) -> Facts:
        """What is known of the run."""
        guided: bool | None = branches is not None
        if self._by_branch:
            # A pipeline that has no word for guidance does without.
            guided = bool(self.caller.guided) if self.caller.facts else None
        return Facts(
            levels=self.run.levels,
            macs=self.shape.macs,
            guided=guided,
            passes=self.caller.passes(self.model),
            guidance_scale=self.caller.guidance_scale(self.model),
        )

    def _check_perturbed(self, groups: list[Group]) -> None:
        """Refuse what takes apart a batch with rows for perturbed-attention guidance.

        Its attention layers cut the whole batch into three.
        """
        if not self.caller.perturbs:
            return
        for choice in (group.segment for group in groups):
            if len(groups) > 1 or choice.guide_mode != choice.mode or choice.gain != 1:
                raise ValueError(
                    f"choice {choice.name} runs some rows by themselves, and perturbed-attention "
                    "guidance keeps three groups of rows in one batch; legal together with it: one "
                    "mode for all rows and gain 1 (or pag_scale = 0)"
                )

    def _warn_of_weak_guidance(self, branches: Branches | None) -> None:
        weak = any(group.segment.weak_guidance for group in self.run.groups)
        if not weak or branches is not None or self.passes.position.warned:
            return
        # One call per branch: nothing has used the conditional call of the step before.
        if not self._by_branch or self.run.remembered is not None:
            warn("the schedule asks for weak guidance, but this call has no guidance branch")
            self.passes.position.warned = True

    def _remember(self, output: Any, branches: Branches | None) -> None:
        """Keep the step's conditional call for its guidance call, and let a controller learn."""
        segments, choosing = [group.segment for group in self.run.groups], self.run.choosing
        needed = any(segment.reads_conditional for segment in segments)
        remembers = needed and self._by_branch
        if not (remembers or choosing.learns):
            return
        prediction = self._arguments.prediction(self.call, output)
        if remembers:
            # FLUX's pipeline writes the other branch's arguments into the same dictionary.
            kept = {k: dict(v) if isinstance(v, dict) else v for k, v in self.call.items()}
            self.run.remembered = Remembered(kept, prediction)
        if choosing.learns:
            told, latent = parametrization(self.caller.pipe), self._arguments.latent(self.call)
            clean = clean_latents(self._wiring, told, self._level, latent, prediction)
            choosing.learn(self._level, on_base_grid(self._wiring, clean, branches))
