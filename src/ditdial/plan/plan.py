"""Plans: a schedule bound to the timesteps of one run, with its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ditdial.plain import figures, json_files
from ditdial.plain.tables import Table
from ditdial.plan.choice import Choice
from ditdial.plan.facts import Facts
from ditdial.plan.mode import Mode
from ditdial.plan.report import CACHES
from ditdial.plan.schedule import Schedule, Segment


def _prompts(segment: Segment, *, guided: bool, together: bool) -> list[tuple[str, ...]]:
    """The prompts of a step's model calls, each with all that are in its batch."""
    own, null = "prompt", "null"
    if not guided:
        return [(own,)]
    if together and segment.guide_mode == segment.mode and segment.gain == 1:
        return [(own, null)]
    return [(own,), (own if segment.weak_guidance else null,)]


RULE = "chosen by a rule, not by measured errors; handle.calibrate(...) measures them"

SHOWN = 9
"""Costs that a plan lists in its table."""

MOST_STEPS = 10_000
"""Of one run; the schedulers of diffusers know a thousand timesteps."""


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
        guidance: whether the run is taken to have a guidance branch; None where that is not told.
        grid: base tokens ``(frames, height, width)`` that the costs are of.
        text_tokens: text tokens of one prompt that the costs are of, or of the prompt and of the
            guidance branch's.
        step_cache: whether a step cache is on the model; what it will skip is not known, and
            counted as if it ran.
        budgets: shares of the full cost that budgets of such a run buy, the dearest first, where
            its steps are few.
        by_rule: whether a rule chose the modes, nothing being measured of this model.
    """

    steps: tuple[PlanStep, ...]
    full_macs: float
    schedule: Schedule = field(repr=False)
    budget: float | None = None
    guidance: bool | None = None
    grid: tuple[int, int, int] | None = None
    text_tokens: int | tuple[int, int] | None = None
    step_cache: bool = False
    budgets: tuple[float, ...] = ()
    by_rule: bool = False

    @classmethod
    def bind(
        cls,
        schedule: Schedule,
        levels: Sequence[float],
        macs: Callable[[Mode, float | None], float],
        *,
        guidance: bool,
        **facts: Any,
    ) -> Plan:
        """Bind a schedule to the noise levels of a run's model calls.

        Args:
            macs: multiply-adds of one forward pass of one picture in a mode at a noise level.
            guidance: whether the run has a guidance branch.
            facts: as `of` takes them.

        Raises:
            ValueError: no timesteps.
        """
        return cls.of(schedule, Facts(levels=tuple(levels), macs=macs, guided=guidance), **facts)

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        run: Facts,
        *,
        packed: bool = False,
        kept: float = 0.0,
        together: bool = False,
        budget: float | None = None,
        grid: tuple[int, int, int] | None = None,
        text_tokens: int | tuple[int, int] | None = None,
        step_cache: bool = False,
        budgets: tuple[float, ...] = (),
        by_rule: bool = False,
    ) -> Plan:
        """Bind a schedule to a run.

        Args:
            run: its noise levels, its passes and their cost.
            packed: whether branches of different modes share one call, which keeps no text.
            kept: what a branch saves whose prompt was seen before, where text layers are kept.
            together: whether branches of the same mode share one call.
            budget: the share of the full cost that the run is allowed.
            grid, text_tokens: that the costs are of, for the record.
            step_cache, budgets, by_rule: as in the class, for the record.

        Raises:
            ValueError: no timesteps.
        """
        if not run.levels:
            raise ValueError("a plan needs at least one timestep")
        steps, seen = [], set()
        for index, level in enumerate(run.levels):
            segment = schedule.at(level)
            guide = segment.guide_mode if run.at(level).guided and segment.gain > 0 else None
            cost = run.cost(segment, level)
            if not packed or guide in (None, segment.mode):
                for prompt in _prompts(segment, guided=guide is not None, together=together):
                    cost -= kept * len(prompt) * (prompt in seen)
                    seen.add(prompt)
            steps.append(
                PlanStep(index=index, level=level, mode=segment.mode, guide=guide, macs=cost)
            )
        return cls(
            steps=tuple(steps),
            full_macs=sum(run.cost(Choice(), level) for level in run.levels),
            schedule=schedule,
            budget=budget,
            guidance=run.guided,
            grid=grid,
            text_tokens=text_tokens,
            step_cache=step_cache,
            budgets=budgets,
            by_rule=by_rule,
        )

    @property
    def macs(self) -> float:
        """Multiply-adds of the whole run for one picture."""
        return sum(step.macs for step in self.steps)

    @property
    def ratio(self) -> float:
        """Cost over the cost of the same run in full mode."""
        return self.macs / self.full_macs

    def to_dict(self) -> dict[str, Any]:
        """Plain data: totals, what was assumed, one row per step, and the schedule."""
        steps = [
            {
                "index": step.index,
                "level": step.level,
                "mode": step.mode.name,
                "guide": None if step.guide is None else step.guide.name,
                "macs": step.macs,
            }
            for step in self.steps
        ]
        totals = {"macs": self.macs, "full_macs": self.full_macs, "ratio": self.ratio}
        assumed = {
            "guidance": self.guidance,
            "grid": None if self.grid is None else list(self.grid),
            "text_tokens": self.text_tokens,
            "step_cache": self.step_cache,
            "budgets": list(self.budgets),
            "by_rule": self.by_rule,
        }
        schedule = self.schedule.to_dict()
        return {**totals, "budget": self.budget, **assumed, "steps": steps, "schedule": schedule}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json_files.dumps(self.to_dict())

    @property
    def table(self) -> Table:
        """A row for each step; the total, and what was assumed, below."""
        full = self.full_macs / len(self.steps)
        rows = [
            (
                str(step.index),
                f"{step.level:.3f}",
                step.mode.name,
                "-" if step.guide is None else step.guide.name,
                figures.macs(step.macs),
                figures.share(step.macs / full),
            )
            for step in self.steps
        ]
        asked = "" if self.budget is None else f" (of {figures.share(self.budget)} allowed)"
        total = (
            f"{figures.share(self.ratio)} of the full cost{asked}, {figures.macs(self.macs)} for "
            "one picture"
        )
        notes = (*(RULE,) * self.by_rule, *(CACHES,) * self.step_cache)
        below = (total, self._assumed(), *self._offered(), *notes)
        headings = ("step", "level", "mode", "guide", "MACs", "of full")
        return Table(headings=headings, rows=rows, below=below, least=(4, 6, 8, 8, 12, 8))

    def _offered(self) -> Iterator[str]:
        """What budgets of so few steps buy."""
        if len(self.budgets) > SHOWN:
            least, most = (figures.share(each) for each in (self.budgets[-1], self.budgets[0]))
            yield f"budgets of so few steps buy {len(self.budgets)} costs, {least} to {most}"
        elif self.budgets:
            yield f"budgets of so few steps buy {', '.join(map(figures.share, self.budgets))}"

    def _assumed(self) -> str:
        """What the costs are of, as far as that is told."""
        facts = [f"{len(self.steps)} steps"]
        if self.guidance is not None:
            facts.append("with guidance" if self.guidance else "without guidance")
        if self.grid is not None:
            facts.append(f"{' x '.join(map(str, self.grid))} base tokens")
        if self.text_tokens is not None:
            told = self.text_tokens if isinstance(self.text_tokens, int) else max(self.text_tokens)
            facts.append(f"{told} text tokens")
        return f"for {', '.join(facts)}"

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table.html()
