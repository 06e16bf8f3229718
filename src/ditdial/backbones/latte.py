"""`LatteTransformer3DModel` (Latte, 2401.03048): spatial and temporal blocks in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ditdial.backbones.arguments import Arguments
from ditdial.backbones.base import COMMON_FACTS, BlockHook, Model
from ditdial.backbones.blocks import CROSS_BLOCKS, BlockList
from ditdial.backbones.forward import forward_of
from ditdial.backbones.layers import embedders
from ditdial.backbones.patch_embed import SELF_ATTENTION_AND_FEED_FORWARD, PatchEmbedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import Routed
from ditdial.backbones.sizes import Sizes, pair
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple


class LatteBackbone(PatchEmbedBackbone):
    """Frames are folded into the batch, so coarse patches are spatial."""

    model_class = "LatteTransformer3DModel"
    patches = Patches(embed="pos_embed", output="proj_out")
    arguments = Arguments(condition=("encoder_hidden_states", "encoder_attention_mask"))
    times = Times(layers=embedders("adaln_single.emb"))
    sizes = Sizes(one="its base was trained at one size", square=True)
    facts = (*COMMON_FACTS, "caption_channels", "video_length")
    block_lists = (
        replace(CROSS_BLOCKS, attention=(("attn1", "spatial"), ("attn2", "cross"))),
        BlockList(blocks="temporal_transformer_blocks", attention=(("attn1", "temporal"),)),
    )
    low_rank = (
        ("transformer_blocks", SELF_ATTENTION_AND_FEED_FORWARD),
        ("temporal_transformer_blocks", SELF_ATTENTION_AND_FEED_FORWARD),
    )
    prompt_only = (("transformer_blocks", ("attn2.to_k", "attn2.to_v")),)
    conditioning = ("adaln_single.emb",)
    routed = tuple(
        Routed(blocks=blocks, attention="attn1", residual="norm2")
        for blocks in ("transformer_blocks", "temporal_transformer_blocks")
    )
    # Behind the first block, positions in time are added to whichever tokens there are.
    streamed = Streamed(
        attention=(("attn1", "spatial"),),
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

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        return linear_macs(model.adaln_single) + text_tokens * linear_macs(model.caption_projection)


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
