"""Plans: a schedule bound to the timesteps of one run, with its cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule, Segment


def _prompts(segment: Segment, *, guided: bool, together: bool) -> list[tuple[str, ...]]:
    """The prompts of a step's model calls, each with all that are in its batch."""
    own, null = "prompt", "null"
    if not guided:
        return [(own,)]
    if together and segment.guide_mode == segment.mode and segment.gain == 1:
        return [(own, null)]
    return [(own,), (own if segment.weak_guidance else null,)]


@dataclass(frozen=True, kw_only=True)
class PlanStep:
    """One model call of a run, before it is made.

    Args:
        level: noise level in [0, 1].
        guide: mode of the guidance branch, None where it is left out.
        macs: multiply-adds of the call for one picture, all branches.
    """

    index: int
    level: float
    mode: Mode
    guide: Mode | None
    macs: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule bound to the timesteps of one run; its cost is known before anything runs.

    Args:
        full_macs: multiply-adds of the same run, with the same guidance, all in full mode.
        budget: the share of them that the run is allowed, if it was planned for one.
    """

    steps: tuple[PlanStep, ...]
    full_macs: float
    schedule: Schedule = field(repr=False)
    budget: float | None = None

    @classmethod
    def bind(
        cls,
        schedule: Schedule,
        levels: Sequence[float],
        macs: Callable[[Mode, float], float],
        *,
        guidance: bool,
        packed: bool = False,
        kept: float = 0.0,
        together: bool = False,
        budget: float | None = None,
    ) -> Plan:
        """Bind a schedule to the noise levels of a run's model calls.

        Args:
            macs: multiply-adds of one forward pass of one picture in a mode at a noise level.
            guidance: whether the run has a guidance branch.
            packed: whether branches of different modes share one call, which keeps no text.
            kept: what a branch saves whose prompt was seen before, where text layers are kept.
            together: whether branches of the same mode share one call.
            budget: the share of the full cost that the run is allowed.

        Raises:
            ValueError: no timesteps.
        """
        if not len(levels):
            raise ValueError("a plan needs at least one timestep")
        steps, seen = [], set()
        for index, level in enumerate(levels):
            segment = schedule.at(level)
            guide = segment.guide_mode if guidance and segment.gain > 0 else None
            branches = [segment.mode] if guide is None else [segment.mode, guide]
            cost = sum(macs(mode, level) for mode in branches)
            if not packed or guide in (None, segment.mode):
                for prompt in _prompts(segment, guided=guide is not None, together=together):
                    cost -= kept * len(prompt) * (prompt in seen)
                    seen.add(prompt)
            steps.append(
                PlanStep(index=index, level=level, mode=segment.mode, guide=guide, macs=cost)
            )
        full = sum(macs(FULL, level) for level in levels) * (2 if guidance else 1)
        return cls(steps=tuple(steps), full_macs=full, schedule=schedule, budget=budget)

    @property
    def macs(self) -> float:
        """Multiply-adds of the whole run for one picture."""
        return sum(step.macs for step in self.steps)

    @property
    def ratio(self) -> float:
        """Cost over the cost of the same run in full mode."""
        return self.macs / self.full_macs
