"""`FluxTransformer2DModel` (FLUX.1): tokens packed by the pipeline, positions given as ids."""

from __future__ import annotations

from dataclasses import replace

from ditdial.backbones.arguments import Arguments
from ditdial.backbones.base import Model
from ditdial.backbones.blocks import DOUBLE_BLOCKS, SINGLE_BLOCKS
from ditdial.backbones.layers import attention, embedders, feed_forward
from ditdial.backbones.packed_ids import PackedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import JOINT, SINGLE, Routed
from ditdial.backbones.sizes import IdSizes, Sizes
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import TransformerShape
from ditdial.ops.patching import Triple


class FluxFamily(PackedBackbone):
    """Double blocks, then single blocks over text and picture; two calls per step with true CFG.

    Reference pictures (Kontext) stand behind the one to make.
    """

    patches = Patches(embed="x_embedder", output="proj_out", output_layout="Cthw", fixed=(1, 2, 2))
    arguments = Arguments(
        residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
        conditional_first=None,
    )
    times = Times(scale=1.0, own_sigmas=True)
    sizes: Sizes = IdSizes()
    facts = (
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "joint_attention_dim",
        "guidance_embeds",
    )
    block_lists = (DOUBLE_BLOCKS, SINGLE_BLOCKS)
    low_rank = (
        ("transformer_blocks", (*attention("attn"), *feed_forward("ff"))),
        ("single_transformer_blocks", (*attention("attn")[:3], "proj_mlp", "proj_out")),
    )

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, 64, 64), 512

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        conditioning = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        return conditioning + text_tokens * linear_macs(model.context_embedder)

    def shape(
        self, model: Model, grid: Triple, text_tokens: int, others: int = 0
    ) -> TransformerShape:
        return replace(super().shape(model, grid, text_tokens), others=others)


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
    )
