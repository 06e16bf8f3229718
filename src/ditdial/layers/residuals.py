"""What a control network adds to tokens: to those of the mode of the pass.

A control network is a model of its own and knows base tokens alone. A coarse token gets the mean
over the base tokens that it covers, which is what a group of equal tokens would be given.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditdial.backbones.arguments import Call
from ditdial.layers.wiring import Wiring


def of_present_tokens(call: Call, wiring: Wiring) -> Call:
    """A call whose residuals are of the tokens that the present pass has.

    Returns:
        The very call where there is nothing to change.
    """
    state, names = wiring.state, wiring.backbone.arguments.residuals
    given = [name for name in names if call.get(name) is not None]
    if not given or not (state.makes_tokens or state.layout is not None):
        return call
    return call | {name: _averaged(call[name], wiring) for name in given}


def _averaged(value: Any, wiring: Wiring) -> Any:
    """One residual, or those of several blocks."""
    if isinstance(value, dict):
        return {key: _averaged(inner, wiring) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_averaged(inner, wiring) for inner in value])
    state = wiring.state

    def own(residual: Tensor) -> Tensor:
        if not state.makes_tokens:
            return residual
        return wiring.backbone.averaged(residual, state, state.mode)

    if state.layout is None:
        return own(value)
    return state.layout.pack(state.each(own, value.split(state.layout.rows)))
