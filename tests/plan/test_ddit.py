"""The choice from the latents: right on known trajectories, by picture, and never over its cap."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tests.backbones.pipes import PIPES, PROMPTS

from ditdial import FULL, FlexiDiT, Mode, PixelDiTPipeline, Schedule, elastify
from ditdial.evaluation.picture import decisions, mode_colour
from ditdial.plan.ddit import Account, DDiTController
from ditdial.plan.facts import Facts
from ditdial.plan.report import Report
from ditdial.plan.threshold import calibrated, settled, traced
from ditdial.sampling.pixel_pipeline import flow_matched_betas

WEAK, WEAKER = Mode(2), Mode(4)
COSTS = {FULL: 100.0, WEAK: 25.0, WEAKER: 8.0}
GRID = (1, 8, 8, 1, 4)  # T, H, W, C, p


def macs_of(mode, level=None):
    return COSTS[mode]


def levels(steps):
    return tuple(1 - i / steps for i in range(steps))


def facts(steps=10):
    return Facts(levels=levels(steps), macs=macs_of, guided=True)


def texture(seed=0):
    return torch.randn(GRID, generator=torch.Generator().manual_seed(seed))


def modes(run, trajectory, steps=10):
    """Modes of all pictures at each step; a trajectory maps a level to latents."""
    return [
        [decision.choice.mode for decision in run.decide(level, trajectory(level))]
        for level in levels(steps)
    ]


def still_and_lively(level):
    """A picture that moves by a quadratic, and one by a cubic that differs from place to place."""
    quiet = texture(1) + level * texture(2) + level**2 * texture(3)
    return torch.stack([quiet, quiet + 2 * level**3 * texture(4)])


@pytest.mark.parametrize("steps", [8, 25, 100])
def test_a_quadratic_is_coarse_and_a_cubic_fine_at_any_step_count(steps):
    found = modes(DDiTController(tau=0.5).begin(facts(steps)), still_and_lively, steps)
    assert found[:3] == [[FULL, FULL]] * 3
    assert found[3:] == [[WEAKER, FULL]] * (steps - 3)


def test_pictures_are_judged_alone():
    both = modes(DDiTController(tau=0.5).begin(facts()), still_and_lively)
    for place in range(2):
        alone = modes(
            DDiTController(tau=0.5).begin(facts()),
            lambda level, place=place: still_and_lively(level)[place : place + 1],
        )
        assert [step[place] for step in both] == [step[0] for step in alone]
    together = modes(DDiTController(tau=0.5, per_picture=False).begin(facts()), still_and_lively)
    assert together == [[FULL, FULL]] * 10


def test_larger_thresholds_are_never_dearer():
    costs = []
    for tau in (0, 1e-3, 0.1, 1, 10, 1e6):
        found = modes(DDiTController(tau=tau).begin(facts()), still_and_lively)
        costs.append(sum(macs_of(mode) for step in found for mode in step))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 2000
    assert costs[-1] == 2 * (300 + 7 * 8)


def test_settings_that_force_modes():
    start = DDiTController(tau=0, start=WEAK, fine_below=0.35)
    found = modes(start.begin(facts()), still_and_lively)
    assert found[:3] == [[WEAK, WEAK]] * 3
    quiet = DDiTController(tau=1e6, fine_below=0.35)
    found = modes(quiet.begin(facts()), still_and_lively)
    assert found[-3:] == [[FULL, FULL]] * 3
    assert found[-4] == [WEAKER, WEAKER]


@pytest.mark.parametrize("cap", [None, 0.5])
def test_a_size_is_not_used_below_its_lowest_level(cap):
    settings = {"lowest": (0.25, 0.55), "start": WEAKER, "cap": cap}
    found = modes(DDiTController(tau=1e6, **settings).begin(facts()), still_and_lively)
    assert found == [[WEAKER] * 2] * 5 + [[WEAK] * 2] * 3 + [[FULL] * 2] * 2
    with pytest.raises(ValueError, match=r"cap = 0\.3; legal: 0\.3150"):
        DDiTController(tau=1e6, **{**settings, "cap": 0.3}).begin(facts())


def test_refine_only_never_goes_back():
    def waking(level):  # lively in the middle only
        bump = math.exp(-(((level - 0.5) / 0.1) ** 2))
        return (texture(1) + 5 * bump * texture(2))[None]

    free = DDiTController(tau=20.0, start=WEAKER)
    kept = DDiTController(tau=20.0, start=WEAKER, refine_only=True)
    costs = [[macs_of(m) for (m,) in modes(c.begin(facts(25)), waking, 25)] for c in (free, kept)]
    assert costs[0] != sorted(costs[0])
    assert costs[1] == sorted(costs[1])


@pytest.mark.parametrize("cap", [0.4, 0.45, 0.61, 0.8, 1.0])
@pytest.mark.parametrize("settings", [{}, {"start": WEAKER, "refine_only": True}], ids=str)
@pytest.mark.parametrize("steps", [8, 20])
def test_no_picture_exceeds_its_cap(cap, settings, steps):
    if steps == 8 and not settings and cap < 0.43:
        pytest.skip("below the cheapest")
    run = DDiTController(tau=0, cap=cap, **settings).begin(facts(steps))
    found = modes(run, still_and_lively, steps)
    for place in range(2):
        share = sum(macs_of(step[place]) for step in found) / (100 * steps)
        assert share <= cap + 1e-9
        assert share > cap - 1 / steps or settings  # and leaves little unused


def test_a_cap_below_the_cheapest_says_what_that_is():
    with pytest.raises(ValueError, match=r"cap = 0.3; legal: 0.3560 .* in 10 steps\) to 1"):
        DDiTController(tau=1, cap=0.3).begin(facts())
    with pytest.raises(ValueError, match=r"account.share = 0.3; legal: 0.3560"):
        DDiTController(tau=1, account=Account(0.3)).begin(facts())


def test_an_account_lets_easy_pictures_pay_for_hard_ones():
    account = Account(0.6)
    controller = DDiTController(tau=0.5, account=account)
    for _ in range(4):
        found = modes(controller.begin(facts()), still_and_lively)
        assert account.spent <= 0.6 * account.full * (1 + 1e-9)
    quiet, lively = (sum(macs_of(step[i]) for step in found) / 1000 for i in range(2))
    assert quiet < 0.4
    assert lively > 0.75
    assert account.full == 4 * 2 * 10 * 200
    mean = DDiTController(tau=0.5, cap=0.6).begin(facts())
    capped = modes(mean, still_and_lively)
    assert sum(macs_of(step[1]) for step in capped) < sum(macs_of(step[1]) for step in found)


def test_savings_of_one_run_are_spent_in_the_next():
    def only(place):
        return lambda level: still_and_lively(level)[place : place + 1]

    account = Account(0.6)
    controller = DDiTController(tau=0.5, account=account)
    poor = modes(DDiTController(tau=0.5, account=Account(0.6)).begin(facts()), only(1))
    for _ in range(3):
        modes(controller.begin(facts()), only(0))
    rich = modes(controller.begin(facts()), only(1))
    assert [m for (m,) in rich] == [FULL] * 10
    assert sum(macs_of(m) for (m,) in poor) <= 600
    assert account.spent <= 0.6 * account.full


def test_a_recorded_run_predicts_the_cost_of_a_threshold():
    record = DDiTController(tau=0).begin(facts())
    trace = [record.decide(level, still_and_lively(level)) for level in levels(10)]
    traces = [[step[i].why for step in trace] for i in range(2)]
    for tau in (0.01, 0.5, 50.0):
        controller = DDiTController(tau=tau)
        found = modes(controller.begin(facts()), still_and_lively)
        for place in range(2):
            share = sum(macs_of(step[place]) for step in found) / 1000
            assert traced(controller, traces[place], facts()) == pytest.approx(share)
    tuned = calibrated(DDiTController(tau=0), 0.678, traces, facts())
    costs = [traced(tuned, trace, facts()) for trace in traces]
    assert sum(costs) / 2 == pytest.approx(0.678, abs=0.001)
    assert costs[0] < costs[1]
    with pytest.raises(ValueError, match=r"budget = 0.2; legal: 0.356"):
        calibrated(DDiTController(tau=0), 0.2, traces, facts())


def test_settling_follows_what_coarse_steps_do():
    """Latents that get rougher where steps were coarse: full runs alone promise too little."""
    asked = []

    def record(controller):
        asked.append(controller.tau)
        run, trace, coarse = controller.begin(facts(20)), [], 0
        for level in levels(20):
            rough = still_and_lively(level) * (1 + 0.2 * coarse)
            (*_, last) = decisions = run.decide(level, rough)
            coarse += last.choice.mode != FULL
            trace.append(decisions)
        return [[step[i].why for step in trace] for i in range(2)]

    start = DDiTController(tau=0)
    once = settled(start, 0.6, record, facts(20), rounds=1)
    asked.clear()
    tuned = settled(start, 0.6, record, facts(20), rounds=4)
    assert asked[0] == 0
    assert len(asked) == 5

    def cost(controller):
        traces = record(controller)
        return sum(traced(controller, trace, facts(20)) for trace in traces) / 2

    assert abs(cost(tuned) - 0.6) < 0.06  # two pictures, one of which feeds back on itself
    assert abs(cost(tuned) - 0.6) <= abs(cost(once) - 0.6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tau": -1}, "tau = -1 .*legal: a number >= 0"),
        ({"tau": float("inf")}, "tau = inf"),
        ({"rho": 1.5}, r"rho = 1.5 .*legal: \[0, 1\]"),
        ({"order": 0}, "order = 0"),
        ({"coarse": ()}, "coarse"),
        ({"coarse": (FULL,)}, "coarse"),
        ({"start": Mode(8)}, "start = 'patch8' .*legal: full, patch2, patch4"),
        ({"fine_below": 1}, "fine_below"),
        ({"lowest": (0.5,)}, "lowest = .*legal: 2 noise levels"),
        ({"lowest": (0.5, 1.5)}, "lowest = .*legal: 2 noise levels"),
        ({"signal": "noise"}, "signal = 'noise'; legal: 'latent', 'clean'$"),
        ({"signal": "latents"}, r"legal: 'latent', 'clean' \(did you mean 'latent'\?\)"),
        ({"cap": 0}, r"cap = 0 .*legal: \(0, 1\]"),
        ({"refine_only": True}, "start = 'full' .*legal: coarse"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        DDiTController(**{"tau": 1, **settings})


def test_too_few_steps_and_unknown_steps_are_refused():
    with pytest.raises(ValueError, match="3 steps; legal with order = 3: more than 3"):
        DDiTController(tau=1).begin(facts(3))
    bare = Facts(levels=(), macs=macs_of)
    with pytest.raises(ValueError, match="number of steps before the run"):
        DDiTController(tau=1, cap=0.5).begin(bare)
    assert DDiTController(tau=1).begin(bare)
    with pytest.raises(ValueError, match=r"share = 0 .*legal: \(0, 1\]"):
        Account(0)


# On real pipelines


@pytest.fixture
def pipe(make_model, make_elastic):
    def make(scheduler=None, **settings):
        model = make_model(num_embeds_ada_norm=10)
        pipe = PixelDiTPipeline(model, scheduler or FlowMatchEulerDiscreteScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe, make_elastic(pipe, **settings)

    return make


LABELS, SEEDS = [1, 2, 3, 4], [11, 12, 13, 14]


def draw(pipe, places=range(4), steps=12, scale=3.0):
    return pipe(
        [LABELS[i] for i in places],
        seeds=[SEEDS[i] for i in places],
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="pt",
    ).images


def median_tau(handle, pipe, **settings):
    """A threshold about which the pictures of a run differ."""
    handle.controller = DDiTController(tau=0, **settings)
    draw(pipe)
    found = [
        value
        for call in handle.report().calls
        for why in call.why
        for value in (why["statistic"] or {}).values()
    ]
    found = sorted(set(found))
    middle = len(found) // 2
    # Between two of them: on one of them, rounding would decide.
    return (found[middle - 1] + found[middle]) / 2


def by_picture(report):
    """Modes of each picture over the run."""
    return [trail.modes for trail in report.by_picture()]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_picture_of_a_mixed_batch_is_that_picture_alone(pipe, scale):
    pipe, handle = pipe()
    handle.controller = DDiTController(tau=median_tau(handle, pipe))
    together = draw(pipe, scale=scale)
    report = handle.report()
    modes = by_picture(report)
    assert len({tuple(m) for m in modes}) > 1  # the pictures do differ
    assert {len(m) for m in modes} == {12}
    for place in range(4):
        alone = draw(pipe, [place], scale=scale)
        assert by_picture(handle.report())[0] == modes[place]
        torch.testing.assert_close(alone[0], together[place], atol=1e-5, rtol=1e-5)
    macs = handle.shape.macs
    branches = 2 if scale > 1 else 1
    counted = branches * sum(macs(mode) for picture in modes for mode in picture)
    assert report.macs == pytest.approx(counted, rel=1e-9)
    assert report.ratio == pytest.approx(counted / (branches * 4 * 12 * macs(FULL)), rel=1e-9)


def test_a_threshold_of_zero_is_the_stock_run(pipe, make_model):
    pipe, handle = pipe()
    stock = PixelDiTPipeline(make_model(), FlowMatchEulerDiscreteScheduler())
    stock.set_progress_bar_config(disable=True)
    handle.controller = DDiTController(tau=0)
    assert torch.equal(draw(pipe), draw(stock))


@pytest.mark.parametrize("cap", [0.5, 0.75])
def test_a_real_run_keeps_its_cap_and_an_account(pipe, cap):
    pipe, handle = pipe()
    handle.controller = DDiTController(tau=0, cap=cap)
    draw(pipe)
    assert cap - 0.1 < handle.report().ratio <= cap
    account = Account(cap)
    handle.controller = DDiTController(tau=median_tau(handle, pipe), account=account)
    for _ in range(2):
        draw(pipe)
        assert handle.report().ratio <= cap + 1e-9 or account.spent <= cap * account.full
    assert account.spent <= cap * account.full * (1 + 1e-9)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(trained_betas=flow_matched_betas(), prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=["ddim", "flow"],
)
def test_the_predicted_clean_latent_can_be_looked_at(pipe, scheduler):
    pipe, handle = pipe(scheduler)
    tau = median_tau(handle, pipe, signal="clean")
    handle.controller = DDiTController(tau=tau, signal="clean")
    draw(pipe)
    modes = by_picture(handle.report())
    assert all(m[:4] == [FULL] * 4 for m in modes)
    assert any(mode != FULL for m in modes for mode in m)


def test_why_is_in_the_report(pipe):
    pipe, handle = pipe()
    handle.controller = DDiTController(tau=1e-9, cap=0.6)
    draw(pipe)
    calls = handle.report().to_dict()["calls"]
    assert calls[0]["why"][0] == {"statistic": None, "tau": 1e-9}
    late = [why for call in calls[4:] for why in call["why"]]
    assert all(set(why["statistic"]) == {"patch2", "patch4"} for why in late)
    assert any(why.get("wanted") == "full" for why in late)  # the cap said no


@pytest.mark.parametrize("name", ["dit", "wan", "flux"])
def test_the_report_follows_each_picture(name):
    """Costs of the pictures add up to the run's; a step of two calls is one line."""
    case, steps = PIPES[name], 6
    pipe = case.pipe()
    handle = case.elastic(pipe)
    prompts = PROMPTS[: 1 if name == "flux" else 2]
    handle.controller = DDiTController(tau=1e-9, cap=0.8, coarse=handle.modes[1:])
    case.draw(pipe, prompts, num_inference_steps=steps)
    report = handle.report()
    trails = report.by_picture()
    assert len(trails) == len(prompts)
    assert {len(trail.modes) for trail in trails} == {steps}
    assert sum(trail.macs for trail in trails) == pytest.approx(report.macs)
    assert all(trail.ratio <= 0.8 + 1e-9 for trail in trails)
    assert all(why["statistic"] for why in trails[0].why[3:])
    picture = decisions(report, plan=None)
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    used = {mode_colour(mode) for trail in trails for mode in trail.modes}
    assert used <= colours
    with pytest.raises(ValueError, match="holds no calls"):
        decisions(Report(()))


def test_schedule_and_controller_replace_each_other(pipe):
    pipe, handle = pipe()
    handle.controller = DDiTController(tau=1e9)
    draw(pipe)
    assert handle.report().ratio < 0.6
    with pytest.raises(ValueError, match="DDiTController chooses while sampling"):
        handle.plan(10)
    handle.schedule = Schedule.constant()
    assert handle.controller is None
    draw(pipe)
    assert handle.report().ratio == 1
    with pytest.raises(ValueError, match="controller asks for patch8; legal for this adapter"):
        handle.controller = DDiTController(tau=1, coarse=(Mode(8),))


@pytest.mark.parametrize("name", ["wan", "flux", "pixart-alpha", "sd3", "lumina2", "latte"])
def test_stock_pipelines(name):
    """Both branches of a step run in the mode that the conditional one was given."""
    case = PIPES[name]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    coarse = tuple(handle.method.modes)
    steps = 6
    handle.controller = DDiTController(tau=0, coarse=coarse)
    case.draw(pipe, num_inference_steps=steps)
    found = sorted(
        value
        for call in handle.report().calls
        for why in call.why
        for value in (why["statistic"] or {}).values()
    )
    assert found
    handle.controller = DDiTController(tau=found[len(found) // 2], coarse=coarse, cap=0.9)
    case.draw(pipe, num_inference_steps=steps)
    report = handle.report()
    assert any(call.mode != FULL for call in report.calls)
    assert report.ratio <= 0.9 + 1e-9
    steps_of = [list(calls) for _, calls in itertools.groupby(report.calls, lambda c: c.level)]
    if case.two_calls:
        assert all(len(calls) == 2 for calls in steps_of)
        assert all(first.mode == second.mode for first, second in steps_of)
    else:
        assert all(call.guide == call.mode for call in report.calls)


def test_a_bare_model_decides_without_a_scheduler(make_model, make_call, output):
    handle = elastify(make_model(), FlexiDiT(rank=4))
    handle.controller = DDiTController(tau=1e9)
    for time in (900.0, 700.0, 500.0, 300.0):
        output(handle.model, make_call(time=time))
    assert [call.mode for call in handle.report().calls] == [FULL, FULL, FULL, WEAKER]
