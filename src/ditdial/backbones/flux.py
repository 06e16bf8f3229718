"""`FluxTransformer2DModel` (FLUX.1): tokens packed by the pipeline, positions given as ids."""

from __future__ import annotations

from dataclasses import replace

from ditdial.backbones.arguments import Arguments
from ditdial.backbones.base import Model
from ditdial.backbones.layers import MODULATION, attention, embedders, feed_forward
from ditdial.backbones.packed_ids import PackedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import JOINT, SINGLE, Routed
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs, with_other_pictures
from ditdial.cost.shape import Attention, TransformerShape
from ditdial.ops.patching import Triple

TEXT = r"\.(attn\.(add_|to_add_out)|ff_context)"


class FluxFamily(PackedBackbone):
    """Double blocks, then single blocks over text and picture; two calls per step with true CFG.

    Sequences with reference pictures (Kontext) run in full mode.
    """

    patches = Patches(embed="x_embedder", output="proj_out", output_layout="Cthw", fixed=(1, 2, 2))
    arguments = Arguments(
        residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
        conditional_first=None,
    )
    times = Times(scale=1.0, own_sigmas=True)
    facts = (
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "joint_attention_dim",
        "guidance_embeds",
    )
    low_rank = (
        ("transformer_blocks", (*attention("attn"), *feed_forward("ff"))),
        ("single_transformer_blocks", (*attention("attn")[:3], "proj_mlp", "proj_out")),
    )

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, 64, 64), 512

    def shape(
        self, model: Model, grid: Triple, text_tokens: int, others: int = 0
    ) -> TransformerShape:
        config, d = model.config, model.inner_dim
        double, single = model.transformer_blocks, model.single_transformer_blocks
        both = linear_macs(single, but=MODULATION)
        modulation = linear_macs(double, MODULATION) + linear_macs(single, MODULATION)
        conditioning = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        shape = TransformerShape(
            width=d,
            grid=grid,
            patch_in=config.in_channels,
            patch_out=model.proj_out.out_features,
            token_macs=linear_macs(double, but=f"{TEXT}|{MODULATION}") + both,
            attention=(Attention(config.num_layers + config.num_single_layers, d, "joint"),),
            text_tokens=text_tokens,
            text_macs=linear_macs(double, TEXT) + both,
            picture_macs=modulation
            + conditioning
            + text_tokens * linear_macs(model, "^context_embedder$"),
            adapted=self.adapted_macs(model),
            adapted_text=self.adapted_macs(model, "^single"),
        )
        return with_other_pictures(shape, others)


class FluxBackbone(FluxFamily):
    """FLUX.1: one embedding of time, guidance and pooled prompt drives all norms."""

    model_class = "FluxTransformer2DModel"
    # An IP-adapter's picture comes in the last one.
    arguments = replace(
        FluxFamily.arguments,
        condition=(
            "encoder_hidden_states",
            "pooled_projections",
            "txt_ids",
            "joint_attention_kwargs",
        ),
    )
    times = replace(FluxFamily.times, layers=embedders("time_text_embed"), factor=1000.0)
    conditioning = ("time_text_embed",)
    routed = (
        Routed(blocks="transformer_blocks", **JOINT, residual="norm2"),
        Routed(blocks="single_transformer_blocks", **SINGLE, residual="norm"),
    )
    streamed = Streamed(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        norms=("norm1", "norm"),
        attention=(("attn", "joint"),),
        phases="image_rotary_emb",
        parallel="proj_mlp",
        apart=r"^(attn\.(add_|to_add_out)|ff_context|norm)",
    )
