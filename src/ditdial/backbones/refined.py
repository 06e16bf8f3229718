"""What Lumina 2 and Z-Image share: refiners of picture and of text, then one sequence of both."""

from __future__ import annotations

from ditdial.backbones.base import Backbone, Model
from ditdial.backbones.blocks import BlockList
from ditdial.cost.linears import linear_macs


class RefinedBackbone(Backbone):
    """Time runs from 0, noise, to 1; the model predicts the other way.

    Attributes:
        once: names of the layers outside the blocks that run once per picture.
        prompt: names of the layers that see the text before the picture does.
    """

    direction = -1.0
    once: str
    prompt: str

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        depth, d = len(model.context_refiner), self.patches.layers(model)[0].out_features
        refining = text_tokens * linear_macs(model, self.prompt) + 2 * depth * d * text_tokens**2
        return linear_macs(model, self.once) + refining


def refined_lists(attention: str, modulation: str) -> tuple[BlockList, ...]:
    """The refiner of the picture and the blocks of both.

    Args:
        attention: module of each block.
        modulation: names of its layers that see the time alone.
    """
    refiner = BlockList(blocks="noise_refiner", attention=((attention, "self"),), once=modulation)
    joint = BlockList(
        blocks="layers", attention=((attention, "joint"),), both=True, once=modulation
    )
    return refiner, joint
