"""The best plan for every budget at once: one choice per step, by dynamic programming, exactly.

Where the damage of a plan is the sum over its steps, the best plan for a budget is a
multiple-choice knapsack. It is solved over labels (cost, damage): after each step only those labels
stay that no cheaper one equals, and each remembers the label and the choice that it came from. What
is left after the last step are the best plans for all budgets.

A run's steps have few different costs, so many plans cost the same, and the labels stay few: of
the 6^60 plans of 60 guided steps in three modes, 224 are left. Two tolerances see to that, and to
budgets being kept exactly (`RESOLUTION`, `ROUNDING`).

Shape legend: S steps, K choices, P plans on the frontier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditdial.plain import figures
from ditdial.plain.tables import Table

RESOLUTION = 1e-9
"""Costs that agree to this share of the full cost count as one.

Sums of the same 250 numbers in another order differ by 2e-15 of them, measured, and each such sum
would be a label of its own.
"""

ROUNDING = 1e-12
"""Share of the full cost by which a sum may exceed a budget that it equals but for rounding.

It is far above what rounding does and far below `RESOLUTION`, so it makes no plan legal that is
dearer than the budget.
"""

SHOWN = 20
"""Plans in a frontier's table at most."""

CHEAPEST = "the cheapest choice throughout"


@dataclass(frozen=True, eq=False)
class Frontier:
    """Every plan that no cheaper plan equals, cheapest first.

    Attributes:
        costs, damages: of the plans, ``(P,)``; costs rise and damages fall.
    """

    costs: NDArray[np.float64]
    damages: NDArray[np.float64]
    _back: tuple[tuple[NDArray[np.int32], NDArray[np.int16]], ...] = field(repr=False)

    @classmethod
    def of(cls, damage_SK: ArrayLike, cost_SK: ArrayLike, *, limit: float = math.inf) -> Frontier:
        """Solve for every budget up to a limit.

        Args:
            damage_SK: what each choice does at each step, ``(S, K)``.
            cost_SK: what it costs there as a share of the full run, ``(S, K)`` or ``(K,)``.
            limit: plans that cost more are left out.

        Raises:
            ValueError: shapes that do not fit, numbers that are negative or not finite, or a limit
                below the cheapest plan.
        """
        damage_SK = np.asarray(damage_SK, dtype=np.float64)
        if damage_SK.ndim != 2 or not damage_SK.size:
            raise ValueError(f"damage has shape {damage_SK.shape}; legal: (steps, choices)")
        cost_SK = np.broadcast_to(np.asarray(cost_SK, dtype=np.float64), damage_SK.shape)
        for name, values in (("damage", damage_SK), ("cost", cost_SK)):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"{name} goes from {values.min()} to {values.max()}; legal: >= 0")
        least = cost_SK.min(axis=1)
        if least.sum() > limit + ROUNDING:
            raise ValueError(f"budget = {limit}; legal: {legal_shares(least.sum(), CHEAPEST)}")
        ahead = np.append(least[::-1].cumsum()[::-1][1:], 0.0)
        costs, damages, back = np.zeros(1), np.zeros(1), []
        for step in range(len(damage_SK)):
            # Choice by choice, so that the costs are K sorted runs, which a stable sort merges.
            cost = (cost_SK[step][:, None] + costs).ravel()
            damage = (damage_SK[step][:, None] + damages).ravel()
            kept = _undominated(cost, damage, limit + 2 * ROUNDING - ahead[step])
            back.append(
                ((kept % len(costs)).astype(np.int32), (kept // len(costs)).astype(np.int16))
            )
            costs, damages = cost[kept], damage[kept]
        return cls(costs, damages, tuple(back))

    def __len__(self) -> int:
        return len(self.costs)

    @property
    def table(self) -> Table:
        """Costs and damages of the plans; of many, as many as fit a page, evenly apart."""
        shown = np.unique(np.linspace(0, len(self) - 1, min(len(self), SHOWN)).round().astype(int))
        rows = [(figures.share(self.costs[i]), f"{self.damages[i]:.3g}") for i in shown]
        rest = f", {len(shown)} of them shown" if len(shown) < len(self) else ""
        below = (f"{len(self)} plan{'s' if len(self) > 1 else ''}{rest}",)
        return Table(headings=("cost", "damage"), rows=rows, below=below, least=(8, 10))

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table.html()

    def best(self, budget: float) -> int:
        """Index of the plan with the least damage within a budget.

        Raises:
            ValueError: a budget below the cheapest plan.
        """
        index = int(np.searchsorted(self.costs, budget + 2 * ROUNDING, side="right")) - 1
        if index < 0:
            raise ValueError(f"budget = {budget}; legal: {legal_shares(self.costs[0], CHEAPEST)}")
        return index

    def choices(self, index: int) -> NDArray[np.intp]:
        """The choice of each step of a plan, ``(S,)``."""
        found = []
        for parents, choices in reversed(self._back):
            found.append(choices[index])
            index = parents[index]
        return np.array(found[::-1], dtype=np.intp)


def _undominated(cost: NDArray, damage: NDArray, limit: float) -> NDArray[np.intp]:
    """Indices of the labels within a limit that no cheaper one equals, cheapest first."""
    within = np.flatnonzero(cost <= limit)
    order = within[np.argsort(cost[within], kind="stable")]
    lowest = np.minimum.accumulate(damage[order])
    better = np.append(True, damage[order][1:] < lowest[:-1])
    kept = order[better]
    # Of costs that only rounding tells apart, the last one has the least damage.
    key = np.rint(cost[kept] / RESOLUTION)
    return kept[np.append(key[1:] != key[:-1], True)]


def legal_shares(least: float, what: str) -> str:
    """The budgets that can be kept, in words; never rounded to one that cannot.

    Args:
        least: share of the full cost that the cheapest run takes.
        what: that run is.
    """
    up = math.ceil(least * 1e4 - 1e-6) / 1e4
    if up < 1:
        return f"{up:.4f} ({what}) to 1"
    return f"1 (nothing is cheaper: {what} takes {up:.4f} of the full run)"
