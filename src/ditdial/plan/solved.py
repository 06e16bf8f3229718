"""The dial: a budget and a calibration, solved for the noise levels of each run before it starts.

A plan is the best one at the guidance scale that errors were measured at, so that is the scale to
run it at; a run at another one warns. Of the reference model's plan for 30 % of the cost, measured
at a scale of 1.45, the loss in Frechet distance is 0.10 there and 0.41 at 1.3.

The plan is found again for every run, so it costs the same share of 10 steps as of 100 and under
another scheduler, and it is the best plan for just these steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditdial.plain import figures
from ditdial.plain.checks import warn
from ditdial.plain.tables import Table
from ditdial.plan.budget import Budget
from ditdial.plan.calibration import Calibration
from ditdial.plan.choice import Choice
from ditdial.plan.controller import BudgetController
from ditdial.plan.facts import Facts
from ditdial.plan.frontier import CHEAPEST, ROUNDING, Frontier, legal_shares
from ditdial.plan.mode import Mode
from ditdial.plan.schedule import Schedule
from ditdial.plan.seconds import Seconds

USUAL_STEPS = 50
"""Evenly spaced steps to solve for where nobody tells the levels of a run."""

TIE = 1e-6
"""Weight of plain errors beside the damage: they decide at pure noise and data, where it is 0."""


class Offer(NamedTuple):
    """What a budget buys: the share of the full cost, the damage, and the schedule."""

    ratio: float
    damage: float
    schedule: Schedule


class Offers(tuple[Offer, ...]):
    """What several budgets buy, cheapest first."""

    __slots__ = ()

    @property
    def table(self) -> Table:
        """A row for each offer: its cost, its damage, and from which noise level it runs what."""
        rows = []
        for offer in self:
            stretches = [f"{x.start:.3g} {x.name}" for x in offer.schedule.segments]
            rows.append((figures.share(offer.ratio), f"{offer.damage:.3g}", ", ".join(stretches)))
        below = ("what runs: the noise level a stretch begins at, mode/guide",)
        headings = ("cost", "damage", "runs")
        return Table(headings=headings, rows=rows, below=below, least=(8, 10), left=("runs",))

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table.html()


@dataclass(frozen=True, kw_only=True)
class SolvedBudget(BudgetController):
    """Runs every run at the least damage that its budget allows.

    Args:
        seconds: what a step takes on the device of the runs; needed for a budget in seconds.

    Raises:
        ValueError: a budget in seconds without seconds, a criterion that was not measured.
    """

    calibration: Calibration
    budget: Budget
    seconds: Seconds | None = None

    def __post_init__(self) -> None:
        if self.budget.currency == "seconds" and self.seconds is None:
            raise ValueError("seconds = None; legal for a budget in seconds: measured ones")
        self.calibration.damage([0.5], criterion=self.budget.criterion)

    @property
    def modes(self) -> set[Mode]:
        """Of all choices."""
        return self.calibration.modes

    def begin(self, facts: Facts) -> Schedule:
        """The best schedule for the levels of a run.

        All of the budget buys the calibration's first choice throughout: the base's own run, unless
        the calibration is one of weak guidance. Where its reference is another and cheaper, less
        than all buys no more than the reference.

        Raises:
            ValueError: a budget below the cheapest plan.

        Warns:
            UserWarning: the run has another guidance scale than the calibration.
        """
        if self.budget.share == 1:
            return Schedule.throughout(self.calibration.choices[0])
        self._check_scale(facts)
        steps = _Steps(self, facts)
        steps.check(self.budget)
        frontier = steps.frontier(self.budget.share)
        return steps.schedule(frontier.choices(frontier.best(self.budget.share)))

    def least(self, facts: Facts) -> float:
        """Of the cheapest plan."""
        return _Steps(self, facts).least

    def within(self, share: float) -> SolvedBudget:
        """The same with another budget."""
        return replace(self, budget=replace(self.budget, share=share))

    def _check_scale(self, facts: Facts) -> None:
        """Warn of a run whose guidance scale is not the one that errors were measured at."""
        measured, asked = self.calibration.guidance_scale, facts.guidance_scale
        if facts.guided and asked is not None and not math.isclose(asked, measured, rel_tol=1e-6):
            warn(
                f"this run has a guidance scale of {asked:g}, and its budget is spent by errors "
                f"that were measured at {measured:g}; run at that scale "
                "(handle.calibration.guidance_scale), or calibrate at the other one"
            )

    def offers(self, facts: Facts, count: int = 50) -> Offers:
        """The best plans for a run at evenly spaced budgets, cheapest first.

        Args:
            count: of the budgets; fewer offers come back where several budgets buy the same.
        """
        steps = _Steps(self, facts)
        frontier = steps.frontier()
        budgets = np.linspace(frontier.costs[0], frontier.costs[-1], count)
        found = sorted({frontier.best(budget) for budget in budgets})
        plans = {index: frontier.choices(index) for index in found}
        return Offers(
            Offer(float(frontier.costs[i]), steps.damage_of(plan), steps.schedule(plan))
            for i, plan in plans.items()
        )


class _Steps:
    """The steps of one run, as the solver sees them: one for each of its noise levels.

    Steps of the same level (a solver's second look) cannot differ, since schedules speak of levels.
    """

    def __init__(self, controller: SolvedBudget, facts: Facts) -> None:
        calibration, criterion = controller.calibration, controller.budget.criterion
        told = facts.levels or [1 - step / USUAL_STEPS for step in range(USUAL_STEPS)]
        levels, counts = np.unique(np.clip(told, 0, 1), return_counts=True)
        self.levels: list[float] = levels[::-1].tolist()
        guides = np.array([facts.at(level).guided for level in self.levels])
        guided = bool(guides.any())
        self.choices: Sequence[Choice] = calibration.choices
        if not guided:
            self.choices = [Choice(mode=mode) for mode in calibration.conditional]
        self.damage = calibration.damage(self.levels, criterion=criterion, guided=guided)
        errors = calibration.errors(self.levels, guided=guided)
        if guided and not guides.all() and criterion == "path":
            # Steps that a guider leaves out are those of the conditional branch alone.
            own = [calibration.conditional.index(choice.mode) for choice in self.choices]
            alone = calibration.damage(self.levels, guided=False)[:, own]
            self.damage = np.where(guides[:, None], self.damage, alone)
            alone = calibration.errors(self.levels, guided=False)[:, own]
            errors = np.where(guides[:, None], errors, alone)
        self.ordered = self.damage + TIE * errors
        full, seconds = Choice(), controller.seconds
        counts = counts[::-1]
        if controller.budget.currency == "seconds" and seconds is not None:
            rows = np.array([[seconds.of(choice, guided=guided) for choice in self.choices]])
            whole = counts * seconds.of(full, guided=guided)
        else:
            costs = [[facts.cost(each, level) for each in self.choices] for level in self.levels]
            rows = np.array(costs)
            whole = counts * np.array([facts.cost(full, level) for level in self.levels])
        self.costs = counts[:, None] * rows / whole.sum()

    def frontier(self, limit: float = np.inf) -> Frontier:
        return Frontier.of(self.ordered, self.costs, limit=limit)

    @property
    def least(self) -> float:
        """Share of the full cost of the cheapest plan."""
        return float(self.costs.min(axis=1).sum())

    def check(self, budget: Budget) -> None:
        """Refuse a budget that no plan can keep, in the words of its currency.

        Raises:
            ValueError: naming what can be kept.
        """
        least = self.least
        if least > budget.share + ROUNDING:
            of = " of the seconds" if budget.currency == "seconds" else ""
            legal = legal_shares(least, CHEAPEST)
            raise ValueError(f"budget = {budget.share}{of}; legal: {legal}")

    def damage_of(self, plan: NDArray[np.intp]) -> float:
        return float(np.take_along_axis(self.damage, plan[:, None], axis=1).sum())

    def schedule(self, plan: NDArray[np.intp]) -> Schedule:
        """The choices of all steps."""
        return Schedule.of_steps(self.levels, [self.choices[choice] for choice in plan])
