"""Rivals that change the run: what they draw, what their latents are made of, what they cost."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
)
from tests.backbones.pipes import PIPES, PROMPTS, SEEDS
from tests.evaluation.rival_runs import (
    ALL,
    FITTING,
    REFUSED,
    draw,
    first_order,
    generators,
    stock,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditdial import PixelDiTPipeline
from ditdial.backbones import backbone_for
from ditdial.evaluation.rivals import DraftAndRefine, ProgressiveResolution, bicubic, widened
from ditdial.ops.low_band import band_of, from_band
from ditdial.ops.noising import KINDS, Scales
from ditdial.plan.spectrum import FLUX_VAE
from ditdial.sampling.pixel_pipeline import flow_matched_betas

PROGRESSIVE = ProgressiveResolution(coarse_steps=2, fine_steps=2)
DRAFT = DraftAndRefine(draft_steps=2, refine_steps=2)
RIVALS = [PROGRESSIVE, DRAFT]
rivals = pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
LABELS = [1, 5, 7]


@pytest.fixture
def pixel(make_model):
    pipe = PixelDiTPipeline(make_model(sample_size=16), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(rival, pipe, labels=LABELS, seeds=(11, 12, 13), **changes):
    call = {"class_labels": labels, "seeds": seeds, "height": 16, "width": 16}
    return rival.draw(pipe, output_type="pt", **{**call, **changes}).images


@pytest.mark.parametrize("name", FITTING)
def test_a_picture_of_the_asked_size_is_its_seeds(name):
    pipe = ALL[name].pipe()
    scheduler, own = pipe.scheduler, stock(name, pipe, 2)
    for rival in RIVALS:
        found = draw(name, pipe, rival)
        assert found.shape == own.shape
        assert found.isfinite().all()
        if rival is PROGRESSIVE:
            assert torch.equal(draw(name, pipe, rival), found)
        assert pipe.scheduler is scheduler
        assert not torch.allclose(draw(name, pipe, rival, seeds=(5,)), found, atol=1e-2)


@pytest.mark.parametrize("name", FITTING)
def test_at_ratio_1_progressive_resolution_is_the_stock_run(name):
    """Of solvers without a history: at the switch that of others is cleared."""
    pipe = first_order(name)
    own = stock(name, pipe, 3)
    rival = ProgressiveResolution(ratio=1, coarse_steps=2, fine_steps=1)
    atol = 1e-5 * own.std().item()
    torch.testing.assert_close(draw(name, pipe, rival), own, atol=atol, rtol=1e-5)


def test_at_ratio_1_the_pixel_pipeline_is_stock(pixel):
    call = {"class_labels": LABELS, "seeds": [1, 2, 3], "output_type": "pt"}
    own = pixel(**call, num_inference_steps=6).images
    rival = ProgressiveResolution(ratio=1, coarse_steps=4, fine_steps=2)
    found = rival.draw(pixel, **call, height=16, width=16).images
    torch.testing.assert_close(found, own, atol=1e-5, rtol=0)


@rivals
@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "pixart-alpha", "qwenimage"])
def test_a_row_of_a_batch_is_the_picture_alone(name, rival):
    case, pipe = ALL[name], first_order(name)
    asked: dict[str, Any] = dict(case.alike)
    if case.embedded:
        asked["num_images_per_prompt"] = 2
        together = draw(name, pipe, rival, generator=generators(SEEDS), **asked)
        asked.clear()
    else:
        together = draw(name, pipe, rival, PROMPTS, **asked)
    assert len(together) == 2
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = draw(name, pipe, rival, [prompt], generator=generators([seed]), **asked)
        torch.testing.assert_close(together[row], alone[0], atol=1e-3, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-1)


@rivals
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_rows_of_the_pixel_pipeline(pixel, rival, scale):
    together = pictures(rival, pixel, guidance_scale=scale)
    assert together.shape == (3, 1, 16, 16)
    for row, (label, seed) in enumerate(zip(LABELS, (11, 12, 13), strict=True)):
        (alone,) = pictures(rival, pixel, [label], [seed], guidance_scale=scale)
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)
    found = pictures(rival, pixel, seeds=None, generator=generators((11, 12, 13)))
    assert torch.equal(found, pictures(rival, pixel))


@rivals
def test_guidance_off_and_on(rival):
    pipe = PIPES["sd3"].pipe()
    guided, plain = (
        draw("sd3", pipe, rival, guidance_scale=scale).flatten() for scale in (4.0, 1.0)
    )
    assert not torch.allclose(guided, plain, atol=1e-2)


@rivals
def test_a_pixel_pipeline_of_variance_preserving_levels(pixel, rival):
    facts = {"prediction_type": "v_prediction", "trained_betas": flow_matched_betas()}
    pixel.scheduler = DPMSolverMultistepScheduler(**facts)
    found = pictures(rival, pixel)
    assert found.shape == (3, 1, 16, 16)
    assert found.std() > 0.02
    assert torch.equal(pictures(rival, pixel), found)


@rivals
def test_an_elastic_pipeline_in_full_mode_is_the_stock_one(rival):
    case = PIPES["sd3"]
    pipe, other = case.pipe(), case.pipe()
    case.elastic(other)
    assert torch.equal(draw("sd3", other, rival), draw("sd3", pipe, rival))


# What the latents are made of.

SHAPES = [((8, 6), (16, 12)), ((5, 4), (9, 8)), ((8, 8), (8, 8)), ((3, 4), (9, 4))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("few", "most"), SHAPES)
def test_a_constant_keeps_its_value(kind, few, most):
    flow = kind == "flow_prediction"
    a, s = (0.3, 0.7) if flow else (0.6, 0.8)
    constant = 2.5 * torch.ones(2, 3, *few, dtype=torch.float64)
    nothing = torch.zeros(2, 3, *most, dtype=torch.float64)
    found, own = widened(a * constant, nothing, Scales(kind, a, s))
    torch.testing.assert_close(found, (2.5 * own.signal) * torch.ones_like(found))
    total = own.signal + own.noise if flow else own.signal**2 + own.noise**2
    assert total == pytest.approx(1)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.85, 0.99])
@pytest.mark.parametrize(("few", "most"), SHAPES)
def test_the_level_is_rewound_by_kappa(t, few, most):
    """And the time shift of the low band is its inverse."""
    r = math.sqrt(math.prod(most) / math.prod(few))
    kappa = r / (1 + (r - 1) * t)
    start = Scales("flow_prediction", 1 - t, t)
    _, own = widened(torch.zeros(few), torch.zeros(most), start)
    assert own.noise == pytest.approx(kappa * t)
    assert own.noise >= t
    back = own.with_signal(r)[0]
    assert (back.signal, back.noise) == pytest.approx((1 - t, t))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_all_waves_have_the_noise_of_the_path(kind):
    few, most, draws = (4, 3), (8, 6), 20_000
    generator = torch.Generator().manual_seed(0)
    a, s = (0.4, 0.6) if kind == "flow_prediction" else (0.8, 0.6)
    small = s * torch.randn(draws, *few, generator=generator)
    noise = torch.randn(draws, *most, generator=generator)
    found, own = widened(small, noise, Scales(kind, a, s))
    covariance = found.flatten(1).T.cov()
    expected = own.noise**2 * torch.eye(math.prod(most))
    assert (covariance - expected).abs().max() < 6 * own.noise**2 / math.sqrt(draws)
    above = found - from_band(band_of(found, few), most)
    torch.testing.assert_close(
        above, own.noise * (noise - from_band(band_of(noise, few), most)), atol=1e-4, rtol=0
    )


def test_bicubic_keeps_constants_and_layout():
    x = torch.arange(6.0).reshape(1, 2, 3, 1, 1).expand(1, 2, 3, 4, 5)
    found = bicubic(x, (8, 10))
    torch.testing.assert_close(found, x[..., :1, :1].expand(1, 2, 3, 8, 10))


# What the model is given.


class Seen:
    """Latents and times that a model is given."""

    def __init__(self, model):
        self.calls = []
        model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs):
        latent = args[0] if args else kwargs["hidden_states"]
        self.calls.append((latent.clone(), float(kwargs["timestep"].flatten()[0])))


def tiles(tokens):
    """FLUX's tokens of a square picture as latents ``(B, C, H, W)``."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(1, (side, side)).unflatten(-1, (-1, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_second_stage_goes_on_from_the_first(name):
    case, pipe = PIPES[name], first_order(name)
    seen = Seen(pipe.transformer)
    rival = ProgressiveResolution(coarse_steps=2, fine_steps=3, switch=0.8)
    draw(name, pipe, rival, guided=False)
    unpack, unit = (tiles, 1) if name == "flux" else (lambda x: x, 1000)
    latents = [unpack(latent) for latent, _ in seen.calls]
    times = [time / unit for _, time in seen.calls]
    assert [x.shape[-1] for x in latents] == [8, 8, 16, 16, 16]
    assert times[2] == pytest.approx(0.8 * 2 / 1.8, rel=1e-5)
    assert times[0] == 1
    assert times[0] > times[1] > 0.8
    assert times[2] > times[3] > times[4] > 0

    generator = torch.Generator().manual_seed(SEEDS[0])
    shape = latents[0].shape
    if name == "flux":
        torch.testing.assert_close(tiles(_flux_noise(pipe, generator)), latents[0])
        noise = torch.randn(1, shape[1], 1, 16, 16, generator=generator)[:, :, 0]
    else:
        torch.testing.assert_close(torch.randn(shape, generator=generator), latents[0])
        noise = torch.randn(1, shape[1], 16, 16, generator=generator)
    above = latents[2] - from_band(band_of(latents[2], (8, 8)), (16, 16))
    expected = noise - from_band(band_of(noise, (8, 8)), (16, 16))
    torch.testing.assert_close(above, times[2] * expected, atol=1e-5, rtol=0)

    # The same first steps, by the stock solver on the stock small run.
    again = case.pipe()
    again.scheduler = pipe.scheduler
    small = draw(name, again, ProgressiveResolution(ratio=1, coarse_steps=2, fine_steps=3,
                 switch=0.8), height=8, width=8, guided=False,
                 callback_on_step_end=_stop_after(1))  # fmt: skip
    small = unpack(small)
    band = band_of(latents[2], (8, 8)) * (0.2 / 2 + 0.8)
    torch.testing.assert_close(band, small, atol=1e-4, rtol=0)


def _flux_noise(pipe, generator):
    return pipe.prepare_latents(
        1, pipe.transformer.config.in_channels // 4, 8, 8, torch.float32, "cpu", generator
    )[0]


def _stop_after(step):
    """Latents as the first stage leaves them, whatever the second one makes of them."""
    kept = {}

    def callback(pipe, index, time, values):
        if len(kept) <= step:
            kept[len(kept)] = values["latents"]
            return values
        return {"latents": kept[step]}

    return callback


def test_a_refined_draft_is_told_its_level():
    pipe = first_order("sd3")
    seen = Seen(pipe.transformer)
    draw("sd3", pipe, DraftAndRefine(draft_steps=3, refine_steps=2, level=0.2), guided=False)
    assert [x.shape[-1] for x, _ in seen.calls] == [8, 8, 8, 16, 16]
    times = [time / 1000 for _, time in seen.calls]
    small = stock("sd3", pipe, 3, height=8, width=8, guided=False)
    assert times[3] == pytest.approx(0.2)
    assert 0.2 > times[4] > 0
    assert times[:3] == pytest.approx([time / 1000 for _, time in seen.calls[5:]])

    rival = DraftAndRefine(draft_steps=3, level=0.2, pixels=False)
    seen.calls.clear()
    draw("sd3", pipe, rival, guided=False)
    generator = torch.Generator().manual_seed(SEEDS[0])
    torch.randn(small.shape, generator=generator)
    noise = torch.randn(1, small.shape[1], 16, 16, generator=generator)
    expected = 0.8 * bicubic(small, (16, 16)) + 0.2 * noise
    torch.testing.assert_close(seen.calls[3][0], expected, atol=1e-5, rtol=0)


def test_pixels_are_enlarged_where_there_is_an_autoencoder():
    pipe = PIPES["sd3"].pipe()
    default, on, off = (
        draw("sd3", pipe, DraftAndRefine(draft_steps=3, pixels=pixels))
        for pixels in (None, True, False)
    )
    assert torch.equal(default, on)
    assert not torch.allclose(on, off, atol=1e-2)


def test_ragged_grids_are_rounded_up():
    pipe = first_order("sd3")
    seen = Seen(pipe.transformer)
    found = draw("sd3", pipe, ProgressiveResolution(ratio=1.5, coarse_steps=1, fine_steps=1),
                 height=16, width=20, guided=False)  # fmt: skip
    assert found.shape[-2:] == (16, 20)
    assert [tuple(x.shape[-2:]) for x, _ in seen.calls] == [(12, 14), (16, 20)]


# What is left behind.


def state(pipe):
    facts = {name: id(value) for name, value in pipe.components.items()}
    held = {name: value for name, value in vars(pipe.scheduler).items()}
    return facts, dict(pipe.config), {k: id(v) for k, v in held.items()}, copy.deepcopy(held)


def assert_as_before(pipe, before):
    facts, config, held, values = state(pipe)
    assert (facts, config, held) == before[:3]
    for name, value in values.items():
        expected = before[3][name]
        same = torch.equal(value, expected) if torch.is_tensor(value) else value == expected
        assert same, name


class Stop(BaseException):
    """No `Exception`, like a key that is pressed."""


@rivals
@pytest.mark.parametrize(
    ("name", "after"), [("sd3", None), ("sd3", 0), ("sd3", 3), ("pixel", 2), ("pixel", None)]
)
def test_the_pipeline_is_left_as_it_was(name, after, rival, pixel):
    pipe = pixel if name == "pixel" else PIPES[name].pipe()
    if name == "pixel":
        pictures(rival, pipe)
    else:
        stock(name, pipe, 4)
    before, calls = state(pipe), []

    def count(*_):
        calls.append(1)
        if after is not None and len(calls) > after:
            raise Stop

    hook = pipe.transformer.register_forward_pre_hook(count)

    def run():
        return pictures(rival, pipe) if name == "pixel" else draw(name, pipe, rival)

    if after is None:
        run()
    else:
        with pytest.raises(Stop):
            run()
    assert_as_before(pipe, before)
    hook.remove()


def test_a_saved_pipeline_has_the_stock_scheduler_after_a_run(pixel, tmp_path):
    pictures(PROGRESSIVE, pixel)
    pixel.save_pretrained(tmp_path)
    again = PixelDiTPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is FlowMatchEulerDiscreteScheduler


# What is refused.


@rivals
@pytest.mark.parametrize("name", REFUSED)
def test_pipelines_that_do_not_fit_are_refused_by_name(name, rival):
    pipe = ALL[name].pipe()
    seen = Seen(pipe.transformer)
    with pytest.raises(ValueError, match=REFUSED[name]):
        draw(name, pipe, rival)
    assert not seen.calls


@rivals
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": None}, "height = None; legal: >= 2"),
        ({"height": 15}, "height = 15 is out of range; legal: a multiple of 2"),
        ({"width": "16"}, "width = '16'; legal: >= 2"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, "latents is given; legal: not here"),
        ({"sigmas": [1.0, 0.5]}, "sigmas is given; legal: not here"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(rival, changes, words):
    pipe = PIPES["sd3"].pipe()
    seen = Seen(pipe.transformer)
    with pytest.raises(ValueError, match=words):
        draw("sd3", pipe, rival, **changes)
    assert not seen.calls


@rivals
def test_other_refusals(rival, pixel):
    pipe = PIPES["pixart-alpha"].pipe()
    with pytest.raises(ValueError, match="use_resolution_binning = True changes the size"):
        draw("pixart-alpha", pipe, rival, use_resolution_binning=True)
    with pytest.raises(ValueError, match="num_inference_steps is given; legal: not here"):
        rival.draw(pipe, prompt="red cat", num_inference_steps=4, height=16, width=16)
    with pytest.raises(ValueError, match="seeds or generator, not both"):
        pictures(rival, pixel, generator=torch.Generator())
    with pytest.raises(ValueError, match="width = 24 is out of range; legal: 16, as height is"):
        pictures(rival, pixel, width=24)
    assert type(pixel.scheduler) is FlowMatchEulerDiscreteScheduler


def test_a_pipeline_that_chooses_the_size_is_refused():
    """Before it starts where its arguments tell, or else before the second stage."""
    pipe = PIPES["flux"].pipe()
    names = inspect.signature(FluxKontextPipeline.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in names}
    with pytest.raises(ValueError, match="FluxKontextPipeline makes all pictures of one area"):
        PROGRESSIVE.draw(FluxKontextPipeline(**parts), prompt="red cat", height=16, width=16)

    class Wider(type(pipe)):
        def __call__(self, height, width, latents=None, output_type="pil", generator=None,
                     num_inference_steps=4, **call):  # fmt: skip
            asked = {"output_type": output_type, "num_inference_steps": num_inference_steps}
            return super().__call__(height=height, width=width + 4, **asked, **call)

    wider = Wider(**parts)
    wider.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"made latents \(1, 24, 16\) where it was asked"):
        PROGRESSIVE.draw(wider, prompt="red cat", height=16, width=16, max_sequence_length=6)


def test_a_switch_above_the_first_level_is_refused():
    pipe = PIPES["pixart-alpha"].pipe()
    seen = Seen(pipe.transformer)
    rival = ProgressiveResolution(coarse_steps=2, fine_steps=2, switch=0.9999)
    with pytest.raises(ValueError, match=r"noise levels of 2 steps from 0\.9"):
        draw("pixart-alpha", pipe, rival)
    assert not seen.calls


def test_pixels_without_an_autoencoder_are_refused(pixel):
    with pytest.raises(ValueError, match="pixels = True and NoneType; legal for it: False"):
        pictures(DraftAndRefine(pixels=True), pixel)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ProgressiveResolution(coarse_steps=0, fine_steps=1), "coarse_steps = 0; legal"),
        (lambda: ProgressiveResolution(coarse_steps=1, fine_steps=1.5), "fine_steps = 1.5; legal"),
        (lambda: ProgressiveResolution(coarse_steps=1, fine_steps=1, switch=1.0), "switch = 1.0"),
        (lambda: ProgressiveResolution(coarse_steps=1, fine_steps=1, ratio=0.5), "ratio = 0.5"),
        (lambda: ProgressiveResolution(coarse_steps=1, fine_steps=1, ratio=1.234), "ratio = 1.234"),
        (lambda: ProgressiveResolution(coarse_steps=1, fine_steps=1, ratio="2"), "ratio = '2'"),
        (lambda: DraftAndRefine(draft_steps=0), "draft_steps = 0; legal"),
        (lambda: DraftAndRefine(level=0.0), "level = 0.0 is out of range; legal: above 0"),
        (lambda: DraftAndRefine(level=float("nan")), "level = nan"),
        (lambda: DraftAndRefine(pixels="yes"), "pixels = 'yes'; legal"),
    ],
)
def test_fields_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# What it costs.


def test_names_setups_and_knobs():
    assert PROGRESSIVE.setup == {"ratio": 2, "coarse_steps": 2, "fine_steps": 2, "switch": None}
    assert (PROGRESSIVE.name, DRAFT.name) == ("progressive-resolution", "draft-and-refine")
    assert (PROGRESSIVE.steps, DRAFT.steps) == ((2, 2), (2, 2))
    assert DRAFT.setup["level"] == 0.15
    switch = FLUX_VAE.switch(side=128, ratio=2)
    assert ProgressiveResolution(coarse_steps=9, fine_steps=9, switch=switch).switch == switch


def counted(model, run):
    """Multiply-adds of a model in a run."""
    total = 0

    def count(*args, **kwargs):
        nonlocal total
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = forward(*args, **kwargs)
        total += counter.get_total_flops() // 2
        return output

    forward, model.forward = model.forward, count
    run()
    return total


@rivals
@pytest.mark.parametrize(("name", "size"), [("sd3", (16, 16)), ("wan", (64, 96)), ("pixel", 16)])
def test_cost_is_what_the_counter_counts(name, size, rival, pixel):
    if name == "pixel":
        pipe, grid, text = pixel, (1, 4, 4), 0
        found = counted(pipe.transformer, lambda: pictures(rival, pipe, [1], [2]))
    else:
        case, pipe = PIPES[name], PIPES[name].pipe()
        grid, text = case.grid, case.text
        found = counted(pipe.transformer, lambda: draw(name, pipe, rival))
    shape = backbone_for(pipe.transformer).shape(pipe.transformer, grid, text)
    assert found == 2 * rival.macs(shape)  # both branches of guidance


def test_shares_of_the_full_run():
    model = PIPES["flux"].pipe().transformer
    shape = backbone_for(model).shape(model, (1, 64, 64), 512)
    one = ProgressiveResolution(ratio=1, coarse_steps=10, fine_steps=10)
    assert one.share(shape, 20) == pytest.approx(1)
    assert one.share(shape, 40) == pytest.approx(0.5)
    two = ProgressiveResolution(coarse_steps=10, fine_steps=10)
    assert 0.5 < two.share(shape, 20) < 0.5 + 0.5 / 3
    assert DraftAndRefine().share(shape, 28) < 13 / 28 / 2
