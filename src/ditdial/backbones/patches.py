"""The two layers that project base patches into a model and out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditdial.cost.linears import matrix_sizes
from ditdial.host.loras import innermost
from ditdial.host.weights import values
from ditdial.ops.patching import Triple, from_base, to_grouped

Projection = tuple[Tensor, Tensor]
"""Weight and bias."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Where a model class makes tokens of patches and patches of tokens.

    Args:
        embed, output: submodules that make tokens and turn them into base patch vectors.
        embed_layout, output_layout: order of channels and pixels inside a base patch vector.
        fixed: latent frames, rows and columns of one base token, where the config does not say.
    """

    embed: str
    output: str
    embed_layout: str = "Cthw"
    output_layout: str = "thwC"
    fixed: Triple | None = None

    def size(self, model: Any) -> Triple:
        """Latent frames, rows and columns of one base token."""
        if self.fixed is not None:
            return self.fixed
        size, frames = model.config.patch_size, getattr(model.config, "patch_size_t", None)
        return (frames or 1, size, size) if isinstance(size, int) else tuple(size)

    def vectors(self, latent: Tensor, size: Triple) -> Tensor:
        """Latents ``(B, C, frames, height, width)`` -> base patch vectors ``(B, T, H, W, c)``.

        Args:
            size: latent frames, rows and columns of one base patch. What is left over at the far
                sides is cut off, as the stock patch convolution does.
        """
        t, h, w = size
        B, C, frames, height, width = latent.shape
        T, H, W = frames // t, height // h, width // w
        x = latent[:, :, : T * t, : H * h, : W * w].reshape(B, C, T, t, H, h, W, w)
        inside = {"C": 1, "t": 3, "h": 5, "w": 7}
        return x.permute(0, 2, 4, 6, *(inside[axis] for axis in self.embed_layout)).flatten(4)

    def latents(self, vectors: Tensor, size: Triple) -> Tensor:
        """The inverse of `vectors`: base patch vectors -> latents ``(B, C, frames, H, W)``."""
        B, T, H, W, _ = vectors.shape
        t, h, w = size
        order = {"C": -1, "t": t, "h": h, "w": w}
        x = vectors.unflatten(4, [order[axis] for axis in self.embed_layout])
        at = {axis: 4 + place for place, axis in enumerate(self.embed_layout)}
        x = x.permute(0, at["C"], 1, at["t"], 2, at["h"], 3, at["w"])
        return x.reshape(B, -1, T * t, H * h, W * w)

    def channels(self, model: Any) -> tuple[int, int]:
        """Of what is embedded, and of what is predicted."""
        first, last = self.layers(model)
        count = math.prod(self.size(model))
        return matrix_sizes(first)[0] // count, matrix_sizes(last)[1] // count

    def by_channel(self, vectors: Tensor, size: Triple) -> Tensor:
        """Base patch vectors ``(..., c)`` -> ``(..., C, p)``, ``p`` numbers of each channel."""
        p = math.prod(size)
        if self.embed_layout == "Cthw":
            return vectors.unflatten(-1, (-1, p))
        return vectors.unflatten(-1, (p, -1)).transpose(-1, -2)

    def layers(self, model: Any) -> tuple[Any, Any]:
        """The layers that project patches into the model and out of it."""
        module = model.get_submodule(self.embed)
        first, last = getattr(module, "proj", module), model.get_submodule(self.output)
        return innermost(first), innermost(last)

    def kernel(self, model: Any) -> Projection:
        """Weight ``(D, C, pt, ph, pw)`` and bias ``(D,)`` of the base patch embedding.

        In the one form that new sizes are started from, whether the class has a convolution or a
        linear layer; weights that torchao has quantised are read as floating numbers, a missing
        bias is zero.
        """
        layer, _ = self.layers(model)
        patch, weight = self.size(model), values(layer)
        if weight.ndim == 2:
            channels = weight.shape[1] // math.prod(patch)
            kernel = from_base(weight, channels, patch, self.embed_layout)
        else:
            kernel = weight.reshape(*weight.shape[:2], *patch)
        return kernel, _bias(layer, weight)

    def rows(self, model: Any) -> Projection:
        """Weight ``(D, C, pt, ph, pw)`` and bias ``(1, C, pt, ph, pw)`` of the base output."""
        (_, layer), patch = self.layers(model), self.size(model)
        weight = values(layer)
        bias = _bias(layer, weight)
        channels = len(bias) // math.prod(patch)
        rows = from_base(weight.T, channels, patch, self.output_layout)
        return rows, from_base(bias[None], channels, patch, self.output_layout)

    @torch.no_grad()
    def load(self, model: Any, embed: Projection, output: Projection) -> None:
        """Write a base patch embedding and output projection, formed as `kernel` and `rows`."""
        (layer, last), one = self.layers(model), (1, 1, 1)
        kernel = to_grouped(embed[0], one, self.embed_layout)
        layer.weight.copy_(kernel if layer.weight.ndim == 2 else embed[0].view_as(layer.weight))
        last.weight.copy_(to_grouped(output[0], one, self.output_layout).T)
        if layer.bias is not None:
            layer.bias.copy_(embed[1])
        if last.bias is not None:
            last.bias.copy_(to_grouped(output[1], one, self.output_layout)[0])


def _bias(layer: Any, weight: Tensor) -> Tensor:
    """Of a layer, in the dtype of its weight; zeros where it has none."""
    return weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.to(weight.dtype)
