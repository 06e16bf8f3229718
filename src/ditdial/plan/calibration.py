"""What each choice loses at each noise level, measured once, good for any run of the model.

At signal scale ``alpha`` and noise scale ``s`` let ``u = s / (alpha + s)``, the level of the same
ratio on the straight path of rectified flow: 1 is noise, 0 is data, whatever the schedule. Compare
two stochastic samplers whose predictions of the clean latent have the squared difference ``D``. By
Girsanov's theorem the divergence of the distributions of their paths grows, as ``u`` falls, like

    dKL = (1 - u) / u^3 D du = 1/2 D dSNR,    SNR = (1 - u)^2 / u^2,

which weighs the squared error as the continuous-time loss of variational diffusion models does
(Kingma et al. 2107.00630). It adds up over the steps. So the damage of a plan is a sum, a frontier
over plans is exact (`ditdial.plan.frontier`), and neither the number of steps nor the scheduler of
the measurement matters: only the error at each level does. Damage is told per number of the latent
(errors are means), so it does not grow with the picture.

The second sampler is the *reference*, whose path the measured runs follow. Girsanov's theorem asks
nothing of it: it may be one choice throughout, such as the base with full guidance, or another at
each noise level. That matters where kinds of guidance are mixed. Weak-model guidance aims at other
pictures than ordinary guidance does; measured against the latter it is charged for the distance of
the two aims, which no error of any mode has made. The reference says which aim is meant where.

Shape legend: S steps, K choices.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditdial.plan.budget import CRITERIA
from ditdial.plan.choice import Choice
from ditdial.plan.mode import Mode
from ditdial.plan.schedule import Schedule, Segment
from ditdial.plan.seconds import Seconds

FORMAT = 1
FILE = "calibration.json"
"""Name of the file in an adapter folder."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Mean squared errors of the predicted clean latent at one noise level.

    Args:
        level: in the network's own time, 1 for noise and 0 for data.
        step_error: of the guided prediction, for each choice.
        branch_error: of the conditional branch by itself, for each of its modes.
    """

    level: float
    step_error: tuple[float, ...]
    branch_error: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Band:
    """What a choice does to the final latents where only some noise levels use it.

    Args:
        start, stop: of the levels, ``stop <= level < start``.
        rates: mean squared difference to the reference's run with the same seed, for each choice,
            per unit of ``u`` that the band covers.
    """

    start: float
    stop: float
    rates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A measurement, good for one base with one adapter at one guidance scale.

    Args:
        base: identity of the base, as its backbone tells it.
        method: ``name`` and ``settings`` of the method.
        guidance_scale: it was measured at; 1 is without guidance.
        choices: ways to run a step. The first is what a whole budget buys.
        reference: what errors are differences to at each noise level, one of the choices; the first
            of them throughout by default.
        noise: ``u`` at evenly spaced noise levels from 0 to 1.
        points: errors at falling noise levels.
        bands: what was measured of final latents, from noise to data; may be empty.
        seconds: at most one entry per device.
        data, provenance: what it was measured on, with which command, commit and machine.

    Raises:
        ValueError: numbers that are negative or not finite, or that do not fit together; a
            reference that is none of the choices somewhere, or changes where nothing was measured.
    """

    base: Mapping[str, Any]
    method: Mapping[str, Any]
    guidance_scale: float
    choices: tuple[Choice, ...]
    noise: tuple[float, ...]
    points: tuple[Point, ...]
    reference: Schedule = None  # pyrefly: ignore[bad-assignment]  # until __post_init__
    bands: tuple[Band, ...] = ()
    seconds: tuple[Seconds, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("base", "method", "data", "provenance"):  # as they come back from a file
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        _check_order("points", [point.level for point in self.points])
        _check_order("noise", list(reversed(self.noise)), equal=True)
        if len(set(self.choices)) != len(self.choices) or not self.choices:
            raise ValueError(f"choices = {self.names}; legal: at least one, all different")
        object.__setattr__(self, "reference", as_choices(self.reference, self.choices))
        check_stretches(self.reference, [point.level for point in self.points])
        modes = [mode.name for mode in self.conditional]
        for point in self.points:
            at, own = f"at level {point.level}", self.reference.at(point.level)
            _check_errors(f"step_error {at}", point.step_error, self.names, own.name)
            _check_errors(f"branch_error {at}", point.branch_error, modes, own.mode.name)
        starts, stops = [b.start for b in self.bands], [b.stop for b in self.bands]
        falls = all(band.stop < band.start for band in self.bands)
        if self.bands and not (falls and [*starts, 0] == [1, *stops]):
            raise ValueError(
                f"bands from {starts} to {stops}; legal: 1 to 0 without gap or overlap"
            )
        for band in self.bands:
            parts = self.reference.between(band.start, band.stop)
            if len(parts) > 1:
                raise ValueError(
                    f"band from {band.start} to {band.stop}; legal: one that ends at "
                    f"{parts[0].stop}, where the reference changes"
                )
            own = parts[0].name
            _check_errors(f"rates of band {band.start}", band.rates, self.names, own)
        devices = [each.device for each in self.seconds]
        if len(set(devices)) != len(devices):
            raise ValueError(f"seconds of {devices}; legal: one entry per device")

    @property
    def modes(self) -> set[Mode]:
        """Every mode that a choice needs."""
        return set().union(*(choice.modes for choice in self.choices))

    @property
    def conditional(self) -> tuple[Mode, ...]:
        """Modes of the conditional branch."""
        return tuple(dict.fromkeys(choice.mode for choice in self.choices))

    @property
    def names(self) -> list[str]:
        """Of the choices."""
        return [choice.name for choice in self.choices]

    def u(self, levels: Sequence[float]) -> NDArray[np.float64]:
        """``s / (alpha + s)`` at noise levels, ``(S,)``."""
        return np.interp(levels, np.linspace(0, 1, len(self.noise)), self.noise)

    def errors(self, levels: Sequence[float], *, guided: bool = True) -> NDArray[np.float64]:
        """Squared errors at noise levels, ``(S, K)``: linear in their logarithm between points.

        Points on the other side of a change of the reference are not used: they are differences to
        something else.

        Args:
            guided: of the guided prediction, for each choice; else of the conditional branch, for
                each of its modes.
        """
        name = "step_error" if guided else "branch_error"
        found = np.empty((len(levels), len(getattr(self.points[0], name))))
        for stretch in self.reference.segments:
            points = [x for x in self.points[::-1] if self.reference.at(x.level) is stretch]
            inside = [step for step, x in enumerate(levels) if self.reference.at(x) is stretch]
            known = np.array([getattr(point, name) for point in points])
            logs = np.log(np.maximum(known, np.finfo(float).tiny))
            at, asked = [point.level for point in points], [levels[step] for step in inside]
            between = np.exp(np.stack([np.interp(asked, at, log) for log in logs.T], axis=1))
            # The reference's own choice has no error anywhere.
            found[inside] = np.where(known.any(axis=0), between, 0.0)
        return found

    def damage(
        self, levels: Sequence[float], *, criterion: str = "path", guided: bool = True
    ) -> NDArray[np.float64]:
        """What each choice does at each step of a run, ``(S, K)``.

        Args:
            levels: noise levels of the run's steps, falling; the last step ends at ``u = 0``.
            criterion: ``path`` for the divergence of the sampling path, ``picture`` for the change
                of the final latents.
            guided: whether the run has a guidance branch. For one without, K counts the modes of
                the conditional branch.

        Raises:
            ValueError: levels that rise, or a criterion that was not measured.
        """
        _check_order("levels", levels, equal=True)
        u = self.u(levels)
        width = u - np.append(u[1:], 0.0)
        if criterion == "path":
            # At u = 1 there is no signal yet; u = 0 has no step after it.
            rate = np.divide(1 - u, u**3, out=np.zeros_like(u), where=u > 0)
            return (rate * width)[:, None] * self.errors(levels, guided=guided)
        if criterion != "picture":
            raise ValueError(f"criterion = {criterion!r}; legal: {', '.join(map(repr, CRITERIA))}")
        if not self.bands or (not guided and self.guidance_scale != 1):
            raise ValueError(
                "criterion = 'picture', which this calibration has not measured"
                f"{'' if not self.bands else ' without guidance'}; legal: 'path'"
            )
        rates = np.array([next(b for b in self.bands if x >= b.stop).rates for x in levels])
        return width[:, None] * rates

    def seconds_on(self, device: str) -> Seconds:
        """What was measured on a device.

        Raises:
            ValueError: nothing was; the message says how to.
        """
        for each in self.seconds:
            if each.device == device:
                return each
        known = ", ".join(repr(each.device) for each in self.seconds) or "no device"
        raise ValueError(
            f"this calibration has seconds of {known}, and this is {device!r}; measure them here "
            "with handle.calibrate(..., only_seconds=True) or ditdial calibrate --only-seconds"
        )

    def with_seconds(self, seconds: Seconds) -> Calibration:
        """The same with seconds of one more device, or new ones of a known device."""
        others = (each for each in self.seconds if each.device != seconds.device)
        return replace(self, seconds=(*others, seconds))

    def check(self, base: Mapping[str, Any], method: Mapping[str, Any]) -> None:
        """Refuse a calibration of another base or method.

        Raises:
            ValueError: naming each fact that differs.
        """
        pairs = {"base": (self.base, base), "method": (self.method, method)}
        differing = []
        for name, (own, other) in pairs.items():
            other = json.loads(json.dumps(other))
            differing += [
                f"{name} {key}: calibration {own.get(key)!r}, here {other.get(key)!r}"
                for key in sorted({*own, *other})
                if own.get(key) != other.get(key)
            ]
        if differing:
            raise ValueError("the calibration is of another model; " + "; ".join(differing))

    def to_json(self) -> str:
        """Plain JSON; the inverse of `from_json`."""
        choices = [
            {
                **asdict(choice),
                "mode": choice.mode.name,
                "guide": choice.guide and choice.guide.name,
            }
            for choice in self.choices
        ]
        data = {"format": FORMAT, **asdict(self), "choices": choices}
        if self.reference == as_choices(None, self.choices):
            del data["reference"]
        else:
            data["reference"] = json.loads(self.reference.to_json())
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read a calibration.

        Raises:
            ValueError: not JSON, another format, missing or unknown entries, numbers out of range.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"calibration is not valid JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else data
            raise ValueError(f"calibration: format = {found!r}; legal: {FORMAT}")
        del data["format"]
        if "reference" in data:
            try:
                data["reference"] = Schedule.from_json(json.dumps(data["reference"]))
            except ValueError as error:
                raise ValueError(f"calibration: reference: {error}") from error
        try:
            rows = {name: data[name] for name in ("choices", "points", "bands", "seconds")}
            return cls(
                **{k: v for k, v in data.items() if k not in ("format", "noise", *rows)},
                noise=tuple(data["noise"]),
                choices=tuple(_choice(**row) for row in rows["choices"]),
                points=tuple(Point(**_tuples(row)) for row in rows["points"]),
                bands=tuple(Band(**_tuples(row)) for row in rows["bands"]),
                seconds=tuple(Seconds(**row) for row in rows["seconds"]),
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"calibration has missing, unknown or wrong entries: {error!r}"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write a file, or `FILE` in a folder; complete or not at all."""
        path = Path(path).expanduser()
        path = path / FILE if path.is_dir() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(self.to_json() + "\n")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is not understood.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"calibration {str(path)!r} does not exist")
        try:
            return cls.from_json(path.read_text())
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error


def as_choices(reference: Schedule | None, choices: Sequence[Choice]) -> Schedule:
    """A reference in the words of the choices, in as few stretches as it takes.

    Args:
        reference: None for the first choice throughout.

    Raises:
        ValueError: a schedule that somewhere is none of the choices.
    """
    if reference is None:
        return Schedule.throughout(choices[0])
    segments: list[Segment] = []
    for segment in reference.segments:
        choice = next((choice for choice in choices if choice.runs_as(segment)), None)
        if choice is None:
            raise ValueError(
                f"reference = {segment.name!r} from noise level {segment.start} to "
                f"{segment.stop}; legal: one of the choices "
                f"({', '.join(repr(choice.name) for choice in choices)})"
            )
        start = segment.start
        if segments and segments[-1].choice == choice:
            start = segments.pop().start
        segments.append(Segment.of(choice, start, segment.stop))
    return Schedule(segments)


def check_stretches(reference: Schedule, levels: Sequence[float]) -> None:
    """Refuse a reference that was not measured throughout.

    Raises:
        ValueError: a stretch of it without any of the levels.
    """
    for stretch in reference.segments:
        if not any(reference.at(level) is stretch for level in levels):
            raise ValueError(
                f"reference = {stretch.name!r} from noise level {stretch.start} to "
                f"{stretch.stop}, where nothing was measured; legal: stretches with at least one "
                f"of the levels {', '.join(f'{level:.3g}' for level in levels)}"
            )


def _choice(mode: str, guide: str | None, **others: Any) -> Choice:
    parsed = None if guide is None else Mode.parse(guide)
    return Choice(mode=Mode.parse(mode), guide=parsed, **others)


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    """Lists as they come from a file, as the records have them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def _check_order(name: str, levels: Sequence[float], *, equal: bool = False) -> None:
    """Refuse noise levels that are none or do not fall."""
    falls = all(a > b or (equal and a == b) for a, b in zip(levels, levels[1:], strict=False))
    if not len(levels) or not falls or not (levels[0] <= 1 and levels[-1] >= 0):
        raise ValueError(f"{name} = {list(levels)}; legal: falling noise levels in [0, 1]")


def _check_errors(name: str, errors: Sequence[float], names: Sequence[str], own: str) -> None:
    """Refuse errors that are not one for each name, or not 0 for the reference's own."""
    fits = len(errors) == len(names) and all(0 <= error < math.inf for error in errors)
    if not fits or errors[names.index(own)]:
        raise ValueError(f"{name} = {errors}; legal: {len(names)} numbers >= 0, that of {own} 0")
