"""What a pipeline tells the model of time, and its scheduler of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditdial.backbones.arguments import Call
from ditdial.ops.patching import Triple


@dataclass(frozen=True, kw_only=True)
class Times:
    """How a model class is told the time: as noise levels, and what a number of steps becomes.

    Args:
        argument: of the call, which holds the latent's time.
        scale: time of pure noise, as the model is given it.
        rises: whether times run from 0, noise, to ``scale``.
        own_sigmas: whether the pipeline gives its scheduler `sigmas`.
        layers: modules that turn a time into sinusoids, and these into the embedding of the time
            alone, before anything of the prompt or the size is added.
        factor: what the model multiplies a time by before that.
    """

    argument: str = "timestep"
    scale: float = 1000.0
    rises: bool = False
    own_sigmas: bool = False
    layers: tuple[str, str] = ("", "")
    factor: float = 1.0

    def levels(self, call: Call) -> tuple[float, float]:
        """Lowest and highest noise level in [0, 1] of the rows of a call.

        Raises:
            ValueError: the call gives no time.
        """
        time = call.get(self.argument)
        if time is None:
            raise ValueError(
                f"{self.argument} = None; an elastic model chooses its mode by the timestep, so "
                "give one"
            )
        time = torch.as_tensor(time).detach()
        if time.ndim > 1:  # one per token: first frames that are given have no noise
            time = time.flatten(1).amax(dim=1)
        times = time.reshape(-1).tolist()
        ends = [self.level_of(time) for time in (min(times), max(times))]
        return min(ends), max(ends)

    def rounding(self, call: Call) -> float:
        """Relative error that the time of a call may have by its dtype.

        FLUX's pipeline casts a time to the latents' dtype and divides it there: each of the two
        errs by half of a dtype's epsilon.
        """
        dtype = torch.as_tensor(call[self.argument]).dtype
        # A time in whole numbers was divided in double precision, levels in single.
        single = 4 * torch.finfo(torch.float32).eps
        return max(torch.finfo(dtype).eps, single) if dtype.is_floating_point else single

    def level_of(self, time: float) -> float:
        """Noise level in [0, 1] of the time the model is given."""
        level = time / self.scale
        return 1 - level if self.rises else level

    def time_of(self, level: float) -> float:
        """The inverse of `level_of`."""
        return (1 - level if self.rises else level) * self.scale

    def told(self, call: Call, level: float, grid: Triple, small: Triple) -> Tensor:
        """The time of a call, of a smaller picture at another noise level.

        Args:
            level: of all its rows.
            grid, small: base grids of the two pictures.

        Raises:
            ValueError: tokens have different times (some frames are given), of which the level is
                that of one.
        """
        time = torch.as_tensor(call[self.argument])
        dtype = time.dtype if time.dtype.is_floating_point else torch.float32
        if time.ndim > 1 and time.shape[1] == math.prod(grid):
            if (time != time.flatten()[0]).any():
                raise ValueError(
                    f"{self.argument} has different times for the tokens of a picture (first "
                    "frames are given); legal with them: modes of the latent's own size"
                )
            time = time[:, : math.prod(small)]
        return torch.full_like(time, self.time_of(level), dtype=dtype)

    def width(self, model: Any) -> int:
        """Width of what `vector` returns.

        Raises:
            ValueError: no embedding of the time alone is known.
        """
        if not self.layers[1]:
            raise ValueError(
                f"no embedding of the time alone is known of {type(model).__name__}; legal: a "
                "class whose backbone names one"
            )
        return model.get_submodule(self.layers[1]).linear_2.out_features

    def vector(self, model: Any, times: Tensor) -> Tensor:
        """Embedding of the time alone, ``(B, D)``, of times ``(B,)`` as the model is given them.

        What routers of the timestep read. Nothing of the prompt, the size or the guidance scale is
        in it, so that it is known for all steps of a run beforehand.
        """
        sinusoids, embedder = (model.get_submodule(name) for name in self.layers)
        weight = embedder.linear_1.weight
        times = times.to(weight.device, torch.float32) * self.factor
        return embedder(sinusoids(times).to(weight.dtype))

    def set_timesteps(self, scheduler: Any, steps: int, grid: Triple, pipe: Any) -> None:
        """Timesteps of a run of a latent with this base grid, as a pipeline of the class asks.

        Args:
            scheduler: is changed; plans give a copy.
            grid: a scheduler with dynamic shifting wants to know the number of base tokens.
            pipe: the pipeline, for what else it tells its scheduler; None for a bare model.
        """
        own = getattr(pipe, "set_timesteps", None)  # no pipeline of diffusers has one
        if own is not None:
            return own(scheduler, steps)
        facts, given = scheduler.config, {}
        if facts.get("use_dynamic_shifting", False):
            given["mu"] = self.shift(facts, math.prod(grid), steps)
        if self.own_sigmas and not facts.get("use_flow_sigmas", False):
            scheduler.set_timesteps(sigmas=self.sigmas(steps), **given)
        else:
            scheduler.set_timesteps(steps, **given)

    def sigmas(self, steps: int) -> Any:
        """Noise levels that a pipeline of a class with `own_sigmas` gives its scheduler."""
        return np.linspace(1.0, 1 / steps, steps)

    def shift(self, scheduler: dict[str, Any], tokens: int, steps: int) -> float:
        """What pipelines give a scheduler with dynamic shifting as ``mu``.

        Args:
            scheduler: its config.
            tokens: base tokens of the picture.
        """
        low = scheduler.get("base_image_seq_len", 256)
        high = scheduler.get("max_image_seq_len", 4096)
        least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        return least + (tokens - low) * (most - least) / (high - low)
