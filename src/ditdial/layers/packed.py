"""What a packed batch asks of modules that do not work token by token: modulation and attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ditdial.backbones.arguments import cut
from ditdial.layers.wiring import wiring_of

DELEGATING = Attention.forward
"""Does what its processor does, and reads the processor's signature first, to tell which of the
arguments are for it. That takes a fiftieth of a small model's coarsest step, and there are none.
"""


class ModulationSeam(nn.Module):
    """Mixed into a module that modulates all tokens of a picture: repeats what it returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Modulation of each picture, or one row of it per packed strip."""
        modulation = super().forward(*args, **kwargs)  # pyrefly: ignore[missing-attribute]
        state = wiring_of(self).state
        if state.layout is None:
            return modulation
        layout = state.layout
        owners = state.constant(("owners", layout.parts), layout.owners)
        if isinstance(modulation, tuple):
            return tuple(x.index_select(0, owners) for x in modulation)
        return modulation.index_select(0, owners)


class AttentionSeam(nn.Module):
    """Mixed into attention: packed tokens see those of their own part alone."""

    processor: Callable[..., Any]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stock attention, part by part if the batch is packed; returns what the layer returns."""
        state = wiring_of(self).state
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        compiling = torch.compiler.is_compiling()  # a graph cannot tell whose forward this is
        if not (kwargs or compiling) and getattr(stock, "__func__", None) is DELEGATING:
            nothing = {"encoder_hidden_states": None, "attention_mask": None}
            stock = functools.partial(self.processor, self, **nothing)
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        given = {name: value for name, value in given.items() if value is not None} | kwargs
        layout = state.layout
        if layout is None:
            return stock(hidden_states, **given)
        starts = itertools.accumulate(layout.rows, initial=0)
        rows = [slice(first, first + n) for first, n in zip(starts, layout.rows, strict=False)]
        pieces = [
            (x, cut(given, own, sum(layout.rows)))
            for x, own in zip(layout.unpack(hidden_states), rows, strict=True)
        ]
        outputs = state.each(lambda piece: stock(piece[0], **piece[1]), pieces)
        if isinstance(outputs[0], tuple):  # joint attention returns the text's tokens too
            images, texts = zip(*outputs, strict=True)
            return layout.pack(images), torch.cat(texts)
        return layout.pack(outputs)
