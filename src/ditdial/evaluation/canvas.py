"""Both sizes of a run that starts on smaller latents, of any pipeline, and what does not fit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditdial.backbones import Backbone, backbone_for
from ditdial.evaluation.stages import check_scheduler
from ditdial.host.pipelines import transformers
from ditdial.ops.low_band import Sides
from ditdial.ops.patching import Triple
from ditdial.plain.checks import require, whole
from ditdial.plan.mode import Mode

ASKED = ("latents", "height", "width", "output_type", "num_inference_steps", "generator")
"""Arguments that a pipeline's call must have."""

OURS = ("latents", "num_inference_steps", "timesteps", "sigmas")
"""Arguments that the pieces of a run have values of their own for."""

PIXELS_PER_NUMBER = (
    "vae_scale_factor",
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
)
"""What diffusers' pipelines call the pixels along a side of a latent's number."""

TOKEN_MAPS = ("Flux2Transformer2DModel",)
"""Models whose pipelines are given tokens as maps ``(B, c, h, w)``, and make rows of them."""

MOST_SIDE = 2**20


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The two sizes of a run that is made on smaller latents first, and how latents lie in memory.

    Args:
        backbone, patch: of the pipeline's model.
        grid, small: base tokens along height and width.
        unit: pixels along each side of a token.
    """

    backbone: Backbone
    patch: Triple
    grid: Sides
    small: Sides
    unit: Sides

    @classmethod
    def of(cls, pipe: Any, ratio: float, call: Mapping[str, Any]) -> Canvas:
        """That of a call.

        Args:
            ratio: how many times shorter the sides of the smaller latents are; rounded so that
                these have whole tokens.

        Raises:
            ValueError: a pipeline, scheduler or argument that does not fit, by name.
        """
        check_pipeline(pipe)
        check_call(pipe, call)
        model: Any = next(iter(transformers(pipe).values()))
        backbone = backbone_for(model)
        patch = backbone.patches.size(model)
        scale = _pixels(pipe)
        unit = scale * patch[1], scale * patch[2]
        sides: dict[str, Any] = {name: call.get(name) for name in ("height", "width")}
        for (name, side), each in zip(sides.items(), unit, strict=True):
            whole(name, side, each, MOST_SIDE)
            require(side % each == 0, name, side, f"a multiple of {each}, whole tokens")
        alike = sides["height"] == sides["width"] or not backbone.sizes.square
        require(alike, "width", sides["width"], f"{sides['height']}, as height is")
        height, width = (side // each for side, each in zip(sides.values(), unit, strict=True))
        small = Mode(low_band=ratio).small((height, width))
        return cls(backbone=backbone, patch=patch, grid=(height, width), small=small, unit=unit)

    @property
    def sides(self) -> Sides:
        """Rows and columns of the whole latents."""
        return self.grid[0] * self.patch[1], self.grid[1] * self.patch[2]

    @property
    def smaller(self) -> dict[str, int]:
        """The smaller size as arguments of the pipeline."""
        return {"height": self.small[0] * self.unit[0], "width": self.small[1] * self.unit[1]}

    def pictures(self, latents: Tensor) -> Tensor:
        """Smaller latents of a pipeline's loop -> ``(B, ..., h, w)``.

        Raises:
            ValueError: they are of another size than the pipeline was asked for.
        """
        sides = (self.small[0] * self.patch[1], self.small[1] * self.patch[2])
        frames, over = divmod(latents.shape[1], math.prod(self.small))
        if over if latents.ndim == 3 else latents.shape[-2:] != sides:
            raise ValueError(
                f"the pipeline made latents {tuple(latents.shape)} where it was asked for {sides} "
                "rows and columns; legal: pipelines that keep the size they are asked for"
            )
        grid = (frames, *self.small)
        return self.backbone.sizes.pictures(latents, self.backbone.patches, self.patch, grid)

    def packed(self, pictures: Tensor, like: Tensor) -> Tensor:
        """Whole latents ``(B, ..., H, W)`` as the pipeline takes them.

        Args:
            like: smaller latents of its loop.
        """
        packed = self.backbone.sizes.packed(pictures, like, self.backbone.patches, self.patch)
        if self.backbone.model_class in TOKEN_MAPS:
            packed = packed.transpose(1, 2).unflatten(2, self.grid)
        return packed.to(like.dtype)

    def noise(self, like: Tensor, call: Mapping[str, Any]) -> Tensor:
        """New noise ``(B, ..., H, W)`` in single precision, of the seeds of a call.

        Args:
            like: pictures of the smaller latents.
        """
        shape = (*like.shape[:-2], *self.sides)
        generator = call.get("generator")
        return randn_tensor(shape, generator=generator, device=like.device, dtype=torch.float32)


def check_pipeline(pipe: Any) -> None:
    """Refuse pipelines whose runs cannot be made of pieces.

    Raises:
        ValueError: an argument is missing, it has no transformer or starts in mid-run, or its
            scheduler has no noise levels to choose among.
    """
    name, names = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    missing = [each for each in ASKED if each not in names]
    if missing or "strength" in names or not transformers(pipe):
        raise ValueError(
            f"{name} has no {', '.join(missing) or 'run from pure noise'}; legal: a pipeline of a "
            f"transformer that starts from noise and takes {', '.join(ASKED)}"
        )
    check_scheduler(pipe.scheduler)


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse arguments of a pipeline that do not go with a run of pieces.

    Raises:
        ValueError: naming the argument.
    """
    for name in OURS:
        if call.get(name) is not None:
            raise ValueError(f"{name} is given; legal: not here, each stage has its own")
    names = inspect.signature(type(pipe).__call__).parameters
    if "max_area" in names:
        raise ValueError(
            f"{type(pipe).__name__} makes all pictures of one area; legal: a pipeline of any size"
        )
    binning = names.get("use_resolution_binning")
    if binning is not None and call.get("use_resolution_binning", binning.default):
        raise ValueError("use_resolution_binning = True changes the size; legal: False")


def seeded(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose ``seeds`` are generators, whose state the next stage goes on from."""
    call = dict(call)
    seeds = call.pop("seeds", None)
    if seeds is not None:
        require(call.get("generator") is None, "seeds", seeds, "seeds or generator, not both")
        call["generator"] = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    return call


def _pixels(pipe: Any) -> int:
    """Pixels along each side of a latent's number.

    Raises:
        ValueError: the pipeline has an autoencoder, and does not tell.
    """
    found = [getattr(pipe, name) for name in PIXELS_PER_NUMBER if hasattr(pipe, name)]
    if not found and "vae" in pipe.components:
        raise ValueError(
            f"{type(pipe).__name__} does not tell its pixels per number of a latent; legal: one "
            f"that has {', '.join(PIXELS_PER_NUMBER)}"
        )
    return int(found[0]) if found else 1
