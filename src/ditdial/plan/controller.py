"""Controllers choose the mode of each call of a run.

A controller is plain configuration; what it remembers of a run lives in the `Run` that `begin`
returns, and is gone with it. The simplest controller is a `Schedule`; `DDiTController` looks at the
latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditdial.plan.choice import Choice
from ditdial.plan.facts import Facts
from ditdial.plan.mode import Mode
from ditdial.plan.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How one picture runs in one call.

    Args:
        why: what led to it, as plain data: a statistic and its threshold, say.
    """

    choice: Choice
    why: dict[str, Any] | None = None


class Run(ABC):
    """A controller at work on one run; pictures keep their place in the batch.

    Attributes:
        learns: whether it wants to see the predicted clean latents.
    """

    learns: bool = False

    @abstractmethod
    def decide(self, level: float, latents: Tensor) -> Sequence[Decision]:
        """The next call of the conditional branch.

        Args:
            latents: of the conditional rows on the base grid, ``(B, T, H, W, C, p)`` with ``p``
                numbers of each channel in one base patch.

        Returns:
            One decision for each of the B pictures.
        """

    def learn(self, level: float, clean: Tensor) -> None:
        """What the call then predicted of the clean latents, of the shape `decide` is given."""
        return


FEW_STEPS = 8
"""Runs with so many steps have so few costs that a plan tells them."""

MOST_SHARES = 40

NEXT = 1e-6
"""By how much a share is below one that is too dear for it."""


class Controller(ABC):
    """Chooses modes while sampling."""

    @property
    @abstractmethod
    def modes(self) -> set[Mode]:
        """Every mode it may choose."""

    @abstractmethod
    def begin(self, facts: Facts) -> Run | Schedule:
        """Start a run; a schedule where all its choices are made before it.

        Raises:
            ValueError: the run does not allow what was asked for (a cap that cannot be kept, too
                few steps).
        """


class BudgetController(Controller):
    """One that spends a budget: all its choices are made before the run."""

    @abstractmethod
    def begin(self, facts: Facts) -> Schedule:
        """The schedule of a run.

        Raises:
            ValueError: a budget below the cheapest plan.
        """

    @abstractmethod
    def least(self, facts: Facts) -> float:
        """Share of the full cost that the cheapest plan of a run takes."""

    @abstractmethod
    def within(self, share: float) -> BudgetController:
        """The same with another budget."""

    def shares(self, facts: Facts) -> tuple[float, ...]:
        """Shares of the full cost that budgets of a run of few steps buy, the dearest first.

        Returns:
            At most `MOST_SHARES` of them; with none where the run has more than `FEW_STEPS`.
        """
        if not 0 < len(facts.levels) <= FEW_STEPS:
            return ()
        full, least = sum(facts.cost(Choice(), level) for level in facts.levels), self.least(facts)
        share, found = 1.0, []
        while share >= max(least, 0.0) and len(found) < MOST_SHARES:
            schedule = self.within(share).begin(facts)
            costs = (facts.cost(schedule.at(level), level) for level in facts.levels)
            found.append(sum(costs) / full)
            share = min(share, found[-1]) - NEXT
        return tuple(dict.fromkeys(found))
