"""How a call of a model class is made for pictures of another height and width.

A pipeline that is asked for a smaller picture gives its model a smaller latent, and arguments that
tell the size in one way or another. What these are for each class stands in its backbone's
`Sizes`; `ditdial.runtime.low_band` makes calls of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditdial.backbones.arguments import Call
from ditdial.backbones.patches import Patches
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode
from ditdial.plan.spectrum import FLUX_VAE, Spectrum


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one class.

    Args:
        one: why its bases know pictures of one size alone; empty where they know several.
        square: whether pictures must be as high as they are wide.
        channels: axis of a latent's channels.
        flat_masks: channels behind the latent's own that hold the same number over all of a frame,
            before those of given pictures.
        spectrum: of clean latents; says at which noise levels only the low band matters.
    """

    one: str = ""
    square: bool = False
    channels: int = 1
    flat_masks: int = 0
    spectrum: Spectrum = FLUX_VAE

    def why_one(self, model: Any) -> str:
        """Why this base knows one size alone; empty if it knows several."""
        return self.one

    def pictures(self, latent: Tensor, patches: Patches, patch: Triple, grid: Triple) -> Tensor:
        """Latents or predictions as pictures ``(B, ..., H, W)``, whatever the class's layout."""
        if latent.ndim != 3:
            return latent
        return patches.latents(latent.unflatten(1, grid), patch)

    def packed(self, pictures: Tensor, like: Tensor, patches: Patches, patch: Triple) -> Tensor:
        """The inverse of `pictures`, at any size.

        Args:
            like: a latent in the class's layout.
        """
        return pictures if like.ndim != 3 else patches.vectors(pictures, patch).flatten(1, 3)

    def arguments(self, model: Any, call: Call, grid: Triple, small: Triple) -> Call:
        """Arguments that tell the size, as the pipeline would make them for a smaller picture.

        Args:
            grid, small: base grids of the call and of the smaller picture.

        Raises:
            ValueError: an argument that cannot be made from that of the call.
        """
        return {}


class IdSizes(Sizes):
    """Each token has an id of numbers, the second and third of which are its row and column."""

    def arguments(self, model: Any, call: Call, grid: Triple, small: Triple) -> Call:
        """Ids of the smaller picture's tokens, then those of given pictures as they are."""
        ids = call["img_ids"]
        rows, rest = ids[..., : math.prod(grid), :], ids[..., math.prod(grid) :, :]
        corner = rows.unflatten(-2, grid)[..., :, : small[1], : small[2], :].flatten(-4, -2)
        return {"img_ids": torch.cat([corner, rest], dim=-2)}


class MaskedIdSizes(IdSizes):
    """There is a mask over the tokens of text and picture."""

    def arguments(self, model: Any, call: Call, grid: Triple, small: Triple) -> Call:
        """Ids and the mask of the smaller picture."""
        mask, count = call.get("attention_mask"), math.prod(grid)
        ids = super().arguments(model, call, grid, small)
        if mask is None:
            return ids
        text = call["encoder_hidden_states"].shape[1]
        picture = mask[:, text : text + count].unflatten(1, grid)
        corner = picture[:, :, : small[1], : small[2]].flatten(1)
        parts = [mask[:, :text], corner, mask[:, text + count :]]
        return ids | {"attention_mask": torch.cat(parts, dim=1)}


class ShapeSizes(Sizes):
    """The base grids of all pictures in a sequence are an argument (Qwen-Image)."""

    def arguments(self, model: Any, call: Call, grid: Triple, small: Triple) -> Call:
        """The shapes, of which the first are those of the pictures that are made."""
        first = call["img_shapes"][0]
        shapes = [first] if isinstance(first, tuple) else list(first)
        made = [(1, *small[1:])] * grid[0] if grid[0] > 1 else [small]
        own = [*made, *shapes[len(made) :]]
        return {"img_shapes": [own] * len(call["img_shapes"])}


class PixelSizes(Sizes):
    """Sizes in pixels are embedded beside the time: rows ``(B, 2)`` of height and width."""

    names: tuple[str, ...] = ()

    def scaled(self, value: Tensor, grid: Triple, small: Triple) -> Tensor:
        """Heights and widths of a smaller picture."""
        shares = [few / many for few, many in zip(small[1:], grid[1:], strict=True)]
        return value * value.new_tensor(shares)


class SizedByTarget(PixelSizes):
    """CogView4's pipeline gives the size that is made, and the one that it is cut from."""

    def arguments(self, model: Any, call: Call, grid: Triple, small: Triple) -> Call:
        """Both sizes; what is cut off stays as it is."""
        names = ("original_size", "target_size")
        return {name: self.scaled(call[name], grid, small) for name in names}


class SizedByResolution(PixelSizes):
    """PixArt's pipeline gives height and width, and one over the other."""

    def arguments(self, model: Any, call: Call, grid: Triple, small: Triple) -> Call:
        """Both, for models that embed them."""
        added = dict(call.get("added_cond_kwargs") or {})
        if added.get("resolution") is not None:
            size = added["resolution"] = self.scaled(added["resolution"], grid, small)
            added["aspect_ratio"] = size[:, :1] / size[:, 1:]
        return {"added_cond_kwargs": added} if added else {}


class VolumeSizes(Sizes):
    """The sides of the grid are arguments, or the coordinates of every token (LTX)."""

    def arguments(self, model: Any, call: Call, grid: Triple, small: Triple) -> Call:
        """Those of the smaller video: the coordinates of its corner, as it is as dense."""
        sides = dict(zip(("num_frames", "height", "width"), small, strict=True))
        told = {name: side for name, side in sides.items() if call.get(name) is not None}
        coordinates = call.get("video_coords")
        if coordinates is None:
            return told
        corner = coordinates.unflatten(-1, grid)[..., : small[1], : small[2]].flatten(-3)
        return told | {"video_coords": corner}


class RotarySizes(Sizes):
    """Rotary phases of the whole grid are an argument (CogVideoX 5B and 1.5)."""

    def why_one(self, model: Any) -> str:
        """CogVideoX 1.5 was trained at several sizes, those before it at one."""
        return "" if model.config.patch_size_t else self.one

    def arguments(self, model: Any, call: Call, grid: Triple, small: Triple) -> Call:
        """The phases of the smaller video.

        1.5 counts tokens from the corner; 5B stretches every video over one region, so that a
        smaller one has every n-th place.
        """
        phases = call.get("image_rotary_emb")
        if phases is None:
            return {}
        rows, columns = (slice(side) for side in small[1:])
        if not model.config.patch_size_t:
            steps = [many // few for many, few in zip(grid[1:], small[1:], strict=True)]
            if any(many % few for many, few in zip(grid[1:], small[1:], strict=True)):
                raise ValueError(
                    f"image_rotary_emb has phases for {grid[1]} x {grid[2]} tokens, of which "
                    f"{small[1]} x {small[2]} are no even share; legal: ratios that divide both"
                )
            rows, columns = (slice(None, None, step) for step in steps)
        return {
            "image_rotary_emb": tuple(
                table.unflatten(0, grid)[:, rows, columns].flatten(0, 2) for table in phases
            )
        }


def fitting(grid: Triple, mode: Mode) -> Triple:
    """The base grid that a mode's latents have, of that of a call.

    Raises:
        ValueError: nothing is left of a side.
    """
    if any(ratio > max(side, 1) for ratio, side in zip(mode.low_band, grid[1:], strict=True)):
        raise ValueError(
            f"mode {mode.name!r} does not fit the {grid[1]}x{grid[2]} base grid of this latent; "
            "legal: ratios that leave a token"
        )
    return grid[0], *mode.small(grid[1:])


def pair(size: int | list[int] | tuple[int, ...], patch: int) -> tuple[int, int]:
    """Base tokens per axis of a latent side or pair of sides."""
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return height // patch, width // patch
