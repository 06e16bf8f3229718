"""Sinusoids of the time, which DiT computes anew in each of its blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditdial.layers.wiring import wiring_of


class SinusoidSeam(nn.Module):
    """Mixed into a block's `diffusers.models.embeddings.Timesteps`: one pass computes them once.

    They have no weights, so that those of one block are those of all. In DiT-XL 28 blocks and the
    output ask for them, with a dozen small kernels each time.
    """

    def forward(self, timesteps: Tensor) -> Tensor:
        """Sinusoids ``(B, C)`` of times ``(B,)``, the same tensor in each block of a pass."""
        state = wiring_of(self).state
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if torch.compiler.is_compiling() or not state.running:  # a compiler finds out by itself
            return stock(timesteps)
        if state.sinusoids is None or state.sinusoids[0] is not timesteps:
            state.sinusoids = timesteps, stock(timesteps)
        return state.sinusoids[1]
