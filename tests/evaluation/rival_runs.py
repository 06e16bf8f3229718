"""Pipelines that the rivals are tried on, and how a case's own call is handed to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tests.backbones.pipes import EMBEDDED, PIPES, PROMPTS, SEEDS, PipeCase
from torch import Tensor

from ditdial.evaluation.rivals import Rival

REFUSED = {
    "dit": "DiTPipeline has no latents, height, width; legal",
    "pixart-sigma": "scheduler DDIMScheduler; legal",
    "latte": "scheduler DDIMScheduler; legal",
    "cogvideox-2b": "scheduler CogVideoXDDIMScheduler; legal",
    "cogvideox-5b": "scheduler CogVideoXDPMScheduler; legal",
    "ltx-condition": "LTXConditionPipeline has no run from pure noise; legal",
}
SIZES = {"ltx": {"height": 64, "width": 128}}  # the pipeline asks for multiples of 32
ALL = PIPES | EMBEDDED
FITTING = [name for name in ALL if name not in REFUSED]


@dataclass(frozen=True)
class Through:
    """What a case calls in place of its pipeline."""

    pipe: Any
    rival: Rival

    def __call__(self, *prompts: Any, num_inference_steps: int, **call: Any) -> Any:
        asked = {"prompt": prompts[0]} if prompts else {}
        return self.rival.draw(self.pipe, **asked, **call)


def first_order(name: str) -> Any:
    """The pipeline of a case, with a solver that keeps no history."""
    pipe = ALL[name].pipe()
    if name.startswith("wan"):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif name == "pixart-alpha":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=1)
    return pipe


def draw(
    name: str,
    pipe: Any,
    rival: Rival,
    prompts: Sequence[str] = PROMPTS[:1],
    seeds: Sequence[int] = SEEDS,
    **changes: Any,
) -> Tensor:
    """A rival's latents of a case."""
    case: PipeCase = ALL[name]
    return case.draw(Through(pipe, rival), prompts, seeds, **{**SIZES.get(name, {}), **changes})


def stock(name: str, pipe: Any, steps: int, **changes: Any) -> Tensor:
    """The pipeline's own."""
    size = {**SIZES.get(name, {}), **changes}
    return ALL[name].draw(pipe, num_inference_steps=steps, **size)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
