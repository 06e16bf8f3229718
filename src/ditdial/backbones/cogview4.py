"""`CogView4Transformer2DModel` (CogView4): joint attention, one set of weights for both streams.

Text and picture pass the same layers with modulations of their own. Rotary positions stretch every
picture over one table of 256 x 256 whole places, several radians apart, so a centre between two
tokens gets phases made for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditdial.backbones.arguments import Arguments
from ditdial.backbones.base import COMMON_FACTS, Backbone, Model
from ditdial.backbones.blocks import BlockList
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import attention, feed_forward
from ditdial.backbones.patches import Patches
from ditdial.backbones.sizes import SizedByTarget
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple
from ditdial.ops.positions import group_centres
from ditdial.plan.mode import Mode


class CogView4Times(Times):
    """The pipeline gives whole times, and a shift that grows with the root of the picture."""

    def set_timesteps(self, scheduler: Any, steps: int, grid: Triple, pipe: Any) -> None:
        """Timesteps of a run of a latent with this base grid, as the pipeline asks."""
        facts = scheduler.config
        times = np.linspace(facts.num_train_timesteps, 1.0, steps).astype(np.int64)
        low = facts.get("base_image_seq_len", 256)
        mu = (math.prod(grid) / low) ** 0.5 * facts.get("max_shift", 0.75)
        scheduler.set_timesteps(
            timesteps=times.astype(np.float32),
            sigmas=times / facts.num_train_timesteps,
            mu=mu + facts.get("base_shift", 0.25),
        )


class CogView4Backbone(Backbone):
    """Two calls per step."""

    model_class = "CogView4Transformer2DModel"
    patches = Patches(embed="patch_embed.proj", output="proj_out", output_layout="Cthw")
    arguments = Arguments(
        condition=("encoder_hidden_states", "attention_mask"),
        base_only=("image_rotary_emb",),
        conditional_first=None,
    )
    times = CogView4Times()
    sizes = SizedByTarget()
    rotary = "rope"
    facts = (*COMMON_FACTS, "text_embed_dim")
    block_lists = (
        BlockList(
            blocks="transformer_blocks",
            attention=(("attn1", "joint"),),
            both=True,
            once=r"\.norm1\.linear",
        ),
    )
    low_rank = (("transformer_blocks", (*attention("attn1"), *feed_forward("ff"))),)

    def phases(
        self, module: Model, forward: Forward, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        device, half = args[0].device, module.dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        frequencies = 1.0 / module.theta**exponents
        rows, columns = (
            torch.outer(places(side, k, size).to(frequencies), frequencies)
            for side, k, size in zip(
                forward.grid[1:], mode.patch_scale[1:], module.rope_axes_dim, strict=True
            )
        )
        row = rows.repeat_interleave(len(columns), dim=0)
        angles = torch.cat([row, columns.repeat(len(rows), 1)] * 2, dim=1)
        return angles.cos(), angles.sin()

    def default_size(self, model: Model) -> tuple[Triple, int]:
        side = model.config.sample_size // model.config.patch_size
        return (1, side, side), 128  # prompts are padded to the next multiple of 16 only

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        conditioning = linear_macs(model, r"^(time_condition_embed|norm_out)\.")
        return conditioning + text_tokens * linear_macs(model.patch_embed.text_proj)


def places(length: int, k: int, size: int) -> Tensor:
    """Places of group centres on a table of ``size``, between those of the two tokens next to it.

    A token's own place is rounded down.
    """
    centres = group_centres(length, k)
    return (centres.floor() * size // length + centres.ceil() * size // length) / 2
