"""LowBand in diffusers' own pipelines: budgets, guidance, batches, and what is refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from tests.backbones.pipes import PIPES, PROMPTS, STEPS
from tests.wild.every_pipeline import every_pipeline
from tests.wild.test_every_budget import Cell, check

from ditdial import FULL, FlexiDiT, LowBand, Mode, Schedule, Segment, elastify
from ditdial.backbones import BACKBONES
from ditdial.ops.low_band import band_of, from_band
from ditdial.runtime.model_class import engine_of

BAND = Mode(low_band=2)
CONTROL = r"holds something for each base token, and mode 'band2' has other tokens; legal"
MASK = r"a mask among them, and mode 'band2' has no smaller form of one; legal with a mask: full"
UNEVEN = r"image_rotary_emb has phases for 8 x 7 tokens, .*; legal: ratios that divide both"
GIVEN = r"timestep has different times for the tokens .*; legal with them: modes of the latent's"
ANGLES = r"scheduler SCMScheduler predicts 'trigflow'; legal: a flow-matching scheduler"
REFUSED = {
    "CogVideoXFunControlPipeline": UNEVEN,
    "CogVideoXImageToVideoPipeline": UNEVEN,
    "CogVideoXPipeline": UNEVEN,
    "CogVideoXVideoToVideoPipeline": UNEVEN,
    "Flux2KleinKVPipeline": r"kv_cache_mode = 'extract' .*; legal with them: full mode",
    "FluxControlNetImg2ImgPipeline": CONTROL,
    "FluxControlNetInpaintPipeline": CONTROL,
    "FluxControlNetPipeline": CONTROL,
    "FluxFillPipeline": MASK,
    "LTXConditionPipeline": GIVEN,
    "LTXI2VLongMultiPromptPipeline": GIVEN,
    "LTXImageToVideoPipeline": GIVEN,
    "QwenImageControlNetInpaintPipeline": CONTROL,
    "QwenImageControlNetPipeline": CONTROL,
    "SanaControlNetPipeline": CONTROL,
    "SanaSprintImg2ImgPipeline": ANGLES,
    "SanaSprintPipeline": ANGLES,
    "StableDiffusion3ControlNetInpaintingPipeline": CONTROL,
    "StableDiffusion3ControlNetPipeline": CONTROL,
    "VisualClozeGenerationPipeline": MASK,
    "VisualClozePipeline": MASK,
    "ZImageControlNetInpaintPipeline": CONTROL,
    "ZImageControlNetPipeline": CONTROL,
    "ZImageOmniPipeline": r"siglip_feat_dim = 24; legal: None",
}
"""Pipelines whose calls have no smaller form, and what is said before their first step."""

ONE_OF_EACH = sorted({model: name for name, model in every_pipeline().items()}.values())


def low_band(pipe, component=None):
    return elastify(pipe, LowBand(force=True), component=component)


def check_or_refusal(name):
    cell = Cell(name, 1.0, 0.6)
    if name not in REFUSED:
        return check(cell, low_band)
    with pytest.raises(ValueError, match=REFUSED[name]):
        check(cell, low_band)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_budget_holds_in_a_pipeline_of_every_class(name):
    check_or_refusal(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in every_pipeline() if x not in ONE_OF_EACH])
def test_a_budget_holds_in_every_pipeline(name):
    check_or_refusal(name)


def test_the_refused_pipelines_are_some_of_all():
    assert set(REFUSED) <= set(every_pipeline())


def started(name, segments, **facts):
    """A pipeline with a schedule; segments are ``(start, stop, mode, guide)``."""
    case = PIPES[name]
    pipe = case.pipe()
    handle = elastify(pipe, LowBand(force=True))
    handle.schedule = Schedule(
        [Segment(start=a, stop=b, mode=m, guide=g, **facts) for a, b, m, g in segments]
    )
    return case, pipe, handle


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "wan", "lumina2", "z-image"])
def test_rows_of_a_batch_are_as_alone(name):
    case, pipe, handle = started(name, [(1, 0.7, BAND, None), (0.7, 0, FULL, None)])
    together = case.draw(pipe, PROMPTS[:2], **case.alike)
    assert BAND in {call.mode for call in handle.report().calls}
    for row, prompt in enumerate(PROMPTS[:2]):
        alone = case.draw(pipe, [prompt], seeds=[11 + row], **case.alike)
        torch.testing.assert_close(together[row], alone[0], atol=2e-4, rtol=1e-3)


def above_the_band(name, handle, prediction):
    """What pictures hold above half of their waves, of predictions in the class's layout."""
    backbone, state = handle.backbone, engine_of(handle.model).wiring.state
    pictures = backbone.sizes.pictures(prediction, backbone.patches, state.patch, state.grid)
    sides = tuple(
        math.ceil(n / 2) * k for n, k in zip(state.grid[1:], state.patch[1:], strict=True)
    )
    return pictures - from_band(band_of(pictures, sides), pictures.shape[-2:])


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "wan", "lumina2", "z-image"])
@pytest.mark.parametrize(
    ("mode", "guide", "facts"),
    [
        (FULL, BAND, {}),
        (FULL, BAND, {"guidance": "weak", "gain": 0.4}),
        (BAND, FULL, {}),
    ],
    ids=["low guide", "weak guide", "low conditional"],
)
def test_branches_of_two_sizes_have_one_high_band(name, mode, guide, facts):
    """Whatever the guidance scale, it multiplies no difference there."""
    case, pipe, handle = started(name, [(1, 0, mode, guide)], **facts)
    seen = []
    engine_of(handle.model).observers.append(
        lambda model, call, output: seen.append(handle.backbone.arguments.prediction(call, output))
    )
    case.draw(pipe, **({"true_cfg_scale": 7.5} if name == "flux" else {"guidance_scale": 7.5}))
    assert {call.mode for call in handle.report().calls} <= {FULL, BAND}
    pairs = (
        zip(seen[::2], seen[1::2], strict=True) if case.two_calls else (x.chunk(2) for x in seen)
    )
    for one, other in pairs:
        high = above_the_band(name, handle, one)
        torch.testing.assert_close(above_the_band(name, handle, other), high, atol=1e-4, rtol=1e-4)
        assert high.abs().max() > 0.1
        assert (one - other).abs().max() > 1e-3


def test_a_schedule_from_the_spectrum_is_there_at_once():
    pipe = PIPES["flux"].pipe()
    handle = elastify(pipe, LowBand())
    first, second = handle.schedule.segments
    assert (first.mode, second.mode) == (BAND, FULL)
    assert first.stop == pytest.approx(0.853, abs=0.002)  # of FLUX.1 at 1024 x 1024 pixels
    stops = [segment.stop for segment in elastify(pipe, LowBand(ratios=(2, 4))).schedule.segments]
    assert 1 > stops[0] > stops[1] > stops[2] == 0


def test_a_plan_says_that_a_rule_chose_until_something_is_measured():
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = elastify(pipe, LowBand())
    told = "chosen by a rule, not by measured errors"
    assert told in str(handle.plan(10))
    assert handle.plan(10).to_dict()["by_rule"] is True
    handle.schedule = Schedule.constant(BAND)
    assert told not in str(handle.plan(10))
    handle.budget = 0.9
    assert told in str(handle.plan(10))
    handle.calibrate(lambda n: case.draw(pipe, guided=False), guidance_scale=1)
    assert told in str(handle.plan(10))  # that budget's plans are as they were
    handle.budget = 0.9
    assert told not in str(handle.plan(10))
    handle.schedule = Schedule.constant()
    assert told not in str(handle.plan(10))


def test_the_rule_is_told_in_the_levels_of_the_pipeline():
    """Of variance-preserving schedulers, a level is the share of the training steps."""
    pipe = PIPES["pixart-sigma"].pipe()
    handle = elastify(pipe, LowBand(force=True))
    model, backbone = pipe.transformer, handle.backbone
    switch = LowBand(force=True).schedule_for(model, backbone, None).segments[0].stop
    stop = handle.schedule.segments[0].stop
    share = pipe.scheduler.alphas_cumprod[round(stop * 1000)].item()
    assert (share / (1 - share)) ** 0.5 == pytest.approx((1 - switch) / switch, rel=0.02)


@pytest.mark.parametrize("name", sorted(PIPES))
def test_bases_of_one_size_are_refused_unless_forced(name):
    case = PIPES[name]
    pipe = case.pipe()
    model_class = type(pipe.transformer).__name__
    backbone = BACKBONES[model_class]
    why = backbone.sizes.why_one(pipe.transformer)
    assert bool(why) == (name in ("dit", "pixart-alpha", "pixart-sigma", "latte", "auraflow"))
    if why:
        with pytest.raises(ValueError, match=r"trained .*; legal: LowBand\(force=True\)"):
            elastify(pipe, LowBand())
        assert type(pipe.transformer).__name__ == model_class
    elastify(pipe, LowBand(force=True)).remove()


@pytest.mark.parametrize("name", ["dit", "latte"])
def test_classes_that_make_squares_alone_have_one_ratio(name):
    pipe = PIPES[name].pipe()
    with pytest.raises(ValueError, match=r"'band2x1' is not square, .*legal: one ratio"):
        elastify(pipe, LowBand(ratios=(2, (2, 1)), force=True))


def test_a_bare_model_has_no_way_to_know_what_it_predicts():
    pipe = PIPES["sd3"].pipe()
    handle = elastify(pipe.transformer, LowBand())
    call = {
        "hidden_states": torch.zeros(1, 4, 16, 16),
        "encoder_hidden_states": torch.zeros(1, 5, 24),
        "pooled_projections": torch.zeros(1, 20),
        "timestep": torch.tensor([900.0]),
    }
    with handle.using(BAND), pytest.raises(ValueError, match="legal for a bare model"):
        handle.model(**call)


def test_an_odd_latent_is_refused():
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = elastify(pipe, LowBand())
    handle.schedule = Schedule.constant(BAND)
    call = {
        "hidden_states": torch.zeros(1, 4, 16, 17),
        "encoder_hidden_states": torch.zeros(1, 5, 24),
        "pooled_projections": torch.zeros(1, 20),
        "timestep": torch.tensor([900.0]),
    }
    with pytest.raises(ValueError, match="a latent of 16 x 17; legal: whole patches of 2 x 2"):
        handle.model(**call)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratios": ()}, "ratios = ()"),
        ({"ratios": (2, 2.0)}, "all different"),
        ({"ratios": (1,)}, "each above 1"),
        ({"ratios": (0.5,)}, "low_band = 0.5; legal: a number from 1 to 64"),
        ({"ratios": (2.345,)}, "at most two decimals"),
        ({"ratios": ((2, 1, 1),)}, "low_band = (2, 1, 1)"),
        ({"ratios": ("2",)}, "low_band = '2'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        LowBand(**settings)


def test_a_ratio_that_leaves_no_token_is_refused():
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = elastify(pipe, LowBand(ratios=(16,)))
    handle.schedule = Schedule.constant(Mode(low_band=16))
    with pytest.raises(ValueError, match="'band16' does not fit"):
        case.draw(pipe)


@pytest.mark.parametrize("ratio", [1.5, (2, 1), (1, 3), 3])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "z-image"])
def test_any_ratio_runs_and_costs_what_is_planned(name, ratio):
    case = PIPES[name]
    pipe = case.pipe()
    handle = elastify(pipe, LowBand(ratios=(ratio,)))
    mode = Mode(low_band=ratio)
    handle.schedule = Schedule.weak_first(0.5, mode)
    case.draw(pipe)
    plan = handle.plan(
        case.size.get("num_inference_steps", STEPS), grid=case.grid, text_tokens=case.text
    )
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-3)
    assert mode in {call.mode for call in handle.report().calls}


def test_low_band_then_coarse_then_full_in_one_run():
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = elastify(pipe, [FlexiDiT(scales=(2,), rank=3), LowBand()])
    assert {mode.name for mode in handle.modes} == {"full", "patch2", "band2"}
    handle.schedule = Schedule(
        [
            Segment(start=1, stop=0.8, mode=BAND),
            Segment(start=0.8, stop=0.5, mode=Mode(2)),
            Segment(start=0.5, stop=0),
        ]
    )
    case.draw(pipe)
    assert {call.mode.name for call in handle.report().calls} == {"full", "patch2", "band2"}
    with pytest.raises(ValueError, match="asks for band2_patch2; legal"):
        handle.schedule = Schedule.constant(Mode(2, low_band=2))


def test_removed_again_the_pipeline_is_the_stock_one():
    case = PIPES["flux"]
    stock, pipe = case.draw(case.pipe()), case.pipe()
    handle = elastify(pipe, LowBand())
    handle.schedule = Schedule.constant()
    assert torch.equal(case.draw(pipe), stock)
    handle.schedule = Schedule.constant(BAND)
    assert not torch.equal(case.draw(pipe), stock)
    handle.remove()
    assert torch.equal(case.draw(pipe), stock)


FEW = [
    pytest.param("flux", {}, id="guidance-distilled"),
    pytest.param("flux", {"scheduler": {"shift": 1.0}}, id="turbo"),
    pytest.param("sd3", {}, id="guided"),
]


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize(("name", "facts"), FEW)
def test_few_steps_have_few_costs_and_the_plan_tells_them(name, facts, steps):
    case = PIPES[name]
    pipe = case.pipe()
    if facts:
        pipe.scheduler = type(pipe.scheduler)(**facts["scheduler"])
    handle = elastify(pipe, LowBand())
    guided = name == "sd3"
    plan = handle.plan(steps, guidance=guided, grid=case.grid, text_tokens=case.text)
    # The default: pure noise is low, the last step is not.
    assert plan.steps[0].mode == BAND
    assert plan.steps[-1].mode == FULL
    assert plan.budgets[0] == 1
    assert list(plan.budgets) == sorted(set(plan.budgets), reverse=True)
    assert len(plan.budgets) == (2 if guided else 1) * steps + 1
    assert "budgets of so few steps buy" in str(plan)
    assert plan.to_dict()["budgets"] == list(plan.budgets)
    for share in plan.budgets[1::3]:
        handle.budget = max(share + 1e-9, usual_least(handle))
        found = handle.plan(steps, guidance=guided, grid=case.grid, text_tokens=case.text)
        right = max(x for x in plan.budgets if x <= handle.budget)
        assert found.ratio == pytest.approx(right)
        case.draw(pipe, num_inference_steps=steps, guided=guided)
        assert handle.report().ratio == pytest.approx(found.ratio, rel=1e-3)
    many = handle.plan(20, guidance=guided, grid=case.grid, text_tokens=case.text)
    assert many.budgets == ()


def usual_least(handle):
    """The least budget that is legal at the model's usual size."""
    with pytest.raises(ValueError, match=r"budget = 0\.001") as refusal:
        handle.budget = 0.001
    return float(str(refusal.value).split("legal: ")[1].split(" ")[0])
