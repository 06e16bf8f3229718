"""What a pipeline tells the model of time, and its scheduler of steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from elastic_dit.backbones.call import Call
from elastic_dit.ops.patching import Triple


class Times:
    """The part of a backbone that turns times into noise levels, and a number of steps into times.

    Attributes:
        time: argument of the call that holds the latent's time.
        time_scale: time of pure noise, as the model is given it.
        own_sigmas: whether the pipeline gives its scheduler `sigmas`.
    """

    time: str = "timestep"
    time_scale: float = 1000.0
    own_sigmas: bool = False

    def levels(self, call: Call) -> tuple[float, float]:
        """Lowest and highest noise level in [0, 1] of the rows of a call.

        Raises:
            ValueError: the call gives no time.
        """
        time = call.get(self.time)
        if time is None:
            raise ValueError(
                f"{self.time} = None; an elastic model chooses its mode by the timestep, so give "
                "one"
            )
        time = torch.as_tensor(time).detach()
        if time.ndim > 1:  # one per token: first frames that are given have no noise
            time = time.flatten(1).amax(dim=1)
        times = time.reshape(-1).tolist()
        ends = [self.level_of(time) for time in (min(times), max(times))]
        return min(ends), max(ends)

    def level_of(self, time: float) -> float:
        """Noise level in [0, 1] of the time the model is given."""
        return time / self.time_scale

    def set_timesteps(self, scheduler: Any, steps: int, grid: Triple, pipe: Any) -> None:
        """Timesteps of a run of a latent with this base grid, as a pipeline of the class asks."""
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
