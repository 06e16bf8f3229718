"""Layers that see the prompt alone: their outputs are kept for the rest of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditdial.host.weights import versions
from ditdial.layers.state import TextKey
from ditdial.layers.wiring import wiring_of

KEPT = "_ditdial_text"
"""Attribute of such a layer: what it has kept."""

PROMPTS = 3
"""Prompts whose outputs are kept: a run's own, its negative one, and both in one batch."""


class TextSeam(nn.Module):
    """Mixed into a layer that only sees the prompt: keeps its output for the rest of a run."""

    weight: Tensor

    def forward(self, text: Tensor) -> Tensor:
        """Stock output, computed once per prompt while the state names one.

        ``(B, T, D) -> (B, T, D')`` or what else the layer makes of the text. A prompt is known
        again by its memory, content and run, a weight by its version.
        """
        state = wiring_of(self).state
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return stock(text)
        if state.text is None or state.layout is not None:
            return stock(text)
        kept: list[tuple[TextKey, object, Tensor]] = self.__dict__.setdefault(KEPT, [])
        version = versions(self.weight)
        for key, weights, output in kept:
            if key.same(state.text) and weights == version:
                return output
        output = stock(text)
        kept[:] = [*kept[-(PROMPTS - 1) :], (state.text, version, output)]
        return output
