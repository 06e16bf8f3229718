"""Measure one schedule against full mode with the same seeds, in one interleaved run."""

from __future__ import annotations

from typing import Any

from ditdial.evaluation.contenders import MOST_PICTURES, Contender, Pictures, draw_in_turn
from ditdial.evaluation.runner import Judge, as_row
from ditdial.handle import Handle
from ditdial.plain.checks import whole
from ditdial.plan.schedule import Schedule
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
        Facts, among them the first and the last of the ``levels``, ``ratio`` (FLOPs over full),
        ``seconds``, ``time_ratio``, and each metric with its noise.

    Raises:
        ValueError: fewer than two pictures for each set, or other numbers out of range.
    """
    whole("images", images, 2, MOST_PICTURES)
    whole("sets", sets, 1, images // 2)
    own, full = Contender(schedule, scale), Contender(Schedule.constant(), scale)
    contenders = [own, full] if compare else [own]
    pictures = Pictures.counted(pipe, images, first_seed)
    draw_in_turn(pipe, handle, contenders, pictures, steps=steps, batch_size=batch_size)
    likeness = full.images if compare else None
    figures = judge.judge(own.images, pictures.labels, sets=sets, full=likeness)
    plan = own.plan
    return as_row(
        figures,
        scale=scale,
        steps=steps,
        levels=own.levels,
        images=images,
        sets=sets,
        gmacs=plan.macs / 1e9,
        ratio=plan.ratio,
        seconds=own.seconds,
        time_ratio=own.seconds / full.seconds if compare else None,
        schedule=schedule.to_dict(),
    )
