"""The dial without a calibration: FlexiDiT's weak-first rule, for the noise levels of each run.

Counting the very steps that are called keeps the cost with any number of steps, with a scheduler
that spaces them unevenly, and for each of two transformers that share a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ditdial.plan.choice import Choice
from ditdial.plan.controller import Controller, Facts
from ditdial.plan.frontier import ROUNDING
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule

POWERFUL = Choice()


@dataclass(frozen=True, kw_only=True)
class WeakFirstBudget(Controller):
    """Runs as few of the noisiest steps weak as the budget asks for.

    The last of them is weak in its guidance branch alone, if that is enough.

    Args:
        share: of the full cost, in (0, 1].
        coarse: the weak modes at hand; the finest that reaches the budget is used.
    """

    share: float
    coarse: tuple[Mode, ...]

    @property
    def modes(self) -> set[Mode]:
        """Full mode and the weak ones."""
        return {FULL, *self.coarse}

    def begin(self, facts: Facts) -> Schedule:
        """The weak-first schedule for the levels of a run; of even steps where none are known.

        Raises:
            ValueError: a budget below what the cheapest mode costs.
        """
        if not facts.levels:
            return weak_first_for_budget(self.share, facts.macs, self.coarse)
        # Steps of the same level cannot differ.
        counts = Counter(min(max(level, 0.0), 1.0) for level in facts.levels)
        levels = sorted(counts, reverse=True)

        def costs(choice: Choice) -> list[float]:
            return [counts[level] * facts.cost(choice, level) for level in levels]

        full = costs(POWERFUL)
        whole = sum(full)
        weak = {mode: replace(POWERFUL, mode=mode) for mode in self.coarse}
        shares = {mode: sum(costs(choice)) / whole for mode, choice in weak.items()}
        reachable = [mode for mode in self.coarse if shares[mode] <= self.share + ROUNDING]
        if not reachable:
            raise ValueError(
                f"budget = {self.share}; legal: {min(shares.values()):.3f} (the cheapest mode "
                f"throughout, in these {len(facts.levels)} steps) to 1"
            )
        mode = max(reachable, key=shares.__getitem__)
        both, guide = costs(weak[mode]), replace(POWERFUL, guide=mode)
        spent, steps = whole, 0
        while spent > (self.share + ROUNDING) * whole:
            spent += both[steps] - full[steps]
            steps += 1
        segments = [weak[mode]] * steps + [POWERFUL] * (len(levels) - steps)
        if steps and facts.guided is not False:
            more = costs(guide)[steps - 1] - both[steps - 1]
            if spent + more <= (self.share + ROUNDING) * whole:
                segments[steps - 1] = guide
        return Schedule.of_steps(levels, segments)


def weak_first_for_budget(
    budget: float, macs: Callable[[Mode, float | None], float], modes: Iterable[Mode]
) -> Schedule:
    """The weak-first schedule that costs ``budget`` times as much as full mode.

    Timesteps are taken to be evenly spaced. The finest coarse mode that reaches the budget is used.

    Args:
        budget: share of the full cost, in (0, 1].
        macs: multiply-adds of one forward pass in a mode at a noise level (None: in the mean).
        modes: the coarse modes at hand.

    Raises:
        ValueError: a budget outside (0, 1], or below what the cheapest mode costs.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget = {budget}; legal: (0, 1]")
    if budget == 1:
        return Schedule.constant(FULL)
    ratios = {mode: macs(mode, None) / macs(FULL, None) for mode in modes}
    reachable = [mode for mode, ratio in ratios.items() if ratio <= budget]
    if not reachable:
        cheapest = min(ratios.values(), default=1.0)
        raise ValueError(
            f"budget = {budget}; legal: {cheapest:.3f} (the cheapest mode throughout) to 1"
        )
    weak = max(reachable, key=lambda mode: ratios[mode])
    return Schedule.weak_first(min(1.0, (1 - budget) / (1 - ratios[weak])), weak)
