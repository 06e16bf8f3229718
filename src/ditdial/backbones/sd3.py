"""`SD3Transformer2DModel` (Stable Diffusion 3 and 3.5, 2403.03206): joint attention."""

from __future__ import annotations

from dataclasses import replace

from ditdial.backbones.arguments import Arguments, Call
from ditdial.backbones.base import COMMON_FACTS, Model
from ditdial.backbones.blocks import DOUBLE_BLOCKS
from ditdial.backbones.layers import Packed, attention, embedders, feed_forward
from ditdial.backbones.patch_embed import PatchEmbedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import JOINT, Routed
from ditdial.backbones.sizes import pair
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode


class SD3Backbone(PatchEmbedBackbone):
    """Text and picture tokens attend together; the position table is cropped from the middle."""

    model_class = "SD3Transformer2DModel"
    patches = Patches(embed="pos_embed", output="proj_out")
    arguments = Arguments(
        condition=("encoder_hidden_states", "pooled_projections", "joint_attention_kwargs"),
        residuals=("block_controlnet_hidden_states",),
    )
    times = Times(layers=embedders("time_text_embed"))
    facts = (*COMMON_FACTS, "joint_attention_dim", "dual_attention_layers")
    block_lists = (replace(DOUBLE_BLOCKS, attention=(("attn", "joint"), ("attn2", "self"))),)
    low_rank = (("transformer_blocks", (*attention("attn"), *feed_forward("ff"))),)
    streamed = Streamed(attention=(("attn", "joint"), ("attn2", "self")))
    packed = Packed(
        modulation=("transformer_blocks.*.norm1.linear", "norm_out.linear"),
        attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
    )
    conditioning = ("time_text_embed",)
    routed = (Routed(blocks="transformer_blocks", **JOINT, residual="norm2"),)

    def check_call(self, call: Call, mode: Mode) -> None:
        super().check_call(call, mode)
        if mode.is_sparse and call.get("skip_layers"):
            raise ValueError(
                f"skip_layers = {call['skip_layers']}, and in mode {mode.name!r} tokens change "
                "grids between blocks; legal together with it: full mode"
            )

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, *pair(model.config.sample_size, model.config.patch_size)), 333

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        conditioning = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        return conditioning + text_tokens * linear_macs(model.context_embedder)
