"""A calibration: what each choice loses at each noise level, measured once, good for any run.

It holds errors, as plain data; what they do to a run, its damage, is `ditdial.plan.damage`.

Errors are differences to a reference (`ditdial.plan.reference_schedule`), whose path the measured
runs follow.

Shape legend: S steps, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditdial.plain import json_files
from ditdial.plain.checks import one_of, require
from ditdial.plan.budget import CRITERIA
from ditdial.plan.choice import Choice
from ditdial.plan.damage import between_points, path_damage, widths
from ditdial.plan.mode import Mode
from ditdial.plan.reference_schedule import as_choices, check_stretches
from ditdial.plan.schedule import Schedule
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
        for name in ("base", "method", "data", "provenance"):
            value = getattr(self, name)
            require(isinstance(value, Mapping), name, value, "names with their values")
            object.__setattr__(self, name, json_files.plain(value))
        if len(set(self.choices)) != len(self.choices) or not self.choices:
            raise ValueError(f"choices = {self.names}; legal: at least one, all different")
        object.__setattr__(self, "reference", as_choices(self.reference, self.choices))
        _check_order("noise", list(reversed(self.noise)), equal=True)
        self._check_points()
        self._check_bands()
        devices = [each.device for each in self.seconds]
        if len(set(devices)) != len(devices):
            raise ValueError(f"seconds of {devices}; legal: one entry per device")

    def _check_points(self) -> None:
        """Refuse points that do not fall, or whose errors do not fit the choices."""
        levels = [point.level for point in self.points]
        _check_order("points", levels)
        check_stretches(self.reference, levels)
        modes = [mode.name for mode in self.conditional]
        for point in self.points:
            at, own = f"at level {point.level}", self.reference.at(point.level)
            _check_errors(f"step_error {at}", point.step_error, self.names, own.name)
            _check_errors(f"branch_error {at}", point.branch_error, modes, own.mode.name)

    def _check_bands(self) -> None:
        """Refuse bands that leave noise levels out, or go across a change of the reference."""
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
            _check_errors(f"rates of band {band.start}", band.rates, self.names, parts[0].name)

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
            known = [getattr(point, name) for point in points]
            asked = [levels[step] for step in inside]
            found[inside] = between_points(asked, [point.level for point in points], known)
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
        one_of("criterion", criterion, CRITERIA)
        u = self.u(levels)
        if criterion == "path":
            return path_damage(u, self.errors(levels, guided=guided))
        if not self.bands or (not guided and self.guidance_scale != 1):
            raise ValueError(
                "criterion = 'picture', which this calibration has not measured"
                f"{'' if not self.bands else ' without guidance'}; legal: 'path'"
            )
        rates = np.array([next(b for b in self.bands if x >= b.stop).rates for x in levels])
        return widths(u)[:, None] * rates

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
            other = json_files.plain(other)
            differing += [
                f"{name} {key}: calibration {own.get(key)!r}, here {other.get(key)!r}"
                for key in sorted({*own, *other})
                if own.get(key) != other.get(key)
            ]
        if differing:
            raise ValueError("the calibration is of another model; " + "; ".join(differing))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the inverse of `from_dict`. A reference that goes without saying is none."""
        data: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        data["choices"] = [choice.to_dict() for choice in self.choices]
        data["reference"] = self.reference.to_dict()
        if self.reference == as_choices(None, self.choices):
            del data["reference"]
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Calibration:
        """A calibration from plain data.

        Raises:
            ValueError: another format, missing or unknown entries, numbers out of range.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else data
            raise ValueError(f"calibration: format = {found!r}; legal: {FORMAT}")
        made = {"choices": Choice.from_dict, "points": _point, "bands": _band, "seconds": _seconds}
        facts: dict[str, Any] = {
            key: value for key, value in data.items() if key not in ("format", "reference")
        }
        if "reference" in data:
            try:
                facts["reference"] = Schedule.from_dict(data["reference"])
            except ValueError as error:
                raise ValueError(f"calibration: reference: {error}") from error
        try:
            for name, make in made.items():
                facts[name] = tuple(make(row) for row in facts[name])
            facts["noise"] = tuple(facts["noise"])
            return cls(**facts)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"calibration has missing, unknown or wrong entries: {error!r}"
            ) from error

    def to_json(self) -> str:
        """`to_dict` as JSON; the inverse of `from_json`."""
        return json_files.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read a calibration.

        Raises:
            ValueError: not JSON, or what `from_dict` refuses.
        """
        return json_files.loads(text, "calibration", cls.from_dict)

    def save(self, path: str | Path) -> Path:
        """Write a ``.json`` file, or `FILE` in a folder; complete or not at all.

        Returns:
            The file.
        """
        return json_files.write(_file(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a ``.json`` file, or `FILE` in a folder.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is not understood.
        """
        return json_files.read(_file(path), "calibration", cls.from_dict)


def _file(path: str | Path) -> Path:
    """The file of a calibration: a path that is no ``.json`` file is a folder, there or not."""
    path = Path(path).expanduser()
    is_file = path.is_file() or (path.suffix == ".json" and not path.is_dir())
    return path if is_file else path / FILE


def _point(row: dict[str, Any]) -> Point:
    return Point(**_tuples(row))


def _band(row: dict[str, Any]) -> Band:
    return Band(**_tuples(row))


def _seconds(row: dict[str, Any]) -> Seconds:
    return Seconds(**row)


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
