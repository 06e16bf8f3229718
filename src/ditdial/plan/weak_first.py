"""The dial without a calibration: FlexiDiT's weak-first rule, for the noise levels of each run.

The noisiest steps run weak, as few of them as the budget asks for (FlexiDiT section 3.3). Counting
the very steps that are called keeps the cost with any number of steps, with a scheduler that spaces
them unevenly, and for each of two transformers that share a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ditdial.plan.budget import Budget
from ditdial.plan.choice import Choice
from ditdial.plan.controller import BudgetController
from ditdial.plan.facts import Facts
from ditdial.plan.frontier import ROUNDING, legal_shares
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule

POWERFUL = Choice()


@dataclass(frozen=True, kw_only=True)
class WeakFirstBudget(BudgetController):
    """Runs as few of the noisiest steps weak as the budget asks for.

    The last of them is weak in its guidance branch alone, if that is enough.

    Args:
        share: of the full cost, in (0, 1].
        coarse: the weak modes at hand; the finest that reaches the budget is used.

    Raises:
        ValueError: a share out of range.
    """

    share: float
    coarse: tuple[Mode, ...]

    def __post_init__(self) -> None:
        Budget(self.share)

    @property
    def modes(self) -> set[Mode]:
        """Full mode and the weak ones."""
        return {FULL, *self.coarse}

    def begin(self, facts: Facts) -> Schedule:
        """The weak-first schedule for the noise levels of a run.

        Where no levels are known, the steps are taken to be even and as many as it takes: the share
        of noise levels that run weak spends just the budget.

        Raises:
            ValueError: a budget below what the cheapest mode costs.
        """
        if self.share == 1:
            return Schedule.constant()
        counts = _levels(facts)
        levels = sorted(counts, reverse=True)
        full = _costs(POWERFUL, facts, counts)
        weak = self._finest(facts, counts)
        both, allowed = (
            _costs(Choice(mode=weak), facts, counts),
            (self.share + ROUNDING) * sum(full),
        )
        if not levels:
            fraction = (1 - self.share) / (1 - both[0] / full[0])
            return Schedule.weak_first(min(1.0, fraction), weak)
        spent, steps = sum(full), 0
        while spent > allowed:
            spent += both[steps] - full[steps]
            steps += 1
        choices = [Choice(mode=weak)] * steps + [POWERFUL] * (len(levels) - steps)
        if steps and facts.at(levels[steps - 1]).guided:
            guided = Choice(guide=weak)
            if spent + _costs(guided, facts, counts)[steps - 1] - both[steps - 1] <= allowed:
                choices[steps - 1] = guided
        return Schedule.of_steps(levels, choices)

    def least(self, facts: Facts) -> float:
        """Of the cheapest mode throughout."""
        return min(self._shares(facts, _levels(facts)).values(), default=1.0)

    def within(self, share: float) -> WeakFirstBudget:
        """The same with another budget."""
        return replace(self, share=share)

    def _shares(self, facts: Facts, counts: Counter[float]) -> dict[Mode, float]:
        """Share of the full cost of each weak mode throughout."""
        full = sum(_costs(POWERFUL, facts, counts))
        return {mode: sum(_costs(Choice(mode=mode), facts, counts)) / full for mode in self.coarse}

    def _finest(self, facts: Facts, counts: Counter[float]) -> Mode:
        """The dearest of the weak modes that reach the budget throughout."""
        shares = self._shares(facts, counts)
        reachable = [
            mode for mode, share in shares.items() if share <= self.share + ROUNDING and share < 1
        ]
        if not reachable:
            steps = f", in these {len(facts.levels)} steps" if facts.levels else ""
            least = min(shares.values(), default=1.0)
            legal = legal_shares(least, f"the cheapest mode throughout{steps}")
            raise ValueError(f"budget = {self.share}; legal: {legal}")
        return max(reachable, key=shares.__getitem__)


def _levels(facts: Facts) -> Counter[float]:
    """The noise levels of a run, and how many steps have each: they cannot differ."""
    return Counter(min(max(level, 0.0), 1.0) for level in facts.levels)


def _costs(choice: Choice, facts: Facts, counts: Counter[float]) -> list[float]:
    """Of a choice at each noise level, the noisiest first; of one step where none is known."""
    if not counts:
        return [facts.cost(choice)]
    return [counts[level] * facts.cost(choice, level) for level in sorted(counts, reverse=True)]


def weak_first_for_budget(
    budget: float, macs: Callable[[Mode, float | None], float], modes: Iterable[Mode]
) -> Schedule:
    """The weak-first schedule that costs ``budget`` times as much as full mode, for even steps.

    Args:
        budget: share of the full cost, in (0, 1].
        macs: multiply-adds of one forward pass in a mode at a noise level (None: in the mean).
        modes: the coarse modes at hand; the finest that reaches the budget is used.

    Raises:
        ValueError: a budget outside (0, 1], or below what the cheapest mode costs.
    """
    return WeakFirstBudget(share=budget, coarse=tuple(modes)).begin(Facts(levels=(), macs=macs))
