"""LowBand with what others put on a model: caches, LoRAs, offloading, adapters of pictures."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import SeaCacheConfig
from tests.backbones.pipes import PIPES
from tests.ecosystem.test_caches import CONFIGS, STEPS, cache_dit, cached, runs_of
from tests.ecosystem.test_inputs import draw, pictures, with_ip_adapter
from tests.ecosystem.test_offload import offloads
from tests.wild.test_lora_orders import loading

from ditdial import DDiT, DDiTController, FlexiDiT, LowBand, Mode, Schedule, Segment, elastify

__all__ = ["cache_dit", "pictures"]

BAND = Mode(low_band=2)
LOW_FIRST = Schedule(
    [Segment(start=1, stop=0.8, mode=BAND), Segment(start=0.8, stop=0)],
)
CACHES = [FirstBlockCacheConfig(threshold=1e6), SeaCacheConfig(threshold=1e6), *CONFIGS[1:]]


def started(name, schedule=LOW_FIRST):
    pipe = PIPES[name].pipe()
    handle = elastify(pipe, LowBand(force=True))
    handle.schedule = schedule
    return pipe, handle


CACHED = [
    pytest.param(name, config, id=f"{name} {type(config).__name__}")
    for name in ("flux", "wan")
    for config in CACHES
    # Runs of the tiny models in which these two skip nothing, in full mode as little.
    if (name, type(config)) not in (("flux", SeaCacheConfig), ("wan", TaylorSeerCacheConfig))
]


@pytest.mark.parametrize(("name", "config"), CACHED)
def test_a_step_cache_keeps_a_state_for_each_size(name, config):
    case = PIPES[name]
    pipe, handle = started(name)
    never = case.draw(pipe, num_inference_steps=STEPS)
    pipe.transformer.enable_cache(copy.deepcopy(config))
    skipped = case.draw(pipe, num_inference_steps=STEPS)
    assert {call.mode for call in handle.report().calls} >= {BAND, Mode()}
    assert skipped.isfinite().all()
    assert not torch.equal(skipped, never)
    pipe.transformer.disable_cache()
    assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), never)


def test_cache_dit_sees_two_sizes(cache_dit):
    case = PIPES["flux"]
    pipe, handle = started("flux")
    never = case.draw(pipe, num_inference_steps=STEPS)
    with cached(cache_dit, pipe, residual_diff_threshold=0.9):
        count = runs_of(pipe.transformer.single_transformer_blocks[-1].attn)
        skipped = case.draw(pipe, num_inference_steps=STEPS)
        assert {call.mode for call in handle.report().calls} >= {BAND, Mode()}
        assert count[0] <= len(handle.report().calls)
    assert skipped.isfinite().all()
    assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), never)


@pytest.mark.parametrize("fused", [False, True], ids=["loaded", "fused"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lora_is_in_the_low_band_as_in_the_stock_model(when, fused):
    case = PIPES["flux"]

    def changed(pipe):
        loading("style")("flux", pipe.transformer)
        if fused:
            pipe.transformer.fuse_lora()

    pipes = [case.pipe() for _ in range(2)]
    changed(pipes[0])
    handles = [elastify(pipe, LowBand()) for pipe in pipes]
    for handle in handles:
        handle.schedule = LOW_FIRST
    without = case.draw(pipes[1])
    if when == "after":
        changed(pipes[1])
    else:
        handles[1].remove()
        changed(pipes[1])
        elastify(pipes[1], LowBand()).schedule = LOW_FIRST
    expected, found = (case.draw(pipe) for pipe in pipes)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - without).abs().max() > 1e-3


@offloads
def test_offloaded_weights(offload, tmp_path):
    case = PIPES["flux"]
    expected = case.draw(started("flux")[0])
    pipe, _ = started("flux")
    offload(pipe.transformer, tmp_path)
    assert torch.equal(case.draw(pipe), expected)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_picture_of_an_ip_adapter_is_seen(name, pictures):
    positive, negative = pictures
    pipe = with_ip_adapter(name)
    elastify(pipe, LowBand()).schedule = Schedule.constant(BAND)
    low = draw(pipe, positive, negative)
    assert low.isfinite().all()
    assert (low - draw(pipe, negative, negative)).abs().max() > 1e-3


def test_a_copied_pipeline_and_one_from_components_run_alike():
    case = PIPES["sd3"]
    pipe, _ = started("sd3")
    expected = case.draw(pipe)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    twin = copy.deepcopy(pipe)
    assert torch.equal(case.draw(other), expected)
    assert torch.equal(case.draw(twin), expected)
    del pipe
    gc.collect()
    assert torch.equal(case.draw(other), expected)


def test_ddits_controller_may_choose_it():
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = elastify(pipe, [DDiT(scales=(2,), rank=3), LowBand(ratios=(4,))])
    quarter = Mode(low_band=4)
    handle.controller = DDiTController(tau=1e9, coarse=(Mode(2), quarter), order=1)
    case.draw(pipe, num_inference_steps=STEPS)
    assert quarter in {call.mode for call in handle.report().calls}
    why = handle.report().calls[-1].why[0]
    assert set(why["statistic"]) == {"patch2", "band4"}
    assert why["statistic"]["band4"] > why["statistic"]["patch2"] > 0


def test_an_adapter_and_the_low_band_are_calibrated_and_solved_together():
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = elastify(pipe, [FlexiDiT(scales=(2,), rank=3), LowBand()])
    calibration = handle.calibrate(
        lambda n: case.draw(pipe, num_inference_steps=STEPS, guided=False), guidance_scale=1
    )
    names = {choice.mode.name for choice in calibration.choices}
    assert names == {"full", "patch2", "band2"}
    assert all(error >= 0 for point in calibration.points for error in point.step_error)
    handle.budget = 0.85
    case.draw(pipe, num_inference_steps=STEPS, guided=False)
    assert handle.report().ratio <= 0.85
    plan = handle.plan(STEPS, guidance=False, grid=case.grid, text_tokens=case.text)
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-3)


def test_a_calibration_sees_branches_of_two_sizes_as_guidance_does():
    """At a strong scale the error of a low guide has none of the noise above its band."""
    case = PIPES["sd3"]
    pipe = case.pipe()
    handle = elastify(pipe, LowBand())
    calibration = handle.calibrate(
        lambda n: case.draw(pipe, num_inference_steps=STEPS, guidance_scale=7.5),
        guidance_scale=7.5,
    )
    (mixed,) = [i for i, x in enumerate(calibration.choices) if x.name == "full/band2"]
    (both,) = [i for i, x in enumerate(calibration.choices) if x.name == "band2/band2"]
    assert all(point.step_error[mixed] > 0 for point in calibration.points)
    assert all(point.step_error[both] > 0 for point in calibration.points)
    handle.budget = 0.85
    case.draw(pipe, num_inference_steps=STEPS, guidance_scale=7.5)
    assert handle.report().ratio <= 0.85


def test_it_is_saved_and_loaded_without_a_tensor(tmp_path):
    case = PIPES["sd3"]
    pipe, handle = started("sd3")
    expected = case.draw(pipe)
    handle.save(tmp_path / "low")
    handle.remove()
    again = elastify(pipe, tmp_path / "low")
    assert again.schedule == LOW_FIRST
    assert again.method == LowBand(force=True)
    assert torch.equal(case.draw(pipe), expected)
