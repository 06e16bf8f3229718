"""A piece of a run, of any pipeline: some of the noise levels, at another size.

Methods that change the run itself are made of such pieces. A piece is run by a copy of the
pipeline's scheduler, without history, that stands in its place for one call and keeps a part of
whatever timesteps the pipeline asks it for. The pipeline's shift of these by the number of tokens,
its guidance and its callbacks stay in force.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditdial.host.parametrization import Parametrization, is_flow_scheduler, parametrization


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


def check_scheduler(scheduler: Any) -> None:
    """Refuse schedulers that have no noise levels to choose among.

    Raises:
        ValueError: naming the class.
    """
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
