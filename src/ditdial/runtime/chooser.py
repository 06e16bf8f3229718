"""Who chooses the modes of a run: a schedule, a controller, or a budget that makes one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ditdial.plan.budget import Budget
from ditdial.plan.calibration import Calibration
from ditdial.plan.choice import Choice
from ditdial.plan.controller import BudgetController, Controller, Run
from ditdial.plan.facts import Facts, Passes
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.report import CallRecord
from ditdial.plan.schedule import Schedule
from ditdial.runtime.pictures import Group, grouped


@dataclass(eq=False)
class Chooser:
    """Of one elastic model.

    Attributes:
        modes: coarse modes that fit the model.
        schedule: noise level -> mode.
        controller: chooses the modes of each run; None leaves that to the schedule.
        budget: that the controller was made for.
        calibration: what each choice of modes loses at each noise level, if that was measured.
        forced: the mode of all calls, whatever their noise level.
        by_rule: whether the schedule or the budget's plans come of a rule, nothing being measured.
    """

    modes: tuple[Mode, ...]
    schedule: Schedule = field(default_factory=Schedule.constant)
    controller: Controller | None = None
    budget: float | Budget | None = None
    calibration: Calibration | None = None
    forced: Mode | None = None
    by_rule: bool = False

    def use(self, choice: Schedule | Controller | None) -> None:
        """Leave the next runs to a schedule or a controller; None: to the schedule as it is.

        A budget that was set before is given up with the controller that it was spent by.
        """
        if isinstance(choice, Schedule):
            self.schedule, choice = choice, None
        self.controller, self.budget, self.by_rule = choice, None, False

    def begin(self) -> Choosing:
        """For a run that is about to begin."""
        return Choosing(self, self.share)

    @property
    def share(self) -> float | None:
        """The budget of the next runs as a share of the full FLOPs; None for another or none."""
        if self.budget is None:
            return None
        budget = self.budget if isinstance(self.budget, Budget) else Budget(self.budget)
        return budget.share if budget.currency == "flops" else None

    @property
    def only_mode(self) -> Mode | None:
        """The mode of every row of every call, where there is just one."""
        if self.forced is not None:
            return self.forced
        segments = self.schedule.segments
        mode = segments[0].mode
        alike = all(s.modes == {mode} and s.gain == 1 for s in segments)
        return mode if alike and self.controller is None else None

    def is_alone(self, mode: Mode) -> bool:
        """Whether no other mode comes in the same run.

        Then a step cache may keep one state for the run, as it does on the stock model.
        """
        return (self.forced, self.controller) == (None, None) and self.schedule.modes == {mode}

    def planned(self, facts: Facts) -> Schedule:
        """The schedule of a run, before it is made.

        Raises:
            ValueError: a controller that chooses while sampling.
        """
        if self.controller is None:
            return self.schedule
        begun = self.controller.begin(facts)
        if isinstance(begun, Schedule):
            return begun
        raise ValueError(
            f"{type(self.controller).__name__} chooses while sampling, so there is no plan; legal: "
            "a schedule or a budget (its cap bounds the cost, and the report tells it)"
        )

    def changes_between(self, low: float, high: float) -> bool:
        """Whether two noise levels of one call may want different modes.

        Rows of one call share a forward pass, so that a batch whose rows lie on both sides of a
        segment's edge cannot be run (`ditdial.runtime.engine.Engine.run` refuses it).
        """
        if low == high:
            return False
        return self.controller is not None or self.schedule.at(low) is not self.schedule.at(high)


@dataclass(eq=False)
class Choosing:
    """How the modes of one run are chosen.

    Args:
        chooser: of the model.
        allowed: share of the full FLOPs that the run may take, if it has a budget.

    Attributes:
        at_work: what the controller does in this run; the schedule of a run whose choices were made
            before it.
        facts: of the run, as its schedule takes them to be.
        known: level at which calls were counted last, and the passes that were counted by then.
        guide_macs: of a guidance branch that was called by itself; its prompt may have a length of
            its own.
    """

    chooser: Chooser
    allowed: float | None = None
    at_work: Run | Schedule | None = None
    facts: Facts | None = None
    known: tuple[float, int] | None = None
    guide_macs: Callable[[Mode, float | None], float] | None = None

    @property
    def learns(self) -> bool:
        """Whether the run wants to see the clean latents that are predicted."""
        return isinstance(self.at_work, Run) and self.at_work.learns

    def learn(self, level: float, clean: Tensor) -> None:
        """Show the run the clean latents that the conditional branch predicted."""
        assert isinstance(self.at_work, Run)
        self.at_work.learn(level, clean)

    def begin(self, facts: Callable[[], Facts]) -> Schedule | None:
        """What is chosen before the first call: the schedule, unless latents are looked at.

        Args:
            facts: of the run, asked for only by a controller.
        """
        if self.chooser.controller is None:
            return self.chooser.schedule
        if self.at_work is None:
            self.facts = facts()
            self.at_work = self.chooser.controller.begin(self.facts)
            if isinstance(self.at_work, Schedule):
                self.chooser.schedule = self.at_work  # the one to see when the run is over
        return self.at_work if isinstance(self.at_work, Schedule) else None

    def decide(
        self, level: float, latents: Callable[[], Tensor], calls: Sequence[CallRecord]
    ) -> list[Group]:
        """How the pictures of a step run, by the schedule or as a controller sees their latents.

        Args:
            level: noise level of the call.
            latents: of the conditional rows, as `Run.decide` takes them; cut only if a controller
                looks at them.
            calls: of the run so far.

        Returns:
            One group where all pictures run alike, else one for each choice.
        """
        if self.chooser.controller is None:
            return [Group(self.chooser.schedule.at(level))]
        if isinstance(self.at_work, Run):
            return grouped(self.at_work.decide(level, latents()))
        self._keep_within_budget(level, calls)
        assert isinstance(self.at_work, Schedule)
        return [Group(self.at_work.at(level))]

    def _keep_within_budget(self, level: float, calls: Sequence[CallRecord]) -> None:
        """Plan the steps from here on anew, if those before took another effort than planned.

        A callback may have turned guidance off, a pipeline made calls that nobody told of, or the
        guidance branch another length of text.
        """
        facts, controller = self.facts, self.chooser.controller
        if self.allowed is None or facts is None or level not in facts.levels:
            return
        if not isinstance(controller, BudgetController) or not calls or level == calls[-1].level:
            return
        done, counted = facts.levels.index(level), sum(call.passes for call in calls)
        since, before = self.known or (facts.levels[0], 0)
        planned = facts.levels[facts.levels.index(since) : done]
        self.known = level, counted
        guide, guided = self.guide_macs or facts.macs, facts.guide_macs or facts.macs
        as_planned = counted - before == sum(facts.at(each).count for each in planned)
        if as_planned and guide(FULL, None) == guided(FULL, None):
            return
        last = Passes.of(sum(call.passes for call in calls if call.level == calls[-1].level))
        rest = facts.levels[done:]
        passes = {each: facts.passes.get(each, last) for each in rest}
        self.facts = facts = replace(
            facts, levels=rest, passes=passes, guide_macs=guide, guidance_scale=None
        )
        spent, full = (
            sum(getattr(call, name) / call.count for call in calls)
            for name in ("macs", "full_macs")
        )
        ahead = sum(facts.cost(Choice(), each) for each in rest)
        share = (self.allowed * (full + ahead) - spent) / ahead
        share = min(max(share, controller.least(facts)), 1.0)
        self.at_work = controller.within(share).begin(facts)
