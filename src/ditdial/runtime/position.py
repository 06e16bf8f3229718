"""The position of a call: which run it belongs to, and where it stands in it.

diffusers' pipelines tell their models none of this. What one call of a pipeline knows lies among
the local variables of that call, and so does what an elastic model keeps of it: it ends when the
call does, and of several calls that take turns each has its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ditdial.backbones import Backbone
from ditdial.backbones.arguments import Call
from ditdial.host.callers import Caller, caller_of
from ditdial.host.pipelines import holds
from ditdial.runtime.chooser import Chooser
from ditdial.runtime.prompts import Prompts
from ditdial.runtime.sampling_run import SamplingRun

PLACES = "_ditdial_places"
"""Local variable of a pipeline's call that holds the places of its elastic models."""

Context = tuple[str, dict[str, Any]]
"""Name and facts of a ``cache_context``."""


@dataclass(eq=False)
class Place:
    """Of an elastic model in one call of a pipeline, or in one thread of bare calls.

    Attributes:
        context: the ``cache_context`` that the pipeline has opened: its branch.
        run: that is being made.
    """

    context: Context | None = None
    run: SamplingRun | None = None

    def branch(self, caller: Caller) -> str | None:
        """Name of the branch that a call is for, if the pipeline or its guider tells."""
        return caller.prediction if self.context is None else self.context[0]


@dataclass(eq=False)
class Position:
    """Of one elastic model's calls.

    Attributes:
        chooser: of the model.
        pipe: a weak reference to the pipeline that the model was made elastic in; it speaks for
            calls in loops of the user's own.
        count: of the runs so far.
        run: the one that the last call belonged to.
        context: of the present call.
        at_work: the pipeline that makes the present call; None for a bare model.
        warned: that weak guidance was asked for in vain.
        bare: place of the calls that no pipeline makes, in each thread.
    """

    backbone: Backbone
    chooser: Chooser
    pipe: Any = None
    count: int = 0
    run: SamplingRun = field(init=False)
    context: Context | None = None
    at_work: Any = None
    warned: bool = False
    bare: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.run = self.new_run()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "bare"} | {"at_work": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"bare": threading.local()}

    def pipe_of(self, model: nn.Module) -> Any:
        """The pipeline that the model was made elastic in, if it is alive and has it still."""
        pipe = self.pipe() if self.pipe is not None else None
        return pipe if pipe is not None and holds(pipe, model) else None

    def caller(self, model: nn.Module) -> Caller:
        """Who makes the present call."""
        pipe = self.pipe_of(model)
        return caller_of(model, pipe) or Caller(pipe)

    @contextlib.contextmanager
    def called_by(self, pipe: Any) -> Iterator[None]:
        """A pipeline makes the present call."""
        before, self.at_work = self.at_work, pipe
        try:
            yield
        finally:
            self.at_work = before

    def place(self, caller: Caller) -> Place:
        """Where the calls of a caller stand."""
        if caller.facts:
            return caller.facts.setdefault(PLACES, {}).setdefault(self, Place())
        return self.bare.__dict__.setdefault(PLACES, Place())

    def new_run(self) -> SamplingRun:
        """A run that has not begun."""
        self.count += 1
        prompts = Prompts(self.backbone.arguments.condition[0])
        return SamplingRun(self.count, prompts, self.chooser.begin())

    def levels(self, call: Call, run: SamplingRun | None) -> tuple[float, float]:
        """Lowest and highest noise level of a call's rows, as exact as its run knows them."""
        low, high = self.backbone.times.levels(call)
        if low != high or run is None:
            return low, high
        return (run.as_planned(high, self.backbone.times.rounding(call)),) * 2
