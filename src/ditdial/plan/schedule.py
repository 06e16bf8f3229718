"""Schedules say which mode runs at which noise level (sigma, for flow-matching models).

A schedule never speaks of step numbers, so it means the same for 10 steps and for 250 (FlexiDiT
section 3.3: weak first, then powerful). `ditdial.plan.plan` binds it to the steps of one run.

A noise level is the network's own time, scaled to [0, 1]: 1 is pure noise, 0 is data. A scheduler
of diffusers tells it in two ways, by its ``timesteps`` and by its ``sigmas``:

- Flow matching (SD3, FLUX, Wan, ...): the noise level *is* sigma, after the scheduler's shift, and
  ``timesteps`` are ``num_train_timesteps`` (1000) times sigma. A noisy latent is ``(1 - sigma) *
  data + sigma * noise``.
- Variance preserving (DiT, PixArt, ...): the noise level is ``timesteps / num_train_timesteps``.
  ``sigmas``, where such a scheduler has them, are noise over signal, ``sqrt((1 - a) / a)`` for an
  ``a`` of ``alphas_cumprod``, and reach far above 1. They are not what a schedule speaks of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ditdial.plain import json_files
from ditdial.plain.checks import require
from ditdial.plain.kinds import check_kind, checked
from ditdial.plain.tables import Table
from ditdial.plan.choice import WEAK_GUIDANCE_GAIN, Choice, is_number
from ditdial.plan.mode import FULL, Mode


@dataclass(frozen=True, kw_only=True)
class Segment(Choice):
    """A choice for one stretch of noise levels, ``stop <= level < start``.

    Args:
        start: where the stretch begins; 1 includes the levels above it.
        stop: where it ends, the lower level.
        mode, guide, guidance, gain: as in `Choice`.

    Raises:
        ValueError: noise levels out of range, or what `Choice` refuses.
    """

    start: float
    stop: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("start", self.start), ("stop", self.stop)):
            if not is_number(value):
                raise ValueError(f"{name} = {value!r}; legal: a number")
        if not 0 <= self.stop < self.start <= 1:
            raise ValueError(
                f"segment from {self.start} to {self.stop}; legal: 0 <= stop < start <= 1"
            )

    @classmethod
    def of(cls, choice: Choice, start: float, stop: float) -> Segment:
        """A choice for a stretch of noise levels; of another segment, what that chooses."""
        return cls(start=start, stop=stop, **_facts(choice))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the inverse of `from_dict`."""
        return {"start": self.start, "stop": self.stop, **super().to_dict()}

    @property
    def choice(self) -> Choice:
        """What it chooses, without the noise levels."""
        return Choice(**_facts(self))


def _facts(choice: Choice) -> dict[str, Any]:
    return {each.name: getattr(choice, each.name) for each in fields(Choice)}


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
        require(isinstance(segments, Iterable), "segments", segments, "Segments in a list")
        ordered = tuple(segments)
        for segment in ordered:
            if not isinstance(segment, Segment):
                raise ValueError(
                    f"segments hold {segment!r}; legal: Segment(start=, stop=, mode=, ...)"
                )
        if not ordered:
            raise ValueError("segments is empty; legal: a schedule needs at least one segment")
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
    @checked
    def constant(
        cls, mode: Mode = FULL, *, guide: Mode | None = None, guidance: str = "cfg"
    ) -> Schedule:
        """One mode at every noise level."""
        return cls.throughout(Choice(mode=mode, guide=guide, guidance=guidance))

    @classmethod
    @checked
    def throughout(cls, choice: Choice) -> Schedule:
        """One choice at every noise level."""
        return cls([Segment.of(choice, 1, 0)])

    @classmethod
    @checked
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
        weak = _weak(weak)
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
    @checked
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
        weak = _weak(weak)
        segments = [Segment(start=1, stop=level)] if level < 1 else []
        if level > 0:
            segments.append(Segment(start=level, stop=0, guide=weak, guidance="weak", gain=gain))
        return cls(segments)

    @classmethod
    @checked
    def of_steps(cls, levels: Sequence[float], choices: Sequence[Choice]) -> Schedule:
        """What each step of a run chooses, with edges half way between their noise levels.

        Args:
            levels: of the steps, falling.
            choices: one for each.

        Raises:
            ValueError: no levels, or not a choice for each.
        """
        fits = 0 < len(levels) == len(choices)
        require(fits, "choices", choices, f"one for each of the levels ({len(levels)})")
        segments, start, last = [], 1.0, len(levels) - 1
        for step, choice in enumerate(choices):
            if step < last and choices[step + 1] == choice:
                continue
            stop = 0.0 if step == last else (levels[step] + levels[step + 1]) / 2
            segments.append(Segment.of(choice, start, stop))
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
        check_kind("level", level, float)
        for segment in self.segments:
            if level >= segment.stop:
                return segment
        return self.segments[-1]

    @property
    def modes(self) -> set[Mode]:
        """Every mode the schedule can ask for."""
        return set().union(*(segment.modes for segment in self.segments))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the inverse of `from_dict`."""
        return {"segments": [segment.to_dict() for segment in self.segments]}

    @classmethod
    def from_dict(cls, data: Any) -> Schedule:
        """A schedule from plain data.

        Raises:
            ValueError: unknown entries or modes, gaps, values out of range.
        """
        if not isinstance(data, dict) or not isinstance(data.get("segments"), list):
            raise ValueError("schedule JSON must be an object with a list 'segments'")
        return cls([Segment.from_dict(row) for row in data["segments"]])

    def to_json(self) -> str:
        """`to_dict` as JSON; the inverse of `from_json`."""
        return json_files.dumps(self.to_dict())

    @classmethod
    @checked
    def from_json(cls, text: str) -> Schedule:
        """Read a schedule.

        Raises:
            ValueError: not JSON, or what `from_dict` refuses.
        """
        return json_files.loads(text, "schedule", cls.from_dict)

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, complete or not at all.

        Returns:
            The file.
        """
        return json_files.write(path, self.to_dict())

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Schedule:
        """Read a JSON file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is not understood.
        """
        return json_files.read(path, "schedule", cls.from_dict)

    @property
    def table(self) -> Table:
        """A row for each stretch of noise levels, from noise to data."""
        rows = [
            (
                f"{segment.start:.4g}",
                f"{segment.stop:.4g}",
                segment.mode.name,
                segment.guide_mode.name if segment.gain else "-",
                "weak" if segment.weak_guidance else "cfg" if segment.gain else "none",
                f"{segment.gain:.3g}",
            )
            for segment in self.segments
        ]
        return Table(
            headings=("from", "to", "mode", "guide", "guidance", "gain"),
            rows=rows,
            below=("from and to are noise levels: 1 is pure noise, 0 is data",),
            least=(6, 6, 8, 8, 9, 6),
        )

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table.html()


def _weak(mode: Mode | int) -> Mode:
    """The weak mode of a schedule, or that of its patch scale."""
    return Mode(mode) if isinstance(mode, int) else Choice(mode=mode).mode
