"""`SD3Transformer2DModel` (Stable Diffusion 3 and 3.5, 2403.03206): joint attention."""

from __future__ import annotations

from ditdial.backbones.arguments import Arguments, Call
from ditdial.backbones.base import COMMON_FACTS, Model, pair
from ditdial.backbones.layers import MODULATION, Packed, attention, embedders, feed_forward
from ditdial.backbones.patch_embed import PatchEmbedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import JOINT, Routed
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import Attention, TransformerShape
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode

TEXT = r"\.(attn\.(add_|to_add_out)|ff_context)"


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
    low_rank = (("transformer_blocks", (*attention("attn"), *feed_forward("ff"))),)
    streamed = Streamed(
        attention=(("attn", "joint"), ("attn2", "self")),
        apart=r"^(attn\.(add_|to_add_out)|ff_context|norm1)",
    )
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

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        config, d, blocks = model.config, model.inner_dim, model.transformer_blocks
        area, dual = config.patch_size**2, len(config.dual_attention_layers)
        conditioning = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        text_in = text_tokens * linear_macs(model, "^context_embedder$")
        return TransformerShape(
            width=d,
            grid=grid,
            patch_in=area * config.in_channels,
            patch_out=area * model.out_channels,
            token_macs=linear_macs(blocks, but=f"{TEXT}|{MODULATION}"),
            attention=(Attention(config.num_layers, d, "joint"), Attention(dual, d)),
            text_tokens=text_tokens,
            text_macs=linear_macs(blocks, TEXT),
            picture_macs=linear_macs(blocks, MODULATION) + conditioning + text_in,
            adapted=self.adapted_macs(model),
        )
