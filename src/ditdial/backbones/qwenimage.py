"""`QwenImageTransformer2DModel` (Qwen-Image, 2508.02324): joint attention, centred positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ditdial.backbones.arguments import Arguments, Call
from ditdial.backbones.base import COMMON_FACTS, Backbone, Model
from ditdial.backbones.blocks import BlockList
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import attention, feed_forward
from ditdial.backbones.patches import Patches
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import TransformerShape
from ditdial.ops.patching import Triple, coarse_grid
from ditdial.ops.positions import rotary_centres
from ditdial.plan.mode import Mode


class QwenImageBackbone(Backbone):
    """Packed by the pipeline; positions count from the middle of the picture; two calls per step.

    The edit and layered pipelines put more pictures into the sequence; those run in full mode.
    """

    model_class = "QwenImageTransformer2DModel"
    patches = Patches(embed="img_in", output="proj_out", output_layout="Cthw")
    arguments = Arguments(
        condition=("encoder_hidden_states", "encoder_hidden_states_mask"),
        residuals=("controlnet_block_samples",),
        conditional_first=None,
    )
    times = Times(scale=1.0, own_sigmas=True)
    rotary = "pos_embed"
    facts = (*COMMON_FACTS, "joint_attention_dim")
    block_lists = (
        BlockList(
            blocks="transformer_blocks",
            attention=(("attn", "joint"),),
            text=r"\.(attn\.(add_|to_add_out)|txt_mlp)",
            once=r"\.(img|txt)_mod\.",
        ),
    )
    conditioning = ("time_text_embed",)
    low_rank = (("transformer_blocks", (*attention("attn"), *feed_forward("img_mlp"))),)

    def grid(self, model: Model, call: Call) -> Triple:
        return pictures(call)[0]

    def phases(
        self, module: Model, forward: Forward, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        (t, h, w), (_, kh, kw) = forward.grid, mode.patch_scale
        _, rows, columns = coarse_grid(forward.grid, mode.patch_scale)
        # One group more on each side keeps the middle where it is and fills ragged borders.
        wide = (t, h + 2 * kh, w + 2 * kw)
        table = stock([[wide]])[0].unflatten(0, wide)
        table = table[:, kh : kh + rows * kh, kw : kw + columns * kw]
        # The text's phases begin where the base grid ends.
        return rotary_centres(table, mode.patch_scale).flatten(0, 2), stock([[forward.grid]])[1]

    def prepare(self, call: Call, forward: Forward, mode: Mode) -> Call:
        # Models with a second time for clean pictures count tokens by these shapes.
        coarse = coarse_grid(forward.grid, mode.patch_scale)
        return call | {"img_shapes": [[coarse]] * len(call["img_shapes"])}

    def check_call(self, call: Call, mode: Mode) -> None:
        super().check_call(call, mode)
        if len(pictures(call)) > 1:
            raise ValueError(
                f"img_shapes name {len(pictures(call))} pictures in one sequence, and mode "
                f"{mode.name!r} takes one; legal with reference pictures: full mode"
            )

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, 64, 64), 512

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        others = sum(math.prod(sides) for sides in pictures(call)[1:])
        return *super().size(model, call), others

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        macs = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        if model.config.zero_cond_t:  # a second time, for clean pictures
            macs += linear_macs(model.time_text_embed)
            macs += linear_macs(model.transformer_blocks, r"\.img_mod\.")
        return macs + text_tokens * linear_macs(model.txt_in)

    def shape(
        self, model: Model, grid: Triple, text_tokens: int, others: int = 0
    ) -> TransformerShape:
        return replace(super().shape(model, grid, text_tokens), others=others)


def pictures(call: Call) -> list[Triple]:
    """Base grids of all pictures in a sequence, the one to make first."""
    first = call["img_shapes"][0]  # all rows of a batch have the same
    return [first] if isinstance(first, tuple) else list(first)
