"""`SD3Transformer2DModel` (Stable Diffusion 3 and 3.5, 2403.03206): joint attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from ditdial.backbones.base import COMMON_FACTS, Model, pair
from ditdial.backbones.blocks import DOUBLE_BLOCKS
from ditdial.backbones.call import Call
from ditdial.backbones.layers import attention, embedders, feed_forward
from ditdial.backbones.patch_embed import PatchEmbedBackbone
from ditdial.backbones.routed import JOINT, Routed
from ditdial.backbones.streamed import Streamed
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode


class SD3Backbone(PatchEmbedBackbone):
    """Text and picture tokens attend together; the position table is cropped from the middle."""

    model_class = "SD3Transformer2DModel"
    output = "proj_out"
    condition = ("encoder_hidden_states", "pooled_projections", "joint_attention_kwargs")
    labels = "pooled_projections"
    embedder = "time_text_embed"
    facts = (*COMMON_FACTS, "joint_attention_dim", "dual_attention_layers")
    block_lists = (replace(DOUBLE_BLOCKS, attention=(("attn", "joint"), ("attn2", "self"))),)
    low_rank = (("transformer_blocks", (*attention("attn"), *feed_forward("ff"))),)
    residuals = ("block_controlnet_hidden_states",)
    streamed = Streamed(attention=(("attn", "joint"), ("attn2", "self")))
    packs = True
    routed = (Routed(blocks="transformer_blocks", **JOINT, residual="norm2"),)
    time_layers = embedders("time_text_embed")

    def check_call(self, call: Call, mode: Mode) -> None:
        super().check_call(call, mode)
        if mode.is_sparse and call.get("skip_layers"):
            raise ValueError(
                f"skip_layers = {call['skip_layers']}, and in mode {mode.name!r} tokens change "
                "grids between blocks; legal together with it: full mode"
            )

    def modulation_layers(self, model: Model) -> Iterator[nn.Module]:
        for block in model.transformer_blocks:
            yield block.norm1.linear
        yield model.norm_out.linear

    def attention_layers(self, model: Model) -> Iterator[nn.Module]:
        for block in model.transformer_blocks:
            yield block.attn
            if block.attn2 is not None:
                yield block.attn2

    def conditioning_layers(self, model: Model) -> Iterator[nn.Module]:
        yield model.time_text_embed

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, *pair(model.config.sample_size, model.config.patch_size)), 333

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        conditioning = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        return conditioning + text_tokens * linear_macs(model.context_embedder)
