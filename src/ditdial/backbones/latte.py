"""`LatteTransformer3DModel` (Latte, 2401.03048): spatial and temporal blocks in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from ditdial.backbones.arguments import Arguments
from ditdial.backbones.base import COMMON_FACTS, BlockHook, Model, pair
from ditdial.backbones.forward import forward_of
from ditdial.backbones.layers import embedders
from ditdial.backbones.patch_embed import SELF_ATTENTION_AND_FEED_FORWARD, PatchEmbedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import Routed
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import Attention, TransformerShape
from ditdial.ops.patching import Triple

TEXT = r"attn2\.to_[kv]$"


class LatteBackbone(PatchEmbedBackbone):
    """Frames are folded into the batch, so coarse patches are spatial."""

    model_class = "LatteTransformer3DModel"
    patches = Patches(embed="pos_embed", output="proj_out")
    arguments = Arguments(condition=("encoder_hidden_states", "encoder_attention_mask"))
    times = Times(layers=embedders("adaln_single.emb"))
    facts = (*COMMON_FACTS, "caption_channels", "video_length")
    low_rank = (
        ("transformer_blocks", SELF_ATTENTION_AND_FEED_FORWARD),
        ("temporal_transformer_blocks", SELF_ATTENTION_AND_FEED_FORWARD),
    )
    prompt_only = (("transformer_blocks", ("attn2.to_k", "attn2.to_v")),)
    conditioning = ("adaln_single.emb",)
    routed = tuple(
        Routed(blocks=blocks, attention="attn1", kind=kind, residual="norm2")
        for blocks, kind in (
            ("transformer_blocks", "spatial"),
            ("temporal_transformer_blocks", "temporal"),
        )
    )
    # Behind the first block, positions in time are added to whichever tokens there are.
    streamed = Streamed(
        attention=(("attn1", "spatial"),),
        text="attn2",
        beside="temporal_transformer_blocks",
        pools_first=True,
    )

    def output_grid(self, grid: Triple) -> Triple:
        return 1, grid[1], grid[2]

    def block_hooks(self, model: Model) -> Iterator[tuple[nn.Module, BlockHook]]:
        for block in model.temporal_transformer_blocks:
            yield block, fewer_times

    def default_size(self, model: Model) -> tuple[Triple, int]:
        config = model.config
        return (config.video_length, *pair(config.sample_size, config.patch_size)), 120

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        config = model.config
        d = config.num_attention_heads * config.attention_head_dim
        spatial, temporal = model.transformer_blocks, model.temporal_transformer_blocks
        depth, area = config.num_layers, config.patch_size**2
        return TransformerShape(
            width=d,
            grid=grid,
            patch_in=area * config.in_channels,
            patch_out=area * model.out_channels,
            token_macs=linear_macs(spatial, but=TEXT) + linear_macs(temporal),
            attention=(
                Attention(depth, d, "spatial"),
                Attention(depth, d, "cross"),
                Attention(depth, d, "temporal"),
            ),
            text_tokens=text_tokens,
            text_once=grid[0] * linear_macs(spatial, TEXT),
            text_macs=grid[0] * linear_macs(spatial, TEXT),  # once for every frame
            picture_macs=linear_macs(model.adaln_single)
            + text_tokens * linear_macs(model.caption_projection),
            adapted=self.adapted_macs(model),
        )


def fewer_times(
    block: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Temporal blocks get their time once per base token of a frame; cut it to the tokens there."""
    base = math.prod(forward_of(block).grid[1:])
    tokens = len(args[0]) * base // len(args[4])
    if tokens == base:
        return None
    times = args[4].unflatten(0, (-1, base))[:, :tokens].flatten(0, 1)
    return (*args[:4], times, *args[5:]), kwargs
