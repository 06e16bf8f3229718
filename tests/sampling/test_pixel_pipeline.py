"""Whole pipelines: full mode is the stock run, plans are kept, a picture is its seed's."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from tests.elastic_models import run_as

from ditdial import FULL, Mode, PixelDiTPipeline, Schedule, Segment, elastify, handle_of
from ditdial.host.parametrization import is_flow_scheduler, parametrization
from ditdial.sampling.pixel_pipeline import flow_matched_betas

WEAK = Mode(2)
LABELS, SEEDS = [1, 5, 7], [11, 12, 13]
VP = {"prediction_type": "v_prediction", "trained_betas": flow_matched_betas()}
FLOW_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

PIXEL_SCHEDULERS = {
    "flow-euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "flow-heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "flow-dpm": lambda: DPMSolverMultistepScheduler(**FLOW_DPM),
    "ddim": lambda: DDIMScheduler(**VP, clip_sample=False),
    "ddpm": lambda: DDPMScheduler(**VP, clip_sample=False),
    "dpm": lambda: DPMSolverMultistepScheduler(**VP),
}
LATENT_SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(),
    "ddpm": lambda: DDPMScheduler(),
    "dpm": lambda: DPMSolverMultistepScheduler(),
}
pixel_schedulers = pytest.mark.parametrize("name", PIXEL_SCHEDULERS)
latent_schedulers = pytest.mark.parametrize("name", LATENT_SCHEDULERS)
SCHEDULES = {
    "full": Schedule.constant(),
    "weak-first": Schedule.weak_first(0.5),
    "uneven": Schedule.weak_first(0.2, guide_fraction=0.7),
    "weak-guidance": Schedule.weak_first(0.4, guidance="weak"),
    "no-guide": Schedule([Segment(start=1, stop=0.6, gain=0), Segment(start=0.6, stop=0)]),
}


@pytest.fixture
def pixel(make_model):
    """``pixel(name)``: a pipeline over a tiny 16x16 model."""

    def make(name="flow-euler"):
        pipe = PixelDiTPipeline(make_model(sample_size=16), PIXEL_SCHEDULERS[name]())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def latent(make_model):
    """``latent(name)``: the stock diffusers pipeline over a tiny model and autoencoder."""

    def make(name="ddim"):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8,),
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
        ).eval()
        # DiTPipeline's null class is 1000; a learned variance doubles the channels.
        facts = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2}
        model = make_model(**facts, num_embeds_ada_norm=1000)
        pipe = DiTPipeline(model, vae, LATENT_SCHEDULERS[name]())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def draw(pipe, **changes):
    arguments = {"guidance_scale": 3.0, "num_inference_steps": 6, "output_type": "pt"} | changes
    if isinstance(pipe, PixelDiTPipeline):
        arguments.setdefault("seeds", SEEDS)
    else:
        arguments.setdefault("generator", torch.Generator().manual_seed(4))
    torch.manual_seed(0)  # the stock pipeline gives DDPM's steps no generator
    images = pipe(LABELS, **arguments).images
    return torch.from_numpy(images) if isinstance(images, np.ndarray) else images


@pixel_schedulers
def test_full_mode_in_the_pixel_pipeline(pixel, make_elastic, name):
    expected = draw(pixel(name))
    pipe = pixel(name)
    make_elastic(pipe)
    assert torch.equal(draw(pipe), expected)
    assert expected.std() > 0.05


@latent_schedulers
def test_full_mode_in_the_stock_pipeline(latent, make_elastic, assert_stock, name):
    expected = draw(latent(name))
    pipe = latent(name)
    handle = make_elastic(pipe)
    assert torch.equal(draw(pipe), expected)
    handle.schedule = Schedule.weak_first(0.5)
    assert not torch.allclose(draw(pipe), expected, atol=1e-3)
    handle.remove()
    assert torch.equal(draw(pipe), expected)
    assert_stock(pipe.transformer, latent(name).transformer)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pixel_schedulers
def test_the_plan_is_what_the_pixel_pipeline_runs(pixel, make_elastic, name, schedule):
    pipe = pixel(name)
    handle = make_elastic(pipe)
    handle.schedule = SCHEDULES[schedule]
    plan = handle.plan(7)
    images = draw(pipe, num_inference_steps=7)
    assert_kept(plan, handle.report(), images)


@pytest.mark.parametrize("schedule", SCHEDULES)
@latent_schedulers
def test_the_plan_is_what_the_stock_pipeline_runs(latent, make_elastic, name, schedule):
    pipe = latent(name)
    handle = make_elastic(pipe)
    handle.schedule = SCHEDULES[schedule]
    plan = handle.plan(7)
    images = draw(pipe, num_inference_steps=7)
    assert_kept(plan, handle.report(), images)


def assert_kept(plan, report, images):
    assert images.isfinite().all()
    assert [(c.level, c.mode, c.guide) for c in report.calls] == [
        (s.level, s.mode, s.guide) for s in plan.steps
    ]
    assert report.macs == len(LABELS) * plan.macs
    assert report.ratio == plan.ratio
    assert [c.macs for c in report.calls] == [len(LABELS) * s.macs for s in plan.steps]


@pixel_schedulers
def test_an_unguided_run_is_planned_too(pixel, make_elastic, name):
    pipe = pixel(name)
    handle = make_elastic(pipe)
    handle.schedule = Schedule.weak_first(0.5)
    plan = handle.plan(6, guidance=False)
    images = draw(pipe, guidance_scale=1.0)
    assert_kept(plan, handle.report(), images)


def test_the_handle_of_a_pipeline(pixel, make_elastic):
    pipe = pixel()
    assert handle_of(pipe) is None
    handle = make_elastic(pipe)
    found = handle_of(pipe)
    assert found is not None
    assert found.model is handle.model is pipe.transformer
    assert found.plan(4).ratio == 1.0


def test_planning_changes_nothing(pixel, make_elastic):
    pipe = pixel()
    handle = make_elastic(pipe)
    expected = draw(pipe)
    calls = handle.report().calls
    before = pipe.scheduler.timesteps
    assert len(handle.plan(3).steps) == 3
    assert len(handle.plan(9, scheduler=PIXEL_SCHEDULERS["ddim"]()).steps) == 9
    assert pipe.scheduler.timesteps is before
    assert handle.report().calls == calls
    assert torch.equal(draw(pipe), expected)
    with pytest.raises(ValueError, match="num_inference_steps = 0; legal: >= 1"):
        handle.plan(0)


def test_each_report_is_of_the_last_run(pixel, make_elastic):
    pipe = pixel()
    handle = make_elastic(pipe)
    for steps in (4, 6, 6, 1, 1):
        draw(pipe, num_inference_steps=steps)
        assert len(handle.report().calls) == steps


def test_a_mode_switch_mid_sampling_equals_forcing_each_step(pixel, make_elastic):
    pipe, other = pixel(), pixel()
    handle, forced = make_elastic(pipe), make_elastic(other)
    handle.schedule = Schedule.weak_first(0.5)
    modes = [step.mode for step in handle.plan(6).steps]
    assert modes == [WEAK] * 3 + [FULL] * 3
    found = draw(pipe)

    class FlowMatchForced(FlowMatchEulerDiscreteScheduler):
        """Forces the mode of the next model call after each step."""

        taken = 0

        def step(self, *args, **kwargs):
            self.taken += 1
            stack.close()
            stack.enter_context(forced.using(modes[min(self.taken, len(modes) - 1)]))
            return super().step(*args, **kwargs)

    other.scheduler = FlowMatchForced()
    with contextlib.ExitStack() as stack:
        stack.enter_context(forced.using(modes[0]))
        expected = draw(other)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("schedule", ["full", "weak-first", "weak-guidance"])
@pixel_schedulers
def test_a_picture_is_its_seeds_alone_and_in_any_batch(pixel, make_elastic, name, schedule):
    pipe = pixel(name)
    make_elastic(pipe).schedule = SCHEDULES[schedule]
    together = draw(pipe)
    for i, (label, seed) in enumerate(zip(LABELS, SEEDS, strict=True)):
        (alone,) = pipe(
            [label], seeds=[seed], guidance_scale=3.0, num_inference_steps=6, output_type="pt"
        ).images
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05
    assert torch.equal(draw(pipe), together)
    assert not torch.allclose(draw(pipe, seeds=[1, 2, 3]), together, atol=1e-2)


def test_gain_in_a_whole_run_is_another_scale(pixel, make_elastic):
    """Gain g at scale s is scale 1 + g (s - 1)."""
    pipe = pixel()
    handle = make_elastic(pipe)
    handle.schedule = Schedule([Segment(start=1, stop=0, gain=0.25)])
    found = draw(pipe, guidance_scale=5.0)
    handle.schedule = Schedule.constant()
    torch.testing.assert_close(found, draw(pipe, guidance_scale=2.0), atol=1e-4, rtol=0)
    handle.schedule = Schedule([Segment(start=1, stop=0, gain=0)])
    found = draw(pipe, guidance_scale=5.0)
    assert handle.report().ratio == 0.5
    handle.schedule = Schedule.constant()
    torch.testing.assert_close(found, draw(pipe, guidance_scale=1.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_weak_guidance_in_the_stock_pipeline_is_flexidits_formula(latent, make_elastic, packed):
    """e(c; p_g) + s2 (e(c; p_c) - e(c; p_g)), s2 = 1 + (s1 - 1) / 2.5, from two forced calls."""
    s1 = 4.0
    pipe = latent()
    handle = make_elastic(pipe)
    handle.schedule = Schedule.weak_first(0.0, guidance="weak")
    run_as(handle, packed=packed)
    found = draw(pipe, guidance_scale=s1, num_inference_steps=3)

    s2 = 1 + (s1 - 1) / 2.5
    model, scheduler = pipe.transformer, DDIMScheduler()
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            call = {"timestep": t.expand(3), "class_labels": torch.tensor(LABELS)}
            with handle.using(FULL):
                strong = model(x, **call).sample[:, :4]
            with handle.using(WEAK):
                weak = model(x, **call).sample[:, :4]
            x = scheduler.step(weak + s2 * (strong - weak), t, x).prev_sample
        pictures = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    expected = (pictures / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_packed_and_split_runs_agree(latent, make_elastic):
    pipe = latent()
    handle = make_elastic(pipe)
    handle.schedule = SCHEDULES["uneven"]
    split = draw(pipe)
    run_as(handle, packed=True)
    torch.testing.assert_close(draw(pipe), split, atol=1e-4, rtol=0)


def test_budget_in_a_pipeline(pixel, make_elastic):
    pipe = pixel("ddim")
    handle = make_elastic(pipe)
    handle.budget = 0.6
    draw(pipe, num_inference_steps=50)
    assert handle.report().ratio == pytest.approx(0.6, abs=0.01)


def test_save_and_load_round_trip(pixel, tmp_path):
    pipe = pixel("ddim")
    pipe.register_to_config(data_mean=0.2, data_std=0.3)
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    again = PixelDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), expected)


def test_an_elastic_pipeline_saves_as_a_stock_one(pixel, make_elastic, tmp_path):
    pipe, expected = pixel(), draw(pixel())
    make_elastic(pipe)
    pipe.save_pretrained(tmp_path)
    again = PixelDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer).__name__ == "DiTTransformer2DModel"
    assert torch.equal(draw(again), expected)


def test_an_elastic_model_is_saved_under_its_stock_class(make_elastic, tmp_path):
    """`AutoModel` and the hub look the class up by the name in ``config.json``."""
    make_elastic().model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel"


def test_output_types(pixel):
    pipe = pixel()
    tensor = draw(pipe)
    assert tensor.shape == (3, 1, 16, 16)
    assert not tensor.is_inference()  # it may be trained with
    array = draw(pipe, output_type="np")
    assert torch.equal(array.permute(0, 3, 1, 2), tensor)
    picture = draw(pipe, output_type="pil")[0]
    assert picture.size == (16, 16)
    error = np.asarray(picture, dtype=np.float32)[:, :, None] / 255 - array[0].numpy()
    assert np.abs(error).max() < 1 / 255
    (as_tuple,) = pipe(LABELS, seeds=SEEDS, guidance_scale=3.0, num_inference_steps=6,
                       output_type="pt", return_dict=False)  # fmt: skip
    assert torch.equal(as_tuple, tensor)


def test_a_generator_works_as_in_diffusers(pixel):
    pipe = pixel("ddpm")
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    expected = draw(pipe)
    torch.testing.assert_close(draw(pipe, seeds=None, generator=generators), expected)
    one = [draw(pipe, seeds=None, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_labels": []}, "class_labels is empty; legal: at least one label"),
        ({"class_labels": [1, 10]}, r"class_labels = \[1, 10\]; legal: 0..9"),
        ({"class_labels": [-1]}, r"class_labels = \[-1\]; legal: 0..9"),
        ({"class_labels": [1.5]}, r"class_labels = .*1.5.*; legal: 0..9"),
        ({"guidance_scale": -1.0}, "guidance_scale = -1.0; legal: a number >= 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan; legal: a number >= 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale = inf; legal"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0; legal: >= 1"),
        ({"seeds": [1]}, "1 seeds for 2 labels; legal: one seed per label"),
        (
            {"seeds": [1, 2], "generator": torch.Generator()},
            "seeds and generator are both given; legal: one of them",
        ),
        ({"output_type": "pixels"}, "output_type = 'pixels'; legal: 'pil', 'np', 'pt', 'latent'"),
        ({"height": 18}, "height = 18; legal: a multiple of 4, for height and width alike"),
        ({"height": 0}, "height = 0; legal: >= 4"),
        ({"width": 16.0}, "width = 16.0; legal: >= 4"),
        ({"height": 16, "width": 8}, "height = 16; legal: a multiple of 4, for height and width"),
        ({"latents": [0.0]}, "latents = .*; legal: a Tensor or None"),
        ({"latents": torch.zeros(2, 1, 8, 8), "width": 16}, "width = 16; legal: that of the lat"),
        *(
            ({"latents": torch.zeros(shape)}, r"latents of shape .*\(2, 1, S, S\), S a multiple")
            for shape in ((3, 1, 16, 16), (2, 3, 16, 16), (2, 1, 16, 12), (2, 1, 18, 18), (), (4,))
        ),
        ({"latents": torch.zeros(2, 1, 0, 0)}, "latents of shape"),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.int)}, "latents of .* in torch.int32"),
    ],
)
def test_illegal_arguments_are_named(pixel, changes, words):
    with pytest.raises(ValueError, match=words):
        pixel()(**{"class_labels": [1, 2], "num_inference_steps": 1, **changes})


@pixel_schedulers
def test_latents_are_the_noise_that_sampling_starts_from(pixel, name):
    pipe = pixel(name)
    noise = torch.cat(
        [torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    )
    if name != "ddpm":  # whose steps draw from the same seeds
        assert torch.equal(draw(pipe, latents=noise), draw(pipe))
    assert torch.equal(draw(pipe, latents=noise, height=16, width=16), draw(pipe, latents=noise))
    before = noise.clone()
    other = draw(pipe, latents=noise.double().flip(-1))
    assert not torch.allclose(other, draw(pipe, latents=noise), atol=1e-2)
    assert torch.equal(noise, before)


@pytest.mark.parametrize("side", [8, 16, 24])
def test_pictures_of_another_size(pixel, side):
    """As the stock network's own positions have it; the size that it knows changes nothing."""
    pipe = pixel()
    found = draw(pipe, height=side)
    assert found.shape == (3, 1, side, side)
    assert torch.equal(found, draw(pipe, height=side, width=side))
    latents = torch.cat(
        [torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    )
    assert torch.equal(found, draw(pipe, latents=latents))
    if side == 16:
        assert torch.equal(found, draw(pipe))


def test_latents_come_out_as_the_solver_left_them(pixel):
    pipe = pixel()
    pipe.register_to_config(data_mean=0.2, data_std=0.3)
    latents = draw(pipe, output_type="latent")
    assert not latents.is_inference()
    assert latents.min() < 0
    pictures = (latents * 0.3 + 0.2).clamp(0, 1)
    torch.testing.assert_close(pictures, draw(pipe), atol=1e-6, rtol=0)


def test_a_scheduler_of_another_prediction_is_refused(pixel):
    pipe = pixel()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="prediction_type = 'epsilon'; legal: 'v_prediction' or"):
        pipe([1])


def test_flow_schedulers_are_recognised():
    flows = [name for name, make in PIXEL_SCHEDULERS.items() if is_flow_scheduler(make())]
    assert flows == ["flow-euler", "flow-heun", "flow-dpm"]
    assert not is_flow_scheduler(EulerDiscreteScheduler())


class Shifted(FlowMatchEulerDiscreteScheduler):
    """A user's own, whose name does not tell what it is."""


def test_a_subclass_of_a_flow_scheduler_is_one(pixel, make_elastic):
    """For the pipeline that samples with it, and for whoever asks what a prediction means."""
    assert is_flow_scheduler(Shifted())
    expected = draw(pixel())
    pipe = pixel()
    pipe.scheduler = Shifted()
    assert torch.equal(draw(pipe), expected)
    stock = SimpleNamespace(scheduler=Shifted())
    told = parametrization(stock)
    assert (told.kind, told.scales(0.25)) == ("flow_prediction", (0.75, 0.25))
    make_elastic(pipe).schedule = Schedule.weak_first(0.5)
    assert draw(pipe).isfinite().all()


def test_flow_matched_betas_have_the_flows_noise_to_signal_ratio():
    alphas = (1 - torch.tensor(flow_matched_betas(), dtype=torch.float64)).cumprod(0)
    level = torch.arange(1000, dtype=torch.float64) / 1000
    level = level.clamp(1e-3, 0.999)
    found = ((1 - alphas) / alphas).sqrt()
    torch.testing.assert_close(found[2:990], (level / (1 - level))[2:990], rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", ["flow-euler", "flow-heun", "flow-dpm", "ddim", "dpm"])
def test_solvers_reach_the_data_when_the_prediction_is_perfect(pixel, name):
    """One picture as data: the exact prediction leads every solver to it, whatever the noise."""
    pipe = pixel(name)
    data = torch.linspace(-0.9, 0.9, 256).reshape(1, 1, 16, 16)

    def perfect(module, args, kwargs, output):
        x, t = args[0], kwargs["timestep"] / 1000
        level = t[:, None, None, None].float()
        norm = ((1 - level) ** 2 + level**2).sqrt()
        noise = (x * norm - (1 - level) * data) / level.clamp(min=1e-3)
        output.sample = ((1 - level) * noise - level * data) / norm
        return output

    pipe.transformer.register_forward_hook(perfect, with_kwargs=True)
    found = draw(pipe, guidance_scale=1.0, num_inference_steps=25)
    expected = (data * 0.5 + 0.5).expand_as(found)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_a_pipeline_without_a_transformer_is_refused():
    class UNetPipeline:
        unet = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="UNetPipeline has no transformer; legal: a diffusers DiT"):
        elastify(UNetPipeline(), "adapter")
