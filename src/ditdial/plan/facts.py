"""What is known of a run before its first call: its steps, their passes, and what these cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ditdial.plan.choice import Choice
from ditdial.plan.mode import Mode


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
