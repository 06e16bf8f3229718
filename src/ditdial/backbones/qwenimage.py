"""`QwenImageTransformer2DModel` (Qwen-Image, 2508.02324): joint attention, centred positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ditdial.backbones.arguments import Arguments, Call
from ditdial.backbones.base import COMMON_FACTS, Backbone, Model
from ditdial.backbones.blocks import BlockList
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import attention, feed_forward
from ditdial.backbones.patches import Patches
from ditdial.backbones.sizes import ShapeSizes
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import TransformerShape
from ditdial.ops.patching import Triple, coarse_grid
from ditdial.ops.positions import rotary_centres
from ditdial.plan.mode import Mode

LAYER = 256
"""Tokens of a layer whose schedule the layered pipeline shifts by 1."""


class QwenImageTimes(Times):
    """The layered pipeline shifts its schedule by the root of one layer's tokens."""

    def set_timesteps(self, scheduler: Any, steps: int, grid: Triple, pipe: Any) -> None:
        """Timesteps of a run of a latent with this base grid, as the pipeline asks."""
        if pipe is None or not pipe.transformer.config.use_layer3d_rope:
            return super().set_timesteps(scheduler, steps, grid, pipe)
        mu = math.sqrt(grid[1] * grid[2] / LAYER)
        return scheduler.set_timesteps(sigmas=self.sigmas(steps), mu=mu)


class QwenImageBackbone(Backbone):
    """Packed by the pipeline; positions count from the middle of the picture; two calls per step.

    The edit pipelines put reference pictures behind the one to make. Layers that are made together
    are frames of one grid, and the picture that they are made of is their reference.
    """

    model_class = "QwenImageTransformer2DModel"
    patches = Patches(embed="img_in", output="proj_out", output_layout="Cthw")
    arguments = Arguments(
        condition=("encoder_hidden_states", "encoder_hidden_states_mask"),
        residuals=("controlnet_block_samples",),
        conditional_first=None,
    )
    times = QwenImageTimes(scale=1.0, own_sigmas=True)
    sizes = ShapeSizes()
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
        made, _ = pictures(model, call)
        return len(made), *made[0][1:]

    def phases(
        self, module: Model, forward: Forward, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        (t, h, w), (_, kh, kw), others = forward.grid, mode.patch_scale, args[0][0][1:]
        _, rows, columns = coarse_grid(forward.grid, mode.patch_scale)
        # One group more on each side keeps the middle where it is and fills ragged borders.
        wide = (t, h + 2 * kh, w + 2 * kw)
        table = stock([[wide, *others]])[0][: math.prod(wide)].unflatten(0, wide)
        table = table[:, kh : kh + rows * kh, kw : kw + columns * kw]
        own = rotary_centres(table, mode.patch_scale).flatten(0, 2)
        # The text's phases begin where the base grids end.
        base, text = stock([[(1, h, w)] * t + others])
        return torch.cat([own, base[t * h * w :]]), text

    def prepare(self, call: Call, forward: Forward, mode: Mode) -> Call:
        # Models with a second time for clean pictures count tokens by these shapes.
        coarse = coarse_grid(forward.grid, mode.patch_scale)
        others = shapes(call)[forward.grid[0] :]
        return call | {"img_shapes": [[coarse, *others]] * len(call["img_shapes"])}

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, 64, 64), 512

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        others = sum(math.prod(sides) for sides in pictures(model, call)[1])
        return *super().size(model, call), others

    def planned_size(
        self,
        grid: Triple,
        text_tokens: int,
        pipe: Any,
        *,
        reference_tokens: int = 0,
        **others: Any,
    ) -> tuple[Any, ...]:
        return *super().planned_size(grid, text_tokens, pipe, **others), reference_tokens

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


def pictures(model: Model, call: Call) -> tuple[list[Triple], list[Triple]]:
    """Base grids of the pictures in a sequence that are made, and of those that are given."""
    found = shapes(call)
    made = len(found) - 1 if model.config.use_layer3d_rope else 1
    return found[:made], found[made:]


def shapes(call: Call) -> list[Triple]:
    """Base grids of all pictures in a sequence."""
    first = call["img_shapes"][0]  # all rows of a batch have the same
    return [first] if isinstance(first, tuple) else list(first)
