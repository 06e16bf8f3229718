"""One compiled function per mode, and how torch's compiler is kept from what chooses the mode.

`torch.compile` keeps the graphs of a function in one list, tries their guards in turn at each call,
and gives up after eight graphs (`torch._dynamo.config.recompile_limit`). A function of its own for
each mode finds its graph at once, and modes do not use up each other's room.

Numbers that a graph finds on a module are constants to it, so the base grid comes in as an
argument: that is how graphs with dynamic shapes are good for more than one grid.

Private names of `torch._dynamo` stand in this file alone.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.decorators import skip_code

from ditdial.backbones.forward import WIRING
from ditdial.layers.wiring import Wiring
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What ``torch.compile`` does with a function."""


@dataclass(eq=False)
class Graphs:
    """The stock forward of one model for each mode, or for the modes of a packed call.

    Args:
        forward: of the stock class.
        wiring: of the model.
        compile: what ``model.compile`` was asked for; None leaves the functions to a compiler that
            is at work around the call.
    """

    forward: Callable[..., Any]
    wiring: Wiring
    compile: Compile | None = None
    functions: dict[tuple[Mode, ...], Callable[..., Any]] = field(default_factory=dict)

    def at(self, model: nn.Module, modes: tuple[Mode, ...]) -> Callable[..., Any]:
        """The function of some modes, for the present grid; a low band has one of its own."""
        band = self.wiring.state.asked.band
        key = modes if band.is_full else (band, *modes)
        if key not in self.functions:
            own = _with_own_code(self.forward, "_".join(mode.name for mode in key))
            # Compiled before it is bound: torch wraps what is no function in one of its own, the
            # same for all.
            self.functions[key] = own if self.compile is None else self.compile(own)
        return functools.partial(self.functions[key], model, _counted(self.wiring, modes))


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a compiler from the code of a function, but not from what it calls.

    ``torch.compiler.disable`` would keep it from both, so that the stock forward inside could not
    become a graph.
    """
    skip_code(function.__code__)
    return function


@dataclass(eq=False)
class Compiled:
    """How the stock forward of one elastic model is run: as it is, or as a graph.

    Attributes:
        forward: of the stock class.
        own: the stock forward by mode, if ``model.compile`` was called.
        around: the compiler of the present call, if ``torch.compile`` was given the whole model.
        apart: the stock forward by mode, for that compiler.
    """

    wiring: Wiring
    stock: type
    own: Graphs | None = None
    around: Any = None
    apart: Graphs | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copied model must not call the compiled forward of the original.
        return {**self.__dict__, "own": None, "around": None, "apart": None}

    @property
    def at_work(self) -> bool:
        """Whether the stock forward of the present call runs as a graph."""
        return self.own is not None or self.around is not None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the stock forward, once per mode, as ``torch.compile`` takes it.

        Nothing is compiled yet: each mode's function is when it is first called.
        """
        compile = functools.partial(torch.compile, *args, **kwargs)
        self.own = Graphs(self.stock.forward, self.wiring, compile)

    @unseen
    def outside(self, run: Callable[..., Any], *args: Any) -> Any:
        """Call what chooses the mode, out of sight of a compiler around the model.

        Only the stock forward is to become a graph: `run` gives the compiler back for it.
        """
        # Taken off for the time of the call, or choosing the mode would be traced into the graph.
        self.around = set_eval_frame(None)  # None unless a compiler is at work
        try:
            return run(*args)
        finally:
            compiler, self.around = self.around, None
            set_eval_frame(compiler)

    def run(self, model: nn.Module, call: dict[str, Any]) -> Any:
        """The stock forward in the present mode: as it is, or as the graph of this mode.

        Args:
            call: arguments of the stock forward by name.

        Returns:
            What the stock forward returns.
        """
        # Found before the compiler is back: it must see the stock forward alone.
        forward = self._forward(model, self.wiring.state.modes)
        set_eval_frame(self.around)
        try:
            return forward(**call)
        finally:
            set_eval_frame(None)

    def _forward(self, model: nn.Module, modes: tuple[Mode, ...]) -> Callable[..., Any]:
        if self.own is not None:
            return self.own.at(model, modes)
        forward = self.stock.forward
        if self.around is None:
            return functools.partial(forward, model)
        if self.apart is None or self.apart.forward is not forward:  # somebody put one there
            self.apart = Graphs(forward, self.wiring)
        return self.apart.at(model, modes)


def _counted(wiring: Wiring, modes: tuple[Mode, ...]) -> Triple | None:
    """How many groups of all modes the present grid has along each axis; tokens if it is ragged.

    None for modes that run as the stock model does, which is not told its grid.

    A graph of whole groups has products for its sides, and no quotient to reason about.
    """
    if not any(map(wiring.new.makes_tokens, modes)):
        return None
    # A packed call has several modes: its grid is whole if the patches of all of them divide it.
    state, scales = wiring.state, zip(*(mode.patch_scale for mode in modes), strict=True)
    kt, kh, kw = (math.lcm(*own) for own in scales)
    whole = not any(side % k for side, k in zip(state.grid, (kt, kh, kw), strict=True))
    state.unit = (kt, kh, kw) if whole else (1, 1, 1)
    t, h, w = (side // k for side, k in zip(state.grid, state.unit, strict=True))
    return t, h, w


def _with_own_code(stock: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that sets the grid and calls the stock one; graphs belong to code objects."""

    def forward(model: nn.Module, groups: Triple | None, /, **call: Any) -> Any:
        if groups is not None:
            state = model.__dict__[WIRING].state
            (t, h, w), (kt, kh, kw) = groups, state.unit
            state.grid = t * kt, h * kh, w * kw
        return stock(model, **call)

    code = forward.__code__.replace(co_name=f"{stock.__name__}_{name}")
    return types.FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
