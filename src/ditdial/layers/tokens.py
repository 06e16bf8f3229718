"""Where a coarse mode differs from the stock forward: tokens are made, placed and ended otherwise.

Each seam is mixed in front of a stock class by `ditdial.layers.swap.swap_class`; it looks at the
state of the pass and either calls the stock ``forward`` or takes the way of the mode. Of a packed
batch (`ditdial.layers.packing`) it takes the parts one by one.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.backbones.forward import WIRING
from ditdial.host.weights import check_latent
from ditdial.layers.wiring import wiring_of


def called_by_another(layer: nn.Module) -> bool:
    """Whether a layer is at work for another model that shares it (a control network does)."""
    frame = sys._getframe(1)
    while frame is not None:
        # To ask for the variables of a frame copies all of them.
        named = frame.f_code.co_varnames[:1] == ("self",)
        owner = frame.f_locals.get("self") if named else None
        if isinstance(owner, nn.Module) and owner is not layer:
            # The elastic model itself has a wiring too.
            return WIRING not in owner.__dict__ and layer in owner.modules()
        frame = frame.f_back
    return False


class EmbedSeam(nn.Module):
    """Mixed into the module that makes tokens (and, in some classes, adds positions)."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Base tokens in full mode; grouped tokens at the centres of their groups otherwise.

        The latent is the last of the inputs; where there are others, rows are not packed.

        Returns:
            What the stock module returns, with ``(B, n, D)`` tokens of the mode in it.

        Raises:
            RuntimeError: the forward pass did not come through the elastic model.
            ValueError: a latent that cannot be multiplied with the mode's weights.
        """
        wiring = wiring_of(self)
        state, backbone, new = wiring.state, wiring.backbone, wiring.new
        if not state.running and called_by_another(self):
            return super().forward(*inputs)  # pyrefly: ignore[missing-attribute]
        if not state.running:
            raise RuntimeError(
                "this model's forward was replaced after elastify, so that no mode is chosen; "
                "replace it before elastify, or on the diffusers class"
            )
        if state.layout is not None:
            run = functools.partial(EmbedSeam.forward, self)
            return state.layout.pack(state.each(run, inputs[-1].split(state.layout.rows)))
        if not state.makes_tokens:
            return super().forward(*inputs)  # pyrefly: ignore[missing-attribute]
        *others, latent = inputs
        if not torch.compiler.is_compiling():
            check_latent(latent, new, state.mode)
        embed = functools.partial(new.embed, mode=state.mode)
        latent, given = backbone.apart(latent, state)
        tokens = backbone.tokens(self, state, state.mode, latent, embed)
        if given is not None:
            stock = super().forward  # pyrefly: ignore[missing-attribute]
            tokens = torch.cat([tokens, stock(given)], dim=1)
        return backbone.beside(self, tokens, *others)


class RotarySeam(nn.Module):
    """Mixed into the module that makes the rotary phases of a grid."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stock phases in full mode; those of the groups' centres otherwise.

        Returns:
            What the stock module returns, for ``n`` tokens of the mode instead of ``N``.
        """
        wiring = wiring_of(self)
        stock = functools.partial(super().forward, **kwargs)  # pyrefly: ignore[missing-attribute]
        if not wiring.state.makes_tokens:
            return stock(*args)
        return wiring.backbone.phases(self, wiring.state, wiring.state.mode, stock, args)


class OutputSeam(nn.Module):
    """Mixed into the last linear layer: tokens of any mode become base tokens in base order."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens ``(B, n, D)`` of the present mode -> ``(B, N, c)`` on the base grid.

        Base patch vectors in base order are what the stock un-patchify expects, whatever the mode.
        """
        wiring = wiring_of(self)
        state, stock = wiring.state, super().forward  # pyrefly: ignore[missing-attribute]
        if state.layout is not None:
            run = functools.partial(OutputSeam.forward, self)
            return torch.cat(state.each(run, state.layout.unpack(hidden)))
        if not state.makes_tokens:
            return stock(hidden)

        def project(hidden: Tensor, grid: Any) -> Tensor:
            return wiring.new.project(hidden, state.mode, grid)

        return wiring.backbone.base_vectors(state, state.mode, stock, hidden, project)


class ConditioningSeam(nn.Module):
    """Mixed into a module that makes the conditioning vector, in which a method may mark modes."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(B, D)``, each row for its own mode."""
        vector = super().forward(*args, **kwargs)  # pyrefly: ignore[missing-attribute]
        wiring = wiring_of(self)
        state, new = wiring.state, wiring.new
        if state.layout is None:
            return new.condition(vector, state.mode)
        pieces = vector.split(state.layout.rows)
        return torch.cat(state.each(lambda x: new.condition(x, state.mode), pieces))
