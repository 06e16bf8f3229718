"""Sample many pictures, each from its own seed, on any number of processes.

The picture of a seed does not depend on the batch or the process it is made in, up to the rounding
of matrix products of different batch sizes (1e-4 of the pixel range in float32).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ditdial.sampling.pixel_pipeline import PixelDiTPipeline


@dataclass(frozen=True)
class Samples:
    """Pictures ``(n, C, H, W)`` in [0, 1] on the CPU, and the seconds of this process's share."""

    images: Tensor
    seconds: float


def sample(
    pipe: PixelDiTPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    guidance_scale: float = 2.0,
    steps: int = 25,
    batch_size: int = 64,
) -> Samples:
    """One picture per label and seed.

    Under `torch.distributed` every process makes its share and all get all pictures, in order.

    Raises:
        ValueError: not one seed per label, no labels, or a batch size below 1.
    """
    if not len(labels) or len(labels) != len(seeds):
        raise ValueError(
            f"{len(labels)} labels and {len(seeds)} seeds; legal: as many, at least one"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}; legal: >= 1")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(labels), world)
    pipe.set_progress_bar_config(disable=True)
    pieces, started = [], time.perf_counter()
    for start in range(0, len(mine), batch_size):
        chosen = mine[start : start + batch_size]
        (images,) = pipe(
            [labels[i] for i in chosen],
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            seeds=[seeds[i] for i in chosen],
            output_type="pt",
            return_dict=False,
        )
        pieces.append(images.float().cpu())
    seconds = time.perf_counter() - started
    if world == 1:
        return Samples(torch.cat(pieces), seconds)
    config = pipe.transformer.config
    none = torch.empty((0, config.in_channels, config.sample_size, config.sample_size))
    return Samples(_gathered(torch.cat([none, *pieces]), len(labels), world), seconds)


def _gathered(own: Tensor, count: int, world: int) -> Tensor:
    """All processes' pictures, in the order of their seeds; a process may have made none."""
    gathered: list[Tensor] = [own] * world
    dist.all_gather_object(gathered, own)
    images = torch.empty((count, *own.shape[1:]))
    for process, part in enumerate(gathered):
        images[process::world] = part
    return images


def cyclic_labels(count: int, classes: int) -> list[int]:
    """Labels 0, 1, ..., classes - 1, 0, 1, ...: every stretch is balanced."""
    return [i % classes for i in range(count)]
