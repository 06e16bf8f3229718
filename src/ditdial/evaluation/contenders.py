"""Several schedules in one run: the same pictures, batch by batch in turn.

A busy machine is so unfair to none of them, and their seconds can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditdial.handle import Handle
from ditdial.plain.checks import whole
from ditdial.plan.plan import Plan
from ditdial.plan.schedule import Schedule
from ditdial.sampling.batches import cyclic_labels, sample
from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

MOST_PICTURES = 1_000_000
"""Of one run; all of them are in memory at its end."""


@dataclass(frozen=True)
class Pictures:
    """What all contenders draw: a label and a seed for each picture."""

    labels: list[int]
    seeds: list[int]

    @classmethod
    def counted(cls, pipe: PixelDiTPipeline, count: int, first_seed: int) -> Pictures:
        """Seeds that count up, and the pipeline's classes in turn.

        Raises:
            ValueError: no pictures, or more than `MOST_PICTURES`.
        """
        whole("images", count, 1, MOST_PICTURES)
        classes = pipe.transformer.config.num_embeds_ada_norm
        return cls(cyclic_labels(count, classes), list(range(first_seed, first_seed + count)))


@dataclass
class Contender:
    """One of the schedules, and what came of it.

    Args:
        schedule: that it runs with.
        scale: the pipeline's guidance scale; 1 turns guidance off.
        seconds: that its pictures have taken so far.
        ratio: share of the full cost that its last batch took, by the handle's report.
    """

    schedule: Schedule
    scale: float
    seconds: float = 0.0
    ratio: float = 0.0
    _plan: Plan | None = None
    _batches: list[Tensor] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        """Of its runs; there is one once it has drawn."""
        assert self._plan is not None
        return self._plan

    @property
    def levels(self) -> list[float]:
        """Noise levels of the first and the last step of its runs, for the record."""
        steps = self.plan.steps
        return [round(steps[0].level, 4), round(steps[-1].level, 4)]

    @property
    def images(self) -> Tensor:
        """All its pictures ``(n, C, H, W)`` in [0, 1], in the order of their seeds."""
        return torch.cat(self._batches)

    def draw(
        self,
        pipe: PixelDiTPipeline,
        handle: Handle,
        labels: list[int],
        seeds: list[int],
        steps: int,
    ) -> None:
        """Sample one batch."""
        handle.schedule = self.schedule
        self._plan = handle.plan(steps, guidance=self.scale != 1)
        drawn = sample(
            pipe,
            labels,
            seeds,
            guidance_scale=self.scale,
            steps=steps,
            batch_size=len(seeds),
        )
        self._batches.append(drawn.images)
        self.seconds += drawn.seconds
        self.ratio = handle.report().ratio


def draw_in_turn(
    pipe: PixelDiTPipeline,
    handle: Handle,
    contenders: Sequence[Contender],
    pictures: Pictures,
    *,
    steps: int,
    batch_size: int,
) -> None:
    """Let each contender draw the first batch, then each the second, and so on.

    Args:
        handle: of the pipeline; its schedule is left at the last contender's.
        contenders: collect their pictures and seconds.
        steps: sampling steps of all.
    """
    for start in range(0, len(pictures.seeds), batch_size):
        part = slice(start, start + batch_size)
        for contender in contenders:
            contender.draw(pipe, handle, pictures.labels[part], pictures.seeds[part], steps)
