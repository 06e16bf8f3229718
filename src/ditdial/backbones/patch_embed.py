"""What the classes with diffusers' `PatchEmbed` share: DiT, PixArt, SD3, Latte.

The module cuts one frame into patches and adds a position table, either sine-cosine at any size or
a crop from the middle of a stored one.
"""

from __future__ import annotations

from torch import Tensor

from ditdial.backbones.base import Backbone, Model
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import attention, feed_forward
from ditdial.ops.positions import group_centres, sincos_2d, table_centres
from ditdial.plan.mode import Mode

SELF_ATTENTION_AND_FEED_FORWARD = (*attention("attn1"), *feed_forward("ff"))
"""The layers of diffusers' `BasicTransformerBlock` that low-rank updates go to."""


class PatchEmbedBackbone(Backbone):
    """Positions of coarse tokens at the centres of their groups, or at their first tokens."""

    corners = True

    def positions(self, module: Model, forward: Forward, mode: Mode) -> Tensor | None:
        if module.pos_embed is None:
            return None
        (_, height, width), scale = forward.grid, mode.patch_scale
        if module.pos_embed_max_size:
            p = module.patch_size
            stored = module.cropped_pos_embed(height * p, width * p).unflatten(1, (height, width))
            return table_centres(stored[0], scale[1:], first=forward.corners)[None]

        def table() -> Tensor:
            # Off its native size the stock table squeezes the grid into base_size units; so do the
            # centres.
            unit = [module.base_size / n / module.interpolation_scale for n in (height, width)]
            rows, columns = (
                group_centres(side, k, first=forward.corners) * each
                for side, k, each in zip((height, width), scale[1:], unit, strict=True)
            )
            return sincos_2d(rows, columns, len(module.proj.weight))

        return forward.position_table(mode, table)
