"""A choice is how one step runs: the modes of its two branches, and how they guide each other.

Choices are what is measured (`ditdial.plan.calibration`), solved for (`ditdial.plan.solved`) and
made while sampling (`ditdial.plan.controller`). A `ditdial.plan.schedule.Segment` is a choice for a
stretch of noise levels.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from ditdial.plain.checks import one_of
from ditdial.plan.mode import FULL, Mode

GUIDANCE = ("cfg", "weak")
WEAK_GUIDANCE_GAIN = 1 / 2.5
"""FlexiDiT's rule (1 - s1) / (1 - s2) = 2.5 for the scales of ordinary and weak guidance."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one step runs.

    Choices are equal if they are written alike; `runs_as` also knows those that run alike.

    Args:
        mode: of the conditional branch.
        guide: mode of the guidance branch; the same as ``mode`` unless given.
        guidance: ``cfg`` (the guidance branch sees the null condition) or ``weak`` (where ``guide``
            is coarser than ``mode``, it sees the true condition instead: weak-model guidance;
            elsewhere ordinary CFG).
        gain: factor on the guidance scale's excess over 1: the pipeline's scale ``s`` acts as ``1 +
            gain * (s - 1)``. 0 leaves the guidance branch out altogether.

    Raises:
        ValueError: what is no mode, or guidance or gain out of range.
    """

    mode: Mode = FULL
    guide: Mode | None = None
    guidance: str = "cfg"
    gain: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("mode", self.mode), ("guide", self.guide)):
            if not isinstance(value, Mode) and (name == "mode" or value is not None):
                none = "" if name == "mode" else "None, or "
                raise ValueError(
                    f"{name} = {value!r}; legal: {none}a Mode, as in Mode(2) or "
                    "Mode.parse('patch2')"
                )
        one_of("guidance", self.guidance, GUIDANCE)
        if not is_number(self.gain) or not 0 <= self.gain < math.inf:
            raise ValueError(f"gain = {self.gain!r}; legal: a number >= 0")

    @property
    def guide_mode(self) -> Mode:
        """Mode of the guidance branch."""
        return self.mode if self.guide is None else self.guide

    @property
    def weak_guidance(self) -> bool:
        """Whether the guidance branch is the weak model on the true condition."""
        return self.guidance == "weak" and self.guide_mode.is_coarser_than(self.mode)

    @property
    def mixes_sizes(self) -> bool:
        """Whether the branches run at two sizes, of which one has no high band of its own."""
        return self.mode.low_band != self.guide_mode.low_band

    @property
    def reads_conditional(self) -> bool:
        """Whether the guidance branch is made from the conditional one of its step."""
        return self.weak_guidance or self.gain != 1 or self.mixes_sizes

    @property
    def modes(self) -> set[Mode]:
        """The modes that the step needs."""
        return {self.mode, self.guide_mode}

    @property
    def work(self) -> tuple[object, ...]:
        """What the branches run; choices of the same work differ in the strength of guidance."""
        return self.mode, self.guide_mode, self.weak_guidance, self.gain == 0

    @property
    def name(self) -> str:
        """``patch2/patch4`` for modes of the conditional and the guidance branch.

        What is not plain CFG is added: ``full/patch2 weak 0.4`` is weak guidance with that gain.
        """
        name = f"{self.mode.name}/{self.guide_mode.name}"
        if self.gain == 1 and not self.weak_guidance:
            return name
        return f"{name} {'weak' if self.weak_guidance else 'cfg'} {self.gain:g}"

    def runs_as(self, other: Choice) -> bool:
        """Whether another choice, or a segment, runs its steps just so, however it is written."""
        facts = ("mode", "guide_mode", "weak_guidance", "gain")
        return all(getattr(self, name) == getattr(other, name) for name in facts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the inverse of `from_dict`."""
        return {
            "mode": self.mode.name,
            "guide": None if self.guide is None else self.guide.name,
            "guidance": self.guidance,
            "gain": self.gain,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """A choice, or a segment, from plain data.

        Raises:
            ValueError: missing or unknown entries, unknown modes, values out of range.
        """
        names = [each.name for each in fields(cls)]
        needed = [each.name for each in fields(cls) if each.default is MISSING] + ["mode"]
        if not isinstance(data, dict) or not set(needed) <= set(data) <= set(names):
            others = ", ".join(name for name in names if name not in needed)
            raise ValueError(
                f"{cls.__name__.lower()} {data!r}; legal: {', '.join(needed)} and optionally "
                f"{others}"
            )
        facts: dict[str, Any] = {**data, "mode": Mode.parse(str(data["mode"]))}
        if data.get("guide") is not None:
            facts["guide"] = Mode.parse(str(data["guide"]))
        return cls(**facts)


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)
