"""What Lumina 2 and Z-Image share: refiners of picture and of text, then one sequence of both."""

from __future__ import annotations

from typing import Any

from ditdial.backbones.base import Backbone, Model
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import Attention
from ditdial.ops.patching import Triple


class RefinedBackbone(Backbone):
    """Time runs from 0, noise, to 1; the model predicts the other way.

    Attributes:
        modulation: names of the layers in blocks that see the time alone.
        once: names of all layers that run once per picture.
        prompt: names of the layers that see the text before the picture does.
    """

    direction = -1.0
    modulation: str
    once: str
    prompt: str

    def sequence(self, model: Model, grid: Triple, text_tokens: int, padded: int) -> dict[str, Any]:
        """Arguments of the `TransformerShape`.

        Args:
            text_tokens: in the common sequence.
            padded: text tokens that its refiner goes through.
        """
        (first, last), layers = self.patches.layers(model), model.layers
        noise, text = model.noise_refiner, model.context_refiner
        d, both = first.out_features, linear_macs(layers, but=self.modulation)
        return {
            "width": d,
            "grid": grid,
            "patch_in": first.in_features,
            "patch_out": last.out_features,
            "token_macs": linear_macs(noise, but=self.modulation) + both,
            "attention": (Attention(len(noise), d), Attention(len(layers), d, "joint")),
            "text_tokens": text_tokens,
            "text_macs": both,
            "picture_macs": linear_macs(model, self.once)
            + padded * linear_macs(model, self.prompt)
            + 2 * len(text) * d * padded**2,
            "adapted": self.adapted_macs(model),
            "adapted_text": self.adapted_macs(model, "^layers"),
        }
