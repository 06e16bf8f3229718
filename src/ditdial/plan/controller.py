"""Controllers choose the mode of each call of a run.

A controller is plain configuration; what it remembers of a run lives in the `Run` that `begin`
returns, and is gone with it. The simplest controller is a `Schedule`; `DDiTController` looks at the
latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ditdial.plan.choice import Choice
from ditdial.plan.mode import Mode
from ditdial.plan.schedule import Schedule


@dataclass(frozen=True)
class Passes:
    """Forward passes of one picture in a step.

    Args:
        guided: whether one of them is the guidance branch.
        more: how many there are beside the conditional and the guidance branch; they run in the
            conditional branch's mode.
    """

    guided: bool
    more: int = 0

    @classmethod
    def of(cls, count: int) -> Passes:
        """So many passes, of which the second is the guidance branch."""
        return cls(count > 1, max(count - 2, 0))

    @property
    def count(self) -> int:
        """All of them."""
        return 1 + self.guided + self.more


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run before its first call.

    Args:
        levels: noise levels of its model calls, one per call of the conditional branch; empty where
            no scheduler tells them (a bare model).
        macs: multiply-adds of one forward pass of one picture in a mode at a noise level (None: in
            the mean).
        guided: whether there is a guidance branch; None where that is not known yet.
        passes: at the noise levels whose steps are others than ``guided`` says.
        guidance_scale: of the run that is being made; None where nothing tells.
        guide_macs: the same as ``macs`` of a guidance branch whose prompt has another length.
    """

    levels: tuple[float, ...]
    macs: Callable[[Mode, float | None], float]
    guided: bool | None = None
    guidance_scale: float | None = None
    passes: Mapping[float, Passes] = field(default_factory=dict)
    guide_macs: Callable[[Mode, float | None], float] | None = None

    def at(self, level: float | None) -> Passes:
        """Forward passes of a picture in the step at a noise level."""
        told = None if level is None else self.passes.get(level)
        return told or Passes(self.guided is not False)

    def cost(self, choice: Choice, level: float | None = None) -> float:
        """Multiply-adds of one picture in one step at a noise level, all its passes."""
        passes = self.at(level)
        own = (1 + passes.more) * self.macs(choice.mode, level)
        if not passes.guided or choice.gain == 0:
            return own
        return own + (self.guide_macs or self.macs)(choice.guide_mode, level)


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
