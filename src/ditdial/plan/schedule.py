"""Schedules say which mode runs at which noise level; plans bind them to the timesteps of one run.

A noise level is the network's own time, scaled to [0, 1]: 1 is pure noise, 0 is data. A schedule
never speaks of step numbers, so it means the same for 10 steps and for 250 (FlexiDiT section 3.3:
weak first, then powerful).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditdial.plan.mode import FULL, Mode

WEAK_GUIDANCE_GAIN = 1 / 2.5
"""FlexiDiT's rule (1 - s1) / (1 - s2) = 2.5 for the scales of ordinary and weak guidance."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stretch of noise levels, ``stop <= level < start`` (a start of 1 includes 1 and above).

    Args:
        mode: of the conditional branch.
        guide: mode of the guidance branch; the same as ``mode`` unless given.
        guidance: ``cfg`` (the guidance branch sees the null condition) or ``weak`` (where ``guide``
            is coarser than ``mode``, it sees the true condition instead: weak-model guidance;
            elsewhere ordinary CFG).
        gain: factor on the guidance scale's excess over 1: the pipeline's scale ``s`` acts as ``1 +
            gain * (s - 1)``. 0 leaves the guidance branch out altogether.

    Raises:
        ValueError: levels, guidance or gain out of range.
    """

    start: float
    stop: float
    mode: Mode = FULL
    guide: Mode | None = None
    guidance: str = "cfg"
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.stop < self.start <= 1:
            raise ValueError(
                f"segment from {self.start} to {self.stop}; legal: 0 <= stop < start <= 1"
            )
        if self.guidance not in ("cfg", "weak"):
            raise ValueError(f"guidance = {self.guidance!r}; legal: 'cfg', 'weak'")
        if not 0 <= self.gain < float("inf"):
            raise ValueError(f"gain = {self.gain}; legal: a number >= 0")

    @property
    def guide_mode(self) -> Mode:
        """Mode of the guidance branch."""
        return self.mode if self.guide is None else self.guide

    @property
    def weak_guidance(self) -> bool:
        """Whether the guidance branch is the weak model on the true condition."""
        return self.guidance == "weak" and self.guide_mode.is_coarser_than(self.mode)

    @property
    def modes(self) -> set[Mode]:
        """The modes this segment needs."""
        return {self.mode, self.guide_mode}

    @property
    def work(self) -> tuple[object, ...]:
        """What the branches run; segments of the same work differ in levels and strength alone."""
        return self.mode, self.guide_mode, self.weak_guidance, self.gain == 0


@dataclass(frozen=True)
class Schedule:
    """Noise level -> mode, as plain data.

    Args:
        segments: from level 1 down to 0, without gap or overlap.

    Raises:
        ValueError: empty, a gap, an overlap, or ends that are not 1 and 0.
    """

    segments: tuple[Segment, ...]

    def __init__(self, segments: Iterable[Segment]) -> None:
        ordered = tuple(segments)
        if not ordered:
            raise ValueError("a schedule needs at least one segment")
        if ordered[0].start != 1 or ordered[-1].stop != 0:
            raise ValueError(
                f"schedule covers noise levels {ordered[0].start} to {ordered[-1].stop}; "
                "legal: 1 to 0"
            )
        for above, below in zip(ordered, ordered[1:], strict=False):
            if above.stop != below.start:
                kind = "gap" if above.stop > below.start else "overlap"
                raise ValueError(
                    f"schedule has a {kind} between noise levels {above.stop} and {below.start}; "
                    "each segment must start where the one before stops"
                )
        object.__setattr__(self, "segments", ordered)

    @classmethod
    def constant(
        cls, mode: Mode = FULL, *, guide: Mode | None = None, guidance: str = "cfg"
    ) -> Schedule:
        """One mode at every noise level."""
        return cls([Segment(start=1, stop=0, mode=mode, guide=guide, guidance=guidance)])

    @classmethod
    def weak_first(
        cls,
        fraction: float,
        weak: Mode | int = 2,
        *,
        guide_fraction: float | None = None,
        guidance: str = "cfg",
        gain: float | None = None,
    ) -> Schedule:
        """FlexiDiT's schedule: the noisiest ``fraction`` of the run weak, the rest in full mode.

        Args:
            fraction: share of noise levels (of steps, where timesteps are spaced evenly) run weak;
                in [0, 1].
            weak: the weak mode, or its patch scale.
            guide_fraction: the same share for the guidance branch; ``fraction`` for ordinary CFG, 1
                for weak guidance.
            guidance: ``cfg`` or ``weak``.
            gain: guidance gain; under weak guidance only where that acts, and there by default
                FlexiDiT's 1/2.5.

        Raises:
            ValueError: a fraction outside [0, 1].
        """
        weak = Mode(weak) if isinstance(weak, int) else weak
        if guide_fraction is None:
            guide_fraction = fraction if guidance == "cfg" else 1.0
        for name, value in (("fraction", fraction), ("guide_fraction", guide_fraction)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}; legal: [0, 1]")
        edges = sorted(
            {1.0, 0.0, round(1 - fraction, 9), round(1 - guide_fraction, 9)}, reverse=True
        )
        segments = []
        for start, stop in zip(edges, edges[1:], strict=False):
            mode = weak if start > 1 - fraction + 1e-9 else FULL
            guide = weak if start > 1 - guide_fraction + 1e-9 else FULL
            acts = guidance == "weak" and guide.is_coarser_than(mode)
            default = WEAK_GUIDANCE_GAIN if acts else 1.0
            scale = gain if gain is not None and (acts or guidance == "cfg") else default
            segments.append(
                Segment(
                    start=start, stop=stop, mode=mode, guide=guide, guidance=guidance, gain=scale
                )
            )
        return cls(segments)

    @classmethod
    def weak_guidance_below(
        cls, level: float, weak: Mode | int = 2, *, gain: float = WEAK_GUIDANCE_GAIN
    ) -> Schedule:
        """Full mode throughout: ordinary CFG at high noise levels, weak-model guidance below.

        What plans are compared with where weak guidance is the better target: it fails where the
        class is decided, at the highest levels (`ditdial.plan.calibration`).

        Args:
            level: where weak guidance begins; in [0, 1].
            weak: mode of the guidance branch below it, or its patch scale.
            gain: guidance gain below it.

        Raises:
            ValueError: a level outside [0, 1].
        """
        if not 0 <= level <= 1:
            raise ValueError(f"level = {level}; legal: [0, 1]")
        weak = Mode(weak) if isinstance(weak, int) else weak
        segments = [Segment(start=1, stop=level)] if level < 1 else []
        if level > 0:
            segments.append(Segment(start=level, stop=0, guide=weak, guidance="weak", gain=gain))
        return cls(segments)

    @classmethod
    def of_steps(cls, levels: Sequence[float], choices: Sequence[Segment]) -> Schedule:
        """What each step of a run chooses, with edges half way between their levels.

        Args:
            levels: of the steps, falling.
            choices: one for each; their own ends do not count.
        """
        segments, start, last = [], 1.0, len(levels) - 1
        for step, choice in enumerate(choices):
            own = replace(choice, start=1, stop=0)
            if step < last and replace(choices[step + 1], start=1, stop=0) == own:
                continue
            stop = 0.0 if step == last else (levels[step] + levels[step + 1]) / 2
            segments.append(replace(choice, start=start, stop=stop))
            start = stop
        return cls(segments)

    def between(self, start: float, stop: float) -> tuple[Segment, ...]:
        """The segments of a stretch of noise levels, cut off at its ends."""
        return tuple(
            replace(segment, start=min(segment.start, start), stop=max(segment.stop, stop))
            for segment in self.segments
            if segment.stop < start and segment.start > stop
        )

    def at(self, level: float) -> Segment:
        """The segment of a noise level; levels beyond [0, 1] belong to the nearest end."""
        for segment in self.segments:
            if level >= segment.stop:
                return segment
        return self.segments[-1]

    @property
    def modes(self) -> set[Mode]:
        """Every mode the schedule can ask for."""
        return set().union(*(segment.modes for segment in self.segments))

    def to_json(self) -> str:
        """Plain JSON; the inverse of `from_json`."""
        rows = [
            {
                "start": s.start,
                "stop": s.stop,
                "mode": s.mode.name,
                "guide": s.guide_mode.name,
                "guidance": s.guidance,
                "gain": s.gain,
            }
            for s in self.segments
        ]
        return json.dumps({"segments": rows})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read a schedule.

        Raises:
            ValueError: not JSON, unknown keys or modes, gaps, values out of range.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"schedule is not valid JSON: {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("segments"), list):
            raise ValueError("schedule JSON must be an object with a list 'segments'")
        return cls([_segment_from(row) for row in data["segments"]])


def _segment_from(row: Any) -> Segment:
    legal = {"start", "stop", "mode", "guide", "guidance", "gain"}
    if not isinstance(row, dict) or set(row) - legal or not {"start", "stop", "mode"} <= set(row):
        raise ValueError(
            f"schedule segment {row!r}; legal: start, stop, mode and optionally guide, guidance, "
            "gain"
        )
    for key in ("start", "stop", "gain"):
        if key in row and (isinstance(row[key], bool) or not isinstance(row[key], int | float)):
            raise ValueError(f"schedule segment: {key} = {row[key]!r}; legal: a number")
    guide = row.get("guide")
    return Segment(
        start=row["start"],
        stop=row["stop"],
        mode=Mode.parse(str(row["mode"])),
        guide=None if guide is None else Mode.parse(str(guide)),
        guidance=row.get("guidance", "cfg"),
        gain=row.get("gain", 1.0),
    )
