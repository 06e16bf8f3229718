"""The facts of a run come from the pipeline that calls, not from the one given to `elastify`."""

from __future__ import annotations

import copy
import gc

import diffusers
import pytest
import torch
from tests.backbones.pipes import PIPES, PROMPTS
from tests.elastic_models import call_of
from tests.wild.pictures import from_picture, noise, quiet

from ditdial import FULL, Mode, Schedule

WEAK = Mode(2)
COARSE_GUIDE = Schedule.constant(FULL, guide=WEAK)


def image_to_image(pipe):
    """Another pipeline around the same components."""
    return quiet(diffusers.AutoPipelineForImage2Image.from_pipe(pipe))


def test_a_guided_image_to_image_pipeline_is_guided_whatever_the_first_pipeline_did_last():
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = COARSE_GUIDE
    case.draw(pipe, guided=False)
    from_picture(case, image_to_image(pipe), guidance_scale=4.0)
    assert [(call.mode, call.guide) for call in handle.report().calls] == [(FULL, WEAK)] * 4


def test_two_unguided_prompts_from_equal_noise_are_no_branches_whatever_the_first_pipeline_did():
    case = PIPES["sd3"]
    pipe = case.pipe()
    unguided = {"prompts": PROMPTS, "seeds": (1, 1), "guidance_scale": 1.0}
    expected = from_picture(case, image_to_image(case.pipe()), **unguided)
    handle = case.elastic(pipe)
    handle.schedule = COARSE_GUIDE
    case.draw(pipe, guided=True)
    found = from_picture(case, image_to_image(pipe), **unguided)
    calls = [(call.mode, call.guide, call.rows) for call in handle.report().calls]
    assert calls == [(FULL, None, 2)] * 4
    assert torch.equal(found, expected)


def test_a_guide_stays_coarse_in_a_pipeline_that_outlives_the_first():
    case = PIPES["chroma"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = COARSE_GUIDE
    expected = case.draw(pipe)
    ratio = handle.report().ratio
    other = quiet(type(pipe)(**pipe.components))
    del pipe
    gc.collect()
    found = case.draw(other)
    assert handle.report().ratio == ratio < 0.7
    assert [call.mode for call in handle.report().calls] == [FULL, WEAK] * 4
    assert torch.equal(found, expected)


def test_a_budget_buys_the_same_in_a_pipeline_that_outlives_the_first():
    case = PIPES["chroma"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.budget = 0.6
    expected = case.draw(pipe)
    modes = [call.mode for call in handle.report().calls]
    other = quiet(type(pipe)(**pipe.components))
    del pipe
    gc.collect()
    found = case.draw(other)
    assert [call.mode for call in handle.report().calls] == modes
    assert torch.equal(found, expected)


@pytest.mark.parametrize("steps_before", [0, 4], ids=["first", "after a run of the other"])
def test_a_pipeline_with_a_scheduler_of_its_own_runs_the_plan_of_its_own_timesteps(steps_before):
    case = PIPES["flux"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.budget = 0.6
    if steps_before:
        case.draw(pipe, guided=False, num_inference_steps=steps_before)
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    case.draw(quiet(type(pipe)(**parts)), guided=False, num_inference_steps=10)
    plan = handle.plan(10, guidance=False, grid=case.grid, text_tokens=case.text)
    report = handle.report()
    assert [call.mode for call in report.calls] == [step.mode for step in plan.steps]
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-3)
    assert report.ratio <= 0.6


def test_a_bare_call_beside_a_pipeline_keeps_the_noise_level_it_is_given():
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    case.draw(pipe)
    level = pipe.scheduler.timesteps[1].item() / 1000
    handle.schedule = Schedule.weak_first(1 - (level + 0.001))
    with torch.no_grad():
        pipe.transformer(**call_of("sd3", time=1000 * (level + 0.002)))
    (call,) = handle.report().calls
    assert call.level == pytest.approx(level + 0.002, abs=1e-6)
    assert call.mode == WEAK


class Wrapping(diffusers.StableDiffusion3Pipeline):
    """Does something before and after the stock call."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Own:
    """A pipeline of the user's, of no class of diffusers."""

    def __init__(self, pipe):
        self.transformer, self.scheduler, self.inner = pipe.transformer, pipe.scheduler, pipe

    @torch.no_grad()
    def __call__(self, steps, seed, scale):
        do_classifier_free_guidance = scale > 1
        words, null, pooled, pooled_null = self.inner.encode_prompt(
            "red cat", None, None, max_sequence_length=6
        )
        latents = torch.randn(1, 4, 16, 16, generator=noise(seed)).expand(2, -1, -1, -1)
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            second = (null, pooled_null) if do_classifier_free_guidance else (words, pooled)
            found = self.transformer(
                hidden_states=latents,
                timestep=time.expand(2),
                encoder_hidden_states=torch.cat([second[0], words]),
                pooled_projections=torch.cat([second[1], pooled]),
                return_dict=False,
            )[0]
            if do_classifier_free_guidance:
                guide, answer = found.chunk(2)
                found = (guide + scale * (answer - guide)).repeat(2, 1, 1, 1)
            latents = self.scheduler.step(found, time, latents, return_dict=False)[0]
        return latents


def test_a_subclass_that_wraps_the_stock_call_is_planned_as_the_stock_pipeline():
    case = PIPES["sd3"]
    stock = case.pipe()
    handle = case.elastic(stock)
    handle.budget = 0.8
    expected = case.draw(stock)
    pipe = quiet(Wrapping(**case.pipe().components))
    handle = case.elastic(pipe)
    handle.budget = 0.8
    assert torch.equal(case.draw(pipe), expected)
    assert handle.report().ratio <= 0.8


@pytest.mark.parametrize(("scale", "guide"), [(4.0, WEAK), (1.0, None)])
def test_a_pipeline_of_the_users_own_tells_whether_it_guides(scale, guide):
    case = PIPES["sd3"]
    pipe = Own(case.pipe())
    handle = case.elastic(pipe)
    handle.schedule = COARSE_GUIDE
    for _ in range(2):
        pipe(4, 1, scale)
        calls = handle.report().calls
        assert [(call.mode, call.guide, call.rows) for call in calls] == [(FULL, guide, 2)] * 4


def test_a_run_that_ends_in_an_error_leaves_nothing_to_the_next():
    case = PIPES["chroma"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.budget = 0.8
    expected = case.draw(pipe)

    def stop(pipe, index, time, facts):
        if index == 1:
            raise KeyboardInterrupt
        return facts

    with pytest.raises(KeyboardInterrupt):
        case.draw(pipe, callback_on_step_end=stop)
    assert torch.equal(case.draw(pipe), expected)
    assert len(handle.report().calls) == 8
