"""A piece of a run, of any pipeline: some of the noise levels, at another size.

Methods that change the run itself are made of such pieces. A piece is run by a copy of the
pipeline's scheduler, without history, that stands in its place for one call and keeps a part of
whatever timesteps the pipeline asks it for. The pipeline's shift of these by the number of tokens,
its guidance and its callbacks stay in force.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditdial.backbones import Backbone, backbone_for
from ditdial.host.parametrization import Parametrization, is_flow_scheduler, parametrization
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
class Piece:
    """A piece of a schedule.

    Its levels lie evenly along the schedule of as many steps as the whole run has: between two
    steps of that, as between two points of a line.

    Args:
        whole: steps of the schedule.
        steps: of the piece.
        start: noise level of its first step; None for that of the schedule.
        stop: noise level where its last step ends; None for that of the schedule after as many
            steps.
    """

    whole: int
    steps: int
    start: float | None = None
    stop: float | None = None

    def cut(self, scheduler: Any) -> list[float]:
        """Keep the piece of a scheduler's timesteps, which are those of the whole run.

        Returns:
            The noise levels where its steps start, and where the last one ends.

        Raises:
            ValueError: it does not start above its end.
        """
        told, sigmas = path_of(scheduler), scheduler.sigmas
        is_flow = told.kind == "flow_prediction"
        scale = scheduler.config.num_train_timesteps
        times = np.append(scheduler.timesteps.double().cpu().numpy(), 0.0)
        known = sigmas.double().cpu().numpy().copy() if is_flow else times / scale
        last, known[-1] = float(sigmas[-1]), 0.0
        places = np.arange(len(known))
        first = 0.0 if self.start is None else np.interp(-self.start, -known, places)
        end = first + self.steps if self.stop is None else np.interp(-self.stop, -known, places)
        at = np.linspace(first, end, self.steps + 1)
        levels = np.interp(at, places, known)
        levels[0] = levels[0] if self.start is None else self.start
        levels[-1] = levels[-1] if self.stop is None else self.stop
        if not (np.diff(levels) < 0).all():
            raise ValueError(
                f"noise levels of {self.steps} steps from {levels[0]:.4g} to {levels[-1]:.4g}; "
                f"legal: falling ones, from at most {known[0]:.4g}"
            )
        found = levels if is_flow else np.array([_ratio(told, level) for level in levels])
        if levels[-1] == 0:
            found = np.append(found[:-1], last)
        # A flow's times are not always its levels: CogView4 shifts these alone.
        kept = np.interp(at, places, times)[:-1] if is_flow else levels[:-1] * scale
        if not scheduler.timesteps.is_floating_point():
            kept = kept.round()
        scheduler.timesteps = torch.from_numpy(kept).to(scheduler.timesteps)
        scheduler.sigmas = torch.from_numpy(found).to(sigmas)
        scheduler.num_inference_steps = self.steps
        return levels.tolist()


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of a piece.

    Attributes:
        output: what the pipeline returned.
        latents: as its last step left them, in the layout of its loop.
        level: their noise level.
    """

    output: Any
    latents: Tensor
    level: float


def run_piece(pipe: Any, piece: Piece, **call: Any) -> Ran:
    """Run a piece of a pipeline's schedule; whatever happens, the pipeline keeps its scheduler.

    Args:
        call: arguments of the pipeline.
    """
    stock = pipe.scheduler
    part = _partial(stock, piece)
    # Past the pipeline's own setter, which writes the class into the config that is saved.
    vars(pipe)["scheduler"] = part
    try:
        output = pipe(num_inference_steps=piece.whole, **call)
    finally:
        vars(pipe)["scheduler"] = stock
    return Ran(output=output, latents=part.piece_left, level=part.piece_levels[-1])


def path_of(scheduler: Any) -> Parametrization:
    """What noise levels mean of the latents that a scheduler is given."""
    return parametrization(SimpleNamespace(scheduler=scheduler))


def _ratio(told: Parametrization, level: float) -> float:
    signal, noise = told.scales(level)
    return noise / signal


def _partial(scheduler: Any, piece: Piece) -> Any:
    """A copy of a scheduler whose runs are a piece of its own."""
    stock: Any = type(scheduler)

    @functools.wraps(stock.set_timesteps)  # pipelines look at which arguments it has
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        stock.set_timesteps(self, *args, **kwargs)
        self.piece_levels = piece.cut(self)

    @functools.wraps(stock.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock.step(self, *args, **kwargs)
        self.piece_left = output[0]  # some pipelines return latents that they do not take
        return output

    # A class, not functions of the copy: pipelines may copy it once more.
    facts = {"set_timesteps": set_timesteps, "step": step, "__module__": stock.__module__}
    part = copy.deepcopy(scheduler)
    part.__class__ = type(stock.__name__, (stock,), facts)
    return part


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
        grid = (latents.shape[1] // math.prod(self.small) if latents.ndim == 3 else 1, *self.small)
        found = self.backbone.sizes.pictures(latents, self.backbone.patches, self.patch, grid)
        sides = (self.small[0] * self.patch[1], self.small[1] * self.patch[2])
        if found.shape[-2:] != sides:
            raise ValueError(
                f"the pipeline made latents of {tuple(found.shape[-2:])} rows and columns where it "
                f"was asked for {sides}; legal: pipelines that keep the size they are asked for"
            )
        return found

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
    scheduler = pipe.scheduler
    facts, path = scheduler.config, getattr(scheduler, "alphas_cumprod", None) is not None
    fits = is_flow_scheduler(scheduler) or (
        path and getattr(scheduler, "init_noise_sigma", None) == 1
    )
    steady = scheduler.order == 1 and not facts.get("invert_sigmas")
    if not (fits and steady and hasattr(scheduler, "sigmas")):
        raise ValueError(
            f"scheduler {type(scheduler).__name__}; legal: one step per noise level and a table of "
            "sigmas, of flow matching (FlowMatchEulerDiscreteScheduler) or of latents of unit "
            "variance (DPMSolverMultistepScheduler)"
        )


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse arguments of a pipeline that do not go with a run of pieces.

    Raises:
        ValueError: naming the argument.
    """
    for name in OURS:
        if call.get(name) is not None:
            raise ValueError(f"{name} is given; legal: not here, each stage has its own")
    binning = inspect.signature(type(pipe).__call__).parameters.get("use_resolution_binning")
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
