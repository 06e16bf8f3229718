"""A budget is never exceeded, and the plan is what runs, in whatever way a pipeline calls."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tests.backbones.pipes import LTX, PIPES, PROMPT, PipeCase, given, ltx_vae, shifting
from tests.wild import modular
from tests.wild.pictures import from_picture, noise, picture, quiet

from ditdial import FULL, Mode, Schedule

WEAK = Mode(2)


def levels_of(report):
    """Noise levels of a run's steps, each once."""
    return list(dict.fromkeys(call.level for call in report.calls))


@pytest.mark.parametrize("strength", [0.6, 0.3])
def test_a_budget_holds_for_the_steps_that_an_image_to_image_run_makes(strength):
    case = PIPES["flux"]
    pipe = quiet(diffusers.FluxImg2ImgPipeline(**case.pipe().components))
    handle = case.elastic(pipe)
    handle.budget = 0.6
    facts = {"guidance_scale": 3.5, "num_inference_steps": 10, "strength": strength}
    from_picture(case, pipe, **facts)
    report = handle.report()
    assert len(report.calls) == round(10 * strength)
    assert report.ratio <= 0.6
    sizes = {"grid": case.grid, "text_tokens": case.text}
    plan = handle.plan_levels(levels_of(report), guidance=False, **sizes)
    assert [call.mode for call in report.calls] == [step.mode for step in plan.steps]
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-3)


def test_a_budget_holds_for_an_image_to_image_run_from_pure_noise():
    case = PIPES["flux"]
    pipe = quiet(diffusers.FluxImg2ImgPipeline(**case.pipe().components))
    handle = case.elastic(pipe)
    handle.budget = 0.6
    from_picture(case, pipe, guidance_scale=3.5, num_inference_steps=10, strength=1.0)
    plan = handle.plan(10, guidance=False, grid=case.grid, text_tokens=case.text)
    assert [call.mode for call in handle.report().calls] == [step.mode for step in plan.steps]
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-3)
    assert handle.report().ratio <= 0.6


@pytest.mark.parametrize("steps", [6, 10])
def test_a_budget_holds_with_skip_layer_guidance(steps):
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.budget = 0.9
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.6}
    case.draw(pipe, num_inference_steps=steps, **skipping)
    assert len(handle.report().calls) > steps
    assert handle.report().ratio <= 0.9


@pytest.mark.parametrize("edges", [(0.5, 1.0), (0.0, 0.5)], ids=["starts", "stops"])
def test_a_budget_holds_with_a_guider_that_works_in_half_of_the_run(edges):
    """It is not exceeded, and what it leaves would not pay for one more step in full mode."""
    start, stop = edges
    pipe = modular.blocks(start=start, stop=stop)
    handle = PIPES["sd3"].elastic(pipe)
    handle.budget = 0.8
    modular.draw(pipe)
    report = handle.report()
    assert len(report.calls) == 3 * modular.STEPS // 2
    assert report.ratio <= 0.8
    weak = min(call.macs / call.full_macs for call in report.calls)
    assert 0.8 - report.ratio < 2 * (1 - weak) / len(report.calls)


def test_the_plan_of_an_image_to_video_run_knows_that_each_token_has_a_time():
    build = given(diffusers.LTXImageToVideoPipeline, "ltx", shifting(), vae=ltx_vae)
    case = PipeCase(build, LTX, (3, 8, 16), 6, embedded=True)
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.constant(WEAK)
    case.draw(pipe, image=picture(32, 64))
    plan = handle.plan(4, grid=case.grid, text_tokens=case.text)
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-3)


SANA_SPRINT = PipeCase(
    given(diffusers.SanaSprintPipeline, "sana-sprint", diffusers.SCMScheduler()),
    {
        **PROMPT,
        "prompt_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "height": 256,
        "width": 224,
        "use_resolution_binning": False,
    },
    (1, 8, 7),
    6,
    guided={},
    embedded=True,
)
sprints = pytest.mark.parametrize("steps", [1, 2, 4])


def sprint(pipe, steps):
    """The pipeline's own default holds for two steps alone, and it refuses it for others."""
    given = {} if steps == 2 else {"intermediate_timesteps": None}
    SANA_SPRINT.draw(pipe, num_inference_steps=steps, **given)


@sprints
def test_the_plan_of_a_sprint_has_the_steps_that_run(steps):
    pipe = SANA_SPRINT.pipe()
    handle = SANA_SPRINT.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.4)
    sprint(pipe, steps)
    plan = handle.plan(steps, guidance=False, grid=(1, 8, 7), text_tokens=6)
    report = handle.report()
    assert len(plan.steps) == steps
    assert [step.level for step in plan.steps] == pytest.approx(levels_of(report), abs=1e-4)
    assert [step.mode for step in plan.steps] == [call.mode for call in report.calls]
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-3)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_sprint_spends_its_budget(steps):
    """One of the steps is weak: with two, 0.66 of the full cost."""
    pipe = SANA_SPRINT.pipe()
    handle = SANA_SPRINT.elastic(pipe)
    handle.budget = 0.9
    sprint(pipe, steps)
    report = handle.report()
    assert [call.mode for call in report.calls] == [WEAK] + [FULL] * (steps - 1)
    assert report.ratio <= 0.9


class Inverting(diffusers.FluxPipeline):
    """Follows the flow from a picture to noise: levels rise within one call (RF inversion)."""

    @torch.no_grad()
    def __call__(self, latents, steps):
        grid = latents.shape[-2] // 2, latents.shape[-1] // 2
        packed = self._pack_latents(latents, *latents.shape)
        prompt, pooled, text_ids = self.encode_prompt("red cat", None, max_sequence_length=6)
        ids = self._prepare_latent_image_ids(1, *grid, latents.device, latents.dtype)
        self.scheduler.set_timesteps(steps, mu=0.5)
        for step in range(steps):
            velocity = self.transformer(
                hidden_states=packed,
                timestep=torch.full((1,), step / steps),
                guidance=torch.full((1,), 1.0),
                pooled_projections=pooled,
                encoder_hidden_states=prompt,
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )[0]
            packed = packed + velocity / steps
        return packed


def test_the_report_keeps_every_call_of_a_run_whose_levels_rise():
    case = PIPES["flux"]
    pipe = Inverting(**case.pipe().components)
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.5)
    pipe(torch.randn(1, 4, 16, 16, generator=noise(1)), 6)
    report = handle.report()
    assert [call.level for call in report.calls] == pytest.approx([step / 6 for step in range(6)])
    assert [call.mode for call in report.calls] == [FULL] * 3 + [WEAK] * 3
    assert report.ratio < 0.7
