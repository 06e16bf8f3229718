"""An embedding and a de-embedding of its own for each new size, started from the base's weights.

Shared by the methods that leave the base's own two projections as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.host.weights import NewLinear
from ditdial.layers.new_modules import NewModules
from ditdial.ops.patching import (
    Triple,
    group,
    resize_embedding,
    resize_output,
    to_grouped,
    ungroup,
)
from ditdial.plan.mode import Mode


class OwnProjections(NewModules):
    """A pair of linear layers for each coarse mode.

    Args:
        resize: how base weights start the new sizes (see `ditdial.ops.patching`).
    """

    def __init__(
        self, modes: Iterable[Mode], resize: str, model: nn.Module, backbone: Backbone
    ) -> None:
        super().__init__()
        kernel, bias = (x.detach() for x in backbone.patches.kernel(model))
        rows, row_bias = (x.detach() for x in backbone.patches.rows(model))
        self.patch_embeds, self.proj_outs = nn.ModuleDict(), nn.ModuleDict()
        for mode in modes:
            scale = mode.patch_scale
            size = times(scale, kernel.shape[2:])
            embed = resize_embedding(kernel, size, resize)
            embed = to_grouped(embed, scale, backbone.patches.embed_layout)
            self.patch_embeds[mode.name] = _linear(embed, bias)
            out, out_bias = (
                to_grouped(resize_output(x, size, resize), scale, backbone.patches.output_layout)
                for x in (rows, row_bias)
            )
            self.proj_outs[mode.name] = _linear(out.T, out_bias[0])

    def makes_tokens(self, mode: Mode) -> bool:
        return not mode.is_full

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        """Join the base patches of each group, and multiply them with the mode's own weights."""
        return self.patch_embeds[mode.name](group(vectors, mode.patch_scale))

    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        return ungroup(self.proj_outs[mode.name](hidden), grid, mode.patch_scale)


class MarkedProjections(OwnProjections):
    """The same, with a size marker that is added to all tokens and starts as zero."""

    def __init__(
        self, modes: Iterable[Mode], resize: str, model: nn.Module, backbone: Backbone
    ) -> None:
        modes = tuple(modes)
        super().__init__(modes, resize, model, backbone)
        kernel, _ = backbone.patches.kernel(model)
        self.size_embeds = nn.ParameterDict()
        for mode in modes:
            self.size_embeds[mode.name] = nn.Parameter(torch.zeros(len(kernel)).to(kernel))

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        return super().embed(vectors, mode) + self.size_embeds[mode.name]


def times(scale: Sequence[int], patch: Sequence[int]) -> Triple:
    """A coarse patch along time, height and width, from its scale and the base patch."""
    t, h, w = (k * p for k, p in zip(scale, patch, strict=True))
    return t, h, w


def legal_scale(scale: object) -> bool:
    """Whether a setting names a coarse patch: a whole number >= 2, or three >= 1, not all 1."""
    if isinstance(scale, tuple):
        whole = len(scale) == 3 and all(type(k) is int and k >= 1 for k in scale)
        return whole and scale != (1, 1, 1)
    return type(scale) is int and scale >= 2


def _linear(weight: Tensor, bias: Tensor) -> NewLinear:
    layer = NewLinear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
