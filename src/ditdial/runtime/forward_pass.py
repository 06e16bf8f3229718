"""One forward pass of the stock model in a mode.

Everything that a mode needs is checked and made ready outside any compiled region; then the stock
``forward`` runs, in which the swapped submodules look at the state (`ditdial.layers`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ditdial.backbones.arguments import Call
from ditdial.host import step_caches
from ditdial.host.loras import unfuse_disabled
from ditdial.host.parametrization import parametrization
from ditdial.host.weights import onloaded
from ditdial.layers.residuals import of_present_tokens
from ditdial.layers.state import TextKey
from ditdial.layers.width_pass import Narrow
from ditdial.plan.execution import Execution
from ditdial.plan.mode import Mode
from ditdial.runtime.chooser import Chooser
from ditdial.runtime.compiled import Compiled
from ditdial.runtime.costs import Costs
from ditdial.runtime.low_band import SmallerCall
from ditdial.runtime.position import Position
from ditdial.runtime.surgery import Surgery


@dataclass(eq=False)
class ForwardPass:
    """Of one elastic model, in whichever mode it is asked for.

    Attributes:
        surgery: what was changed on the model.
        position: which run a call belongs to, and where it stands in it.
        chooser: who chooses its modes.
        costs: what calls cost; learns what routed modes left in.
        compiled: how the stock forward is run.
        execution: how calls are run.
    """

    surgery: Surgery
    position: Position
    chooser: Chooser
    costs: Costs
    compiled: Compiled
    execution: Execution = field(default_factory=Execution)

    def run(
        self,
        model: nn.Module,
        call: Call,
        mode: Mode,
        branch: str = step_caches.ALL_ROWS,
        *,
        asked: Mode | None = None,
    ) -> Any:
        """The stock forward in a mode (of all rows, unless the state has a packed layout).

        Args:
            branch: of a batched call, if its rows run by themselves.
            asked: the mode of which this one is what runs at the size of the latent.

        Raises:
            ValueError, RuntimeError: a mode that the call, its pipeline or what was put on the
                model does not allow.
        """
        if mode.is_low_band:
            return self._in_low_band(model, call, mode, branch)
        # New tensors that no hook brings back are fetched first: the steps below read them.
        with onloaded(self.surgery.silent if self.surgery.away else ()):
            wiring = self.surgery.wiring
            state, new = wiring.state, wiring.new
            state.asked = mode if asked is None else asked
            # `state.modes` and whatever is made ready below read the mode from the state.
            state.mode, state.makes_tokens = mode, new.makes_tokens(mode)
            state.device = wiring.backbone.arguments.device(call)
            # Gradients must reach the factors, which a merged weight has no way back to.
            state.merging = self.execution.merge and not torch.is_grad_enabled()
            for each in state.modes:
                self._check(model, call, each, branch)
                self._ready(model, each)
            # Behind the checks, which count the base tokens that the call still speaks of.
            call = of_present_tokens(call, wiring)
            if state.makes_tokens:
                call = wiring.backbone.prepare(call, state, mode)
            narrow, text = self._narrow(model, call, mode), self._prompt(call)
            grids = new.grids(model, wiring.backbone, state, mode)
            self.costs.cached = step_caches.has_step_cache(model)
            begun = state.begin(narrow=narrow, grids=grids, text=text)
            with begun, self._cache_state(model, mode, branch):
                output = self.compiled.run(model, call)
            # Behind the pass: tokens decide on their way what they skip. Of a graph nothing is
            # told.
            if narrow is not None and not self.compiled.at_work:
                self.costs.kept[mode] = narrow.kept()
            return output

    def _in_low_band(self, model: nn.Module, call: Call, mode: Mode, branch: str) -> Any:
        """The same in a mode whose latent is smaller: a call of its own size inside this one."""
        low, high = self.position.levels(call, self.position.run)
        if low != high:
            raise ValueError(
                f"noise levels of a batch go from {low} to {high}, and the latents of mode "
                f"{mode.name!r} are made smaller for one; legal: rows of one noise level"
            )
        smaller = SmallerCall(
            wiring=self.surgery.wiring,
            model=model,
            call=call,
            mode=mode,
            told=parametrization(self.position.at_work),
            level=high,
        )
        return smaller.run(functools.partial(self.run, model, branch=branch, asked=mode))

    def _cache_state(self, model: nn.Module, mode: Mode, branch: str) -> Any:
        """The state of a step cache that belongs to a mode, or to its size, and a branch."""
        asked = self.surgery.wiring.state.asked
        mode = asked if asked.is_low_band else mode
        alone = self.chooser.is_alone(mode)
        context, stock = self.position.context, self.surgery.stock
        return step_caches.state(model, stock, context, mode, branch, alone=alone)

    def _check(self, model: nn.Module, call: Call, mode: Mode, branch: str) -> None:
        """Refuse a mode that this call, or what was put on the model, does not allow."""
        if not mode.is_full:
            self._check_coarse(model, call, mode)
        asked = self.surgery.wiring.state.asked
        self.check_cache_dit(model, asked if asked.is_low_band else mode, branch)

    def _check_coarse(self, model: nn.Module, call: Call, mode: Mode) -> None:
        backbone, misfit = self.surgery.wiring.backbone, self.surgery.misfit
        if misfit is not None and self.surgery.wiring.new.makes_tokens(mode):
            raise RuntimeError(
                f"{misfit}; legal in mode {mode.name!r}: the layer as it was "
                "(pipe.unload_lora_weights(reset_to_overwritten_params=True)), or full mode"
            )
        if not mode.has_base_patch or mode.is_sparse:
            backbone.check_grid(self.surgery.wiring.state.grid, mode)
            backbone.check_call(call, mode)
        step_caches.check_sparse(model, mode)
        if getattr(model, "_parallel_config", None) is not None:
            raise RuntimeError(
                f"context parallelism splits the base tokens and heads, and mode {mode.name!r} has "
                "others; legal together with it: full mode"
            )

    def check_cache_dit(self, model: nn.Module, mode: Mode, branch: str) -> None:
        """Refuse what cache-dit would get wrong.

        Raises:
            RuntimeError: cache-dit is on, and the call is of a kind that it keeps no state for.
        """
        reads_blocks = self.surgery.wiring.backbone.reads_blocks
        step_caches.check_cache_dit(model, mode, branch, reads_blocks=reads_blocks)

    def _ready(self, model: nn.Module, mode: Mode) -> None:
        """Make what a mode keeps between calls, outside any compiled region."""
        wiring, state = self.surgery.wiring, self.surgery.wiring.state
        if state.merging and not mode.is_full:
            if self.surgery.merged.run != state.run:
                unfuse_disabled(model)
            self.surgery.merged.ready(mode, state)
        if wiring.new.makes_tokens(mode):
            wiring.new.ready(mode)
            if self.compiled.at_work:  # else the module itself makes its table when asked
                embed = model.get_submodule(wiring.backbone.patches.embed)
                wiring.backbone.positions(embed, state, mode)

    def _narrow(self, model: nn.Module, call: Call, mode: Mode) -> Narrow | None:
        """What a routed mode leaves out of a call."""
        if self.surgery.widths is None or not mode.is_routed:
            return None
        _, level = self.position.levels(call, self.position.run)
        return self.surgery.widths.of(model, call, mode, level)

    def _prompt(self, call: Call) -> TextKey | None:
        """The prompt of a call, if what depends on it alone is kept for the run."""
        prompts = self.position.run.prompts
        kept = self.execution.keep_text and prompts.in_one_group
        # In a forced mode nobody notices that a new run begins, so nothing is kept for a run.
        kept = kept and self.chooser.forced is None
        if not kept or self.compiled.at_work or torch.is_grad_enabled():
            return None
        state = self.surgery.wiring.state
        return None if state.layout is not None else prompts.key(call, state.run)

    def run_inside(self, model: nn.Module, call: Call) -> Any:
        """One call inside a larger graph or an export: nothing is read from tensors or recorded.

        Raises:
            RuntimeError: the mode would depend on the noise level, or the call does not allow it.
        """
        wiring = self.surgery.wiring
        state, new = wiring.state, wiring.new
        mode = self._mode_inside()
        state.mode, state.makes_tokens, state.merging = mode, new.makes_tokens(mode), False
        if state.makes_tokens or mode.is_sparse:
            state.grid = wiring.backbone.grid(model, call)
            state.device = wiring.backbone.arguments.device(call)
            if not mode.is_full:
                self.surgery.keep_fused_seams()
                self._check_coarse(model, call, mode)
            call = of_present_tokens(call, wiring)
            call = wiring.backbone.prepare(call, state, mode)
        state.grids = new.grids(model, wiring.backbone, state, mode)
        state.running = True
        try:
            return self.surgery.stock.forward(model, **call)
        finally:
            state.running, state.grids, state.sinusoids = False, None, None

    def _mode_inside(self) -> Mode:
        """The mode of a call inside a larger graph."""
        mode = self.chooser.only_mode
        if mode is None:
            raise RuntimeError(
                "a call inside a larger graph has one mode at all noise levels; legal: a schedule "
                "of one mode, handle.using(mode), or to compile the model itself"
            )
        if mode.is_low_band:
            raise RuntimeError(
                f"mode {mode.name!r} makes latents smaller for the noise level of a call, which is "
                "not read inside a larger graph; legal there: modes of the latent's own size, or "
                "to compile the model itself"
            )
        if mode.is_routed:
            raise RuntimeError(
                f"mode {mode.name!r} cuts its layers for the noise level of a call, which is not "
                "read inside a larger graph; legal there: modes of full width, or to compile the "
                "model itself"
            )
        return mode
