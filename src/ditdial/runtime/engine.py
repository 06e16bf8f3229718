"""The engine of an elastic model: it runs one call of it.

What it runs is the stock ``forward`` of the model's class, in which the swapped submodules look up
the mode (`ditdial.layers`); how they came there is `ditdial.runtime.surgery`. Everything that an
engine needs to know it asks the objects that it holds: where the call stands in its run, who
chooses its modes, what it costs, how the stock forward is run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ditdial.adapter import Adapter
from ditdial.backbones import Backbone
from ditdial.backbones.arguments import Call
from ditdial.cost.shape import TransformerShape
from ditdial.host.callers import Caller
from ditdial.layers.checkpointing import remembered_in_checkpoints
from ditdial.layers.wiring import Wiring
from ditdial.methods import Method
from ditdial.plan.execution import Execution
from ditdial.plan.mode import Mode
from ditdial.runtime.chooser import Chooser
from ditdial.runtime.compiled import Compiled
from ditdial.runtime.costs import Costs
from ditdial.runtime.forward_pass import ForwardPass
from ditdial.runtime.position import Position
from ditdial.runtime.sampling_run import SamplingRun
from ditdial.runtime.step import Step
from ditdial.runtime.surgery import Surgery

Observer = Callable[[nn.Module, Call, Any], None]
"""``observe(model, call, output)`` after a call of an elastic model."""


@dataclass(eq=False)
class Engine:
    """Lives on the elastic model.

    Attributes:
        surgery: what was changed on the model.
        position: which run a call belongs to, and where it stands in it.
        chooser: who chooses modes.
        costs: what calls cost.
        passes: runs the stock forward in a mode.
        observers: called behind every call, with the model, the call and its output.
        lock: held by the call that is at work: submodules have one mode at a time.
    """

    surgery: Surgery
    position: Position
    chooser: Chooser
    costs: Costs
    passes: ForwardPass
    observers: list[Observer] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def build(
        cls, model: nn.Module, backbone: Backbone, method: Method, adapters: Sequence[Adapter]
    ) -> Engine:
        """An engine for a stock model, which is only read; see `Surgery.build`."""
        surgery = Surgery.build(model, backbone, method, adapters)
        modes = tuple(mode for mode in method.modes if backbone.fits(model, mode))
        parts: dict[str, Any] = {
            "surgery": surgery,
            "chooser": (chooser := Chooser(modes)),
            "position": Position(backbone, chooser),
            "costs": Costs(surgery),
        }
        compiled = Compiled(surgery.wiring, surgery.stock)
        return cls(**parts, passes=ForwardPass(**parts, compiled=compiled))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"} | {"observers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"lock": threading.RLock()}

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

        Calls of other threads wait until it is over.

        Raises:
            ValueError: the rows have noise levels of different modes, or the latent is too small
                for a mode.
            RuntimeError: the weights or arguments of the call do not allow a coarse mode.
        """
        caller, wiring = self.position.caller(model), self.wiring
        with self.lock, wiring.state.set_aside(), self.position.called_by(caller.pipe):
            size = wiring.backbone.size(model, call)
            # The grid comes first: seams, checks and costs all count in it.
            wiring.state.grid, shape = size[0], self.shape(model, size)
            # A layer that somebody has put in since the last call needs its seam before this one.
            self.surgery.look_over(model)
            with remembered_in_checkpoints(model, wiring.state):
                output = self._choose_and_run(model, call, shape, caller)
            for observe in self.observers:
                observe(model, call, output)
        return output

    @contextlib.contextmanager
    def forced(self, mode: Mode) -> Iterator[None]:
        """Run every call in one mode, in a run of its own."""
        self._take_up(self.position.new_run())
        previous, self.chooser.forced = self.chooser.forced, mode
        try:
            yield
        finally:
            self.chooser.forced = previous

    def _choose_and_run(
        self, model: nn.Module, call: Call, shape: TransformerShape, caller: Caller
    ) -> Any:
        """Find out which run the call belongs to, and run it as its guidance branch asks."""
        place, forced, level = self.position.place(caller), self.chooser.forced, None
        run = self.position.run
        if forced is None:
            low, level = self.position.levels(call, place.run)
            run = place.run
            # A new run is noticed before the branch is told: what the last left would mislead it.
            if run is None or not run.goes_on(caller, level):
                run = place.run = self.position.new_run()
                run.begin(caller, caller.levels(model))
                low, level = self.position.levels(call, run)
            if run is not self.position.run:
                self._take_up(run)
            self._check_levels(low, level)
        self.position.context = place.context
        run.branch, run.prompts.repeated = place.branch(caller), 0
        step = Step(
            model=model,
            call=call,
            shape=shape,
            caller=caller,
            run=run,
            level=level,
            passes=self.passes,
            costs=self.costs,
        )
        return step.in_mode(forced) if forced is not None else step.as_chosen()

    def _check_levels(self, low: float, level: float) -> None:
        """Refuse a call whose rows want different modes."""
        if self.chooser.changes_between(low, level):
            raise ValueError(
                f"noise levels of a batch go from {low} to {level}, and modes change between them; "
                "legal: rows of one segment (handle.using(mode) sets a mode for all)"
            )

    def _take_up(self, run: SamplingRun) -> None:
        """The calls from here on belong to another run, which may have begun before."""
        self.position.run = run
        # What layers have kept of another run's prompt is stale.
        self.wiring.state.run = run.number
        if self.surgery.widths is not None:
            self.surgery.widths.begin(run.levels)
