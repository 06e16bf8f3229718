"""What people put on their models beside us: each works at every mode, or refuses clearly."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from peft import LoraConfig
from tests.backbones.tiny import CASES
from tests.elastic_models import MERGED, WEAK, call_of, elastic, run, shake
from torch._dynamo.testing import CompileCounterWithBackend

from ditdial import FULL, FlexiDiT, Schedule, elastify, handle_of
from ditdial.runtime.tensors import is_new

NAMES = ("flux", "wan")
names = pytest.mark.parametrize("name", NAMES)


# torch.compile


@names
def test_whole_model_compiles_to_one_graph_per_mode(name):
    torch._dynamo.reset()
    handle, call = elastic(name), call_of(name)
    expected = {mode: run(handle, call, mode) for mode in (FULL, WEAK)}
    counter = CompileCounterWithBackend("eager")
    handle.model.compile(backend=counter, fullgraph=True)
    counts = []
    for mode in (FULL, WEAK, FULL, WEAK):
        torch.testing.assert_close(run(handle, call, mode), expected[mode])
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]


@names
@pytest.mark.parametrize("recipe", ["lora", "shared"])
def test_repeated_blocks_compile_to_few_graphs(name, recipe):
    torch._dynamo.reset()
    handle = elastify(CASES[name].model(), FlexiDiT(rank=3, scales=(2,), recipe=recipe))
    call = call_of(name)
    expected = {mode: run(handle, call, mode) for mode in (FULL, WEAK)}
    counter = CompileCounterWithBackend("eager")
    handle.model.compile_repeated_blocks(backend=counter, fullgraph=True)
    for mode in (FULL, WEAK, FULL, WEAK):
        torch.testing.assert_close(run(handle, call, mode), expected[mode])
    stock, of_stock = CASES[name].model(), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    stock.compile_repeated_blocks(backend=of_stock, fullgraph=True)
    run(stock, call)
    assert counter.frame_count <= 2 * of_stock.frame_count


# LoRA


def add_lora(model, targets, name="style"):
    torch.manual_seed(4)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), name)
    shake(model, lambda key: "lora_" in key, seed=5)


TARGETS = {"flux": ["attn.to_q", "attn.to_k"], "wan": ["attn1.to_q", "attn2.to_k"]}


@names
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_users_lora_acts_in_every_mode_and_goes_again(name, when):
    call, stock = call_of(name), CASES[name].model()
    plain = elastic(name)
    without = {mode: run(plain, call, mode) for mode in (FULL, WEAK)}
    add_lora(stock, TARGETS[name])
    if when == "before":
        model = CASES[name].model()
        add_lora(model, TARGETS[name])
        handle = elastic(name, model)
    else:
        handle = elastic(name)
        add_lora(handle.model, TARGETS[name])
    assert torch.equal(run(handle, call, FULL), run(stock, call))
    assert not torch.allclose(run(handle, call, WEAK), without[WEAK], atol=1e-4)
    handle.model.disable_lora() if hasattr(handle.model, "disable_lora") else None
    for mode in (FULL, WEAK):
        torch.testing.assert_close(run(handle, call, mode), without[mode])
    if when == "after":
        handle.model.delete_adapters("style")
        handle.model.unload_lora() if hasattr(handle.model, "unload_lora") else None
        for mode in (FULL, WEAK):
            torch.testing.assert_close(run(handle, call, mode), without[mode])


@names
def test_merged_weights_follow_a_fused_lora(name):
    call = call_of(name)
    merged, unmerged = elastic(name, execution=MERGED), elastic(name)
    run(merged, call, WEAK)
    for handle in (merged, unmerged):
        add_lora(handle.model, TARGETS[name])
        handle.model.fuse_lora()
    torch.testing.assert_close(run(merged, call, WEAK), run(unmerged, call, WEAK))


@pytest.mark.parametrize(
    ("name", "targets"),
    [("flux", ["x_embedder", "proj_out"]), ("flux", ["x_embedder"]), ("wan", ["proj_out"])],
)
def test_a_later_lora_on_a_seam_module_is_no_silent_no_op(name, targets):
    call, stock, handle = call_of(name), CASES[name].model(), elastic(name)
    coarse = run(handle, call, WEAK)
    add_lora(stock, targets)
    add_lora(handle.model, targets)
    assert torch.equal(run(handle, call, FULL), run(stock, call))
    found = run(handle, call, WEAK)
    assert found.shape == coarse.shape
    assert not torch.allclose(found, run(stock, call), atol=1e-3)
    assert [c.mode for c in handle.report().calls] == [WEAK]
    handle.model.delete_adapters("style")
    handle.model.unload_lora()
    torch.testing.assert_close(run(handle, call, WEAK), coarse)
    handle.remove()
    assert torch.equal(run(handle.model, call), run(CASES[name].model(), call))


# Step caches


def steps(handle, name, times=(900.0, 800.0, 700.0, 600.0, 500.0, 400.0)):
    """Two branches a step, as the pipelines call the model."""
    outputs = []
    with torch.no_grad():
        for time in times:
            for branch in ("cond", "uncond"):
                with handle.model.cache_context(branch):
                    outputs.append(handle.model(**call_of(name, time)).sample)
    return outputs


ALTERNATING = [
    {"start": 1.0, "stop": 0.85, "mode": "patch2"},
    {"start": 0.85, "stop": 0.65, "mode": "full"},
    {"start": 0.65, "stop": 0.55, "mode": "patch2"},
    {"start": 0.55, "stop": 0.0, "mode": "full"},
]


def alternating() -> Schedule:
    import json

    return Schedule.from_json(json.dumps({"segments": ALTERNATING}))


@names
def test_first_block_cache_keeps_a_state_per_mode(name):
    handle = elastic(name)
    handle.schedule = alternating()
    expected = steps(handle, name)
    handle.model.enable_cache(FirstBlockCacheConfig(threshold=0.0))  # never skips
    for found, wanted in zip(steps(handle, name), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert handle.report().calls[0].mode == WEAK
    handle.model.disable_cache()
    handle.model.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # skips whenever it may
    skipped = steps(handle, name)
    assert all(x.isfinite().all() for x in skipped)
    assert not torch.allclose(skipped[-1], expected[-1])


@names
@pytest.mark.parametrize(
    "config",
    [
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
        MagCacheConfig(
            threshold=1.0,
            max_skip_steps=2,
            retention_ratio=0.2,
            num_inference_steps=6,
            mag_ratios=torch.ones(6),
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_caches_survive_mode_changes(name, config):
    handle = elastic(name)
    handle.schedule = alternating()
    shape = steps(handle, name)[0].shape
    handle.model.enable_cache(config)
    outputs = steps(handle, name)
    assert all(x.shape == shape and x.isfinite().all() for x in outputs)
    modes = [c.mode for c in handle.report().calls]
    assert modes == [m for m in (WEAK, FULL, FULL, WEAK, FULL, FULL) for _ in range(2)]


@pytest.mark.parametrize(
    "config",
    [
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=2,
            current_timestep_callback=lambda: 500,
        ),
        FasterCacheConfig(current_timestep_callback=lambda: 500),
    ],
    ids=lambda config: type(config).__name__,
)
def test_caches_with_one_state_refuse_coarse_modes(config):
    handle = elastic("wan")
    handle.model.enable_cache(config)
    run(handle, call_of("wan"), FULL)
    with pytest.raises(RuntimeError, match=r"one state for all patch sizes; legal .*FirstBlock"):
        run(handle, call_of("wan"), WEAK)


# Hooks, copies, replaced parts


@names
def test_hooks_put_on_before_still_run_and_modes_still_change(name):
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    model = CASES[name].model()
    backbone_embed = {"flux": "x_embedder", "wan": "patch_embedding"}[name]
    add_hook_to_module(model, Counting())
    add_hook_to_module(model.get_submodule(backbone_embed), Counting())
    handle, twin, call = elastic(name, model), elastic(name), call_of(name)
    for mode in (FULL, WEAK):
        assert torch.equal(run(handle, call, mode), run(twin, call, mode))
    assert len(calls) == 4


@names
def test_a_copy_is_elastic_by_itself(name):
    handle, call = elastic(name), call_of(name)
    twin = copy.deepcopy(handle.model)
    expected = {mode: run(handle, call, mode) for mode in (FULL, WEAK)}
    with torch.no_grad():
        for parameter in handle.model.parameters():
            parameter.zero_()
    for mode in (FULL, WEAK):
        assert torch.equal(run(twin, call, mode), expected[mode])
    handle_of(twin).remove()
    assert torch.equal(run(twin, call), run(CASES[name].model(), call))


@names
@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_forward_put_over_ours_is_refused_when_it_runs(name, where):
    """Forks of step caches do this; their forward never asks for a mode."""
    handle, call = elastic(name), call_of(name)
    stock = type(CASES[name].model())

    def forked(self, *args, **kwargs):
        return stock.forward(self, *args, **kwargs)

    ours = type(handle.model)
    original = ours.forward
    if where == "class":
        ours.forward = forked
    else:
        handle.model.forward = types.MethodType(forked, handle.model)
    try:
        with pytest.raises(RuntimeError, match="forward was replaced after elastify"):
            run(handle.model, call)
    finally:
        if where == "class":
            ours.forward = original


@names
def test_a_forward_put_on_the_stock_class_is_used(name, monkeypatch):
    handle, call = elastic(name), call_of(name)
    stock = type(CASES[name].model())
    original, seen = stock.forward, []

    def forked(self, *args, **kwargs):
        seen.append(1)
        return original(self, *args, **kwargs)

    expected = run(handle, call, WEAK)
    monkeypatch.setattr(stock, "forward", forked)
    assert torch.equal(run(handle, call, WEAK), expected)
    assert seen == [1]


# Memory and precision


@names
def test_layerwise_casting(name):
    call, stock, handle = call_of(name), CASES[name].model(), elastic(name)
    for model in (stock, handle.model):
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
    assert torch.equal(run(handle, call, FULL), run(stock, call))
    assert run(handle, call, WEAK).isfinite().all()


@names
def test_sixteen_bits(name):
    handle = elastic(name)
    handle.model.to(torch.bfloat16)
    call = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() and "ids" not in k else v
        for k, v in call_of(name).items()
    }
    for mode in (FULL, WEAK):
        out = run(handle, call, mode)
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()


@names
def test_group_offloading_to_the_same_device(name):
    from diffusers.hooks import apply_group_offloading

    handle, twin, call = elastic(name), elastic(name), call_of(name)
    apply_group_offloading(
        handle.model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )
    for mode in (FULL, WEAK):
        assert torch.equal(run(handle, call, mode), run(twin, call, mode))


@names
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        handle = elastic(name)
        if checkpointing:
            handle.model.enable_gradient_checkpointing()
            handle.model.train()
        with handle.using(WEAK):
            loss = handle.model(**call_of(name)).sample.square().mean()
        loss.backward()
        gradients.append({k: p.grad for k, p in handle.model.named_parameters() if is_new(k)})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


@names
def test_fused_projections_give_the_same_in_every_mode(name):
    handle, call = elastic(name), call_of(name)
    expected = {mode: run(handle, call, mode) for mode in (FULL, WEAK)}
    handle.model.fuse_qkv_projections()
    for mode in (FULL, WEAK):
        torch.testing.assert_close(run(handle, call, mode), expected[mode])
    handle.model.unfuse_qkv_projections()
    assert torch.equal(run(handle, call, WEAK), expected[WEAK])


# Saving


@names
def test_an_elastic_model_saves_as_the_stock_model_with_its_adapter_inside(name, tmp_path):
    handle, call = elastic(name), call_of(name)
    stock = type(CASES[name].model())
    expected = {mode: run(handle, call, mode) for mode in (FULL, WEAK)}
    handle.model.save_pretrained(tmp_path)
    assert handle_of(handle.model) is not None
    again = stock.from_pretrained(tmp_path)
    assert torch.equal(run(again, call), expected[FULL])
    assert set(again.state_dict()) == set(CASES[name].model().state_dict())
    handle = elastify(again, tmp_path / "elastic.adapter")
    for mode in (FULL, WEAK):
        assert torch.equal(run(handle, call, mode), expected[mode])


@names
def test_the_generated_class_builds_stock_models(name, tmp_path):
    """Test suites and EMA build ``type(model)(**config)`` and load it with ``from_pretrained``."""
    handle, call = elastic(name), call_of(name)
    cls, stock = type(handle.model), CASES[name].model()
    built = cls(**dict(stock.config)).eval()
    built.load_state_dict(stock.state_dict())
    assert torch.equal(run(built, call), run(stock, call))
    built.save_pretrained(tmp_path)
    assert torch.equal(run(cls.from_pretrained(tmp_path), call), run(stock, call))
    with built.cache_context("cond"):
        run(built, call)


@names
def test_an_average_of_weights_is_kept_as_diffusers_does(name):
    from diffusers.training_utils import EMAModel

    handle, call = elastic(name), call_of(name)
    average = EMAModel(handle.model.parameters(), decay=0.5)
    before = run(handle, call, WEAK)
    shake(handle.model, is_new, seed=9)
    average.step(handle.model.parameters())
    average.store(handle.model.parameters())
    average.copy_to(handle.model.parameters())
    assert not torch.equal(run(handle, call, WEAK), before)
    average.restore(handle.model.parameters())
