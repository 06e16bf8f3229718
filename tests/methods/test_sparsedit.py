"""SparseDiT: two token grids in a stock model, on every class that knows where tokens meet."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.backbones.tiny import CASES
from tests.elastic_models import checkpointed_gradients, run_as
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ditdial import FULL, Mode, Schedule, SparseDiT, elastify
from ditdial.methods import method_from_config
from ditdial.ops.pooling import pool_tokens, spread_tokens
from ditdial.runtime.tensors import is_new

TIME = 700.0
CALLS = {
    "dit": ("dit", (1, 7, 7)),
    "pixart": ("pixart", (1, 6, 7)),
    "latte": ("latte", (3, 6, 7)),
    "wan": ("wan", (3, 6, 7)),
    "sd3": ("sd3", (1, 6, 7)),
    "flux": ("flux", (1, 6, 7)),
    "flux-single": ("flux", (1, 6, 7)),
}
NAMES = tuple(CALLS)
JOINT = ("sd3", "flux", "flux-single")
STAGES = ((0.5, 2), (0.25, (4, 3)), (0, 5))
names = pytest.mark.parametrize("name", NAMES)


def method_of(name="dit", **settings):
    pool = 0 if name in JOINT else 1
    plan = {"pool": pool, "modules": 2, "group": (1, 1, 1, 1), "top": 2 - pool, "stages": STAGES}
    return SparseDiT(**{**plan, **settings})


def deep(name, layers=10):
    """A tiny model with the ten blocks of the plan; FLUX has blocks of two kinds."""
    case = CASES[CALLS[name][0]]
    depth = {"num_layers": layers}
    if name in ("flux", "flux-single"):
        double = layers - 4 if name == "flux" else 2
        depth = {"num_layers": double, "num_single_layers": layers - double}
    return replace(case, config={**case.config, **depth}).model()


def call_of(name, count=2, time=TIME):
    case, grid = CALLS[name]
    return CASES[case].call(count, grid, time)


@torch.no_grad()
def elastic(name, layers=10, **settings):
    torch.manual_seed(2)
    handle = elastify(deep(name, layers), method_of(name, **settings))
    generator = torch.Generator().manual_seed(3)
    for key, parameter in handle.model.named_parameters():
        if is_new(key):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return handle


@torch.no_grad()
def run(handle, call, mode=None):
    if mode is None:
        return handle.model(**call).sample
    with handle.using(mode):
        return handle.model(**call).sample


@names
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_full_mode_is_stock_and_remove_is_exact(name, recipe, assert_stock):
    handle, call, stock = elastic(name, recipe=recipe), call_of(name), deep(name)
    with torch.no_grad():
        expected = stock(**call).sample
    assert torch.equal(run(handle, call, FULL), expected)
    for mode in handle.modes[1:]:
        found = run(handle, call, mode)
        assert found.shape == expected.shape
        assert torch.isfinite(found).all()
        assert not torch.allclose(found, expected)
    assert torch.equal(run(handle, call, FULL), expected)
    handle.remove()
    assert_stock(handle.model, stock)


@names
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_planned_cost_is_what_the_counter_counts(name, recipe):
    handle, call = elastic(name, recipe=recipe, rank=3), call_of(name, 1)
    size = handle.backbone.size(handle.model, call)
    shape, costs = handle._engine.shape(handle.model, size), []
    for mode in handle.modes:
        counter = FlopCounterMode(display=False)
        with handle.using(mode), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
            handle.model(**call)
        assert shape.macs(mode) == counter.get_total_flops() / 2, mode
        costs.append(shape.macs(mode))
    assert costs[1] < costs[2] < costs[3] < costs[0]


@names
def test_a_row_alone_is_the_row_in_a_batch(name):
    handle, call = elastic(name), call_of(name, 3)
    for mode in handle.modes[1:]:
        together = run(handle, call, mode)
        for row in range(3):
            alone = run(handle, handle.backbone.arguments.rows(call, slice(row, row + 1)), mode)
            torch.testing.assert_close(alone[0], together[row], atol=2e-5, rtol=1e-4)


def test_a_pooling_block_is_attention_with_equal_weights():
    """Zero queries make all weights equal; the block then needs no average to be told."""
    handle = elastic("dit")
    handle.model.double()
    block = handle.model.transformer_blocks[0]
    x = torch.randn(2, 49, 32, dtype=torch.float64)
    times = {"timestep": torch.tensor([3.0, 700.0]), "class_labels": torch.tensor([1, 2])}
    handle._engine.wiring.state.grids = _grids(handle, 2)
    with torch.no_grad():
        found = block(x, **times)
        handle._engine.wiring.state.grids = None
        attention = block.attn1
        attention.to_q.weight.zero_()
        attention.to_q.bias.zero_()
        expected = block(x, **times)
    assert (found - expected).abs().max() < 1e-12


def _grids(handle, sides):
    """The token grids of a pass on 7 x 7 tokens."""
    wiring = handle._engine.wiring
    wiring.state.grid, wiring.state.device = (1, 7, 7), torch.device("cpu")
    return wiring.new.grids(handle.model, wiring.backbone, wiring.state, Mode(token_grid=sides))


def test_a_merge_starts_as_the_dense_tokens():
    handle = elastify(deep("dit"), method_of())
    grids = _grids(handle, 2)
    dense, sparse = torch.randn(2, 49, 32), torch.randn(2, 4, 32)
    for module in range(2):
        merge = handle._engine.wiring.new.merges[module]
        assert torch.equal(merge.merged(grids, sparse, dense), dense)
        assert torch.equal(merge.pooled(grids, dense), pool_tokens(dense, (7, 7), (2, 2)))


@torch.no_grad()
def test_a_merge_is_the_papers():
    """Spread first, multiply then; positions go in behind their gate."""
    handle = elastic("dit")
    merge = handle._engine.wiring.new.merges[1]
    grids = _grids(handle, (4, 3))
    dense, sparse = torch.randn(2, 49, 32), torch.randn(2, 12, 32)
    wide = spread_tokens(sparse, (4, 3), (7, 7))
    expected = merge.sparse(wide) + merge.dense(dense) + merge.dense_gate * grids.positions
    torch.testing.assert_close(merge.merged(grids, sparse, dense), expected)


@names
@torch.no_grad()
def test_two_streams_of_the_same_tokens_are_stock(name):
    """The sparse grid is the dense one, and merges return the sparse tokens: nothing is left out.

    A pool block comes first where the class must have one, with zero queries, so that the stock
    block's weights are equal too.
    """
    _, (_, height, width) = CALLS[name]
    pool = int(name == "latte")
    stock, settings = deep(name), {"pool": pool, "top": 2 - pool, "stages": ((0, (height, width)),)}
    if pool:
        for parameter in stock.transformer_blocks[0].attn1.to_q.parameters():
            parameter.zero_()
    call = call_of(name)
    expected = stock(**call).sample
    handle = elastify(stock, method_of(name, **settings))
    for merge in handle._engine.wiring.new.merges:
        merge.sparse.weight.copy_(torch.eye(len(merge.sparse.weight)))
        merge.dense.weight.zero_()
    found = run(handle, call, handle.modes[1])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    handle._engine.wiring.new.merges[1].sparse.bias.normal_()
    changed = run(handle, call, handle.modes[1])
    assert not torch.allclose(changed, expected, atol=1e-2)  # it does take the other way


@torch.no_grad()
def test_a_module_starts_as_cross_attention():
    """Merges that return the dense tokens: a recover block reads what the others have made of them.

    Written out here with the stock modules, for a sparse grid as large as the dense one.
    """
    settings = {"pool": 0, "modules": 1, "group": (1, 0, 1, 0), "top": 8, "stages": ((0, 7),)}
    handle, call = elastify(deep("dit"), method_of(**settings)), call_of("dit")
    found = run(handle, call, Mode(token_grid=7))
    handle.remove()
    model = handle.model
    x = model.pos_embed(call["hidden_states"])
    times = {"timestep": call["timestep"], "class_labels": call["class_labels"]}
    first, second, *rest = model.transformer_blocks
    own, gate, shift, scale, gate_mlp = second.norm1(x, **times, hidden_dtype=x.dtype)
    other = second.norm1(first(x, **times), **times, hidden_dtype=x.dtype)[0]
    x = x + gate[:, None] * second.attn1(own, encoder_hidden_states=other)
    inner = second.norm3(x) * (1 + scale[:, None]) + shift[:, None]
    x = x + gate_mlp[:, None] * second.ff(inner)
    for block in rest:
        x = block(x, **times)
    emb = first.norm1.emb(*times.values(), hidden_dtype=x.dtype)
    shift, scale = model.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
    x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
    vectors = x.view(2, 7, 7, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 14, 14)
    torch.testing.assert_close(found, vectors, atol=1e-5, rtol=1e-5)


def test_guidance_in_one_batch_equals_two_calls():
    handle = elastic("dit")
    call = CASES["dit"].guided(2, (1, 7, 7), TIME)
    halves = [handle.backbone.arguments.rows(call, part) for part in (slice(0, 2), slice(2, 4))]
    handle.schedule = Schedule.constant(Mode(token_grid=2))
    expected = torch.cat([run(handle, half, Mode(token_grid=2)) for half in halves])
    torch.testing.assert_close(run(handle, call), expected, atol=2e-5, rtol=1e-4)
    handle.schedule = Schedule.constant(FULL, guide=Mode(token_grid=2))
    expected = [run(handle, h, m) for h, m in zip(halves, (FULL, Mode(token_grid=2)), strict=True)]
    torch.testing.assert_close(run(handle, call), torch.cat(expected), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"packed = True; .* method 'sparsedit': False"):
        run_as(handle, packed=True)


def test_modes_follow_the_noise_level_in_a_run():
    handle = elastic("dit", stages=((0.75, 2), (0.5, 3), (0.25, 4)))
    times = (999.0, 760.0, 740.0, 500.0, 490.0, 260.0, 249.0, 0.0)
    for time in times:
        run(handle, call_of("dit", time=time))
    expected = ["grid2", "grid2", "grid3", "grid3", "grid4", "grid4", "full", "full"]
    calls = handle.report().calls
    assert [call.mode.name for call in calls] == expected
    plan = handle.plan_levels([t / 1000 for t in times], guidance=False, grid=(1, 7, 7))
    assert sum(call.macs for call in calls) == pytest.approx(2 * plan.macs)


def test_rows_of_different_stages_are_refused():
    handle, call = elastic("dit"), call_of("dit")
    call["timestep"] = torch.tensor([900.0, 100.0])
    with pytest.raises(ValueError, match=r"noise levels of a batch go from 0.1 to 0.9"):
        run(handle, call)


@names
def test_the_adapter_survives_a_round_trip(name, tmp_path):
    for recipe in ("full", "lora"):
        handle, call = elastic(name, recipe=recipe), call_of(name)
        expected = [run(handle, call, mode) for mode in handle.modes]
        handle.adapter().save_pretrained(tmp_path / recipe)
        again = elastify(deep(name), tmp_path / recipe)
        assert again.method == handle.method
        assert again.schedule.to_json() == handle.method.default_schedule.to_json()
        for mode, output in zip(handle.modes, expected, strict=True):
            assert torch.equal(run(again, call, mode), output)


def test_retrained_weights_leave_with_the_handle(tmp_path):
    handle, call = elastic("dit"), call_of("dit")
    with torch.no_grad():
        handle.model.transformer_blocks[0].ff.net[2].weight.mul_(1.5)
    expected = run(handle, call, Mode(token_grid=2))
    handle.adapter().save_pretrained(tmp_path / "adapter")
    again = elastify(deep("dit"), tmp_path / "adapter")
    assert torch.equal(run(again, call, Mode(token_grid=2)), expected)
    again.remove()
    with torch.no_grad():
        assert torch.equal(again.model(**call).sample, deep("dit")(**call).sample)


def compiled(name):
    """A handle, and its outputs in three modes without a compiler."""
    torch._dynamo.reset()
    handle = elastic(name, 5, modules=1, group=(1, 1, 1, 0))  # the rest of the plan is two blocks
    call, modes = call_of(name), handle.modes[:3]
    return handle, call, modes, [run(handle, call, mode) for mode in modes]


def graphs_of(handle, call, modes, expected, counter):
    """Graphs made up to each of two rounds of modes."""
    graphs = []
    for mode, output in zip(modes * 2, expected * 2, strict=True):
        torch.testing.assert_close(run(handle, call, mode), output, atol=2e-5, rtol=1e-4)
        graphs.append(counter.frame_count)
    return graphs


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "dit"]


@pytest.mark.parametrize("name", ["dit", *SLOW])
def test_one_graph_per_grid(name):
    handle, *rest = compiled(name)
    counter = CompileCounterWithBackend("eager")
    handle.model.compile(backend=counter, fullgraph=True, dynamic=False)
    assert graphs_of(handle, *rest, counter) == [1, 2, 3, 3, 3, 3]


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=32)
def test_one_graph_per_role_and_grid_where_blocks_are_compiled():
    handle, *rest = compiled("wan")
    counter = CompileCounterWithBackend("eager")
    handle.model.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=False)
    first, *_, last = found = graphs_of(handle, *rest, counter)
    assert first == 1
    assert found[2:] == [last] * 4


@names
def test_checkpointed_gradients_are_the_same(name):
    handle = elastic(name)
    reached = checkpointed_gradients(handle, call_of(name), Mode(token_grid=2))
    new = {k for k, _ in handle.model.named_parameters() if is_new(k)}
    assert new <= reached


def test_a_whole_pipeline_run_is_what_was_planned():
    from ditdial.reference import load_reference

    pipe = load_reference()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe([3, 7], seeds=[0, 1], num_inference_steps=4, output_type="pt").images
    method = SparseDiT.for_depth(6, stages=((0.5, 4), (0, 6)))
    handle = elastify(pipe, method)
    images = pipe([3, 7], seeds=[0, 1], num_inference_steps=4, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(images)).all()
    report, plan = handle.report(), handle.plan(4)
    assert [call.mode for call in report.calls] == [step.mode for step in plan.steps]
    assert report.ratio == pytest.approx(plan.ratio)
    assert plan.ratio < 0.8
    handle.budget = 0.85
    assert handle.plan(4).ratio <= 0.86
    handle.remove()
    again = pipe([3, 7], seeds=[0, 1], num_inference_steps=4, output_type="pt").images
    assert torch.equal(torch.as_tensor(again), torch.as_tensor(expected))


def test_a_copy_has_streams_of_its_own():
    handle, call = elastic("dit"), call_of("dit")
    expected = run(handle, call, Mode(token_grid=2))
    from ditdial import handle_of

    twin = handle_of(copy.deepcopy(handle.model))
    with torch.no_grad():
        for parameter in handle.model.parameters():
            parameter.zero_()
    assert torch.equal(run(twin, call, Mode(token_grid=2)), expected)


def test_an_error_in_a_forward_leaves_no_state(monkeypatch):
    handle, call = elastic("dit"), call_of("dit")
    expected = run(handle, call, FULL)
    sparse = run(handle, call, Mode(token_grid=2))
    broken = call | {"class_labels": torch.tensor([1, 99])}
    with pytest.raises(IndexError):
        run(handle, broken, Mode(token_grid=2))
    assert handle._engine.wiring.state.grids is None
    assert torch.equal(run(handle, call, FULL), expected)
    assert torch.equal(run(handle, call, Mode(token_grid=2)), sparse)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if torch.is_tensor(x):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.itemsize)
        return out


@names
def test_nothing_is_larger_than_in_full_mode(name):
    handle, call = elastic(name), call_of(name)
    sizes = {}
    for mode in (FULL, Mode(token_grid=2)):
        with Largest() as seen:
            run(handle, call, mode)
        sizes[mode] = seen.numbers
    assert sizes[Mode(token_grid=2)] <= sizes[FULL]


def test_a_latent_smaller_than_the_grid_is_refused():
    handle = elastic("pixart")
    call = CASES["pixart"].call(1, (1, 6, 4), TIME)
    with pytest.raises(ValueError, match=r"'grid5' does not fit the 6x4 tokens .*at most 6x4"):
        run(handle, call, Mode(token_grid=5))
    with pytest.raises(ValueError, match=r"'grid9' does not fit the 8x8 tokens"):
        elastify(deep("dit"), method_of(stages=((0, 9),)))


def test_what_goes_not_together_is_refused():
    with pytest.raises(ValueError, match=r"are 6 blocks; legal: 10, .*for_depth\(10\)"):
        elastify(deep("dit"), method_of(modules=1))
    with pytest.raises(ValueError, match="where tokens of SanaTransformer2DModel meet"):
        elastify(CASES["sana"].model(), method_of())
    with pytest.raises(ValueError, match="pool = 0; legal for LatteTransformer3DModel: at least 1"):
        elastify(deep("latte"), method_of(pool=0, top=2))
    with pytest.raises(ValueError, match="pool = 1; legal for SD3Transformer2DModel: 0 "):
        elastify(deep("sd3"), method_of("sd3", pool=1, top=1))
    handle = elastic("dit")
    with (
        pytest.raises(ValueError, match="mode 'patch2_grid2'; legal: full, grid2"),
        handle.using(Mode(2, token_grid=2)),
    ):
        pass
    wan = elastic("wan")
    call = CASES["wan-token-times"].call(1, (3, 6, 7), TIME)
    with pytest.raises(ValueError, match=r"timestep has a time for each base token"):
        run(wan, call, Mode(token_grid=2))
    pixart = elastic("pixart")
    pixart.model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"legal in sparse modes: model.unfuse_qkv_projections"):
        run(pixart, call_of("pixart"), Mode(token_grid=2))


def test_skipped_layers_are_refused():
    call = call_of("sd3") | {"skip_layers": [1]}
    with pytest.raises(ValueError, match=r"skip_layers = \[1\], and in mode 'grid2' tokens change"):
        run(elastic("sd3"), call, Mode(token_grid=2))


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-single"])
def test_a_lora_of_joint_attention_acts_in_sparse_modes_in_every_order(name):
    from peft import LoraConfig

    call, mode = call_of(name), Mode(token_grid=2)

    def add_lora(model):
        torch.manual_seed(4)
        targets = ["to_k", "to_v", "proj_mlp"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))

    handle = elastic(name)
    adapter, without = handle.adapter(), run(handle, call, mode)
    add_lora(handle.model)
    model = deep(name)
    add_lora(model)
    first = elastify(model, adapter)
    found, expected = run(handle, call, mode), run(first, call, mode)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected - without).abs().max() > 0.01
    for each in (handle, first):
        each.model.unload_lora()
        assert torch.equal(run(each, call, mode), without)


def test_layers_that_were_put_in_others_are_not_given_the_wrong_tokens_inside_a_graph():
    from peft import LoraConfig

    handle, call = elastic("flux"), call_of("flux")
    handle.schedule = Schedule.constant(Mode(token_grid=2))
    adapter = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    handle.model.add_adapter(adapter)
    with pytest.raises(RuntimeError, match="layers of keys and values were put in others"):
        handle._engine.passes.run_inside(handle.model, dict(call))
    expected = run(handle, call)
    assert torch.equal(handle._engine.passes.run_inside(handle.model, dict(call)).sample, expected)


def test_step_caches_are_refused():
    from diffusers import FirstBlockCacheConfig

    handle, call = elastic("wan"), call_of("wan")
    handle.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with (
        pytest.raises(RuntimeError, match="a step cache skips blocks, and in mode 'grid2'"),
        handle.model.cache_context("cond"),
    ):
        run(handle, call, Mode(token_grid=2))


@pytest.mark.parametrize("depth", range(4, 60))
def test_plans_of_any_depth_fill_it(depth):
    for settings in ({}, {"pool": 0}):
        plan = SparseDiT.for_depth(depth, **settings)
        assert len(plan.roles) == depth
        assert plan.modules >= 1
        assert (plan.pool >= 1) == (not settings)


def test_plans_of_published_models():
    assert SparseDiT.for_depth(28) == SparseDiT()
    base = SparseDiT.for_depth(12)
    assert (base.pool, base.modules, base.group, base.top) == (1, 2, (1, 2, 1, 1), 1)
    large = SparseDiT.for_depth(24)
    assert (large.pool, large.modules, large.group, large.top) == (2, 4, (1, 2, 1, 1), 2)
    with pytest.raises(ValueError, match="depth = 3; legal: at least 4 blocks"):
        SparseDiT.for_depth(3)


def test_settings_survive_a_round_trip():
    import json

    method = method_of(recipe="lora", rank=4, upsample="nearest-exact")
    plain = json.loads(json.dumps(method.to_config()))
    assert method_from_config("sparsedit", plain) == method


def test_default_schedule_is_the_papers():
    schedule = SparseDiT().default_schedule
    found = [schedule.at(level).mode.name for level in (1, 0.75, 0.74, 0.5, 0.49, 0.25, 0.24, 0)]
    assert found == ["grid6", "grid6", "grid7", "grid7", "grid8", "grid8", "grid10", "grid10"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pool": -1}, "pool = -1; legal: a whole number >= 0"),
        ({"modules": 0}, "modules = 0; legal: a whole number >= 1"),
        ({"top": 1.5}, "top = 1.5"),
        ({"group": (1, 3, 2, 1)}, r"group = \(1, 3, 2, 1\); legal: whole numbers"),
        ({"group": (0, 3, 1, 1)}, "generate >= 1"),
        ({"group": (1, 3, 1)}, "group"),
        ({"stages": ()}, "stages"),
        ({"stages": ((0.5, 4), (0.6, 5))}, "falling"),
        ({"stages": ((0.5, 4), (-0.1, 5))}, "falling"),
        ({"stages": ((0.5, 4), (0, 4))}, "a grid of its own"),
        ({"stages": ((0.5, 0),)}, "token_grid = 0; legal"),
        ({"upsample": "cubic"}, "upsample = 'cubic'; legal: bilinear, nearest-exact"),
        ({"recipe": "some"}, "recipe = 'some'; legal: full, lora"),
        ({"rank": 0}, "rank = 0"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        SparseDiT(**settings)
