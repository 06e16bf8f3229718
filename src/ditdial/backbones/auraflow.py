"""`AuraFlowTransformer2DModel` (AuraFlow): joint attention, a learned table of positions."""

from __future__ import annotations

import math

from torch import Tensor

from ditdial.backbones.base import Backbone, Model
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import MODULATION, attention
from ditdial.backbones.patches import Patches
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import Attention, TransformerShape
from ditdial.ops.patching import Triple
from ditdial.ops.positions import table_centres
from ditdial.plan.mode import Mode

TEXT = r"\.(attn\.(add_|to_add_out)|ff_context)"
ADAPTED = (*attention("attn"), "ff.linear_1", "ff.linear_2", "ff.out_projection")


class AuraFlowBackbone(Backbone):
    """Double blocks, then single ones; eight register tokens stand before the text's.

    The table is cropped from the middle. Patches are cut by a reshape and embedded by a linear
    layer.
    """

    model_class = "AuraFlowTransformer2DModel"
    patches = Patches(embed="pos_embed", output="proj_out")
    times = Times(scale=1.0)
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
    low_rank = (("joint_transformer_blocks", ADAPTED), ("single_transformer_blocks", ADAPTED))

    def positions(self, module: Model, forward: Forward, mode: Mode) -> Tensor:
        (_, height, width), p = forward.grid, module.patch_size
        cropped = module.pe_selection_index_based_on_dim(height * p, width * p)
        table = module.pos_embed[0, cropped].unflatten(0, (height, width))
        return table_centres(table, mode.patch_scale[1:])[None]

    def default_size(self, model: Model) -> tuple[Triple, int]:
        side = min(64, math.isqrt(model.config.pos_embed_max_size))
        return (1, side, side), 256

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        config, d = model.config, model.inner_dim
        double, single = model.joint_transformer_blocks, model.single_transformer_blocks
        depth, area = config.num_mmdit_layers + config.num_single_dit_layers, config.patch_size**2
        both = linear_macs(single, but=MODULATION)
        modulation = linear_macs(double, MODULATION) + linear_macs(single, MODULATION)
        conditioning = linear_macs(model.time_step_proj) + linear_macs(model.norm_out)
        return TransformerShape(
            width=d,
            grid=grid,
            patch_in=area * config.in_channels,
            patch_out=model.proj_out.out_features,
            token_macs=linear_macs(double, but=f"{TEXT}|{MODULATION}") + both,
            attention=(Attention(depth, d, "joint"),),
            text_tokens=text_tokens + model.register_tokens.shape[1],
            text_macs=linear_macs(double, TEXT) + both,
            picture_macs=modulation
            + conditioning
            + text_tokens * linear_macs(model, "^context_embedder$"),
            adapted=self.adapted_macs(model),
            adapted_text=self.adapted_macs(model, "^single"),
        )
