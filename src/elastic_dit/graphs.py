"""One compiled function per mode.

`torch.compile` keeps the graphs of a function in one list, tries their guards in turn at each call,
and gives up after eight graphs (`torch._dynamo.config.recompile_limit`). A function of its own for
each mode finds its graph at once, and modes do not use up each other's room.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from elastic_dit.mode import Mode

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(eq=False)
class Graphs:
    """The stock forward of one model for each mode, or for the modes of a packed call.

    Args:
        forward: of the stock class.
        compile: what ``model.compile`` was asked for; None leaves the functions to a compiler that
            is at work around the call.
    """

    forward: Callable[..., Any]
    compile: Compile | None = None
    functions: dict[tuple[Mode, ...], Callable[..., Any]] = field(default_factory=dict)

    def at(self, model: nn.Module, modes: tuple[Mode, ...]) -> Callable[..., Any]:
        """The function of some modes."""
        if modes not in self.functions:
            own = _with_own_code(self.forward, "_".join(mode.name for mode in modes))
            # Compiled before it is bound: torch wraps what is no function in one of its own, the
            # same for all.
            made = own if self.compile is None else self.compile(own)
            self.functions[modes] = functools.partial(made, model)
        return self.functions[modes]


def _with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of a function; graphs belong to code objects."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{name}")
    own = types.FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own
