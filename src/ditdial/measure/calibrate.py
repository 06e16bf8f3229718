"""Measure a calibration: the other modes look on while the real pipeline samples the reference.

At every model call of a run all modes predict from the same inputs, in both branches. For the
predictions c and g of a choice's branches and the pipeline's scale s, what the pipeline makes of
them is ``c + gain (s - 1)(c - g)``; so one prediction per mode and branch tells the error of every
choice. What is compared are the clean latents that the predictions imply, with those of the choice
that the reference makes at this noise level.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditdial.adapter import identity
from ditdial.backbones.call import Call
from ditdial.checks import require
from ditdial.handle import Handle
from ditdial.host.device import device_name
from ditdial.host.parametrization import Parametrization, parametrization
from ditdial.measure.bench import interleave
from ditdial.measure.provenance import provenance
from ditdial.plan.budget import Choice, pairings
from ditdial.plan.calibration import Band, Calibration, Point, as_choices, check_stretches
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule, Segment
from ditdial.plan.seconds import Seconds
from ditdial.runtime.engine import Engine

NOISE_POINTS = 101
"""Entries of the table from noise level to ``u``: ten of 1000 training steps apart."""

Sample = Callable[[int], object]
"""``sample(n)`` calls the pipeline for batch ``n``, which is the same each time it is asked for."""

Visit = Callable[[nn.Module, Call, Any], None]
"""``visit(model, call, output)`` after a model call."""


def calibrate(
    handle: Handle,
    sample: Sample,
    *,
    guidance_scale: float,
    batches: int = 1,
    choices: Sequence[Choice] | None = None,
    reference: Schedule | None = None,
    bands: int = 0,
    rounds: int = 5,
    data: dict[str, Any] | None = None,
    command: str | None = None,
) -> Calibration:
    """Measure what each choice loses at each noise level, and what each mode takes on this device.

    Args:
        sample: calls the pipeline for a batch.
        guidance_scale: that it calls the pipeline with; 1 for none.
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
        ValueError: a number out of range, a choice the adapter lacks a mode for, a reference that
            is none of the choices somewhere or changes more often than the runs call the model, a
            pipeline whose predictions are not understood, a guidance scale that the runs do not
            fit, or a step cache that is on.
    """
    engine, model = handle._live(), handle.model
    require(batches >= 1, "batches", batches, ">= 1")
    require(0 <= guidance_scale < float("inf"), "guidance_scale", guidance_scale, "a number >= 0")
    require(bands >= 0, "bands", bands, ">= 0")
    guided = guidance_scale != 1
    legal = "a Schedule, or None for the first choice throughout"
    require(reference is None or isinstance(reference, Schedule), "reference", reference, legal)
    choices = _usual(handle.modes, reference, guided) if choices is None else tuple(choices)
    _check(handle, choices)
    reference = as_choices(reference, choices)
    told = parametrization(handle._pipe)
    watch = _Watch(engine, choices, reference, guidance_scale, told, rounds)
    finals: list[Tensor] = []
    with _running(engine, reference, watch.visit), _final(handle._pipe) as final:
        for batch in range(batches):
            watch.waiting.clear()
            sample(batch)
            watch.check(guided)
            finals += final
    points = watch.points()
    assert watch.seconds is not None
    calibration = Calibration(
        base=handle.backbone.identity(model),
        method=identity(handle.method),
        guidance_scale=guidance_scale,
        choices=choices,
        noise=noise_table(told),
        points=points,
        reference=reference,
        seconds=(watch.seconds,),
        data={"pictures": watch.pictures, "steps": len(points), **(data or {})},
        provenance=provenance(command),
    )
    if not bands:
        return calibration
    require(bands <= len(points), "bands", bands, f"at most one per step ({len(points)})")
    found = _measure_bands(handle, sample, calibration, finals, bands)
    return replace(calibration, bands=found)


def time_modes(handle: Handle, sample: Sample, *, rounds: int = 5) -> Seconds:
    """What each mode takes on this device, with the batch that ``sample(0)`` makes.

    Raises:
        ValueError: no rounds, or a step cache that is on.
    """
    engine, choices = handle._live(), [Choice(mode=mode) for mode in handle.modes]
    _check(handle, choices)
    full = Schedule.constant()
    watch = _Watch(engine, choices, full, 1.0, None, rounds)
    with _running(engine, full, watch.visit):
        sample(0)
    if watch.seconds is None:
        raise ValueError("sample(0) made no call of the elastic model; nothing to time")
    return watch.seconds


def noise_table(told: Parametrization) -> tuple[float, ...]:
    """``u = s / (alpha + s)`` at evenly spaced noise levels from 0 to 1."""
    scales = [told.scales(level) for level in np.linspace(0, 1, NOISE_POINTS).tolist()]
    return tuple(s / (alpha + s) for alpha, s in scales)


def _usual(modes: Sequence[Mode], reference: Schedule | None, guided: bool) -> tuple[Choice, ...]:
    """The choices for a reference: of the kinds of guidance that it mixes, and its own."""
    stretches = () if reference is None else reference.segments
    weak = any(stretch.weak_guidance for stretch in stretches)
    usual = list(pairings(modes, "both" if weak else "cfg"))
    for stretch in stretches:
        if not any(choice.runs_as(stretch) for choice in usual):
            usual.append(Choice.of(stretch))
    return tuple(x for x in usual if guided or x.segment(1, 0).guide_mode == x.mode)


def _check(handle: Handle, choices: Sequence[Choice]) -> None:
    unknown = set().union(*(choice.segment(1, 0).modes for choice in choices)) - set(handle.modes)
    legal = ", ".join(mode.name for mode in handle.modes)
    names = sorted(mode.name for mode in unknown)
    if unknown or not choices:
        raise ValueError(f"choices ask for {names or 'nothing'}; legal for this adapter: {legal}")
    if getattr(handle.model, "is_cache_enabled", False):
        raise ValueError("a step cache is on, which skips calls; legal: disable_cache() first")


@contextlib.contextmanager
def _running(engine: Engine, schedule: Schedule, visit: Visit) -> Iterator[None]:
    """Run a schedule for a while and look at every call."""
    before = engine.schedule, engine.controller, engine.budget
    run = engine.run

    def observed(model: nn.Module, call: Call) -> Any:
        output = run(model, call)
        visit(model, call, output)
        return output

    engine.schedule, engine.controller, engine.budget = schedule, None, None
    engine.__dict__["run"] = observed
    try:
        yield
    finally:
        del engine.__dict__["run"]
        engine.schedule, engine.controller, engine.budget = before


@contextlib.contextmanager
def _final(pipe: Any) -> Iterator[list[Tensor]]:
    """What the scheduler's last step returned: the final latents of the pipeline's last run."""
    found: list[Tensor] = []
    step = pipe.scheduler.step

    @functools.wraps(step)  # pipelines read its signature
    def kept(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        found[:] = [result[0]]
        return result

    pipe.scheduler.step = kept
    try:
        yield found
    finally:
        del pipe.scheduler.step


@dataclass
class _Watch:
    """Looks at the calls of the reference's runs: sums up errors by level, times the first call.

    Args:
        reference: in the words of the choices.
        told: how to read predictions; None to time only.
    """

    engine: Engine
    choices: Sequence[Choice]
    reference: Schedule
    scale: float
    told: Parametrization | None
    rounds: int
    seconds: Seconds | None = None
    sums: dict[float, Tensor] = field(default_factory=dict)
    rows: dict[float, int] = field(default_factory=dict)
    waiting: dict[bool, tuple[float, Tensor, dict[Mode, Tensor]]] = field(default_factory=dict)
    guided: bool = False

    @property
    def segments(self) -> list[Segment]:
        return [choice.segment(1, 0) for choice in self.choices]

    @property
    def modes(self) -> list[Mode]:
        return list(dict.fromkeys(m for s in self.segments for m in (s.mode, s.guide_mode)))

    @property
    def pictures(self) -> int:
        return max(self.rows.values())

    @torch.no_grad()
    def visit(self, model: nn.Module, call: Call, output: Any) -> None:
        """Look at a call; branches that come one after the other wait for each other."""
        engine, backbone = self.engine, self.engine.router.backbone
        branches = backbone.branches(model, call, engine.timeline.pipe_of(model))
        if self.seconds is None:
            alone = call if branches is None else backbone.rows(call, branches.conditional)
            self.seconds = self._time(model, alone, None if branches is None else call)
        if self.told is None:
            return
        latent, level = backbone.stack(call[backbone.sample]), engine.ledger.calls[-1].level
        assert level is not None
        found = self._predict(model, call, output, latent, level)
        if branches is not None:
            c = {mode: x[branches.conditional] for mode, x in found.items()}
            n = {mode: x[branches.guidance] for mode, x in found.items()}
            self._sum(level, c, n)
            return
        guides = self._guides(level, latent)
        if self.scale == 1:
            self.guided |= guides
            self._sum(level, found, None)
            self.waiting[False] = level, latent.clone(), found
        else:
            other = self.waiting.pop(not guides, None)
            if other is not None and other[0] == level:
                self._sum(level, *((other[2], found) if guides else (found, other[2])))
            else:
                self.waiting[guides] = level, latent.clone(), found

    def _guides(self, level: float, latent: Tensor) -> bool:
        """Whether a call is the guidance branch: by its name, or by the latent's second coming."""
        if self.engine.timeline.context is not None:
            return self.engine.timeline.context[0] in self.engine.router.backbone.contexts
        before = self.waiting.get(False)
        return before is not None and before[0] == level and torch.equal(before[1], latent)

    def _own(self, level: float) -> int:
        """Index of the choice that runs."""
        return self.choices.index(Choice.of(self.reference.at(level)))

    def _predict(
        self, model: nn.Module, call: Call, output: Any, latent: Tensor, level: float
    ) -> dict[Mode, Tensor]:
        """Of all rows, in every mode; a learned variance behind the prediction is cut off."""
        backbone, found = self.engine.router.backbone, {}
        for mode in self.modes:
            if mode == FULL and self.choices[self._own(level)] == Choice():
                prediction = output.sample if call.get("return_dict", True) else output[0]
            else:
                prediction = self.engine._forward(model, {**call, "return_dict": False}, mode)[0]
            prediction = backbone.stack(prediction)
            sides = zip(prediction.shape, latent.shape, strict=True)
            found[mode] = prediction[tuple(slice(0, min(n, m)) for n, m in sides)].float()
        return found

    def _sum(self, level: float, c: dict[Mode, Tensor], n: dict[Mode, Tensor] | None) -> None:
        """Add the squared errors of a step to those of its level."""
        self.guided |= n is not None
        made = [c[segment.mode] for segment in self.segments]
        if n is not None:
            for k, segment in enumerate(self.segments):
                guide = (c if segment.weak_guidance else n)[segment.guide_mode]
                made[k] = made[k] + segment.gain * (self.scale - 1) * (made[k] - guide)
        own = self._own(level)
        modes = dict.fromkeys(segment.mode for segment in self.segments)
        errors = [self._error(level, x - made[own]) for x in made]
        errors += [self._error(level, c[mode] - c[self.choices[own].mode]) for mode in modes]
        self.sums[level] = self.sums.get(level, 0) + torch.stack(errors)
        self.rows[level] = self.rows.get(level, 0) + len(made[0])

    def _error(self, level: float, difference: Tensor) -> Tensor:
        """Sum over the rows of the mean squared difference of the clean latents."""
        assert self.told is not None
        clean = self.told.clean(level, torch.zeros_like(difference), difference)
        return clean.flatten(1).square().mean(dim=1).sum().double().cpu()

    def _time(self, model: nn.Module, alone: Call, together: Call | None) -> Seconds:
        backbone, calls = self.engine.router.backbone, {"alone": alone, "together": together}
        runs = {
            f"{kind} {mode.name}": functools.partial(self.engine._forward, model, call, mode)
            for mode in self.modes
            for kind, call in calls.items()
            if call is not None
        }
        timings = interleave(runs, rounds=self.rounds, warmup=1)

        def medians(kind: str) -> dict[str, float]:
            return {mode.name: timings[f"{kind} {mode.name}"].median for mode in self.modes}

        latent = backbone.stack(alone[backbone.sample])
        return Seconds(
            device=device_name(latent.device),
            rows=len(latent),
            alone=medians("alone"),
            together=None if together is None else medians("together"),
        )

    def check(self, guided: bool) -> None:
        """Refuse runs that are not what the guidance scale says, or that miss a stretch."""
        if not self.sums or self.guided != guided:
            made = "guidance calls" if self.guided else "no guidance calls"
            made = made if self.seconds is not None else "no calls of the elastic model"
            raise ValueError(
                f"guidance_scale = {self.scale}, and the runs made {made}; legal: the scale that "
                "the pipeline is called with, 1 for no guidance"
            )
        check_stretches(self.reference, sorted(self.sums, reverse=True))

    def points(self) -> tuple[Point, ...]:
        """Mean errors by falling noise level."""
        count, found = len(self.choices), []
        for level in sorted(self.sums, reverse=True):
            errors = (self.sums[level] / self.rows[level]).tolist()
            found.append(
                Point(
                    level=level,
                    step_error=tuple(errors[:count]),
                    branch_error=tuple(errors[count:]),
                )
            )
        return tuple(found)


def _measure_bands(
    handle: Handle, sample: Sample, calibration: Calibration, finals: list[Tensor], count: int
) -> tuple[Band, ...]:
    """Final latents with each choice in one band of noise levels, against those without."""
    levels = [point.level for point in calibration.points]
    u = calibration.u(levels)
    width = -np.diff(u, append=0.0)
    reference = calibration.reference
    # The reference changes before these steps; each of its stretches has at least one.
    changes = {
        next(step for step, level in enumerate(levels) if level < stretch.stop): stretch.stop
        for stretch in reference.segments[:-1]
    }
    even = {int(part[0]) for part in np.array_split(np.arange(len(levels)), count)} - {0}
    cuts = sorted({*even, *changes})
    inner = [changes.get(step, (levels[step - 1] + levels[step]) / 2) for step in cuts]
    edges = [1.0, *inner, 0.0]
    bands = []
    parts = np.split(np.arange(len(levels)), cuts)
    for start, stop, part in zip(edges, edges[1:], parts, strict=False):
        rates = []
        for choice in calibration.choices:
            own = choice.segment(start, stop)
            if reference.between(start, stop) == (own,):
                rates.append(0.0)
                continue
            above, below = reference.between(1.0, start), reference.between(stop, 0.0)
            schedule = Schedule([*above, own, *below])
            with (
                _running(handle._live(), schedule, lambda *_: None),
                _final(handle._pipe) as final,
            ):
                error = 0.0
                for batch, full in enumerate(finals):
                    sample(batch)
                    error += (final[0].float() - full.float()).square().mean().item()
            rates.append(error / len(finals) / width[part].sum())
        bands.append(Band(start=start, stop=stop, rates=tuple(map(float, rates))))
    return tuple(bands)
