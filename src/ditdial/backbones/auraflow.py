"""`AuraFlowTransformer2DModel` (AuraFlow): joint attention, a learned table of positions."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ditdial.backbones.base import Backbone, Model
from ditdial.backbones.blocks import DOUBLE_BLOCKS, SINGLE_BLOCKS
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import attention
from ditdial.backbones.patches import Patches
from ditdial.backbones.sizes import Sizes
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import TransformerShape
from ditdial.ops.patching import Triple
from ditdial.ops.positions import table_centres
from ditdial.plan.mode import Mode

ADAPTED = (*attention("attn"), "ff.linear_1", "ff.linear_2", "ff.out_projection")


class AuraFlowBackbone(Backbone):
    """Double blocks, then single ones; eight register tokens stand before the text's.

    The table is cropped from the middle. Patches are cut by a reshape and embedded by a linear
    layer.
    """

    model_class = "AuraFlowTransformer2DModel"
    patches = Patches(embed="pos_embed", output="proj_out")
    times = Times(scale=1.0)
    sizes = Sizes(one="its bases were trained for one number of pixels each")
    facts = (
        "num_mmdit_layers",
        "num_single_dit_layers",
        "num_attention_heads",
        "attention_head_dim",
        "patch_size",
        "in_channels",
        "out_channels",
        "joint_attention_dim",
    )
    block_lists = (replace(DOUBLE_BLOCKS, blocks="joint_transformer_blocks"), SINGLE_BLOCKS)
    low_rank = (("joint_transformer_blocks", ADAPTED), ("single_transformer_blocks", ADAPTED))

    def positions(self, module: Model, forward: Forward, mode: Mode) -> Tensor:
        (_, height, width), p = forward.grid, module.patch_size
        cropped = module.pe_selection_index_based_on_dim(height * p, width * p)
        table = module.pos_embed[0, cropped].unflatten(0, (height, width))
        return table_centres(table, mode.patch_scale[1:])[None]

    def default_size(self, model: Model) -> tuple[Triple, int]:
        side = min(64, math.isqrt(model.config.pos_embed_max_size))
        return (1, side, side), 256

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        conditioning = linear_macs(model.time_step_proj) + linear_macs(model.norm_out)
        return conditioning + text_tokens * linear_macs(model.context_embedder)

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        shape = super().shape(model, grid, text_tokens)
        return replace(shape, text_tokens=text_tokens + model.register_tokens.shape[1])
