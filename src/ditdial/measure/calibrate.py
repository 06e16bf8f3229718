"""Measure a calibration: real runs of a pipeline, with onlookers that try the other choices.

The pipeline samples the reference, and at every call `ditdial.measure.onlookers` find out what each
choice would have made of the same latents. What a choice does to the final latents takes runs of
its own, band by band of noise levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ditdial.adapter import identity
from ditdial.host.parametrization import Parametrization, parametrization
from ditdial.measure.onlookers import Clock, Errors, Onlooker, final_latents, modes_of, observed
from ditdial.measure.provenance import provenance
from ditdial.plain.checks import require
from ditdial.plain.kinds import checked_fields
from ditdial.plan.budget import pairings
from ditdial.plan.calibration import Band, Calibration
from ditdial.plan.choice import Choice
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.reference_schedule import as_choices, check_stretches
from ditdial.plan.schedule import Schedule, Segment
from ditdial.plan.seconds import Seconds
from ditdial.runtime.engine import Engine
from ditdial.runtime.low_band import one_high_band

NOISE_POINTS = 101
"""Entries of the table from noise level to ``u``: ten of 1000 training steps apart."""

Sample = Callable[[int], object]
"""``sample(n)`` calls the pipeline for batch ``n``, which is the same each time it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What to measure; the first two arguments matter.

    Args:
        guidance_scale: that the samples call the pipeline with; 1 for none.
        batches: how many there are.
        choices: ways to run a step, the first of which is what a whole budget buys; every pair of
            modes with a guide as coarse or coarser by default, with weak guidance beside ordinary
            guidance where the reference uses it, and what else the reference does.
        reference: what runs, and what the choices are compared with at each noise level, in terms
            of the choices; the first one throughout by default.
        bands: stretches of noise levels in which to also measure what each choice does to the final
            latents; each takes one more run of all batches per choice. They are also cut where the
            reference changes.
        rounds: timed calls per mode.
        data: what the batches are (seeds, prompts), kept with the numbers.
        command: that measures, for the record; the process's own by default.

    Raises:
        ValueError: a number out of range, or a reference that is no schedule.
    """

    guidance_scale: float
    batches: int = 1
    choices: Sequence[Choice] | None = None
    reference: Schedule | None = None
    bands: int = 0
    rounds: int = 5
    data: dict[str, Any] | None = None
    command: str | None = None

    @checked_fields
    def __post_init__(self) -> None:
        fits = 0 <= self.guidance_scale < float("inf")
        require(fits, "guidance_scale", self.guidance_scale, "a number >= 0")
        require(self.batches >= 1, "batches", self.batches, ">= 1")
        require(self.bands >= 0, "bands", self.bands, ">= 0")
        require(self.rounds >= 1, "rounds", self.rounds, ">= 1")
        fits = self.reference is None or isinstance(self.reference, Schedule)
        legal = "a Schedule, or None for the first choice throughout"
        require(fits, "reference", self.reference, legal)

    def choices_of(self, modes: Sequence[Mode]) -> tuple[Choice, ...]:
        """The choices for the modes at hand: of the kinds of guidance that the reference mixes."""
        if self.choices is not None:
            return tuple(self.choices)
        stretches = () if self.reference is None else self.reference.segments
        weak = any(stretch.weak_guidance for stretch in stretches)
        usual = list(pairings(modes, "both" if weak else "cfg"))
        for stretch in stretches:
            if not any(choice.runs_as(stretch) for choice in usual):
                usual.append(stretch.choice)
        guided = self.guidance_scale != 1
        return tuple(x for x in usual if guided or x.guide_mode == x.mode)


def calibrate(
    engine: Engine, model: nn.Module, pipe: Any, sample: Sample, measuring: Measuring
) -> Calibration:
    """Measure what each choice loses at each noise level, and what each mode takes on this device.

    Args:
        engine, model: the elastic model.
        pipe: the pipeline it is part of.
        sample: calls the pipeline for a batch.
        measuring: what to measure.

    Raises:
        ValueError: a choice the adapter lacks a mode for, a reference that is none of the choices
            somewhere or changes more often than the runs call the model, a pipeline whose
            predictions are not understood, a guidance scale that the runs do not fit, more bands
            than steps, or a step cache that is on.
    """
    choices = measuring.choices_of((FULL, *engine.chooser.modes))
    _check(engine, model, choices)
    reference = as_choices(measuring.reference, choices)
    told = parametrization(pipe)
    mixed = functools.partial(one_high_band, engine.wiring)
    errors = Errors(choices, reference, measuring.guidance_scale, told, mixed)
    onlooker = Onlooker(engine, pipe, errors)
    clock = Clock(engine, pipe, modes_of(choices), measuring.rounds)
    finals: list[Tensor] = []
    with observed(engine, reference, clock, onlooker), final_latents(pipe) as final:
        for batch in range(measuring.batches):
            onlooker.waiting.clear()
            sample(batch)
            _check_runs(onlooker)
            legal = f"at most one per step ({len(errors.sums)})"
            require(measuring.bands <= len(errors.sums), "bands", measuring.bands, legal)
            finals += final
    points = errors.points()
    assert clock.seconds is not None
    calibration = Calibration(
        base=engine.wiring.backbone.identity(model),
        method=identity(engine.method),
        guidance_scale=measuring.guidance_scale,
        choices=choices,
        noise=noise_table(told),
        points=points,
        reference=reference,
        seconds=(clock.seconds,),
        data={"pictures": errors.pictures, "steps": len(points), **(measuring.data or {})},
        provenance=provenance(measuring.command),
    )
    if not measuring.bands:
        return calibration
    bands = _measure_bands(engine, pipe, sample, calibration, finals, measuring.bands)
    return replace(calibration, bands=bands)


def time_modes(
    engine: Engine, model: nn.Module, pipe: Any, sample: Sample, *, rounds: int = 5
) -> Seconds:
    """What each mode takes on this device, with the batch that ``sample(0)`` makes.

    Args:
        engine, model, pipe, sample: as in `calibrate`; a model by itself has no pipeline (None).
        rounds: timed calls per mode.

    Raises:
        ValueError: no rounds, a batch without calls of the model, or a step cache that is on.
    """
    modes = (FULL, *engine.chooser.modes)
    _check(engine, model, [Choice(mode=mode) for mode in modes])
    clock = Clock(engine, pipe, modes, rounds)
    with observed(engine, Schedule.constant(), clock):
        sample(0)
    if clock.seconds is None:
        raise ValueError("sample(0) made no call of the elastic model; nothing to time")
    return clock.seconds


def noise_table(told: Parametrization) -> tuple[float, ...]:
    """``u = s / (alpha + s)`` at evenly spaced noise levels from 0 to 1."""
    scales = [told.scales(level) for level in np.linspace(0, 1, NOISE_POINTS).tolist()]
    return tuple(s / (alpha + s) for alpha, s in scales)


def _check(engine: Engine, model: nn.Module, choices: Sequence[Choice]) -> None:
    """Refuse choices that the adapter has no mode for, and a cache that would skip calls."""
    known = (FULL, *engine.chooser.modes)
    unknown = sorted(mode.name for mode in set(modes_of(choices)) - set(known))
    if unknown or not choices:
        legal = ", ".join(mode.name for mode in known)
        raise ValueError(f"choices ask for {unknown or 'nothing'}; legal for this adapter: {legal}")
    if getattr(model, "is_cache_enabled", False):
        raise ValueError("a step cache is on, which skips calls; legal: disable_cache() first")


def _check_runs(onlooker: Onlooker) -> None:
    """Refuse runs that are not what the guidance scale says, or that miss a stretch."""
    errors = onlooker.errors
    if not errors.sums or onlooker.guided != (errors.scale != 1):
        made = "guidance calls" if onlooker.guided else "no guidance calls"
        made = made if onlooker.calls else "no calls of the elastic model"
        raise ValueError(
            f"guidance_scale = {errors.scale}, and the runs made {made}; legal: the scale that the "
            "pipeline is called with, 1 for no guidance"
        )
    check_stretches(errors.reference, sorted(errors.sums, reverse=True))


@dataclass(frozen=True)
class _Stretch:
    """A band before it is measured: its ends, and what its steps cover of ``u``."""

    start: float
    stop: float
    width: float


def _measure_bands(
    engine: Engine,
    pipe: Any,
    sample: Sample,
    calibration: Calibration,
    finals: list[Tensor],
    count: int,
) -> tuple[Band, ...]:
    """Final latents with each choice in one band of noise levels, against those without."""
    reference, bands = calibration.reference, []
    for stretch in _stretches(calibration, count):
        above = reference.between(1.0, stretch.start)
        below = reference.between(stretch.stop, 0.0)
        rates = []
        for choice in calibration.choices:
            own = Segment.of(choice, stretch.start, stretch.stop)
            if reference.between(stretch.start, stretch.stop) == (own,):
                rates.append(0.0)
                continue
            error, schedule = 0.0, Schedule([*above, own, *below])
            with observed(engine, schedule), final_latents(pipe) as final:
                for batch, full in enumerate(finals):
                    sample(batch)
                    error += (final[0].float() - full.float()).square().mean().item()
            rates.append(error / len(finals) / stretch.width)
        bands.append(Band(start=stretch.start, stop=stretch.stop, rates=tuple(rates)))
    return tuple(bands)


def _stretches(calibration: Calibration, count: int) -> Iterator[_Stretch]:
    """As many bands of nearly as many steps each, cut once more where the reference changes."""
    levels = [point.level for point in calibration.points]
    width = -np.diff(calibration.u(levels), append=0.0)
    # The reference changes before these steps; each of its stretches has at least one.
    changes = {
        next(step for step, level in enumerate(levels) if level < stretch.stop): stretch.stop
        for stretch in calibration.reference.segments[:-1]
    }
    even = {int(part[0]) for part in np.array_split(np.arange(len(levels)), count)} - {0}
    cuts = sorted({*even, *changes})
    inner = [changes.get(step, (levels[step - 1] + levels[step]) / 2) for step in cuts]
    edges = [1.0, *inner, 0.0]
    for start, stop, part in zip(edges, edges[1:], np.split(width, cuts), strict=False):
        yield _Stretch(start, stop, float(part.sum()))
