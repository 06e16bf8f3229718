"""Measure one schedule against full mode with the same seeds, in one interleaved run."""

from __future__ import annotations

from typing import Any

import torch

from ditdial.evaluation.runner import Judge, as_row
from ditdial.handle import Handle
from ditdial.plan.schedule import Schedule
from ditdial.sampling.batches import cyclic_labels, sample
from ditdial.sampling.pixel_pipeline import PixelDiTPipeline


def measure(
    pipe: PixelDiTPipeline,
    handle: Handle,
    judge: Judge,
    schedule: Schedule,
    *,
    scale: float,
    steps: int,
    images: int = 1000,
    sets: int = 4,
    first_seed: int = 0,
    batch_size: int = 100,
    compare: bool = True,
) -> dict[str, Any]:
    """One row of results.

    Args:
        scale: the pipeline's guidance scale; the full run that is compared with uses it too.
        compare: also run full mode with the same seeds, batch by batch in turn, for PSNR, SSIM and
            the time ratio.

    Returns:
        Facts, ``ratio`` (FLOPs over full), ``seconds``, ``time_ratio``, and each metric with its
        noise.
    """
    labels = cyclic_labels(images, pipe.transformer.config.num_embeds_ada_norm)
    seeds = list(range(first_seed, first_seed + images))
    schedules = {"row": schedule, "full": Schedule.constant()} if compare else {"row": schedule}
    pictures: dict[str, list[torch.Tensor]] = {name: [] for name in schedules}
    seconds = dict.fromkeys(schedules, 0.0)
    plan = None
    for start in range(0, images, batch_size):
        part = slice(start, start + batch_size)
        for name, chosen in schedules.items():
            handle.schedule = chosen
            if name == "row":
                plan = handle.plan(steps, guidance=scale != 1)
            drawn = sample(
                pipe,
                labels[part],
                seeds[part],
                guidance_scale=scale,
                steps=steps,
                batch_size=batch_size,
            )
            pictures[name].append(drawn.images)
            seconds[name] += drawn.seconds
    assert plan is not None
    full = torch.cat(pictures["full"]) if compare else None
    figures = judge.judge(torch.cat(pictures["row"]), labels, sets=sets, full=full)
    return as_row(
        figures,
        scale=scale,
        steps=steps,
        images=images,
        sets=sets,
        gmacs=plan.macs / 1e9,
        ratio=plan.ratio,
        seconds=seconds["row"],
        time_ratio=seconds["row"] / seconds["full"] if compare else None,
        schedule=schedule.to_dict(),
    )
