"""From a budget to a schedule of that cost: weak first, and the exact frontier."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ditdial import FULL, Mode, Plan, Schedule, Segment
from ditdial.plan.budget import Budget, pairings
from ditdial.plan.choice import Choice
from ditdial.plan.frontier import Frontier
from ditdial.plan.weak_first import weak_first_for_budget

COSTS = {FULL: 100.0, Mode(2): 25.0, Mode(4): 8.0}
MODES = (Mode(2), Mode(4))


def macs_of(mode, level=None):
    return COSTS[mode]


@pytest.mark.parametrize("budget", [0.08, 0.1, 0.25, 0.26, 0.6, 0.9, 0.999])
def test_the_schedule_costs_the_budget(budget):
    schedule = weak_first_for_budget(budget, macs_of, MODES)
    levels = [1 - (i + 0.5) / 1000 for i in range(1000)]
    plan = Plan.bind(schedule, levels, macs_of, guidance=True)
    assert plan.ratio == pytest.approx(budget, abs=1e-3)


def test_the_finest_mode_that_reaches_it_is_used():
    assert weak_first_for_budget(0.6, macs_of, MODES).modes == {FULL, Mode(2)}
    assert weak_first_for_budget(0.6, macs_of, reversed(MODES)).modes == {FULL, Mode(2)}
    assert weak_first_for_budget(0.2, macs_of, MODES).modes == {FULL, Mode(4)}
    assert weak_first_for_budget(0.25, macs_of, MODES) == Schedule.constant(Mode(2), guide=Mode(2))


def test_everything_is_full_mode():
    assert weak_first_for_budget(1, macs_of, MODES) == Schedule.constant(FULL)
    assert weak_first_for_budget(1, macs_of, ()) == Schedule.constant(FULL)


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan"), float("inf")])
def test_illegal_budgets_are_named(budget):
    with pytest.raises(ValueError, match=rf"budget = {budget}; legal: \(0, 1\]"):
        weak_first_for_budget(budget, macs_of, MODES)
    with pytest.raises(ValueError, match=rf"budget = {budget}; legal: \(0, 1\]"):
        Budget(budget)


def test_a_budget_below_the_cheapest_mode_names_it():
    with pytest.raises(ValueError, match=r"budget = 0.05; legal: 0.0800 .*cheapest.* to 1"):
        weak_first_for_budget(0.05, macs_of, MODES)
    with pytest.raises(
        ValueError, match=r"budget = 0.5; legal: 1 \(nothing is cheaper: the cheapest mode"
    ):
        weak_first_for_budget(0.5, macs_of, ())


def test_a_budget_has_a_known_currency_and_criterion():
    assert Budget(0.5) == Budget(0.5, "flops", criterion="path")
    with pytest.raises(ValueError, match="currency = 'euros'; legal: 'flops', 'seconds'"):
        Budget(0.5, "euros")
    with pytest.raises(ValueError, match="criterion = 'taste'; legal: 'path', 'picture'"):
        Budget(0.5, criterion="taste")


def test_usual_choices():
    names = [choice.name for choice in pairings([FULL, *MODES])]
    full = ["full/full", "full/patch2", "full/patch4"]
    assert names == [*full, "patch2/patch2", "patch2/patch4", "patch4/patch4"]
    assert pairings([FULL])[0] == Choice() == pairings([])[0]
    weak = pairings(MODES, "weak")
    guided = ["full/patch4 weak 0.4", "patch2/patch4 weak 0.4"]
    assert [choice.name for choice in weak] == [*guided, "patch4/patch4"]
    assert [choice.weak_guidance for choice in weak] == [True, True, False]
    assert [choice.gain for choice in weak] == [0.4, 0.4, 1.0]
    frames, width = Mode((2, 1, 1)), Mode((1, 1, 2))  # neither is coarser than the other
    assert "patch2x1x1/patch1x1x2" not in [choice.name for choice in pairings([frames, width])]
    both = pairings(MODES, "both")
    assert both[:6] == pairings(MODES)
    assert [choice.name for choice in both[6:]] == ["full/patch2 weak 0.4", *guided]
    for guidance in ("weak", "both"):
        with pytest.raises(
            ValueError, match=rf"guidance = '{guidance}' with modes full; legal: 'c"
        ):
            pairings([FULL], guidance)
    with pytest.raises(ValueError, match="gain = -1"):
        Choice(gain=-1)


def test_a_choice_is_what_runs_not_how_it_is_written():
    weak = Choice(guide=Mode(2), guidance="weak", gain=0.4)
    segment = Segment.of(weak, 0.8, 0.1)
    assert segment.choice == weak != segment
    assert Segment.of(segment, 0.4, 0.2) == Segment.of(weak, 0.4, 0.2)
    assert {weak: "found"}[segment.choice] == "found"
    assert weak.runs_as(segment)
    assert not Choice(guide=Mode(2)).runs_as(segment)
    assert not Choice(guide=Mode(2), guidance="weak").runs_as(segment)
    assert Choice().runs_as(Segment(start=1, stop=0, guide=FULL, guidance="weak"))
    assert Choice(gain=0.0).name == "full/full cfg 0"


def every_plan(damage, cost):
    """Cost, damage and choices of all plans."""
    steps = range(len(damage))
    for plan in itertools.product(range(damage.shape[1]), repeat=len(damage)):
        yield sum(cost[i, plan[i]] for i in steps), sum(damage[i, plan[i]] for i in steps), plan


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("by_step", [False, True], ids=["cost of choices", "cost of steps"])
def test_the_frontier_is_brute_force(seed, by_step):
    generator = np.random.default_rng(seed)
    S, K = int(generator.integers(1, 7)), int(generator.integers(1, 5))
    damage, cost = generator.random((S, K)), generator.random((S, K) if by_step else K) / S
    frontier = Frontier.of(damage, cost)
    cost_SK = np.broadcast_to(cost, (S, K))
    plans = sorted(every_plan(damage, cost_SK))
    lowest = np.minimum.accumulate([plan[1] for plan in plans])
    best = [plan for i, plan in enumerate(plans) if i == 0 or plan[1] < lowest[i - 1]]
    merged = [p for p, q in zip(best, [*best[1:], (9, 9, 9)], strict=True) if q[0] - p[0] > 1e-9]
    np.testing.assert_allclose(frontier.costs, [plan[0] for plan in merged])
    np.testing.assert_allclose(frontier.damages, [plan[1] for plan in merged])
    steps = np.arange(S)
    for index in range(len(frontier)):
        chosen = frontier.choices(index)
        assert cost_SK[steps, chosen].sum() == pytest.approx(frontier.costs[index])
        assert damage[steps, chosen].sum() == pytest.approx(frontier.damages[index])
    for budget in generator.uniform(plans[0][0], plans[-1][0], 5):
        within = min(damage for cost, damage, _ in plans if cost <= budget)
        limited = Frontier.of(damage, cost, limit=budget)
        for each in (frontier, limited):
            assert each.damages[each.best(budget)] == pytest.approx(within)
            assert each.costs[each.best(budget)] <= budget + 1e-9
        np.testing.assert_allclose(limited.costs, frontier.costs[frontier.costs <= budget])


def test_more_budget_is_never_worse():
    generator = np.random.default_rng(0)
    frontier = Frontier.of(generator.random((12, 4)), generator.random(4) / 12)
    assert (np.diff(frontier.costs) > 0).all()
    assert (np.diff(frontier.damages) < 0).all()


def test_rounding_does_not_multiply_the_labels():
    """Sums of three costs in any order: as many different ones as there are multisets."""
    generator = np.random.default_rng(0)
    S, modes = 60, np.array([1.0, 0.27, 0.11])
    cost = (modes[[0, 0, 0, 1, 1, 2]] + modes[[0, 1, 2, 1, 2, 2]]) / (2 * S)
    noisy = cost * (1 + 1e-13 * generator.standard_normal((S, 6)))
    damage = generator.random((S, 6))
    frontier = Frontier.of(damage, noisy)
    np.testing.assert_allclose(frontier.damages, Frontier.of(damage, cost).damages)
    assert len(frontier) <= (2 * S + 1) * (2 * S + 2) / 2


def test_a_long_run_with_unrelated_costs():
    generator = np.random.default_rng(0)
    error = np.array([0, 0.002, 0.02, 0.01, 0.05, 0.2]) * generator.uniform(0.9, 1.1, (250, 6))
    cost = np.array([0.9, 0.66, 0.57, 0.27, 0.21, 0.12]) / 250
    frontier = Frontier.of(error * np.linspace(0.1, 9, 250)[:, None], cost)
    assert frontier.costs[[0, -1]] == pytest.approx([0.12, 0.9])
    assert frontier.costs[frontier.best(0.5)] == pytest.approx(0.5, abs=1e-3)


def test_the_cheapest_plan_is_within_its_own_cost():
    cost = np.array([1.0, 1 / 3]) / 7
    frontier = Frontier.of(np.ones((7, 2)) * [0, 1], cost, limit=1 / 3)
    assert frontier.choices(frontier.best(1 / 3)).tolist() == [1] * 7
    with pytest.raises(ValueError, match=r"budget = 0.33; legal: 0.3334 .*cheapest.* to 1"):
        Frontier.of(np.ones((7, 2)), cost, limit=0.33)
    with pytest.raises(ValueError, match=r"budget = 0.33; legal: 0.3334 .*cheapest.* to 1"):
        frontier.best(0.33)


@pytest.mark.parametrize("least", [1.0, 0.99999, 1.03])
def test_where_nothing_is_cheaper_than_full_mode_only_all_is_legal(least):
    """In seconds, on a device where coarse modes save none, say."""
    cost = np.array([least, least + 0.1]) / 7
    words = rf"budget = 0.6; legal: 1 \(nothing is cheaper: .* takes {max(least, 1):.4f} of the"
    with pytest.raises(ValueError, match=words):
        Frontier.of(np.ones((7, 2)), cost, limit=0.6)
    with pytest.raises(ValueError, match=words):
        Frontier.of(np.ones((7, 2)), cost).best(0.6)


@pytest.mark.parametrize("least", [1 / 3, 0.5, 0.08, 0.99987])
def test_a_budget_that_is_told_can_be_kept(least):
    cost = np.array([least, 1.0]) / 7
    with pytest.raises(ValueError, match="to 1") as told:
        Frontier.of(np.ones((7, 2)), cost, limit=0.01)
    budget = float(str(told.value).split("legal: ")[1].split()[0])
    assert least <= budget + 1e-9 < least + 1e-4 + 1e-9
    assert len(Frontier.of(np.ones((7, 2)), cost, limit=budget))


@pytest.mark.parametrize(
    ("damage", "cost", "words"),
    [
        (np.ones(3), np.ones(3), r"damage has shape \(3,\); legal: \(steps, choices\)"),
        (np.ones((0, 3)), np.ones(3), r"damage has shape \(0, 3\)"),
        (np.full((2, 3), np.nan), np.ones(3), "damage goes from nan"),
        (np.ones((2, 3)), -np.ones(3), r"cost goes from -1.0 to -1.0; legal: >= 0"),
    ],
)
def test_illegal_problems_are_named(damage, cost, words):
    with pytest.raises(ValueError, match=words):
        Frontier.of(damage, cost)
