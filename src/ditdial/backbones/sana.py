"""`SanaTransformer2DModel` (SANA 2410.10629, SANA-Sprint 2503.09641): linear attention.

Every token is already 32 x 32 pixels. Self-attention costs the same per token however many there
are, and the feed-forward is made of convolutions, so blocks are told the grid they work on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ditdial.backbones.arguments import Arguments, Call
from ditdial.backbones.base import COMMON_FACTS, BlockHook, Model
from ditdial.backbones.blocks import CROSS_BLOCKS
from ditdial.backbones.forward import forward_of
from ditdial.backbones.layers import attention
from ditdial.backbones.patch_embed import PatchEmbedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.sizes import Sizes, pair
from ditdial.backbones.times import Times
from ditdial.cost.blocks import Block, Term
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import TransformerShape
from ditdial.host.pipelines import tells_angles
from ditdial.ops.patching import Triple, coarse_grid
from ditdial.plan.mode import Mode

SPRINT_MIDDLE = 1.3
"""Angle of the second of two steps: the default of the pipeline's ``intermediate_timesteps``."""


class SanaTimes(Times):
    """Models with embedded guidance (Sprint) are given the noise level directly."""

    def levels(self, call: Call) -> tuple[float, float]:
        """Lowest and highest noise level in [0, 1] of the rows of a call."""
        low, high = super().levels(call)
        if call.get("guidance") is None:
            return low, high
        return low * self.scale, high * self.scale

    def told(self, call: Call, level: float, grid: Triple, small: Triple) -> Tensor:
        """The time of a call, of a smaller picture at another noise level."""
        time = super().told(call, level, grid, small)
        return time if call.get("guidance") is None else time / self.scale

    def set_timesteps(self, scheduler: Any, steps: int, grid: Triple, pipe: Any) -> None:
        """As the pipelines do; those of Sprint have a time of their own for two steps alone."""
        if tells_angles(scheduler):
            middle = SPRINT_MIDDLE if steps == 2 else None
            scheduler.set_timesteps(steps, intermediate_timesteps=middle)
        else:
            super().set_timesteps(scheduler, steps, grid, pipe)


class SanaBackbone(PatchEmbedBackbone):
    """Cross-attention to the text; mostly without positions; unconditional rows first.

    Low-rank updates go to self-attention only: convolutions take none.
    """

    model_class = "SanaTransformer2DModel"
    patches = Patches(embed="patch_embed", output="proj_out")
    arguments = Arguments(
        condition=("encoder_hidden_states", "encoder_attention_mask"),
        residuals=("controlnet_block_samples",),
    )
    times = SanaTimes()
    sizes = Sizes(one="its bases were trained for one number of pixels each")
    facts = (*COMMON_FACTS, "caption_channels", "mlp_ratio", "guidance_embeds")
    block_lists = (replace(CROSS_BLOCKS, attention=(("attn2", "cross"),)),)
    low_rank = (("transformer_blocks", attention("attn1")),)
    prompt_only = (("transformer_blocks", ("attn2.to_k", "attn2.to_v")),)

    def block_hooks(self, model: Model) -> Iterator[tuple[nn.Module, BlockHook]]:
        for block in model.transformer_blocks:
            yield block, coarse_sides

    def check(self, model: Model, modes: set[Mode]) -> None:
        super().check(model, modes)
        config = model.config
        if config.timestep_scale != 1 and not config.guidance_embeds:
            raise ValueError(
                f"timestep_scale = {config.timestep_scale}; legal: 1 (times from 0 to 1000), or "
                "guidance_embeds = True (times from 0 to 1)"
            )

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, *pair(model.config.sample_size, model.config.patch_size)), 300

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        return linear_macs(model.time_embed) + text_tokens * linear_macs(model.caption_projection)

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        shape = super().shape(model, grid, text_tokens)
        # Values and a one, times keys: a state of head x (head + 1), written and read per token.
        states = 2 * shape.patches.width * (model.config.attention_head_dim + 1)

        def with_rest(block: nn.Module, known: Block) -> Block:
            layers = (layer for layer in block.modules() if isinstance(layer, nn.Conv2d))
            # One weight, one multiply-add per token, for depthwise and for 1 x 1 convolutions.
            convolutions = sum(layer.weight.numel() for layer in layers)
            return replace(known, terms=(*known.terms, Term(convolutions + states, "stream")))

        blocks = map(with_rest, model.transformer_blocks, shape.blocks)
        return replace(shape, blocks=tuple(blocks))


def coarse_sides(
    block: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Blocks get the base grid's height and width last; give them those of a mode."""
    forward = forward_of(block)
    if not forward.makes_tokens:
        return None
    return (*args[:5], *coarse_grid(forward.grid, forward.mode.patch_scale)[1:]), kwargs
