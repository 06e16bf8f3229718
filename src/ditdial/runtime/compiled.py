"""One compiled function per mode.

`torch.compile` keeps the graphs of a function in one list, tries their guards in turn at each call,
and gives up after eight graphs (`torch._dynamo.config.recompile_limit`). A function of its own for
each mode finds its graph at once, and modes do not use up each other's room.

Numbers that a graph finds on a module are constants to it, so the base grid comes in as an
argument: that is how graphs with dynamic shapes are good for more than one grid.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ditdial.layers.state import ENGINE, Router
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(eq=False)
class Graphs:
    """The stock forward of one model for each mode, or for the modes of a packed call.

    Args:
        forward: of the stock class.
        router: of the model.
        compile: what ``model.compile`` was asked for; None leaves the functions to a compiler that
            is at work around the call.
    """

    forward: Callable[..., Any]
    router: Router
    compile: Compile | None = None
    functions: dict[tuple[Mode, ...], Callable[..., Any]] = field(default_factory=dict)

    def at(self, model: nn.Module, modes: tuple[Mode, ...]) -> Callable[..., Any]:
        """The function of some modes, for the present grid."""
        if modes not in self.functions:
            own = _with_own_code(self.forward, "_".join(mode.name for mode in modes))
            # Compiled before it is bound: torch wraps what is no function in one of its own, the
            # same for all.
            self.functions[modes] = own if self.compile is None else self.compile(own)
        return functools.partial(self.functions[modes], model, _counted(self.router, modes))


def _counted(router: Router, modes: tuple[Mode, ...]) -> Triple | None:
    """How many groups of all modes the present grid has along each axis; tokens if it is ragged.

    None for modes that run as the stock model does, which is not told its grid.

    A graph of whole groups has products for its sides, and no quotient to reason about.
    """
    if not any(map(router.sizes.routes, modes)):
        return None
    scales = zip(*(mode.patch_scale for mode in modes), strict=True)
    kt, kh, kw = (math.lcm(*own) for own in scales)
    whole = not any(side % k for side, k in zip(router.grid, (kt, kh, kw), strict=True))
    router.unit = (kt, kh, kw) if whole else (1, 1, 1)
    t, h, w = (side // k for side, k in zip(router.grid, router.unit, strict=True))
    return t, h, w


def _with_own_code(stock: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that sets the grid and calls the stock one; graphs belong to code objects."""

    def forward(model: nn.Module, groups: Triple | None, /, **call: Any) -> Any:
        if groups is not None:
            router = model.__dict__[ENGINE].router
            (t, h, w), (kt, kh, kw) = groups, router.unit
            router.grid = t * kt, h * kh, w * kw
        return stock(model, **call)

    code = forward.__code__.replace(co_name=f"{stock.__name__}_{name}")
    return types.FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
