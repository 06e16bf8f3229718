"""Pictures to start from, and the runs that start from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.backbones.pipes import PipeCase
from torch import Tensor


def noise(seed: int) -> torch.Generator:
    """A generator of its own for one picture's noise."""
    return torch.Generator().manual_seed(seed)


def picture(side: int = 16, width: int | None = None) -> Tensor:
    """One picture ``(1, 3, H, W)`` in [0, 1], the same each time."""
    return torch.rand(1, 3, side, width or side, generator=noise(0))


def quiet(pipe: Any) -> Any:
    """The pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_picture(
    case: PipeCase,
    pipe: Any,
    prompts: Sequence[str] = ("red cat",),
    seeds: Sequence[int] = (1,),
    **changes: Any,
) -> Tensor:
    """Latents of an image-to-image run, one picture to start from for each prompt."""
    arguments = {
        "image": picture().expand(len(prompts), -1, -1, -1),
        "strength": 1.0,
        "num_inference_steps": 4,
        "output_type": case.latent,
        "generator": [noise(seed) for seed in seeds],
        **case.size,
        **changes,
    }
    return pipe(list(prompts), **arguments).images
