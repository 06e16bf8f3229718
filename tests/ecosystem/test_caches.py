"""Step caches beyond those in `tests.test_ecosystem`: SeaCache, text caches, cache-dit."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig, TextKVCacheConfig
from tests.backbones.pipes import EMBEDDED, PIPES
from tests.elastic_models import WEAK, call_of, elastic, run

from ditdial import FULL, Schedule

CASES = {**PIPES, **EMBEDDED}
STEPS = 8


def schedule(*rows):
    keys = ("start", "stop", "mode")
    segments = [dict(zip(keys, row, strict=False), **(row[3] if row[3:] else {})) for row in rows]
    return Schedule.from_json(json.dumps({"segments": segments}))


COARSE_FIRST = schedule((1.0, 0.8, "patch2"), (0.8, 0.0, "full"))
ALTERNATING = schedule(
    (1.0, 0.9, "patch2"), (0.9, 0.8, "full"), (0.8, 0.6, "patch2"), (0.6, 0.0, "full")
)


def runs_of(module):
    """How often a module inside a block ran; a skipped block calls none of its modules."""
    count = [0]
    module.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


# diffusers


@pytest.mark.parametrize("modes", [COARSE_FIRST, ALTERNATING], ids=["coarse-first", "alternating"])
def test_seacache_keeps_a_state_per_mode(modes):
    case = PIPES["wan"]
    stock, pipe = case.pipe(), case.pipe()
    stock.transformer.enable_cache(SeaCacheConfig(threshold=0.6))
    handle = case.elastic(pipe)
    handle.schedule = modes
    never = case.draw(pipe, num_inference_steps=STEPS)
    pipe.transformer.enable_cache(SeaCacheConfig(threshold=0.0))
    assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), never)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(SeaCacheConfig(threshold=1e6))
    count = runs_of(pipe.transformer.blocks[1].attn1)
    skipped = case.draw(pipe, num_inference_steps=STEPS)
    assert count[0] < 2 * STEPS
    assert skipped.isfinite().all()
    assert not torch.equal(skipped, never)
    handle.schedule = Schedule.constant(FULL)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(SeaCacheConfig(threshold=0.6))
    full = case.draw(pipe, num_inference_steps=STEPS)
    assert torch.equal(full, case.draw(stock, num_inference_steps=STEPS))


def test_a_text_cache_refuses_coarse_modes():
    handle, call = elastic("flux"), call_of("flux")
    expected = run(handle, call, FULL)
    handle.model.enable_cache(TextKVCacheConfig())
    assert torch.equal(run(handle, call, FULL), expected)
    with pytest.raises(RuntimeError, match=r"TextKVCache keeps one state .*legal .*SeaCache"):
        run(handle, call, WEAK)


CONFIGS = [
    FirstBlockCacheConfig(threshold=0.5),
    TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    MagCacheConfig(
        threshold=0.3,
        max_skip_steps=2,
        retention_ratio=0.2,
        num_inference_steps=STEPS,
        mag_ratios=torch.ones(STEPS),
    ),
]


@pytest.mark.parametrize("name", ["flux", "wan", "qwenimage"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_full_mode_is_the_stock_model_with_the_same_cache(name, config):
    case, pictures = CASES[name], []
    for elastic_too in (False, True):
        pipe = case.pipe()
        if elastic_too:
            case.elastic(pipe)
        pipe.transformer.enable_cache(copy.deepcopy(config))
        pictures.append(case.draw(pipe, num_inference_steps=STEPS))
    assert torch.equal(*pictures)


def one_state_cache(kind, pipe):
    seen = {"current_timestep_callback": lambda: pipe._current_timestep}
    if kind == "faster":
        return FasterCacheConfig(
            spatial_attention_block_skip_range=2, is_guidance_distilled=True, **seen
        )
    every = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 2}
    times = {f"{k}_attention_timestep_skip_range": (0, 1000) for k in ("spatial", "cross")}
    return PyramidAttentionBroadcastConfig(**every, **times, **seen)


@pytest.mark.parametrize("kind", ["pyramid", "faster"])
def test_caches_with_one_state_serve_runs_of_one_mode(kind):
    case = PIPES["wan"]
    stock, pipe = case.pipe(), case.pipe()
    stock.transformer.enable_cache(one_state_cache(kind, stock))
    expected = case.draw(stock, num_inference_steps=STEPS)
    handle = case.elastic(pipe)
    handle.schedule = Schedule.constant(WEAK)
    plain = case.draw(pipe, num_inference_steps=STEPS)
    pipe.transformer.enable_cache(one_state_cache(kind, pipe))
    coarse = case.draw(pipe, num_inference_steps=STEPS)
    assert coarse.isfinite().all()
    assert not torch.equal(coarse, plain)
    handle.schedule = Schedule.constant(FULL)  # nothing is left of the coarse run
    assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), expected)
    handle.schedule = COARSE_FIRST
    with pytest.raises(RuntimeError, match=r"one state for all patch sizes; legal .*FirstBlock"):
        case.draw(pipe, num_inference_steps=STEPS)


@pytest.mark.parametrize("gain", [0.5, 0.0])
def test_branches_of_one_batch_that_run_apart_have_states_of_their_own(gain):
    """The guidance rows must not repeat what the cache kept of the conditional rows."""
    handle = elastic("cogvideox-2b")
    handle.schedule = schedule((1.0, 0.0, "full", {"gain": gain}))
    call = call_of("cogvideox-2b", count=2)
    call["hidden_states"] = torch.cat([call["hidden_states"][:1]] * 2)

    def step(time):
        call["timestep"] = torch.full((2,), time)
        with torch.no_grad(), handle.model.cache_context("cond_uncond"):
            return handle.model(**call).sample

    expected = step(900.0)
    handle.model.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # skips whenever it may
    assert torch.equal(step(900.0), expected)
    handle.schedule = Schedule.constant(FULL)  # now all rows in one pass
    assert step(800.0).isfinite().all()


# cache-dit


@pytest.fixture
def cache_dit():
    return pytest.importorskip("cache_dit", reason="pip install cache-dit")


@contextlib.contextmanager
def cached(cache_dit, pipe, **settings):
    """cache-dit on a pipeline; it patches the pipeline's class, so it must go again."""
    facts = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.3}
    config = cache_dit.DBCacheConfig(**{**facts, **settings})
    try:
        cache_dit.enable_cache(pipe, cache_config=config)
        yield
    finally:
        cache_dit.disable_cache(pipe)


@pytest.mark.parametrize("name", ["flux", "wan", "qwenimage", "sd3"])
def test_cache_dit_put_on_an_elastic_pipeline(name, cache_dit):
    case = CASES[name]
    stock, pipe = case.pipe(), case.pipe()
    plain = case.draw(stock, num_inference_steps=STEPS)
    with cached(cache_dit, stock):
        expected = case.draw(stock, num_inference_steps=STEPS)
    handle = case.elastic(pipe)
    with cached(cache_dit, pipe):  # the first run: costs are counted while blocks are hidden
        assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), expected)
    counted = [call.macs for call in handle.report().calls]
    handle.schedule = ALTERNATING
    with cached(cache_dit, pipe):
        found = case.draw(pipe, num_inference_steps=STEPS)
    assert found.isfinite().all()
    names = [call.mode.name for call in handle.report().calls]
    assert set(names) == {"full", "patch2"}
    uncached = case.draw(pipe, num_inference_steps=STEPS)
    assert [call.mode.name for call in handle.report().calls] == names
    with cached(cache_dit, pipe, residual_diff_threshold=0.0):  # never skips
        torch.testing.assert_close(case.draw(pipe, num_inference_steps=STEPS), uncached)
    if case.two_calls:
        handle.schedule = Schedule.constant(FULL, guide=WEAK, guidance="weak")
        uncached = case.draw(pipe, num_inference_steps=STEPS)
        with cached(cache_dit, pipe, residual_diff_threshold=0.0):
            torch.testing.assert_close(case.draw(pipe, num_inference_steps=STEPS), uncached)
    handle.schedule = Schedule.constant(FULL)
    assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), plain)
    assert [call.macs for call in handle.report().calls] == counted
    handle.remove()
    assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), plain)


OTHERS = sorted(set(CASES) - {"flux", "wan", "qwenimage", "sd3", "dit", "chroma", "latte"})
"""cache-dit does not know Latte; the six named first have tests of their own."""


@pytest.mark.parametrize("name", OTHERS)
def test_cache_dit_on_the_other_classes(name, cache_dit):
    case = CASES[name]
    stock, pipe = case.pipe(), case.pipe()
    with cached(cache_dit, stock):
        expected = case.draw(stock, num_inference_steps=STEPS)
    handle = case.elastic(pipe)
    with cached(cache_dit, pipe):
        assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), expected)
        handle.schedule = COARSE_FIRST
        assert case.draw(pipe, num_inference_steps=STEPS).isfinite().all()
    assert {call.mode.name for call in handle.report().calls} == {"full", "patch2"}


def test_cache_dit_skips_in_coarse_modes_too(cache_dit):
    case = CASES["wan"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = COARSE_FIRST
    plain = case.draw(pipe, num_inference_steps=STEPS)
    count = runs_of(pipe.transformer.blocks[1].attn1)
    with cached(cache_dit, pipe, residual_diff_threshold=0.9):
        skipped = case.draw(pipe, num_inference_steps=STEPS)
    assert count[0] < len(handle.report().calls)
    assert not torch.equal(skipped, plain)
    with cached(cache_dit, pipe, residual_diff_threshold=0.9):
        assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), skipped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual_diff_threshold": 1.0}, r"residual_diff_threshold = 1.0.*'patch2': below 1"),
        (
            {"steps_computation_mask": [1, 0] * 4, "steps_computation_policy": "static"},
            r"steps_computation_policy = 'static'.*legal.*'dynamic'",
        ),
    ],
)
def test_cache_dit_settings_that_ignore_sizes(settings, message, cache_dit):
    case = CASES["flux"]
    stock, pipe = case.pipe(), case.pipe()
    with cached(cache_dit, stock, **settings):
        expected = case.draw(stock, num_inference_steps=STEPS)
    handle = case.elastic(pipe)
    with cached(cache_dit, pipe, **settings):
        assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), expected)
        handle.schedule = COARSE_FIRST
        with pytest.raises(RuntimeError, match=message):
            case.draw(pipe, num_inference_steps=STEPS)


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("sd3", schedule((1.0, 0.0, "full", {"gain": 0.5}))),
        ("sd3", schedule((1.0, 0.0, "full", {"gain": 0.0}))),
        ("sd3", schedule((1.0, 0.0, "full", {"guide": "patch2"}))),
        ("wan", schedule((1.0, 0.5, "full", {"gain": 0.0}), (0.5, 0.0, "full"))),
    ],
)
def test_cache_dit_refuses_schedules_that_change_its_count_of_steps(name, modes, cache_dit):
    case = CASES[name]
    pipe = case.pipe()
    case.elastic(pipe).schedule = modes
    with (
        cached(cache_dit, pipe),
        pytest.raises(RuntimeError, match=r"one pass of all rows .*none or several; legal"),
    ):
        case.draw(pipe, num_inference_steps=STEPS)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_pipeline_that_cache_dit_has_changed_already(name, cache_dit):
    case = CASES[name]
    pipe = case.pipe()
    plain = case.draw(pipe, num_inference_steps=STEPS)
    with (
        cached(cache_dit, pipe),
        pytest.raises(ValueError, match=r"forward of its own, from cache_dit.*elastify first"),
    ):
        case.elastic(pipe)
    # It leaves a forward behind when it goes: Wan's own, of FLUX a copy of it.
    if name == "flux":
        with pytest.raises(ValueError, match=r"from cache_dit.*del model\.forward"):
            case.elastic(pipe)
        del pipe.transformer.forward
    handle = case.elastic(pipe)
    assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), plain)
    handle.schedule = COARSE_FIRST
    case.draw(pipe, num_inference_steps=STEPS)
    assert handle.report().calls[0].mode == WEAK
    handle.remove()
    assert torch.equal(case.draw(pipe, num_inference_steps=STEPS), plain)


@pytest.mark.parametrize("name", ["dit", "chroma"])
def test_cache_dit_hides_blocks_that_a_forward_looks_into(name, cache_dit):
    """It has copies of these forwards that do not, but they would not ask for a mode."""
    case = CASES[name]
    pipe = case.pipe()
    plain = case.draw(pipe)
    case.elastic(pipe)
    with (
        cached(cache_dit, pipe),
        pytest.raises(RuntimeError, match=r"hides the blocks of .*2DModel.*legal"),
    ):
        case.draw(pipe)
    assert torch.equal(case.draw(pipe), plain)
