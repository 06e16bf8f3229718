"""`LTXVideoTransformer3DModel` (LTX-Video, 2501.00103): tokens packed by the pipeline.

One latent vector is a token already (32 x 32 pixels, 8 frames). Rotary positions are seconds and
pixels, made from the grid's sides or from coordinates of every token. Their highest frequency makes
many turns between neighbours, so phases are never averaged; coordinates are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ditdial.backbones.arguments import Arguments, Call, grouped_times, has_token_times
from ditdial.backbones.base import COMMON_FACTS, Backbone, Model
from ditdial.backbones.blocks import CROSS_BLOCKS
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import attention, feed_forward
from ditdial.backbones.patches import Patches
from ditdial.backbones.sizes import VolumeSizes
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import TransformerShape
from ditdial.ops.ids import grid_of_coordinates
from ditdial.ops.patching import Triple
from ditdial.ops.positions import coordinate_centres, group_centres
from ditdial.plan.mode import Mode


class LTXTimes(Times):
    """Some of its pipelines have a schedule of their own."""

    def set_timesteps(self, scheduler: Any, steps: int, grid: Triple, pipe: Any) -> None:
        """Timesteps of a run of a latent with this base grid, as the pipeline asks."""
        if type(pipe).__name__ == "LTXI2VLongMultiPromptPipeline":
            return scheduler.set_timesteps(steps)
        if type(pipe).__name__ != "LTXConditionPipeline":
            return super().set_timesteps(scheduler, steps, grid, pipe)
        from diffusers.pipelines.ltx import pipeline_ltx_condition  # needs transformers

        times = pipeline_ltx_condition.linear_quadratic_schedule(steps) * 1000
        return scheduler.set_timesteps(timesteps=times)


class LTXBackbone(Backbone):
    """Cross-attention; unconditional rows first; given frames may have times of their own."""

    model_class = "LTXVideoTransformer3DModel"
    patches = Patches(embed="proj_in", output="proj_out", output_layout="Cthw")
    arguments = Arguments(condition=("encoder_hidden_states", "encoder_attention_mask"))
    times = LTXTimes(own_sigmas=True)
    sizes = VolumeSizes()
    rotary = "rope"
    facts = (*COMMON_FACTS, "patch_size_t", "caption_channels")
    axes = "thw"
    block_lists = (CROSS_BLOCKS,)
    low_rank = (("transformer_blocks", (*attention("attn1"), *feed_forward("ff"))),)
    prompt_only = (("transformer_blocks", ("attn2.to_k", "attn2.to_v")),)

    def grid(self, model: Model, call: Call) -> Triple:
        tokens, coordinates = self.arguments.latent(call).shape[1], call.get("video_coords")
        frames, height, width = (call.get(name) or 0 for name in ("num_frames", "height", "width"))
        if frames * height * width == tokens or coordinates is None:
            return frames, height, width
        return grid_of_coordinates(coordinates[0])

    def check_grid(self, grid: Triple, mode: Mode) -> None:
        if grid[:2] == (1, 1):
            raise ValueError(
                f"video_coords name {grid[2]} tokens that form no single grid (given frames among "
                "them, say); legal: full mode"
            )
        super().check_grid(grid, mode)

    def check_call(self, call: Call, mode: Mode) -> None:
        super().check_call(call, mode)
        coordinates = call.get("video_coords")
        if mode.patch_scale[0] == 1 or coordinates is None or coordinates.is_meta:
            return
        _, height, width = self.grid(None, call)
        if (coordinates[0, 0, :: height * width].diff() <= 0).any():
            raise ValueError(
                "video_coords name frames at times that do not rise (given frames among them, say) "
                f"and mode {mode.name!r} joins frames; legal: patchK"
            )

    def phases(
        self, module: Model, forward: Forward, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        hidden, _, _, _, interpolation, coordinates = args
        if coordinates is not None:
            centres = coordinate_centres(coordinates, forward.grid, mode.patch_scale)
            return stock(hidden, video_coords=centres)
        units = module.base_num_frames, module.base_height, module.base_width
        if interpolation is not None:
            patch = module.patch_size_t, module.patch_size, module.patch_size
            units = [s * p for s, p in zip(interpolation, patch, strict=True)]
        axes = [
            group_centres(side, k, hidden.device).float() * unit
            for side, k, unit in zip(forward.grid, mode.patch_scale, units, strict=True)
        ]
        return stock(hidden, video_coords=torch.cartesian_prod(*axes).T.expand(len(hidden), -1, -1))

    def prepare(self, call: Call, forward: Forward, mode: Mode) -> Call:
        if not has_token_times(call):
            return call
        return call | {"timestep": grouped_times(call["timestep"], forward.grid, mode)}

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (21, 16, 22), 128

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        return *super().size(model, call), has_token_times(call)

    def planned_size(
        self,
        grid: Triple,
        text_tokens: int,
        pipe: Any,
        *,
        token_times: bool | None = None,
        **others: Any,
    ) -> tuple[Any, ...]:
        if token_times is None:
            # Pipelines that start from a frame tell each token a time: those of the frame have
            # none.
            names = (cls.__name__ for cls in type(pipe).__mro__)
            token_times = any("ImageToVideo" in name or "I2V" in name for name in names)
        return *super().planned_size(grid, text_tokens, pipe, **others), token_times

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        return text_tokens * linear_macs(model.caption_projection)

    def shape(
        self, model: Model, grid: Triple, text_tokens: int, times_per_token: bool = False
    ) -> TransformerShape:
        shape = super().shape(model, grid, text_tokens)
        return shape.with_times(linear_macs(model.time_embed), per_token=times_per_token)
