"""The dial without a calibration: as few weak steps as a budget needs, for the levels of a run."""

from __future__ import annotations

import pytest

from ditdial.plan.facts import Facts
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.plan import Plan
from ditdial.plan.schedule import Segment
from ditdial.plan.weak_first import WeakFirstBudget

MODES = (Mode(2), Mode(4))
RATIOS = {FULL: 1.0, Mode(2): 0.25, Mode(4): 0.06}
STEPS = (10, 25, 50, 100)


def macs(mode, level=None):
    return 1000 * RATIOS[mode]


def even(steps):
    return tuple(1 - i / steps for i in range(steps))


def shifted(steps, shift=5.0):
    return tuple(shift * x / (1 + (shift - 1) * x) for x in even(steps))


def plan(budget, levels, guided):
    schedule = WeakFirstBudget(share=budget, coarse=MODES).begin(
        Facts(levels=levels, macs=macs, guided=guided)
    )
    return Plan.bind(schedule, levels, macs, guidance=guided is not False)


@pytest.mark.parametrize("guided", [True, None, False])
@pytest.mark.parametrize("spaced", [even, shifted])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("budget", [0.07, 0.3, 0.5, 0.64, 0.9, 0.99])
def test_the_cost_is_the_same_for_all_steps_and_schedulers(budget, steps, spaced, guided):
    found = plan(budget, spaced(steps), guided)
    weak = Mode(2) if budget > 0.25 else Mode(4)
    whole = (1 - RATIOS[weak]) / steps  # what one weak step saves
    assert budget - whole / (1 if guided is False else 2) < found.ratio <= budget + 1e-9
    order = [(RATIOS[step.mode], RATIOS[step.guide or step.mode]) for step in found.steps]
    assert order == sorted(order)
    assert {mode for step in found.steps for mode in (step.mode, step.guide)} <= {FULL, weak, None}


def test_a_solvers_second_look_at_a_level_is_paid_for():
    levels = (1.0, 0.7, 0.7, 0.4, 0.4, 0.1)
    found = plan(0.6, levels, True)
    assert 0.6 - 2 * 0.75 / 6 < found.ratio <= 0.6


def test_all_of_the_cost_is_full_mode():
    assert {step.mode for step in plan(1.0, even(10), True).steps} == {FULL}


def test_a_budget_below_the_cheapest_mode_is_refused():
    facts = Facts(levels=even(10), macs=macs, guided=True)
    with pytest.raises(ValueError, match=r"budget = 0.05; legal: 0\.0600 .*10 steps\) to 1"):
        WeakFirstBudget(share=0.05, coarse=MODES).begin(facts)


def test_without_levels_steps_are_taken_to_be_even():
    schedule = WeakFirstBudget(share=0.25, coarse=MODES).begin(Facts(levels=(), macs=macs))
    assert schedule.segments == (Segment(start=1, stop=0, mode=Mode(2), guide=Mode(2)),)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("budget", [0.07, 0.3, 0.64, 0.99])
def test_no_levels_are_the_limit_of_many_even_steps(budget, guided):
    """One rule: the edge that many even steps find is the edge without any."""
    dial = WeakFirstBudget(share=budget, coarse=MODES)
    fine = dial.begin(Facts(levels=even(5000), macs=macs, guided=guided))
    limit = dial.begin(Facts(levels=(), macs=macs, guided=guided))
    assert fine.segments[0].mode == limit.segments[0].mode
    assert fine.segments[-1].start == pytest.approx(limit.segments[-1].start, abs=1e-3)


@pytest.mark.parametrize("share", [0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"budget = {share}; legal: \(0, 1\]"):
        WeakFirstBudget(share=share, coarse=MODES)


def test_a_mode_that_saves_nothing_is_never_used():
    facts = Facts(levels=(), macs=lambda mode, level=None: 1.0)
    with pytest.raises(ValueError, match=r"legal: 1 \(nothing is cheaper"):
        WeakFirstBudget(share=1 - 1e-13, coarse=MODES).begin(facts)
    assert WeakFirstBudget(share=1, coarse=MODES).begin(facts).modes == {FULL}
