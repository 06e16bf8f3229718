"""From a budget to a weak-first schedule (FlexiDiT's one-parameter dial)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from elastic_dit.mode import FULL, Mode
from elastic_dit.schedule import Schedule


def weak_first_for_budget(
    budget: float, macs: Callable[[Mode], float], modes: Iterable[Mode]
) -> Schedule:
    """The weak-first schedule that costs ``budget`` times as much as full mode.

    Timesteps are taken to be evenly spaced. The finest coarse mode that reaches the budget is used.

    Args:
        budget: share of the full cost, in (0, 1].
        macs: multiply-adds of one forward pass in a mode.
        modes: the coarse modes at hand.

    Raises:
        ValueError: a budget outside (0, 1], or below what the cheapest mode costs.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget = {budget}; legal: (0, 1]")
    if budget == 1:
        return Schedule.constant(FULL)
    ratios = {mode: macs(mode) / macs(FULL) for mode in modes}
    reachable = [mode for mode, ratio in ratios.items() if ratio <= budget]
    if not reachable:
        cheapest = min(ratios.values(), default=1.0)
        raise ValueError(
            f"budget = {budget}; legal: {cheapest:.3f} (the cheapest mode throughout) to 1"
        )
    weak = max(reachable, key=lambda mode: ratios[mode])
    return Schedule.weak_first(min(1.0, (1 - budget) / (1 - ratios[weak])), weak)
