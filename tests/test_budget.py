"""From a budget to a schedule of that cost."""

from __future__ import annotations

import pytest

from elastic_dit import FULL, Mode, Plan, Schedule
from elastic_dit.budget import weak_first_for_budget

COST = {FULL: 100.0, Mode(2): 25.0, Mode(4): 8.0}.__getitem__
MODES = (Mode(2), Mode(4))


@pytest.mark.parametrize("budget", [0.08, 0.1, 0.25, 0.26, 0.6, 0.9, 0.999])
def test_the_schedule_costs_the_budget(budget):
    schedule = weak_first_for_budget(budget, COST, MODES)
    levels = [1 - (i + 0.5) / 1000 for i in range(1000)]
    plan = Plan.bind(schedule, levels, COST, guidance=True)
    assert plan.ratio == pytest.approx(budget, abs=1e-3)


def test_the_finest_mode_that_reaches_it_is_used():
    assert weak_first_for_budget(0.6, COST, MODES).modes == {FULL, Mode(2)}
    assert weak_first_for_budget(0.6, COST, reversed(MODES)).modes == {FULL, Mode(2)}
    assert weak_first_for_budget(0.2, COST, MODES).modes == {FULL, Mode(4)}
    assert weak_first_for_budget(0.25, COST, MODES) == Schedule.constant(Mode(2), guide=Mode(2))


def test_everything_is_full_mode():
    assert weak_first_for_budget(1, COST, MODES) == Schedule.constant(FULL)
    assert weak_first_for_budget(1, COST, ()) == Schedule.constant(FULL)


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan"), float("inf")])
def test_illegal_budgets_are_named(budget):
    with pytest.raises(ValueError, match=rf"budget = {budget}; legal: \(0, 1\]"):
        weak_first_for_budget(budget, COST, MODES)


def test_a_budget_below_the_cheapest_mode_names_it():
    with pytest.raises(ValueError, match=r"budget = 0.05; legal: 0.080 .*cheapest.* to 1"):
        weak_first_for_budget(0.05, COST, MODES)
    with pytest.raises(ValueError, match=r"budget = 0.5; legal: 1.000"):
        weak_first_for_budget(0.5, COST, ())
