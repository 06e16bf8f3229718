"""Who chooses the modes of a run: a schedule, a controller, or a budget that makes one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ditdial.plan.budget import Budget
from ditdial.plan.calibration import Calibration
from ditdial.plan.controller import Controller, Facts, Run
from ditdial.plan.mode import Mode
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
        allowed: share of the full FLOPs that the present run was planned for, if it has a budget.
        run: what the controller is at work on in the present run; the schedule of a run whose
            choices were made before it.
    """

    modes: tuple[Mode, ...]
    schedule: Schedule = field(default_factory=Schedule.constant)
    controller: Controller | None = None
    budget: float | Budget | None = None
    calibration: Calibration | None = None
    forced: Mode | None = None
    allowed: float | None = None
    run: Run | Schedule | None = None

    def use(self, choice: Schedule | Controller | None) -> None:
        """Leave the next runs to a schedule or a controller; None: to the schedule as it is.

        A budget that was set before is given up with the controller that it was spent by.
        """
        if isinstance(choice, Schedule):
            self.schedule, choice = choice, None
        self.controller, self.budget = choice, None

    def begin_run(self) -> None:
        """Forget the run before."""
        self.run, self.allowed = None, self.share

    @property
    def share(self) -> float | None:
        """The budget of the next runs as a share of the full FLOPs; None for another or none."""
        if self.budget is None:
            return None
        budget = self.budget if isinstance(self.budget, Budget) else Budget(self.budget)
        return budget.share if budget.currency == "flops" else None

    @property
    def learns(self) -> bool:
        """Whether the present run wants to see the clean latents that are predicted."""
        return isinstance(self.run, Run) and self.run.learns

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

    def decide(
        self, level: float, facts: Callable[[], Facts], latents: Callable[[], Tensor]
    ) -> list[Group]:
        """How the pictures of a step run, by the schedule or as a controller sees their latents.

        Args:
            level: noise level of the call.
            facts: of the run, asked for at its first call.
            latents: of the conditional rows, as `Run.decide` takes them; cut only if a controller
                looks at them.

        Returns:
            One group where all pictures run alike, else one for each choice.
        """
        if self.controller is None:
            return [Group(self.schedule.at(level))]
        if self.run is None:
            self.run = self.controller.begin(facts())
        if isinstance(self.run, Schedule):
            self.schedule = self.run
            return [Group(self.schedule.at(level))]
        return grouped(self.run.decide(level, latents()))

    def learn(self, level: float, clean: Tensor) -> None:
        """Show the present run the clean latents that the conditional branch predicted."""
        assert isinstance(self.run, Run)
        self.run.learn(level, clean)

    def changes_between(self, low: float, high: float) -> bool:
        """Whether two noise levels of one call may want different modes.

        Rows of one call share a forward pass, so that a batch whose rows lie on both sides of a
        segment's edge cannot be run (`ditdial.runtime.engine.Engine.run` refuses it).
        """
        if low == high:
            return False
        return self.controller is not None or self.schedule.at(low) is not self.schedule.at(high)
