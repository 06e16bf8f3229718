"""DyDiT on tiny models of every class that has routed layers: the same decisions, run two ways."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tests.backbones.pipes import PIPES, STEPS
from tests.backbones.tiny import CASES
from tests.elastic_models import call_of, run, run_as

from ditdial import FULL, DyDiT, Mode, PixelDiTPipeline, Schedule, elastify, handle_of

ROUTED = ["dit", "pixart", "sd3", "flux", "wan", "latte"]
HALF = Mode(width=0.5)


@torch.no_grad()
def open_some(handle, seed=5):
    """Routers that leave out about half, differently at every timestep and token."""
    generator = torch.Generator().manual_seed(seed)
    for routers in handle._engine.wiring.new.routers.values():
        for name, parameter in routers.named_parameters():
            scale = 0.3 if name.endswith("bias") else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    for B in handle._engine.wiring.new.B.values():
        B.copy_(0.05 * torch.randn(B.shape, generator=generator))


def routed(name, model=None, **options):
    model = model or CASES[name].model()
    torch.manual_seed(2)
    handle = elastify(model, DyDiT(widths=(0.5,), groups=2, **options))
    open_some(handle)
    return handle


def gated(handle, call, mode):
    handle._engine.wiring.new.gated = True
    try:
        return run(handle, call, mode)
    finally:
        handle._engine.wiring.new.gated = False


@pytest.fixture(params=ROUTED)
def name(request):
    return request.param


def test_all_open_is_the_stock_model(name):
    model = CASES[name].model()
    expected = run(copy.deepcopy(model), call_of(name), None)
    handle = elastify(model, DyDiT(widths=(0.5,), groups=2))
    for mode in (FULL, HALF):
        assert torch.equal(run(handle, call_of(name), mode), expected)


@pytest.mark.parametrize("recipe", ["full", "td-lora"])
@pytest.mark.parametrize("mode", [HALF, Mode(width=0.5, token_keep=0.5)])
def test_sliced_equals_gated(name, mode, recipe):
    handle = routed(name, recipe=recipe)
    call = call_of(name)
    sliced = run(handle, call, mode)
    full = run(handle, call, FULL)
    assert (sliced - full).norm() > 1e-3 * full.norm()  # something was left out
    assert (gated(handle, call, mode) - sliced).norm() < 1e-6 * sliced.norm()


def test_a_row_alone_and_branches_in_one_batch(name):
    """Token masks differ from row to row; nothing of one row enters another."""
    case = CASES[name]
    if not case.batched:
        pytest.skip("takes one picture at a time")
    handle = routed(name)
    call = call_of(name, count=3)
    both = run(handle, call, HALF)
    for row in range(3):
        alone = run(handle, handle.backbone.arguments.rows(call, slice(row, row + 1)), HALF)
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=2e-6)


def test_remove_is_exact(name):
    model = CASES[name].model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    expected = run(copy.deepcopy(model), call_of(name))
    handle = routed(name, model)
    run(handle, call_of(name), HALF)
    handle.remove()
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(run(model, call_of(name)), expected)
    leftovers = [k for m in model.modules() for k in m.__dict__ if k.startswith("_ditdial")]
    assert leftovers == []


def test_save_and_load(name, tmp_path):
    handle = routed(name, recipe="td-lora")
    expected = run(handle, call_of(name), HALF)
    handle.adapter().save_pretrained(tmp_path)
    again = elastify(CASES[name].model(), tmp_path)
    assert again.method == handle.method
    assert torch.equal(run(again, call_of(name), HALF), expected)
    assert torch.equal(run(again, call_of(name), FULL), run(handle, call_of(name), FULL))


@pytest.mark.parametrize("mode", [HALF, Mode(width=0.5, token_keep=0.4)])
def test_the_record_counts_what_ran(name, mode):
    handle = routed(name)
    call = call_of(name)
    macs = {}
    for each in (FULL, mode):
        with torch.no_grad(), handle.using(each):
            handle.model(**call)
        (record,) = handle.report().calls
        macs[each] = record.macs / record.rows
    blocks, kept = handle.shape.blocks, handle._engine.surgery.widths.last.kept()
    assert macs[mode] < macs[FULL]
    assert any(k.heads < 1 for k in kept)
    assert any(k.channels < 1 for k in kept)
    skipping = [k.tokens < 1 for k, b in zip(kept, blocks, strict=True) if b.router]
    assert any(skipping)


def test_single_blocks_of_flux_skip_picture_tokens_alone():
    """A skipped token keeps its residual; the text never skips."""
    handle = routed("flux")
    call = call_of("flux")
    text, block = call["encoder_hidden_states"].shape[1], handle.model.single_transformer_blocks[0]
    seen = {}
    handle_in = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(before=kwargs), with_kwargs=True
    )
    handle_out = block.register_forward_hook(lambda *args: seen.update(after=args[-1]))
    run(handle, call, HALF)
    handle_in.remove()
    handle_out.remove()
    words, picture = seen["after"]
    moved = (picture - seen["before"]["hidden_states"]).abs().amax(-1) > 0
    assert words.shape[1] == text
    place = len(handle.model.transformer_blocks)
    share = handle._engine.surgery.widths.last.token_shares[place]
    assert 0 < share < 1
    assert moved.float().mean().item() == pytest.approx(share)
    assert ((words - seen["before"]["encoder_hidden_states"]).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("keep", [None, 0.5])
def test_planned_is_counted(keep):
    """Exactly where a fixed number of tokens is kept; else tokens are as training left them."""
    handle = routed("dit", tokens=keep is not None)
    handle.schedule = Schedule.constant(Mode(width=0.5, token_keep=keep))
    levels = [0.9, 0.6, 0.3]
    planned = handle.plan_levels(levels, guidance=False, grid=(1, 8, 8))
    counted = []
    for level in levels:
        with torch.no_grad():
            handle.model(**call_of("dit", time=1000 * level))
        counted.append(handle.report().calls[-1].macs / 2)
    assert counted == pytest.approx([step.macs for step in planned.steps], rel=1e-9)
    assert len(set(counted)) > 1  # other widths at other levels


def test_a_fixed_share_is_spread_as_training_left_it(name):
    """Blocks that kept more keep more, the same number at every noise level."""
    if name == "latte":
        pytest.skip("its rows of one place are shorter than the smallest number of tokens")
    handle, mode = routed(name), Mode(width=0.5, token_keep=0.4)
    table = handle._engine.wiring.new.routers["width50"].token_shares
    with torch.no_grad():
        table.copy_(torch.linspace(0.9, 0.1, len(table))[:, None].expand_as(table))
    handle.schedule = Schedule.constant(mode)
    call = call_of(name)
    sliced = run(handle, call, mode)
    shares = [kept.tokens for kept in handle._engine.surgery.widths.last.kept()]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.4 > shares[-1]
    assert (gated(handle, call, mode) - sliced).norm() < 1e-6 * sliced.norm()


@pytest.mark.parametrize(
    "name", ["dit", "pixart-alpha", "pixart-sigma", "sd3", "flux", "wan", "wan-5b", "latte"]
)
def test_in_stock_pipelines(name):
    """Through the pipeline's own call: all open is stock, and what was planned is counted."""
    case = PIPES[name]
    expected = case.draw(case.pipe())
    pipe = case.pipe()
    # Routers read the residual stream as it is, which random weights make as large as any bias.
    handle = elastify(pipe, DyDiT(widths=(0.5,), groups=2, token_bias=1e6))
    handle.schedule = Schedule.constant(HALF)
    assert torch.equal(case.draw(pipe), expected)
    open_some(handle)
    handle.schedule = Schedule.constant(Mode(width=0.5, token_keep=0.5))
    assert not torch.equal(case.draw(pipe), expected)
    plan = handle.plan(STEPS, grid=case.grid, text_tokens=case.text)
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-6)
    assert plan.ratio < 1
    handle.remove()
    assert torch.equal(case.draw(pipe), expected)


def test_one_table_for_a_whole_run(monkeypatch, make_model):
    """Routers of the timestep run once, for all noise levels of the run."""
    pipe = PixelDiTPipeline(make_model(), FlowMatchEulerDiscreteScheduler())
    handle = elastify(pipe, DyDiT(widths=(0.5,), groups=2))
    open_some(handle)
    handle.schedule = Schedule.constant(HALF)
    calls, stock = [], handle._engine.wiring.new.decide
    monkeypatch.setattr(
        handle._engine.wiring.new,
        "decide",
        lambda mode, time: calls.append(len(time)) or stock(mode, time),
    )
    pipe([1, 2], seeds=[0, 1], num_inference_steps=4, output_type="pt")
    assert calls == [4]


def test_buckets_join_steps_and_lose_nothing():
    handle = routed("dit", tokens=False)
    widths = handle._engine.surgery.widths
    levels = [i / 10 for i in range(10)]
    widths.begin(levels)
    alone = [widths.at(handle.model, HALF, level) for level in levels]
    widths.buckets = 3
    widths.begin(levels)
    joined = [widths.at(handle.model, HALF, level) for level in levels]
    assert len({tuple(x["heads"].flatten().tolist()) for x in joined}) <= 3
    for a, b in zip(alone, joined, strict=True):
        for role in a:
            assert bool((b[role] | ~a[role]).all())


def test_coarse_patches_with_routed_width():
    handle = routed("dit", scales=(2,))
    mode = Mode(2, width=0.5)
    assert set(handle.method.modes) == {Mode(2), HALF, mode}
    call = call_of("dit")
    sliced = run(handle, call, mode)
    assert sliced.shape == run(handle, call, FULL).shape
    torch.testing.assert_close(gated(handle, call, mode), sliced, rtol=1e-5, atol=2e-6)
    handle.schedule = Schedule.weak_first(0.5, mode)
    plan = handle.plan_levels([0.9, 0.1], guidance=False)
    assert [step.mode for step in plan.steps] == [mode, FULL]
    ratios = [handle.shape.macs(m) / handle.shape.macs(FULL) for m in (HALF, Mode(2), mode)]
    assert ratios[2] < min(ratios[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, r"widths = \(\); legal: at least one"),
        ({"widths": (1.0,)}, r"widths = \(1.0,\); legal"),
        ({"widths": (1.5,)}, r"width = 1.5; legal"),
        ({"widths": (0.5, 0.5)}, r"widths = .*all different"),
        ({"recipe": "lora"}, r"recipe = 'lora'; legal: full, td-lora"),
        ({"groups": -1}, r"groups = -1; legal"),
        ({"rank": 0}, r"rank = 0; legal"),
        ({"head_bias": -1.0}, r"head_bias = -1.0; legal"),
        ({"scales": (1,)}, r"scales = \(1,\); legal"),
    ],
)
def test_illegal_settings(options, message):
    with pytest.raises(ValueError, match=message):
        DyDiT(**options)


def test_a_whole_number_is_as_good_a_bias(make_model):
    handle = elastify(make_model(), DyDiT(head_bias=15, token_bias=35))
    biases = [v for k, v in handle.adapter().tensors.items() if k.endswith("_bias")]
    assert biases
    assert all(bias.dtype == torch.float32 for bias in biases)


def test_groups_must_divide():
    with pytest.raises(ValueError, match=r"groups = 7 in transformer_blocks.0; legal: a div"):
        elastify(CASES["dit"].model(), DyDiT(groups=7))


def test_classes_without_routed_layers_are_refused():
    with pytest.raises(ValueError, match=r"no routed layers are known of SanaTransformer2DModel"):
        elastify(CASES["sana"].model(), DyDiT())


def test_mixed_timesteps_are_refused_when_sliced():
    handle = routed("dit")
    call = call_of("dit") | {"timestep": torch.tensor([900.0, 100.0])}
    with pytest.raises(ValueError, match=r"from 0.1 to 0.9.*legal: one noise level"):
        run(handle, call, HALF)
    together = gated(handle, call, HALF)
    for row, time in enumerate((900.0, 100.0)):
        alone = {k: v[row : row + 1] for k, v in call.items() if torch.is_tensor(v)}
        alone = {**call, **alone, "timestep": torch.tensor([time])}
        torch.testing.assert_close(
            together[row : row + 1], run(handle, alone, HALF), rtol=1e-4, atol=2e-6
        )


def test_a_fused_or_wrapped_layer_is_refused():
    handle = routed("dit")
    block = handle.model.transformer_blocks[0]
    stock = block.attn1.to_q
    block.attn1.to_q = torch.nn.Linear(stock.in_features, stock.out_features)
    with pytest.raises(RuntimeError, match=r"to_q is a Linear by now.*legal in routed modes"):
        run(handle, call_of("dit"), HALF)
    block.attn1.to_q = stock
    run(handle, call_of("dit"), HALF)
    model = CASES["dit"].model()
    layer = model.transformer_blocks[0].ff.net[2]
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"a layer of transformer_blocks.0 .* from which no rows"):
        elastify(model, DyDiT())


@pytest.mark.parametrize("width", [0.6, 0.8])
def test_widths_that_were_not_trained_for(width):
    """A threshold that the mean over all noise levels gives the width with."""
    handle = routed("dit", tokens=False)
    mode = Mode(width=width)
    shape, works = handle.shape, handle._engine.surgery.widths.works(handle.model, mode)
    assert sum(a + b for a, b in works) == shape.block_macs(FULL)
    share = shape.block_macs(mode) / shape.block_macs(FULL)
    assert share == pytest.approx(width, abs=0.05)  # two heads and two groups make big steps
    call = call_of("dit")
    torch.testing.assert_close(
        gated(handle, call, mode), run(handle, call, mode), rtol=1e-5, atol=2e-6
    )
    with pytest.raises(ValueError, match=r"width = 0.1; legal for these routers: 0.5 to 1.0"):
        shape.macs(Mode(width=0.1))


@pytest.mark.parametrize("slices", [0, 1, 4])
def test_kept_slices_change_nothing(slices):
    handle = routed("dit")
    calls = [call_of("dit", time=time) for time in (900.0, 500.0, 900.0, 500.0)]
    expected = [gated(handle, call, HALF) for call in calls]
    handle._engine.surgery.widths.slices = slices
    for call, each in zip(calls * 2, expected * 2, strict=True):
        torch.testing.assert_close(run(handle, call, HALF), each, rtol=1e-5, atol=2e-6)
    layer = handle.model.transformer_blocks[0].ff.net[2]
    assert len(layer.__dict__.get("_ditdial_slices", ())) <= slices


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_fused_projections_are_refused(name):
    handle = routed(name)
    handle.model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"has fused projections.*unfuse"):
        run(handle, call_of(name), HALF)
    handle.model.unfuse_qkv_projections()
    run(handle, call_of(name), HALF)
    model = CASES[name].model()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"has fused projections.*unfuse"):
        elastify(model, DyDiT(groups=2))


def test_a_lora_on_a_routed_layer_is_refused():
    pytest.importorskip("peft")
    from peft import LoraConfig

    handle = routed("flux")
    handle.model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(RuntimeError, match=r"to_q is a Linear by now \(a LoRA.*fuse the LoRA"):
        run(handle, call_of("flux"), HALF)
    assert torch.isfinite(run(handle, call_of("flux"), FULL)).all()


@pytest.mark.parametrize("recipe", ["full", "td-lora"])
def test_gradients_reach_the_routers(name, recipe):
    handle = routed(name, recipe=recipe)
    handle._engine.wiring.new.gated, handle._engine.wiring.new.drawing = (
        True,
        torch.Generator().manual_seed(0),
    )
    with handle.using(HALF):
        handle.model(**call_of(name)).sample.square().mean().backward()
    missing = [k for k, p in handle._engine.wiring.new.named_parameters() if p.grad is None]
    assert missing == []
    for key, parameter in handle._engine.wiring.new.routers.named_parameters():
        assert parameter.grad.abs().max() > 0, key


def test_train_and_run_agree_where_gates_are_sure():
    """Far from zero, noise changes nothing: what is trained is what runs."""
    handle = routed("dit")
    with torch.no_grad():
        for routers in handle._engine.wiring.new.routers.values():
            for role in ("head", "channel", "token_out"):
                getattr(routers, f"{role}_bias").mul_(200)
                getattr(routers, f"{role}_weight").mul_(0.01)
    call = call_of("dit")
    expected = run(handle, call, HALF)
    handle._engine.wiring.new.drawing = torch.Generator().manual_seed(0)
    torch.testing.assert_close(gated(handle, call, HALF), expected, rtol=1e-5, atol=2e-6)


def test_budgets_choose_among_widths(make_model):
    """Routed modes are modes to the solver, each at its own cost at each noise level."""
    pipe = PixelDiTPipeline(make_model(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    handle = elastify(pipe, DyDiT(widths=(0.5,), groups=8, tokens=False))
    open_some(handle)

    def sample(number):
        return pipe([1, 2], seeds=[number, 9], num_inference_steps=8, output_type="pt")

    handle.calibrate(sample, guidance_scale=2.5, rounds=1)
    handle.budget = 0.8
    plan = handle.plan(8)
    assert {step.mode for step in plan.steps} == {FULL, HALF}
    assert len({step.macs for step in plan.steps if step.mode == step.guide == HALF}) != 1
    assert 0.7 < plan.ratio <= 0.8 + 1e-9
    sample(0)
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-6)


def test_packing_is_refused():
    with pytest.raises(ValueError, match=r"packed = True; legal .* method 'dydit': False"):
        run_as(routed("dit"), packed=True)


def test_force_opens_fixed_shares():
    handle = elastify(CASES["dit"].model(), DyDiT(groups=4, tokens=False))
    handle._engine.wiring.new.force(HALF, 0.5, 0.25)
    run(handle, call_of("dit"), HALF)
    assert {(k.heads, k.channels) for k in handle._engine.surgery.widths.last.kept()} == {
        (0.5, 0.25)
    }
    with pytest.raises(ValueError, match=r"heads = 1.5; legal: \(0, 1\]"):
        handle._engine.wiring.new.force(HALF, 1.5, 0.5)


def test_a_copy_has_tables_of_its_own():
    handle = routed("dit")
    expected = run(handle, call_of("dit"), HALF)
    twin = copy.deepcopy(handle.model)
    with torch.no_grad():
        for parameter in handle.model.parameters():
            parameter.zero_()
    assert torch.equal(run(handle_of(twin), call_of("dit"), HALF), expected)


@pytest.mark.parametrize("recipe", ["full", "td-lora"])
def test_a_pickled_model_is_the_same(recipe):
    handle = routed("dit", recipe=recipe)
    expected = run(handle, call_of("dit"), HALF)
    gated(handle, call_of("dit"), HALF)
    again = pickle.loads(pickle.dumps(handle.model))
    assert torch.equal(run(handle_of(again), call_of("dit"), HALF), expected)


def test_routers_decide_in_float32_under_autocast():
    handle = routed("dit")
    call, seen = call_of("dit"), []
    tokens = handle._engine.wiring.new.routers["width50"].tokens

    def watched(block, x):
        seen.append(tokens(block, x))
        return seen[-1]

    handle._engine.wiring.new.routers["width50"].tokens = watched
    with torch.autocast("cpu", torch.bfloat16):
        run(handle, call, HALF)
        gated(handle, call, HALF)
    assert {logits.dtype for logits in seen} == {torch.float32}
    assert all((logits.bfloat16().float() != logits).any() for logits in seen)


def test_changed_weights_are_sliced_anew():
    handle = routed("dit")
    before = run(handle, call_of("dit"), HALF)
    with torch.no_grad():
        handle.model.transformer_blocks[0].ff.net[2].weight.mul_(2)
    after = run(handle, call_of("dit"), HALF)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(gated(handle, call_of("dit"), HALF), after, rtol=1e-5, atol=2e-6)
