"""A budget is kept whatever a run does: guidance that comes and goes, timesteps of its own."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tests.backbones.pipes import embeddings
from tests.wild.every_pipeline import TEXT, Built
from tests.wild.pictures import quiet
from tests.wild.test_every_budget import Sizes, assert_as_planned, elastic, keeping

from ditdial.runtime.model_class import engine_of

BUDGETS = (0.5, 0.8)
SIGMAS = [1.0, 0.95, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1]
TIMES = [999, 980, 900, 700, 500, 300, 100, 20]
budgets = pytest.mark.parametrize("budget", BUDGETS)
GUIDED_APART = ("ChromaPipeline", "Lumina2Pipeline", "WanPipeline")


def watched(pipe, component=None):
    """A handle, and the sizes of the calls to come."""
    handle, sizes = elastic(pipe, component), Sizes()
    engine_of(handle.model).observers.append(sizes)
    return handle, sizes


@pytest.fixture
def drawn():
    """Makes a run of a pipeline within a budget: its handle, its calls' sizes, what was kept."""
    alive = []  # for as long as the test: a plan asks the pipeline for its scheduler

    def draw(name, budget, *, scheduler=None, **changes):
        pipe, arguments = Built(name).pipe(), Built(name).call(steps=10) | changes
        alive.append(pipe)
        if scheduler is not None:
            pipe.scheduler = scheduler
        handle, sizes = watched(pipe)
        kept = keeping(handle, budget, lambda: pipe(**arguments))
        return handle, sizes.of, kept

    return draw


# Guidance that is on in some steps only


def without_guidance_from(step):
    """diffusers' dynamic guidance: a callback turns the scale down."""

    def callback(pipe, index, time, given):
        if index + 1 == step:
            pipe._guidance_scale = 0.0
        return given

    return callback


@budgets
@pytest.mark.parametrize("step", [2, 5, 8])
@pytest.mark.parametrize("name", [*GUIDED_APART, "ZImagePipeline"])
def test_a_budget_holds_when_a_callback_turns_guidance_off(drawn, name, step, budget):
    handle, _, kept = drawn(name, budget, callback_on_step_end=without_guidance_from(step))
    report = handle.report()
    levels = dict.fromkeys(call.level for call in report.calls)
    assert len(levels) == 10
    assert sum(call.passes for call in report.calls) == 10 + step
    assert report.ratio <= kept


@budgets
@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_budget_holds_when_a_callback_drops_the_null_rows(drawn, step, budget):
    given = ["latents", "prompt_embeds", "pooled_prompt_embeds"]

    def callback(pipe, index, time, tensors):
        if index + 1 == step:
            pipe._guidance_scale = 0.0
            tensors |= {name: tensors[name].chunk(2)[-1] for name in given[1:]}
        return tensors

    handle, _, kept = drawn(
        "StableDiffusion3Pipeline",
        budget,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=given,
    )
    report = handle.report()
    assert [call.rows for call in report.calls] == [2] * step + [1] * (10 - step)
    assert report.ratio <= kept


@budgets
@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Lumina2Pipeline", "cfg_trunc_ratio"),
        ("ZImagePipeline", "cfg_truncation"),
        ("ZImageImg2ImgPipeline", "cfg_truncation"),
    ],
)
def test_guidance_of_the_first_steps_alone_is_planned(drawn, name, argument, share, budget):
    handle, sizes, kept = drawn(name, budget, **{argument: share})
    passes = sum(call.passes for call in handle.report().calls)
    assert 10 < passes < 20
    assert_as_planned(handle, sizes, kept)


@budgets
@pytest.mark.parametrize("stop", [0.3, 0.7])
def test_skipped_layers_are_planned(drawn, stop, budget):
    """The conditional branch is made once more in some steps."""
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": stop}
    handle, sizes, kept = drawn("StableDiffusion3Pipeline", budget, **skipping)
    assert len(handle.report().calls) > 10
    report = handle.report()
    assert report.ratio <= kept
    levels = list(dict.fromkeys(call.level for call in report.calls))
    passes = [sum(call.passes for call in report.calls if call.level == each) for each in levels]
    grid, text, *_ = sizes[-1]
    plan = handle.plan(10, guidance=passes, grid=grid, text_tokens=text)
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-3)


# Prompts of different lengths


@budgets
@pytest.mark.parametrize("tokens", [2, 4 * TEXT])
@pytest.mark.parametrize(
    "name",
    [
        "ChromaPipeline",
        "WanPipeline",
        "QwenImagePipeline",
        "HunyuanVideoPipeline",
        "Flux2KleinPipeline",
    ],
)
def test_a_guidance_branch_of_another_length_is_planned(drawn, name, tokens, budget):
    ones = torch.ones(1, tokens)
    null = {
        "max_sequence_length": 4 * TEXT,
        "negative_prompt_embeds": embeddings(tokens, 24, seed=6),
        "negative_prompt_attention_mask": ones if "Chroma" in name else ones.long(),
        "negative_prompt_embeds_mask": ones.long(),
    }
    takes = Built(name).takes
    changes = {key: value for key, value in null.items() if key in takes}
    if name == "Flux2KleinPipeline":
        changes["image"] = None
    handle, sizes, kept = drawn(name, budget, **changes)
    assert {size[1] for size in sizes} == {TEXT, tokens}
    assert_as_planned(handle, sizes, kept)


@budgets
@pytest.mark.parametrize("words", [2, 4])
def test_a_budget_holds_where_words_and_not_their_padding_count(drawn, words, budget):
    mask = (torch.arange(TEXT) < words)[None].long()
    handle, _, kept = drawn("Lumina2Pipeline", budget, negative_prompt_attention_mask=mask)
    assert handle.report().ratio <= kept


# Timesteps


@pytest.mark.parametrize("budget", [0.6, 0.9])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("StableDiffusion3Pipeline", diffusers.FlowMatchHeunDiscreteScheduler),
        ("StableDiffusion3Img2ImgPipeline", diffusers.FlowMatchHeunDiscreteScheduler),
        ("PixArtSigmaPipeline", diffusers.HeunDiscreteScheduler),
        ("PixArtSigmaPipeline", diffusers.KDPM2DiscreteScheduler),
        ("PixArtSigmaPipeline", diffusers.DPMSolverSinglestepScheduler),
        ("PixArtSigmaPipeline", diffusers.UniPCMultistepScheduler),
        ("LattePipeline", diffusers.HeunDiscreteScheduler),
        ("DiTPipeline", diffusers.DPMSolverMultistepScheduler),
    ],
)
def test_a_budget_holds_with_schedulers_of_second_order(drawn, name, scheduler, budget):
    handle, sizes, kept = drawn(name, budget, scheduler=scheduler())
    report = handle.report()
    assert report.ratio <= kept
    grid, text, *_ = sizes[-1]
    plan = handle.plan(10, grid=grid, text_tokens=text)
    assert [call.mode for call in report.calls] == [step.mode for step in plan.steps]
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-3)


@budgets
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("FluxPipeline", {"sigmas": SIGMAS}),
        ("StableDiffusion3Pipeline", {"sigmas": SIGMAS}),
        ("FluxImg2ImgPipeline", {"sigmas": SIGMAS}),
        ("PixArtSigmaPipeline", {"timesteps": TIMES}),
        ("LTXConditionPipeline", {"timesteps": TIMES}),
    ],
)
def test_a_budget_holds_for_timesteps_of_the_users_own(drawn, name, changes, budget):
    scheduler = diffusers.DPMSolverMultistepScheduler() if "PixArt" in name else None
    changes = {"num_inference_steps": 8, **changes}
    handle, sizes, kept = drawn(name, budget, scheduler=scheduler, **changes)
    facts = assert_as_planned(handle, sizes, kept)
    assert len(facts["levels"]) == 8


def test_a_sprint_of_one_step_keeps_its_budget(drawn):
    handle, sizes, kept = drawn("SanaSprintPipeline", 0.9, num_inference_steps=1)
    assert len(handle.report().calls) == 1
    assert_as_planned(handle, sizes, kept)


# Two transformers


@budgets
@pytest.mark.parametrize("boundary", [0.5, 0.9])
@pytest.mark.parametrize("name", ["WanPipeline", "WanImageToVideoPipeline"])
def test_each_of_two_transformers_keeps_its_budget(name, boundary, budget):
    built = Built(name)
    parts = {**built.pipe().components, "transformer_2": built.transformer(seed=5)}
    parts.pop("image_encoder", None), parts.pop("image_processor", None)
    pipe = quiet(built.cls(**parts, boundary_ratio=boundary))
    both = [watched(pipe, component) for component in ("transformer", "transformer_2")]
    for handle, _ in both:
        handle.budget = budget
    pipe(**built.call(steps=12))
    made = 0
    for handle, sizes in both:
        facts = assert_as_planned(handle, sizes.of, budget)
        levels = facts.pop("levels")
        made += len(levels)
        plan = handle.plan(12, **facts)
        assert [step.level for step in plan.steps] == pytest.approx(levels, abs=1e-4)
    assert made == 12


# What a plan is told


def test_an_edit_model_that_is_given_no_picture_keeps_its_budget(drawn):
    handle, sizes, kept = drawn("Flux2KleinKVPipeline", 0.6, image=None)
    assert_as_planned(handle, sizes, kept)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"strength": 0.0}, r"strength = 0\.0; legal: above 0, up to 1"),
        ({"strength": 1.5}, r"strength = 1\.5; legal: above 0, up to 1"),
        ({"guidance": [2] * 9}, r"guidance = .*; legal: True, False, or the number of passes"),
        ({"guidance": [4] * 10}, r"guidance = .*; legal: True, False, or the number of passes"),
        ({"reference_tokens": 8}, r"reference_tokens = 8 of SD3Transformer2DModel; legal: 0"),
        ({"token_times": True}, r"token_times = True of SD3Transformer2DModel; legal: False"),
    ],
)
def test_facts_that_a_plan_cannot_be_told_are_refused(facts, message):
    pipe = Built("StableDiffusion3Pipeline").pipe()
    handle = elastic(pipe)
    with pytest.raises(ValueError, match=message):
        handle.plan(10, **facts)


def test_a_strength_that_leaves_no_step_is_refused():
    pipe = Built("LTXConditionPipeline").pipe()
    handle = elastic(pipe)
    with pytest.raises(
        ValueError, match=r"strength = 0\.01 leaves none of 10 steps; legal: .*0\.1"
    ):
        handle.plan(10, strength=0.01)
