"""Calibrations: what is measured is what happens, damage is the formula, budgets are kept."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from tests.backbones.pipes import PIPES
from tests.elastic_models import run_as

from ditdial import (
    FULL,
    Adapter,
    FlexiDiT,
    Mode,
    PixelDiTPipeline,
    Schedule,
    Segment,
    elastify,
)
from ditdial.cli.app import main
from ditdial.host.device import device_name
from ditdial.plan.budget import Budget, pairings
from ditdial.plan.calibration import FILE, Band, Calibration, Point
from ditdial.plan.choice import Choice
from ditdial.plan.facts import Facts
from ditdial.plan.frontier import Frontier
from ditdial.plan.seconds import Seconds
from ditdial.plan.solved import SolvedBudget
from ditdial.plan.weak_first import WeakFirstBudget
from ditdial.reference import load_reference, reference_adapter
from ditdial.runtime.model_class import ENGINE
from ditdial.sampling.pixel_pipeline import flow_matched_betas

WEAK = Mode(2)
DEVICE = device_name(torch.device("cpu"))
VP = {"prediction_type": "v_prediction", "trained_betas": flow_matched_betas()}
SCHEDULERS = {
    "flow-euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "flow-heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "ddim": lambda: DDIMScheduler(**VP, clip_sample=False),
    "dpm": lambda: DPMSolverMultistepScheduler(**VP),
}
STAGES = (
    Choice(),
    Choice(guide=WEAK),
    Choice(mode=WEAK),
    Choice(mode=WEAK, guide=Mode(4)),
    Choice(mode=Mode(4)),
)


def refers(*stretches):
    """A reference as it is in a file: (start, stop, mode) from noise to data."""
    keys = ("start", "stop", "mode")
    rows = [dict(zip(keys, (*stretch, "full")[:3], strict=True)) for stretch in stretches]
    return {"segments": rows}


@pytest.fixture
def pixel(make_model):
    """``pixel(name)``: a pipeline over a tiny 32x32 model."""

    def make(name="flow-euler"):
        pipe = PixelDiTPipeline(make_model(), SCHEDULERS[name]())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def sampler(pipe, *, per_batch=2, steps=4, scale=2.5):
    """``sample(n)``: pictures 0, 1, ... in batches."""

    def sample(batch):
        numbers = range(batch * per_batch, (batch + 1) * per_batch)
        arguments = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "pt"}
        return pipe([i % 10 for i in numbers], seeds=list(numbers), **arguments)

    return sample


@pytest.fixture
def calibrated(pixel, make_elastic):
    """An elastic pipeline with a calibration, and that."""
    pipe = pixel()
    handle = make_elastic(pipe)
    sample = sampler(pipe, steps=8)
    return pipe, handle, handle.calibrate(sample, guidance_scale=2.5, choices=STAGES, rounds=1)


def made_up(**changes):
    """A calibration of round numbers."""
    levels = (0.9, 0.5, 0.1)
    facts = {
        "base": {"class": "None", "layers": [1, 2]},
        "method": {"name": "none", "settings": {"scales": (2,)}},
        "guidance_scale": 2.0,
        "choices": (Choice(), Choice(guide=WEAK), Choice(mode=WEAK)),
        "noise": (0.0, 0.5, 1.0),
        "points": tuple(
            Point(level=x, step_error=(0.0, 0.01 * x, 0.1 * x), branch_error=(0.0, 0.04 * x))
            for x in levels
        ),
        "seconds": (
            Seconds(
                device="a",
                rows=2,
                alone={"full": 1.0, "patch2": 0.4},
                together={"full": 1.8, "patch2": 0.5},
            ),
        ),
        "data": {"pictures": 3},
        "provenance": {"commit": "abc"},
    }
    return Calibration(**{**facts, **changes})


# ------------------------------------------------------------------------------------------------
# The record


def test_round_trip(tmp_path):
    bands = (
        Band(start=1.0, stop=0.4, rates=(0.0, 0.1, 0.2)),
        Band(start=0.4, stop=0.0, rates=(0.0, 0.3, 0.4)),
    )
    calibration = made_up(bands=bands)
    assert Calibration.from_json(calibration.to_json()) == calibration
    assert calibration.save(tmp_path / "deep" / "c.json") == tmp_path / "deep" / "c.json"
    assert Calibration.load(tmp_path / "deep" / "c.json") == calibration
    assert calibration.save(tmp_path) == tmp_path / FILE
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE, "deep"]


def test_a_folder_need_not_be_there_yet(tmp_path):
    """Only a path that ends in .json is a file."""
    calibration, folder = made_up(), tmp_path / "new" / "v1.5"
    assert calibration.save(folder) == folder / FILE
    assert Calibration.load(folder) == calibration
    (tmp_path / "odd.json").mkdir()
    assert calibration.save(tmp_path / "odd.json") == tmp_path / "odd.json" / FILE
    with pytest.raises(FileNotFoundError, match=rf"calibration '.*other/{FILE}' does not exist"):
        Calibration.load(tmp_path / "other")


def test_a_measured_one_round_trips(calibrated):
    *_, measured = calibrated
    assert Calibration.from_json(measured.to_json()) == measured
    assert measured.data["pictures"] == 2
    assert measured.data["steps"] == 8
    assert {"command", "commit", "device"} <= set(measured.provenance)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=7), "format = 7; legal: 1"),
        (lambda d: d.update(more=1), "missing, unknown or wrong entries.*more"),
        (lambda d: d.pop("noise"), "missing, unknown or wrong entries.*noise"),
        (lambda d: d["points"][0].pop("level"), "missing, unknown or wrong entries.*level"),
        (lambda d: d["points"].reverse(), r"points = \[0.1, 0.5, 0.9\]; legal: falling"),
        (lambda d: d.update(noise=[0, 2]), r"noise = \[2, 0\]; legal: falling"),
        (lambda d: d["points"][1].update(step_error=[0, 1]), "step_error at level 0.5 .*: 3 num"),
        (lambda d: d["points"][1].update(step_error=[0, -1, 1]), "step_error at level 0.5"),
        (lambda d: d["points"][1].update(step_error=[0, float("nan"), 1]), "step_error at level"),
        (lambda d: d["points"][1].update(step_error=[1, 1, 1]), "3 numbers >= 0, that of full/f"),
        (lambda d: d["points"][1].update(branch_error=[1, 1]), "2 numbers >= 0, that of full 0"),
        (lambda d: d["choices"].__setitem__(1, d["choices"][0]), "legal: at least one, all diff"),
        (lambda d: d["choices"][1].update(mode="tiny"), "unknown mode 'tiny'"),
        (lambda d: d["seconds"][0]["alone"].pop("full"), "with those of full mode"),
        (lambda d: d["seconds"].append(d["seconds"][0]), "one entry per device"),
        (lambda d: d.update(bands=[{"start": 1, "stop": 0.5, "rates": [0, 1, 1]}]), "without gap"),
        (lambda d: d.update(bands=[{"start": 0, "stop": 0, "rates": [0, 1, 1]}]), "without gap"),
        (
            lambda d: d.update(reference=refers((1, 0.6), (0.5, 0))),
            "reference: .*gap .*0.6 and 0.5",
        ),
        (lambda d: d.update(reference=7), "reference: schedule JSON must be an object"),
        (
            lambda d: d.update(reference=refers((1, 0.5, "patch4"), (0.5, 0))),
            r"reference = 'patch4/patch4' from noise level 1 to 0.5; legal: .*'full/patch2'",
        ),
        (
            lambda d: d.update(reference=refers((1, 0.5, "patch2"), (0.5, 0))),
            r"step_error at level 0.9 = .*; legal: 3 numbers >= 0, that of patch2/patch2 0",
        ),
        (
            lambda d: d.update(reference=refers((1, 0.95, "patch2"), (0.95, 0))),
            "'patch2/patch2' from noise level 1 to 0.95, where nothing was .* levels 0.9, 0.5",
        ),
    ],
)
def test_damage_to_a_file_is_named(tmp_path, change, words):
    data = json.loads(made_up().to_json())
    change(data)
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{FILE}.*{words}"):
        Calibration.load(tmp_path / FILE)


def test_what_is_no_calibration(tmp_path):
    (tmp_path / FILE).write_text('{"format": 1')
    with pytest.raises(ValueError, match=f"{FILE}.* is not valid JSON"):
        Calibration.load(tmp_path / FILE)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Calibration.load(tmp_path / "none.json")


def test_seconds_of_a_step():
    (seconds,) = made_up().seconds
    both = [seconds.of(choice, guided=True) for choice in made_up().choices]
    assert both == [1.8, 1.4, 0.5]
    alone = [seconds.of(choice, guided=False) for choice in made_up().choices]
    assert alone == [1.0, 1.0, 0.4]
    assert seconds.of(Choice(gain=0), guided=True) == 1.0
    assert seconds.of(Choice(gain=2), guided=True) == 2.0
    assert replace(seconds, together=None).of(Choice(), guided=True) == 2.0
    again = (
        made_up().with_seconds(replace(seconds, rows=7)).with_seconds(replace(seconds, device="b"))
    )
    assert [(each.device, each.rows) for each in again.seconds] == [("a", 7), ("b", 2)]


# ------------------------------------------------------------------------------------------------
# Damage


def test_damage_is_the_formula():
    levels = [1.0, 0.7, 0.5, 0.1]
    found = made_up().damage(levels)
    u = np.array(levels)  # this table is the identity
    rate = (1 - u) / u**3
    error = np.interp(u, [0.1, 0.5, 0.9], np.log([0.01, 0.05, 0.09]))
    expected = rate * np.exp(error) * (u - np.append(u[1:], 0))
    np.testing.assert_allclose(found[:, 2], expected)
    np.testing.assert_allclose(found[:, 1], expected / 10)
    assert not found[:, 0].any()
    assert not found[0].any()
    unguided = made_up().damage(levels, guided=False)
    np.testing.assert_allclose(unguided[:, 1], found[:, 2] * 0.4)


def test_half_a_step_twice_is_one_step():
    """Where the error is even, damage goes over to its integral: half the change of SNR."""
    even = tuple(Point(level=x, step_error=(0.0, 1.0), branch_error=(0.0, 1.0)) for x in (0.9, 0.1))
    calibration = made_up(choices=(Choice(), Choice(mode=WEAK)), points=even)
    fine = np.linspace(0.9, 0.3, 20_001)
    snr = (1 - fine) ** 2 / fine**2
    total = calibration.damage(fine)[:-1, 1].sum()
    assert total == pytest.approx((snr[-1] - snr[0]) / 2, rel=1e-3)


def test_levels_are_mapped_to_the_flows(pixel):
    """A network that was trained on the flow's levels has them with any scheduler."""
    levels = np.linspace(0, 1, 21)
    for name in SCHEDULERS:
        pipe = pixel(name)
        handle = elastify(pipe, FlexiDiT(rank=4))
        found = handle.calibrate(sampler(pipe, steps=2), guidance_scale=2.5, rounds=1)
        np.testing.assert_allclose(found.u(levels), levels, atol=1e-6)


def test_variance_preserving_levels():
    pipe = PIPES["dit"].pipe()
    handle = PIPES["dit"].elastic(pipe)
    found = handle.calibrate(lambda n: PIPES["dit"].draw(pipe), guidance_scale=4.0, rounds=1)
    kept = pipe.scheduler.alphas_cumprod.double().numpy()
    times = np.arange(0, 1000, 10)  # the table's own entries
    a, s = kept[times] ** 0.5, (1 - kept[times]) ** 0.5
    np.testing.assert_allclose(found.u(times / 1000), s / (a + s), rtol=1e-5)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"levels": [0.5, 0.7]}, r"levels = \[0.5, 0.7\]; legal: falling"),
        ({"levels": []}, r"levels = \[\]; legal: falling"),
        ({"levels": [0.5], "criterion": "taste"}, "criterion = 'taste'; legal: 'path', 'picture'"),
        ({"levels": [0.5], "criterion": "picture"}, "has not measured; legal: 'path'"),
    ],
)
def test_illegal_questions_are_named(ask, words):
    with pytest.raises(ValueError, match=words):
        made_up().damage(**ask)


# ------------------------------------------------------------------------------------------------
# Measuring


def first_step(pipe, run):
    """What the pipeline made of its first model call, and the noise level of that."""
    kept, step = [], pipe.scheduler.step

    @functools.wraps(step)  # pipelines read its signature
    def keep(output, *args, **kwargs):
        kept.append(output.clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = keep
    try:
        run()
    finally:
        del pipe.scheduler.step
    return kept[0].double()


GUIDED = {"dit": 4.0, "pixart-sigma": 4.0, "sd3": 4.0, "latte": 4.0} | {
    "flux": 3.0,  # one call per branch, which it names
    "wan": 4.0,
    "chroma": 4.0,  # and which it does not
}
MANY = (
    *pairings([FULL, WEAK]),
    Choice(guide=WEAK, guidance="weak", gain=0.4),
    Choice(mode=WEAK, gain=0.5),
    Choice(gain=0.0),
)


@pytest.mark.parametrize("choices", [MANY, pairings([FULL, WEAK], "weak")], ids=["cfg", "weak"])
@pytest.mark.parametrize("name", GUIDED)
def test_measured_errors_are_those_of_real_runs(name, choices):
    """At a first step all runs of a seed see the same latent, so their predictions compare."""
    case, scale = PIPES[name], GUIDED[name]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    measured = handle.calibrate(
        lambda n: case.draw(pipe), guidance_scale=scale, choices=choices, rounds=1
    )
    first = measured.points[0]
    flow = "flow" in str(pipe.scheduler.config.get("prediction_type", "flow"))
    if flow:
        factor = first.level
    else:
        kept = float(pipe.scheduler.alphas_cumprod[round(first.level * 1000)])
        factor = ((1 - kept) / kept) ** 0.5
    handle.schedule = Schedule.throughout(choices[0])
    full = first_step(pipe, lambda: case.draw(pipe))
    for choice, error in zip(measured.choices[1:], first.step_error[1:], strict=True):
        handle.schedule = Schedule.throughout(choice)
        found = first_step(pipe, lambda: case.draw(pipe))
        expected = (factor * (found - full)).square().mean().item()
        assert expected > 0
        assert error == pytest.approx(expected, rel=1e-3), choice.name


def test_errors_without_guidance(pixel, make_elastic):
    pipe = pixel()
    handle = make_elastic(pipe)
    found = handle.calibrate(sampler(pipe, scale=1.0), guidance_scale=1.0, rounds=1)
    assert [choice.name for choice in found.choices] == [f"{m}/{m}" for m in handle.modes]
    assert all(point.step_error == point.branch_error for point in found.points)
    assert found.seconds[0].together is None
    case = PIPES["flux"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    found = handle.calibrate(lambda n: case.draw(pipe, guided=False), guidance_scale=1.0, rounds=1)
    assert all(point.step_error == point.branch_error for point in found.points)


def test_a_scale_that_the_runs_do_not_have_is_refused(pixel, make_elastic):
    pipe = pixel()
    handle = make_elastic(pipe)
    with pytest.raises(ValueError, match=r"scale = 1, and the runs made guidance calls; legal"):
        handle.calibrate(sampler(pipe), guidance_scale=1, rounds=1)
    with pytest.raises(ValueError, match=r"scale = 3, and the runs made no guidance calls"):
        handle.calibrate(sampler(pipe, scale=1), guidance_scale=3, rounds=1)
    with pytest.raises(ValueError, match=r"scale = 3, and the runs made no calls"):
        handle.calibrate(lambda n: None, guidance_scale=3, rounds=1)
    case = PIPES["chroma"]
    pipe = case.pipe()
    with pytest.raises(ValueError, match=r"scale = 1, and the runs made guidance calls"):
        case.elastic(pipe).calibrate(lambda n: case.draw(pipe), guidance_scale=1, rounds=1)


def test_batches_do_not_matter(pixel, make_elastic):
    pipe = pixel()
    handle = make_elastic(pipe)
    whole = handle.calibrate(sampler(pipe, per_batch=4), guidance_scale=2.5, rounds=1)
    parts = handle.calibrate(sampler(pipe, per_batch=2), guidance_scale=2.5, batches=2, rounds=1)
    assert whole.data["pictures"] == parts.data["pictures"] == 4
    for one, other in zip(whole.points, parts.points, strict=True):
        assert one.level == other.level
        np.testing.assert_allclose(one.step_error, other.step_error, rtol=1e-3, atol=1e-12)


def test_measuring_leaves_no_trace(pixel, make_elastic):
    pipe = pixel("ddim")
    handle = make_elastic(pipe)
    handle.budget = 0.6
    sample = sampler(pipe)
    expected = sample(0).images
    before = handle.schedule, handle.budget, handle.controller
    handle.calibrate(sample, guidance_scale=2.5, bands=1, rounds=1)
    assert (handle.schedule, handle.budget, handle.controller) == before
    assert not handle._engine.observers
    assert "step" not in pipe.scheduler.__dict__
    assert torch.equal(sample(0).images, expected)


def test_a_failed_measurement_leaves_no_trace(pixel, make_elastic):
    """Nor does it take away what somebody else has put on the scheduler or the engine."""
    pipe = pixel()
    handle, seen = make_elastic(pipe), []
    step = pipe.scheduler.step
    pipe.scheduler.step = own = functools.wraps(step)(lambda *a, **k: step(*a, **k))
    handle._engine.observers.append(lambda model, call, output: seen.append(call))
    observers = list(handle._engine.observers)

    def sample(batch):
        sampler(pipe)(batch)
        raise RuntimeError("the disk is full")

    before = handle.schedule, handle.budget, handle.controller, handle.calibration
    with pytest.raises(RuntimeError, match="the disk is full"):
        handle.calibrate(sample, guidance_scale=2.5, rounds=1)
    assert (handle.schedule, handle.budget, handle.controller, handle.calibration) == before
    assert handle._engine.observers == observers
    assert pipe.scheduler.step is own
    assert len(seen) == 4


def test_observers_see_every_call_and_what_came_of_it(pixel, make_elastic):
    pipe = pixel()
    handle, seen = make_elastic(pipe), []
    handle.schedule = Schedule.weak_first(0.5)
    handle._engine.observers.append(lambda *facts: seen.append((*facts, handle.report())))
    sampler(pipe)(0)
    assert [model for model, *_ in seen] == [handle.model] * 4
    assert [len(report.calls) for *_, report in seen] == [1, 2, 3, 4]  # it is in the ledger by then
    handle._engine.observers.clear()
    for _, call, output, report in seen:
        with handle.using(report.calls[-1].mode), torch.inference_mode():
            assert torch.equal(handle.model(**call)[0], output[0])
    handle._engine.observers.append(print)
    assert not copy.deepcopy(handle.model).__dict__[ENGINE].observers


def test_bands_are_changes_of_final_latents(pixel, make_elastic):
    pipe = pixel()
    handle = make_elastic(pipe)
    sample = sampler(pipe, steps=4)

    def final():
        kept, step = [], pipe.scheduler.step
        pipe.scheduler.step = lambda *a, **k: kept.append(step(*a, **k)) or kept[-1]
        try:
            sample(0)
        finally:
            del pipe.scheduler.step
        return kept[-1].prev_sample.double()

    choices = (Choice(), Choice(mode=WEAK))
    found = handle.calibrate(sample, guidance_scale=2.5, choices=choices, bands=2, rounds=1)
    levels = [point.level for point in found.points]
    edge = (levels[1] + levels[2]) / 2
    assert [(band.start, band.stop) for band in found.bands] == [(1, edge), (edge, 0)]
    handle.schedule = Schedule.constant()
    full = final()
    handle.schedule = Schedule([Segment.of(choices[1], 1, edge), Segment.of(choices[0], edge, 0)])
    first = (final() - full).square().mean().item()
    damage = found.damage(levels, criterion="picture")
    assert damage[:2, 1].sum() == pytest.approx(first, rel=1e-4)
    assert not damage[:, 0].any()
    with pytest.raises(ValueError, match="without guidance; legal: 'path'"):
        found.damage(levels, criterion="picture", guided=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_scale": -1}, "guidance_scale = -1 is out of range"),
        ({"batches": 0}, "batches = 0 is out of range"),
        ({"bands": -1}, "bands = -1 is out of range"),
        ({"bands": 5}, r"bands = 5 is out of range; legal: at most one per step \(4\)"),
        ({"choices": ()}, "choices ask for nothing"),
        ({"choices": (Choice(mode=Mode(3)),)}, r"choices ask for \['patch3'\]; legal.*patch2"),
        ({"rounds": 0}, "rounds = 0"),
    ],
)
def test_illegal_settings_are_named(pixel, make_elastic, changes, words):
    pipe = pixel()
    with pytest.raises(ValueError, match=words):
        make_elastic(pipe).calibrate(
            sampler(pipe), **{"guidance_scale": 2.5, "rounds": 1} | changes
        )


def test_a_bare_model_and_a_step_cache_are_refused(pixel, make_elastic, make_model):
    with pytest.raises(ValueError, match="need a pipeline's scheduler"):
        make_elastic(make_model()).calibrate(lambda n: None, guidance_scale=2)
    case = PIPES["flux"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="a step cache is on"):
        handle.calibrate(lambda n: case.draw(pipe), guidance_scale=3.0)


# ------------------------------------------------------------------------------------------------
# The dial


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.65, 0.8])
def test_a_budget_holds_for_any_steps_and_scheduler(calibrated, budget):
    _, handle, measured = calibrated
    # As in trained adapters, what costs more errs less (untrained ones leave some budget unspent).
    error = {x: (0.0, 0.002, 0.01 * x, 0.03 + 0.05 * x, 0.1 + 0.2 * x) for x in (1.0, 0.5, 0.01)}
    points = [Point(level=x, step_error=e, branch_error=(0.0, *e[2:4])) for x, e in error.items()]
    handle.calibration = replace(measured, points=tuple(points))
    handle.budget = budget
    for name in SCHEDULERS:
        for steps in (10, 25, 50, 100):
            plan = handle.plan(steps, scheduler=SCHEDULERS[name]())
            least = budget - max(0.01, 0.2 / steps)  # one branch of ten steps is 5 % of the run
            assert least <= plan.ratio <= budget + 1e-9, (name, steps)


@pytest.mark.parametrize("guidance", [True, False])
def test_the_shipped_calibration_costs_the_same_for_any_steps_and_scheduler(guidance):
    """To 1 %, or to the smallest part of a run that can be made cheaper, where that is more."""
    pipe = load_reference()
    handle = elastify(pipe, reference_adapter())
    finest = handle.shape.macs(Mode(2)) / handle.shape.macs(FULL)
    for budget in (0.2, 0.33, 0.46, 0.6, 0.73):
        handle.budget = budget
        usual = handle.plan(50, guidance=guidance).ratio
        for name, steps in itertools.product(SCHEDULERS, (10, 25, 50, 100)):
            plan = handle.plan(steps, guidance=guidance, scheduler=SCHEDULERS[name]())
            assert (plan.budget, plan.ratio <= budget + 1e-9) == (budget, True)
            part = (1 - finest) / steps / (1 + guidance)
            assert abs(plan.ratio - usual) <= max(0.01, part), (budget, name, steps)


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("guidance", [True, False])
def test_the_dearest_plan_below_full_mode_lacks_one_branch_of_one_step(steps, guidance):
    """No solver reaches a budget above it."""
    choices, ratios = pairings([FULL, WEAK, Mode(4)]), {FULL: 1.0, WEAK: 0.4, Mode(4): 0.1}
    if not guidance:
        choices = [choice for choice in choices if choice.guide is None]
    cost = [(ratios[c.mode] + ratios[c.guide_mode]) / 2 / steps for c in choices]
    damage = np.random.default_rng(0).random((steps, 1)) * (1 - np.array(cost) * steps)
    found = Frontier.of(damage, cost)
    assert found.costs[-1] == pytest.approx(1)
    assert 1 - found.costs[-2] == pytest.approx((1 - 0.4) / steps / (1 + guidance))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [2.5, 1.0], ids=["guided", "unguided"])
def test_the_plan_is_what_runs(pixel, make_elastic, calibrated, name, scale):
    *_, calibration = calibrated
    pipe = pixel(name)
    handle = make_elastic(pipe)
    handle.calibration = calibration
    handle.budget = 0.5
    for steps in (5, 8):
        sampler(pipe, steps=steps, scale=scale)(0)
        plan, report = handle.plan(steps, guidance=scale != 1), handle.report()
        assert [(c.mode, c.guide) for c in report.calls] == [(s.mode, s.guide) for s in plan.steps]
        assert report.ratio == pytest.approx(plan.ratio)
        assert report.ratio <= 0.5 + 1e-9
        assert (report.budget, plan.budget) == (0.5, 0.5)
        assert handle.schedule == plan.schedule


@pytest.mark.parametrize("name", ["dit", "sd3", "wan", "chroma"])
def test_budgets_in_stock_pipelines(name):
    case = PIPES[name]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.calibrate(lambda n: case.draw(pipe), guidance_scale=4.0, rounds=1)
    facts = {"grid": case.grid, "text_tokens": case.text}
    handle.budget = 0.8
    case.draw(pipe, num_inference_steps=8)
    plan = handle.plan(8, **facts)
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-6)
    assert 0.6 < plan.ratio <= 0.8 + 1e-9


def test_packed_branches_keep_the_budget(calibrated):
    pipe, handle, *_ = calibrated
    for packed, budget in itertools.product((False, True), (0.5, 0.7, 0.9)):
        run_as(handle, packed=packed)
        handle.budget = budget
        plan = handle.plan(10)
        sampler(pipe, steps=10)(0)
        report = handle.report()
        assert plan.ratio <= budget
        assert report.ratio == pytest.approx(plan.ratio, rel=1e-9)


def test_all_of_the_budget_is_the_base(calibrated):
    pipe, handle, _ = calibrated
    handle.budget = 1.0
    expected = sampler(pipe)(0).images
    assert handle.report().ratio == 1
    handle.remove()
    assert torch.equal(sampler(pipe)(0).images, expected)


def test_more_budget_does_less_damage(calibrated):
    _, handle, measured = calibrated
    offers = handle.frontier(25, count=20)
    ratios, damages = [offer.ratio for offer in offers], [offer.damage for offer in offers]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1)
    assert all(a > b for a, b in zip(damages[1:], damages[2:], strict=False))
    assert damages[-1] == 0
    for ratio, damage, schedule in offers[::5]:
        handle.schedule = schedule
        plan = handle.plan(25)
        assert plan.ratio == pytest.approx(ratio)
        table = measured.damage([step.level for step in plan.steps])
        chosen = [schedule.at(step.level) for step in plan.steps]
        segments = [(choice.mode, choice.guide_mode) for choice in STAGES]
        picked = [segments.index((s.mode, s.guide_mode)) for s in chosen]
        assert table[np.arange(25), picked].sum() == pytest.approx(damage)


def test_a_solved_plan_beats_weak_first(calibrated):
    _, handle, measured = calibrated
    handle.budget = 0.6
    solved = handle.plan(25)
    handle.calibration = None
    handle.budget = 0.6
    weak_first = handle.plan(25)
    assert weak_first.ratio == pytest.approx(solved.ratio, abs=0.03)
    table = measured.damage([step.level for step in solved.steps])
    pairs = [(choice.mode, choice.guide_mode) for choice in STAGES]

    def damage(plan):
        return sum(table[i, pairs.index((s.mode, s.guide))] for i, s in enumerate(plan.steps))

    assert damage(solved) < damage(weak_first)


def test_setting_a_schedule_ends_the_budget(calibrated):
    _, handle, _ = calibrated
    handle.budget = 0.6
    assert isinstance(handle.controller, SolvedBudget)
    handle.schedule = Schedule.constant()
    assert (handle.controller, handle.budget) == (None, None)
    handle.budget = Budget(0.6)
    assert handle.budget == Budget(0.6)


def test_illegal_budgets_change_nothing(calibrated):
    _, handle, _ = calibrated
    handle.budget = 0.6
    before = (handle.controller, handle.schedule, handle.budget)
    for illegal, words in (
        (1.5, r"budget = 1.5; legal: \(0, 1\]"),
        (0.01, r"budget = 0.01; legal: 0\.\d+ \(the cheapest choice throughout\) to 1"),
        (Budget(0.5, criterion="picture"), "has not measured"),
    ):
        with pytest.raises(ValueError, match=words):
            handle.budget = illegal
        assert (handle.controller, handle.schedule, handle.budget) == before


def test_seconds_are_of_this_device_or_refused(calibrated):
    pipe, handle, measured = calibrated
    (own,) = measured.seconds
    assert (own.device, own.rows) == (DEVICE, 2)
    assert set(own.alone) == set(own.together) == {"full", "patch2", "patch4"}
    handle.calibration = replace(measured, seconds=(replace(own, device="abacus"),))
    with pytest.raises(ValueError, match=r"has seconds of 'abacus', and this is .*only_seconds"):
        handle.budget = Budget(0.6, "seconds")
    again = handle.calibrate(sampler(pipe), only_seconds=True, rounds=1)
    assert [each.device for each in again.seconds] == ["abacus", DEVICE]
    assert again.points == measured.points
    handle.budget = Budget(1.0, "seconds")
    assert handle.schedule == Schedule.constant()


def test_a_budget_in_seconds_is_spent_in_seconds():
    calibration = made_up()
    (seconds,) = calibration.seconds
    controller = SolvedBudget(
        calibration=calibration, budget=Budget(0.6, "seconds"), seconds=seconds
    )
    levels = tuple(1 - i / 20 for i in range(20))
    schedule = controller.begin(Facts(levels=levels, macs=lambda mode, level: 1.0, guided=True))
    spent = sum(seconds.of(schedule.at(level), guided=True) for level in levels)
    assert 0.58 < spent / (20 * 1.8) <= 0.6
    with pytest.raises(ValueError, match="seconds = None; legal for a budget in seconds"):
        SolvedBudget(calibration=calibration, budget=Budget(0.6, "seconds"))


def test_repeated_levels_and_no_levels():
    """A solver's second look at a level runs as the first; a bare model tells no levels."""

    def macs(mode, level):
        return {FULL: 1.0, WEAK: 0.3}[mode]

    controller = SolvedBudget(calibration=made_up(), budget=Budget(0.7))
    levels = (1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2)
    schedule = controller.begin(Facts(levels=levels, macs=macs, guided=True))
    cost = sum(Facts(levels=(), macs=macs).cost(schedule.at(level)) for level in levels)
    assert cost / 18 <= 0.7
    even = tuple(1 - i / 50 for i in range(50))
    told, untold = (controller.begin(Facts(levels=x, macs=macs)) for x in (even, ()))
    assert told == untold


def test_without_a_calibration(make_elastic, make_model):
    handle = make_elastic(make_model())
    handle.budget = 0.6
    assert isinstance(handle.controller, WeakFirstBudget)
    for ask in (Budget(0.6, "seconds"), Budget(0.6, criterion="picture")):
        with pytest.raises(ValueError, match="needs a calibration, and this adapter has none"):
            handle.budget = ask
    with pytest.raises(ValueError, match=r"no calibration; handle.calibrate measures one"):
        handle.frontier(10, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="only_seconds = True; legal with a calibration"):
        handle.calibrate(lambda n: None, only_seconds=True)


# ------------------------------------------------------------------------------------------------
# A reference that changes with the noise level

CFG_THEN_WEAK = Schedule.weak_guidance_below(0.5)
WEAKLY = CFG_THEN_WEAK.segments[1].choice
BOTH = pairings([FULL, WEAK], "both")


def two_aims(**changes):
    """A calibration in which weak guidance is the aim below 0.5: there it is free."""
    assert (*made_up().choices, WEAKLY) == BOTH
    step = {0.9: (0.0, 0.01, 0.09, 0.3), 0.6: (0.0, 0.02, 0.06, 0.2)}
    step |= {0.4: (0.2, 0.15, 0.3, 0.0), 0.1: (0.1, 0.08, 0.2, 0.0)}
    points = tuple(
        Point(level=x, step_error=errors, branch_error=(0.0, 0.04 * x))
        for x, errors in step.items()
    )
    return made_up(**{"choices": BOTH, "points": points, "reference": CFG_THEN_WEAK} | changes)


def test_no_reference_is_the_first_choice_throughout():
    plain = made_up()
    assert plain.reference == Schedule.constant()
    for same in (Schedule.constant(guide=FULL), Schedule.weak_first(0.0)):
        assert made_up(reference=same) == plain
    assert "reference" not in json.loads(plain.to_json())
    weak = pairings([FULL, WEAK], "weak")
    points = tuple(replace(point, step_error=point.step_error[:2]) for point in plain.points)
    assert made_up(choices=weak, points=points).reference == Schedule.throughout(weak[0])


def test_the_usual_reference_goes_without_saying():
    """Calibrations of before there was a choice load and save as they were."""
    text = made_up().to_json()
    assert "reference" not in json.loads(text)
    again = Calibration.from_json(text)
    assert again.reference == Schedule.constant()
    assert again.to_json() == text


def test_the_shipped_calibration_saves_as_it_was_loaded():
    file = reference_adapter("lora") / FILE
    shipped = Calibration.load(file)
    assert shipped.to_json() + "\n" == file.read_text()
    assert [segment.guidance for segment in shipped.reference.segments] == ["cfg", "weak"]


def test_a_reference_round_trips():
    calibration = two_aims()
    data = json.loads(calibration.to_json())
    assert [row["guidance"] for row in data["reference"]["segments"]] == ["cfg", "weak"]
    again = Calibration.from_json(calibration.to_json())
    assert again == calibration
    assert again.reference == CFG_THEN_WEAK
    split = Schedule([Segment.of(Choice(), 1, 0.7), *CFG_THEN_WEAK.between(0.7, 0)])
    assert two_aims(reference=split) == calibration  # as few stretches as it takes


def test_errors_are_not_mixed_across_a_change():
    found = two_aims().errors([1.0, 0.75, 0.51, 0.49, 0.25, 0.0])
    assert not found[:3, 0].any()
    assert not found[3:, 3].any()
    np.testing.assert_allclose(found[2], two_aims().errors([0.6])[0])
    np.testing.assert_allclose(found[3], two_aims().errors([0.4])[0])
    np.testing.assert_allclose(found[1, 3], np.sqrt(0.3 * 0.2))
    np.testing.assert_allclose(found[4, 0], np.sqrt(0.2 * 0.1))
    damage = two_aims().damage([0.9, 0.6, 0.4, 0.1])
    assert (damage == 0).tolist() == [[True, False, False, False]] * 2 + [[False] * 3 + [True]] * 2


def facts_of(levels):
    costs = {FULL: 1.0, WEAK: 0.3}
    return Facts(levels=tuple(levels), macs=lambda mode, level: costs[mode], guided=True)


def test_what_the_reference_does_is_free():
    """With enough budget the plan is the reference; all of the budget is the base."""
    levels = [1 - (i + 0.5) / 20 for i in range(20)]
    own = facts_of(levels)
    share = np.mean([own.cost(CFG_THEN_WEAK.at(level)) for level in levels]) / 2
    for budget in (share, 0.9, 0.999):
        controller = SolvedBudget(calibration=two_aims(), budget=Budget(budget))
        assert controller.begin(own) == CFG_THEN_WEAK
    last = controller.offers(own)[-1]
    assert (last.damage, last.schedule) == (0, CFG_THEN_WEAK)
    assert last.ratio == pytest.approx(share)
    assert SolvedBudget(calibration=two_aims(), budget=Budget(1)).begin(own) == Schedule.constant()
    unguided = replace(own, guided=False)
    plan = SolvedBudget(calibration=two_aims(), budget=Budget(0.9)).begin(unguided)
    assert {segment.guide for segment in plan.segments} == {None}


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.6, 0.7, 0.8, 0.95])
def test_the_solver_is_brute_force_with_both_kinds_of_guidance(budget):
    levels = [0.95, 0.7, 0.55, 0.45, 0.3, 0.1]
    calibration, own = two_aims(), facts_of(levels)
    damage = calibration.damage(levels)
    cost = np.array([own.cost(choice) for choice in BOTH]) / (2 * len(levels))
    plans = np.array(list(itertools.product(range(len(BOTH)), repeat=len(levels))))
    within = cost[plans].sum(axis=1) <= budget + 1e-9
    best = damage[np.arange(len(levels)), plans[within]].sum(axis=1).min()
    schedule = SolvedBudget(calibration=calibration, budget=Budget(budget)).begin(own)
    chosen = [BOTH.index(schedule.at(level).choice) for level in levels]
    assert damage[np.arange(len(levels)), chosen].sum() == pytest.approx(best, rel=1e-4)
    assert cost[chosen].sum() <= budget + 1e-9


def test_the_constant_reference_measures_the_same(pixel, make_elastic):
    """Bit for bit, with the final latents."""
    found = []
    for reference in (None, Schedule.constant(), Schedule.constant(guide=FULL)):
        pipe = pixel()
        facts = {"choices": BOTH, "reference": reference, "bands": 2, "rounds": 1}
        found.append(make_elastic(pipe).calibrate(sampler(pipe), guidance_scale=2.5, **facts))
    assert found[0].points == found[1].points == found[2].points
    assert found[0].bands == found[1].bands == found[2].bands


def made_at(pipe, handle, schedule, sample):
    """The final latents of a run, and what the pipeline made of each of its model calls."""
    kept, step, last = [], pipe.scheduler.step, []

    @functools.wraps(step)  # pipelines read its signature
    def keep(output, *args, **kwargs):
        kept.append(output.double())
        last[:] = [step(output, *args, **kwargs)]
        return last[0]

    handle.schedule = schedule
    pipe.scheduler.step = keep
    try:
        sample(0)
        return last[0][0].double(), kept
    finally:
        del pipe.scheduler.step


MIXED = {
    "cfg, then weak": CFG_THEN_WEAK,
    "weak, then cfg": Schedule([Segment.of(WEAKLY, 1, 0.6), Segment.of(Choice(), 0.6, 0)]),
    "coarse, then weak": Schedule(
        [Segment.of(Choice(mode=WEAK), 1, 0.8), Segment.of(WEAKLY, 0.8, 0)]
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_errors_are_those_of_leaving_the_reference(pixel, make_elastic, name):
    """At the step where a run leaves the reference, both still see the same latent."""
    reference, pipe = MIXED[name], pixel()
    handle = make_elastic(pipe)
    sample = sampler(pipe, steps=5)
    measured = handle.calibrate(sample, guidance_scale=2.5, reference=reference, rounds=1)
    assert set(BOTH) < set(measured.choices)
    assert measured.reference == reference
    levels = [point.level for point in measured.points]
    _, own = made_at(pipe, handle, reference, sample)
    for choice in BOTH:
        place = measured.choices.index(choice)
        for step, level in enumerate(levels):
            stop = max(level - 1e-6, 0.0)
            start = min(level + 1e-6, 1.0)
            parts = (*reference.between(1, start), Segment.of(choice, start, stop))
            schedule = Schedule([*parts, *reference.between(stop, 0)])
            _, found = made_at(pipe, handle, schedule, sample)
            expected = (level * (found[step] - own[step])).square().mean().item()
            error = measured.points[step].step_error[place]
            assert error == pytest.approx(expected, rel=1e-3, abs=1e-12), (choice.name, level)
            assert (error == 0) == choice.runs_as(reference.at(level))


def test_bands_end_where_the_reference_changes(pixel, make_elastic):
    pipe = pixel()
    handle = make_elastic(pipe)
    sample = sampler(pipe, steps=6)
    facts = {"choices": BOTH, "reference": CFG_THEN_WEAK, "bands": 2, "rounds": 1}
    found = handle.calibrate(sample, guidance_scale=2.5, **facts)
    levels = [point.level for point in found.points]
    assert 0.5 in [band.stop for band in found.bands]
    damage = found.damage(levels, criterion="picture")
    for step, level in enumerate(levels):
        assert damage[step, BOTH.index(CFG_THEN_WEAK.at(level).choice)] == 0
    final, _ = made_at(pipe, handle, CFG_THEN_WEAK, sample)
    band = found.bands[-1]
    parts = (*CFG_THEN_WEAK.between(1, band.start), Segment.of(Choice(), band.start, 0))
    other, _ = made_at(pipe, handle, Schedule(parts), sample)
    inside = [step for step, level in enumerate(levels) if level < band.start]
    assert damage[inside, 0].sum() > 0
    change = (other - final).square().mean().item()
    assert damage[inside, 0].sum() == pytest.approx(change, rel=1e-4)
    with pytest.raises(ValueError, match=r"band from 1 to 0; legal: one that ends at 0.5, where"):
        replace(found, bands=(Band(start=1, stop=0, rates=(0.0,) * 4),))


def test_budgets_run_what_a_reference_made_of_them(pixel, make_elastic):
    pipe = pixel()
    handle = make_elastic(pipe)
    sample = sampler(pipe, steps=8)
    handle.calibrate(sample, guidance_scale=2.5, reference=CFG_THEN_WEAK, rounds=1)
    handle.budget = 0.99
    sample(0)
    levels = [call.level for call in handle.report().calls]
    chosen = [handle.schedule.at(level).choice for level in levels]
    assert chosen == [CFG_THEN_WEAK.at(level).choice for level in levels]
    assert {Choice(), WEAKLY} == set(chosen)
    handle.budget = 1.0
    expected = sample(0).images
    assert handle.report().ratio == 1
    handle.remove()
    assert torch.equal(sample(0).images, expected)


@pytest.mark.parametrize("name", ["dit", "flux", "chroma"])
def test_a_reference_in_stock_pipelines(name):
    case = PIPES[name]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    settings = {"guidance_scale": 3.0, "rounds": 1}
    plain = handle.calibrate(lambda n: case.draw(pipe), **settings)
    levels = [point.level for point in plain.points]
    reference = Schedule.weak_guidance_below((levels[0] + levels[1]) / 2)
    found = handle.calibrate(lambda n: case.draw(pipe), reference=reference, **settings)
    assert found.points[0].step_error[: len(plain.choices)] == plain.points[0].step_error
    own = [found.names[np.argmin(point.step_error)] for point in found.points]
    assert own == ["full/full"] + ["full/patch2 weak 0.4"] * (len(levels) - 1)


NARROW = Schedule(
    [Segment.of(Choice(), 1, 0.59), Segment.of(WEAKLY, 0.59, 0.58), Segment.of(Choice(), 0.58, 0)]
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "weak:0.8"}, "reference = 'weak:0.8' is out of range; legal: a Schedule"),
        (
            {"reference": CFG_THEN_WEAK, "choices": pairings([FULL, WEAK])},
            r"reference = 'full/patch2 weak 0.4' from noise level 0.5 to 0; legal: .*'full/full'",
        ),
        ({"reference": Schedule.constant(Mode(3))}, r"ask for \['patch3'\]; legal.*patch2"),
        (
            {"reference": NARROW},
            "from noise level 0.59 to 0.58, where nothing was measured; legal: .* levels 1, 0.",
        ),
    ],
)
def test_illegal_references_are_named(pixel, make_elastic, changes, words):
    pipe = pixel()
    with pytest.raises(ValueError, match=words):
        make_elastic(pipe).calibrate(sampler(pipe), guidance_scale=2.5, rounds=1, **changes)


def test_weak_guidance_is_no_reference_without_guidance(pixel, make_elastic):
    pipe = pixel()
    handle, sample = make_elastic(pipe), sampler(pipe, scale=1.0)
    with pytest.raises(ValueError, match=r"reference = 'full/patch2 weak 0.4'.*one of the choices"):
        handle.calibrate(sample, guidance_scale=1, reference=CFG_THEN_WEAK, rounds=1)
    coarse = Schedule.weak_first(0.5)
    found = handle.calibrate(sample, guidance_scale=1, reference=coarse, rounds=1)
    assert [segment.mode for segment in found.reference.segments] == [WEAK, FULL]
    assert all(point.step_error == point.branch_error for point in found.points)


# ------------------------------------------------------------------------------------------------
# In an adapter folder


def test_an_adapter_ships_its_calibration(calibrated, make_model, make_elastic, tmp_path):
    _, handle, measured = calibrated
    folder = handle.adapter().save_pretrained(tmp_path / "adapter")
    assert (folder / FILE).is_file()
    again = elastify(make_model(), folder)
    assert again.calibration == measured
    again.budget = 0.6
    assert isinstance(again.controller, SolvedBudget)
    assert again.schedule == SolvedBudget(calibration=measured, budget=Budget(0.6)).begin(
        Facts(levels=(), macs=again.shape.macs)
    )
    Adapter.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert Adapter.from_pretrained(tmp_path / "copy").calibration == measured
    make_elastic().adapter().save_pretrained(folder)  # other weights, never measured
    assert not (folder / FILE).exists()
    assert Adapter.from_pretrained(folder).calibration is None


def test_a_calibration_of_another_model_is_refused(calibrated, make_model, make_elastic, tmp_path):
    *_, measured = calibrated
    other = make_elastic(scales=(2,))
    words = r"of another model; method settings: calibration .*, here .*"
    with pytest.raises(ValueError, match=words):
        other.calibration = measured
    assert other.calibration is None
    with pytest.raises(ValueError, match="base num_layers: calibration 2, here 3"):
        make_elastic(make_model(num_layers=3)).calibration = measured
    folder = other.adapter().save_pretrained(tmp_path / "adapter")
    measured.save(folder)
    with pytest.raises(ValueError, match=words):
        Adapter.from_pretrained(folder)
    (folder / FILE).write_text("[]")
    with pytest.raises(ValueError, match=rf"{FILE}.*format = \[\]; legal: 1"):
        Adapter.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------
# The command


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["ditdial", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_the_command_calibrates_an_adapter_folder(monkeypatch, capsys, tmp_path):
    adapter = shutil.copytree(reference_adapter("lora"), tmp_path / "adapter")
    (adapter / FILE).unlink(missing_ok=True)
    small = ("--adapter", str(adapter), "--images", "3", "--steps", "4")
    code, out, err = run(monkeypatch, capsys, "calibrate", *small, "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["level"] for row in rows] == pytest.approx([row["u"] for row in rows])
    assert all(row["full/full"] == 0 < row["patch2/patch2"] for row in rows)
    measured = Calibration.load(adapter / FILE)
    assert (measured.data["pictures"], measured.guidance_scale) == (3, 2.0)
    code, _, err = run(monkeypatch, capsys, "calibrate", *small)
    assert code == 2
    assert "exists; --force replaces it" in " ".join(err.split())
    assert Calibration.load(adapter / FILE) == measured
    code, _, err = run(monkeypatch, capsys, "calibrate", *small, "--only-seconds")
    assert code == 0, err
    timed = Calibration.load(adapter / FILE)
    assert timed.points == measured.points
    assert timed.seconds != measured.seconds
    code, _, err = run(monkeypatch, capsys, "calibrate", *small, "--force", "--steps", "2")
    assert code == 0, err
    assert Calibration.load(adapter / FILE).data["steps"] == 2
    pictures = tmp_path / "pictures"
    options = ("--adapter", str(adapter), "--budget", "0.5", "--labels", "1", "--steps", "6")
    code, _, err = run(monkeypatch, capsys, "sample", str(pictures), *options)
    assert code == 0, err
    assert 0.4 < json.loads((pictures / "report.json").read_text())["ratio"] <= 0.5


def test_the_command_takes_a_reference(monkeypatch, capsys, tmp_path):
    small = ("--images", "2", "--steps", "5", "--output")
    code, _, err = run(
        monkeypatch,
        capsys,
        "calibrate",
        *small,
        str(tmp_path / "weak.json"),
        "--reference",
        "weak:0.8",
    )
    assert code == 0, err
    measured = Calibration.load(tmp_path / "weak.json")
    assert measured.reference == Schedule.weak_guidance_below(0.8)
    (tmp_path / "reference.json").write_text(measured.reference.to_json())
    code, _, err = run(
        monkeypatch,
        capsys,
        "calibrate",
        *small,
        str(tmp_path / "same.json"),
        "--reference",
        str(tmp_path / "reference.json"),
    )
    assert code == 0, err
    assert Calibration.load(tmp_path / "same.json").points == measured.points


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reference", "weak"], "reference = 'weak'; legal: 'cfg', 'weak:LEVEL'"),
        (["--reference", "weak:1.5"], "reference = 'weak:1.5'; legal: 'cfg', 'weak:LEVEL'"),
        (["--reference", "no.json"], "reference = 'no.json'; legal: 'cfg', 'weak:LEVEL'"),
        (["--reference", "weak:0.5", "--only-seconds"], "--only-seconds, which keeps the errors"),
        (["--images", "0"], "images = 0"),
        (["--steps", "0"], "steps = 0"),
        (["--adapter", "no/such/folder"], "no/such/folder"),
        (["--only-seconds"], "calibration 'c.json' does not exist"),
        (["--guidance-scale", "-2"], "guidance_scale = -2.0"),
        (["--bands", "-1"], "bands = -1"),
    ],
)
def test_the_command_refuses(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, "calibrate", "--output", "c.json", *arguments)
    assert code == 2
    assert words in " ".join(err.split())
    assert not list(tmp_path.iterdir())
