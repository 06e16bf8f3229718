"""One verb in, one verb out: full mode is the stock model, `remove` restores it bit for bit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from tests.elastic_models import run_as

from ditdial import FULL, FlexiDiT, Mode, Schedule, Segment, elastify, handle_of
from ditdial.adapter import Adapter
from ditdial.elastify import stock_class

both_recipes = pytest.mark.parametrize("recipe", ["lora", "shared"])
both_merges = pytest.mark.parametrize("merge", [False, True])
WEAK, WEAKER = Mode(2), Mode(4)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def forced(handle, mode, call, output):
    with handle.using(mode):
        return output(handle.model, call)


@both_recipes
@both_merges
def test_full_mode_is_the_stock_model_bit_for_bit(
    make_model, make_elastic, make_call, output, recipe, merge
):
    handle = make_elastic(recipe=recipe, merge=merge)
    for guided in (False, True):
        call = make_call(2, guided=guided)
        expected = output(make_model(), call)
        assert torch.equal(output(handle.model, call), expected)
        assert torch.equal(forced(handle, FULL, call, output), expected)
        (as_tuple,) = handle.model(**call, return_dict=False)
        assert torch.equal(as_tuple, expected)
    assert not torch.allclose(forced(handle, WEAK, call, output), expected, atol=1e-2)


def test_full_mode_has_the_stock_gradients(make_model, make_elastic, make_call):
    handle, stock, call = make_elastic(), make_model(), make_call()
    for model in (handle.model, stock):
        model(**call).sample.square().mean().backward()
    ours = dict(handle.model.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.equal(ours[name].grad, parameter.grad), name


@both_recipes
@both_merges
def test_remove_restores_everything(
    make_model, make_elastic, make_call, output, assert_stock, recipe, merge
):
    model, stock, call = make_model(), make_model(), make_call()
    ids = {name: id(p) for name, p in model.named_parameters()}
    handle = make_elastic(model, recipe=recipe, merge=merge)
    assert handle.model is model
    assert type(model) is not type(stock)
    assert isinstance(model, type(stock))
    for mode in handle.modes:
        forced(handle, mode, call, output)
    handle.remove()
    assert_stock(model, stock)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert torch.equal(output(model, call), output(stock, call))
    handle.remove()  # twice is safe
    assert_stock(model, stock)


def test_shared_remove_restores_the_bases_weights(
    make_model, make_elastic, make_call, output, assert_stock, perturb
):
    """A trained shared adapter brings its own base weights; the base comes back unharmed."""
    trained = make_elastic(recipe="shared")
    perturb(trained.model, seed=11)
    adapter = trained.adapter()
    model, stock, call = make_model(), make_model(), make_call()
    handle = elastify(model, adapter, schedule=Schedule.constant())
    assert torch.equal(output(model, call), output(trained.model, call))
    assert not torch.allclose(output(model, call), output(stock, call), atol=1e-2)
    handle.remove()
    assert_stock(model, stock)
    assert torch.equal(output(model, call), output(stock, call))


def test_a_context_manager_undoes_itself_even_after_an_error(
    make_model, make_call, output, assert_stock
):
    model, stock = make_model(), make_model()
    with elastify(model, FlexiDiT(rank=4)) as handle:
        assert handle_of(model) is not None
        forced(handle, WEAK, make_call(), output)
    assert_stock(model, stock)
    with pytest.raises(ZeroDivisionError), elastify(model, FlexiDiT(rank=4)):
        _ = 1 / 0
    assert_stock(model, stock)


@both_recipes
def test_applying_twice_replaces(make_model, make_elastic, make_call, output, assert_stock, recipe):
    model, stock, call = make_model(), make_model(), make_call()
    first = make_elastic(model, recipe=recipe)
    second = make_elastic(model, scales=(2,))
    assert second.modes == (FULL, WEAK)
    assert stock_class(model) is type(stock)
    assert torch.equal(output(model, call), output(stock, call))
    for use in (
        lambda: setattr(first, "schedule", Schedule.constant()),
        lambda: setattr(first, "budget", 0.5),
        lambda: first.plan_levels([0.5]),
        first.report,
        first.adapter,
        lambda: first.using(WEAK).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="removed or replaced; elastify again"):
            use()
    first.remove()  # not its model any more
    assert handle_of(model) is not None
    second.remove()
    assert_stock(model, stock)


def bad_adapters(make_elastic):
    good = make_elastic().adapter()
    name = next(iter(good.tensors))
    wrong_base = {**good.base, "num_layers": 7}
    reshaped = {**good.tensors, name: torch.zeros(3)}
    lacking = {k: v for k, v in good.tensors.items() if k != name}

    def made(**changes):
        facts = {"method": good.method, "base": good.base, "tensors": good.tensors}
        return Adapter(**{**facts, **changes})

    yield made(base=wrong_base), "another base; num_layers: adapter 7, this model 2"
    yield made(tensors=reshaped), rf"wrong shape: {name} \(3,\) instead of"
    yield made(tensors=lacking), f"missing: {name}"
    yield made(tensors={"a.b": torch.zeros(1)}), "unknown: a.b"
    yield made(schedule=Schedule.constant(Mode(8))), "asks for patch8; legal .*full, patch2, patch4"
    yield FlexiDiT(scales=(9,)), "'patch9' does not fit the 1x8x8 base grid"
    yield FlexiDiT(scales=(2, (2, 2, 2))), "'patch2x2x2' joins frames"
    yield FlexiDiT(recipe="shared", scales=(8,), underlying=3), "scales = .* with underlying = 3"


def test_a_failing_elastify_leaves_a_stock_model_untouched(make_model, make_elastic, assert_stock):
    model, stock = make_model(), make_model()
    for adapter, words in bad_adapters(make_elastic):
        with pytest.raises(ValueError, match=words):
            elastify(model, adapter)
        assert_stock(model, stock)
        assert handle_of(model) is None


@both_recipes
def test_a_failing_elastify_leaves_an_elastic_model_as_it_was(
    make_model, make_elastic, make_call, output, assert_stock, recipe
):
    model, stock, call = make_model(), make_model(), make_call()
    handle = make_elastic(model, recipe=recipe)
    handle.schedule = Schedule.weak_first(0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = {mode: forced(handle, mode, call, output) for mode in handle.modes}
    for adapter, words in bad_adapters(make_elastic):
        with pytest.raises(ValueError, match=words):
            elastify(model, adapter)
        assert handle.schedule == Schedule.weak_first(0.5)
        now = model.state_dict()
        assert list(now) == list(state)
        assert all(torch.equal(now[name], state[name]) for name in state)
        for mode, value in expected.items():
            assert torch.equal(forced(handle, mode, call, output), value)
    handle.remove()
    assert_stock(model, stock)


@both_recipes
@both_merges
def test_a_copy_is_elastic_and_independent(
    make_model, make_elastic, make_call, output, assert_stock, recipe, merge
):
    handle, call = make_elastic(recipe=recipe, merge=merge), make_call()
    expected = {mode: forced(handle, mode, call, output) for mode in handle.modes}
    twin = copy.deepcopy(handle.model)
    other = handle_of(twin)
    assert other is not None
    assert other.model is twin
    other.schedule = Schedule.constant(WEAK)
    with torch.no_grad():
        for parameter in handle.model.parameters():
            parameter.zero_()
    for mode, value in expected.items():
        assert torch.equal(forced(other, mode, call, output), value)
    assert torch.equal(output(twin, call), expected[WEAK])
    assert handle.schedule != Schedule.constant(WEAK)
    handle.remove()
    assert torch.equal(output(twin, call), expected[WEAK])
    other.remove()
    assert_stock(twin, make_model())


def test_handle_of(make_model, make_elastic):
    model = make_model()
    assert handle_of(model) is None
    handle = make_elastic(model)
    found = handle_of(model)
    assert found is not None
    assert found.model is model
    assert stock_class(model).__name__ == "DiTTransformer2DModel"
    found.schedule = Schedule.weak_first(0.3)
    assert handle.schedule == Schedule.weak_first(0.3)
    found.remove()
    assert handle_of(model) is None
    with pytest.raises(RuntimeError, match="elastify again"):
        handle.report()


@both_recipes
@both_merges
@pytest.mark.parametrize("mode", [FULL, WEAK, WEAKER])
def test_a_row_in_a_batch_equals_the_row_alone(
    make_elastic, make_call, output, recipe, merge, mode
):
    handle, call = make_elastic(recipe=recipe, merge=merge), make_call(5)
    together = forced(handle, mode, call, output)
    for row in range(5):
        alone = {name: value[row : row + 1] for name, value in call.items()}
        torch.testing.assert_close(
            together[row : row + 1], forced(handle, mode, alone, output), **TOLERANCE
        )


@pytest.mark.parametrize("mode", [WEAK, WEAKER])
def test_merged_equals_unmerged(make_elastic, make_call, output, mode):
    call = make_call(3)
    plain, merged = make_elastic(), make_elastic(merge=True)
    expected = forced(plain, mode, call, output)
    torch.testing.assert_close(forced(merged, mode, call, output), expected, **TOLERANCE)


def test_merged_weights_follow_changes(make_elastic, make_call, output):
    call = make_call(2)
    plain, merged = make_elastic(), make_elastic(merge=True)
    forced(merged, WEAK, call, output)
    for handle in (plain, merged):
        block = handle.model.transformer_blocks[0]
        with torch.no_grad():
            block.attn1.to_q.weight.mul_(1.5)
            block.attn1.to_v.coarse_A["patch2"].mul_(-1)
            block.ff.net[2].coarse_B["patch2"].add_(0.2)
    expected = forced(plain, WEAK, call, output)
    torch.testing.assert_close(forced(merged, WEAK, call, output), expected, **TOLERANCE)


@pytest.mark.parametrize("modes", [(WEAK,), (WEAK, FULL), (WEAK, WEAKER)])
def test_gradient_checkpointing_changes_no_gradient(make_elastic, make_call, modes):
    """The blocks are recomputed after `using` has ended, perhaps after another mode has run."""
    call, grads = make_call(2), []
    for checkpointing in (False, True):
        handle = make_elastic()
        if checkpointing:
            handle.model.enable_gradient_checkpointing()
        handle.model.train()
        total = torch.zeros(())
        for mode in modes:
            with handle.using(mode):
                total = total + handle.model(**call).sample.square().mean()
        total.backward()
        grads.append({n: p.grad for n, p in handle.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, msg=name)


def test_using_is_nested_and_restored_after_an_error(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call()
    weak = forced(handle, WEAK, call, output)
    with handle.using(WEAK):
        with pytest.raises(ZeroDivisionError), handle.using(WEAKER):
            _ = 1 / 0
        assert torch.equal(output(handle.model, call), weak)
    assert not torch.equal(output(handle.model, call), weak)
    with pytest.raises(ValueError, match="mode 'patch8'; legal: full, patch2, patch4"):
        forced(handle, Mode(8), call, output)


def test_other_resolutions_and_dtypes(make_elastic, make_call, output):
    handle = make_elastic()
    for mode in handle.modes:
        assert forced(handle, mode, make_call(side=48), output).shape == (2, 1, 48, 48)
    handle.model.to(torch.bfloat16)
    call = make_call()
    call["hidden_states"] = call["hidden_states"].bfloat16()
    for mode in handle.modes:
        found = forced(handle, mode, call, output)
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()


def test_a_ragged_grid_runs_in_coarse_modes(make_elastic, make_call, output):
    handle = make_elastic()
    for mode in handle.modes:  # 5x5 base tokens
        assert forced(handle, mode, make_call(side=20), output).shape == (2, 1, 20, 20)


def test_a_latent_smaller_than_a_coarse_patch_is_refused(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call(side=12)
    for mode in (FULL, WEAK):
        assert forced(handle, mode, call, output).shape == (2, 1, 12, 12)
    with pytest.raises(ValueError, match=r"'patch4' does not fit the 1x3x3 .*at most 1x3x3 base"):
        forced(handle, WEAKER, call, output)
    handle.schedule = Schedule.constant(FULL, guide=WEAKER)
    guided = make_call(side=12, guided=True)
    for packed in (False, True):
        run_as(handle, packed=packed)
        with pytest.raises(ValueError, match="'patch4' does not fit the 1x3x3"):
            output(handle.model, guided)
    assert forced(handle, WEAK, call, output).isfinite().all()


def test_fused_projections_run_in_every_mode(make_model, make_elastic, make_call, output):
    handle, call = make_elastic(), make_call()
    expected = forced(handle, WEAK, call, output)
    attention = [block.attn1 for block in handle.model.transformer_blocks]
    for layer in attention:
        layer.fuse_projections(fuse=True)
    assert torch.equal(output(handle.model, call), output(make_model(), call))
    assert torch.equal(forced(handle, WEAK, call, output), expected)
    for layer in attention:
        layer.fuse_projections(fuse=False)
    assert torch.equal(forced(handle, WEAK, call, output), expected)


def test_a_processor_is_given_what_the_stock_layer_gives_it(make_model, make_elastic, make_call):
    """Under its names, with nothing left out."""
    seen = []

    class Processor:
        def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask):
            seen.append((type(hidden_states), encoder_hidden_states, attention_mask))
            return AttnProcessor2_0()(attn, hidden_states)

    models, call = [make_model(), make_elastic().model], make_call()
    for model in models:
        for block in model.transformer_blocks:
            block.attn1.set_processor(Processor())
        with torch.no_grad():
            model(**call)
    half = len(seen) // 2
    assert half > 0
    assert seen[:half] == seen[half:] == [(torch.Tensor, None, None)] * half


def test_a_forward_that_somebody_put_on_attention_runs(make_elastic, make_call, monkeypatch):
    handle, call, ran = make_elastic(), make_call(), []
    stock = Attention.forward

    def forward(self, *args, **kwargs):
        ran.append(handle._engine.wiring.state.mode)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Attention, "forward", forward)
    for mode in (FULL, WEAK):
        with torch.no_grad(), handle.using(mode):
            handle.model(**call)
    depth = len(handle.model.transformer_blocks)
    assert ran == [FULL] * depth + [WEAK] * depth


def test_a_class_that_cannot_pack_refuses_to(make_elastic, monkeypatch):
    handle = make_elastic()
    run_as(handle, packed=True)
    with pytest.raises(ValueError, match="packed = 'mask' is out of range; legal: True, False"):
        run_as(handle, packed="mask")
    assert handle.execution.packed is True
    monkeypatch.setattr(type(handle.backbone), "packed", None)
    with pytest.raises(ValueError, match="packed = True; legal for DiTTransformer2DModel with"):
        run_as(handle, packed=True)
    run_as(handle, packed=False)
    assert not handle.execution.packed


def test_plans_of_another_size_cost_what_it_costs(make_elastic):
    handle = make_elastic()
    handle.schedule = Schedule.weak_first(0.5)
    native = handle.plan_levels([0.9, 0.1])
    assert handle.plan_levels([0.9, 0.1], grid=(1, 8, 8), text_tokens=0) == native
    larger = handle.plan_levels([0.9, 0.1], grid=(1, 16, 16))
    assert larger.ratio < native.ratio  # attention is a larger share of it
    for grid in ((16, 16), (1, 0, 8), (1, 8, -1)):
        with pytest.raises(ValueError, match=r"grid = .*; legal: \(frames, height, width\), each"):
            handle.plan_levels([0.5], grid=grid)


class Counting(AccelerateHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class CountingToo(DiffusersHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class Replacing(DiffusersHook):
    calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)

    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs


PLACES = ["", "pos_embed", "proj_out_2", "transformer_blocks.0.attn1.to_q"]


def hook_accelerate(module):
    hook = Counting()
    add_hook_to_module(module, hook)
    return hook, lambda: remove_hook_from_module(module)


def hook_diffusers(module, cls=CountingToo):
    hook, registry = cls(), HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, "counting")

    def undo():
        registry.remove_hook("counting", recurse=False)
        del module._diffusers_hook

    return hook, undo


def hook_replacing(module):
    return hook_diffusers(module, Replacing)


installers = pytest.mark.parametrize("install", [hook_accelerate, hook_diffusers, hook_replacing])


@installers
@pytest.mark.parametrize("place", PLACES)
def test_hooks_from_before_do_not_hide_the_conversion(
    make_model, make_elastic, make_call, output, assert_stock, install, place
):
    call, model, stock = make_call(), make_model(), make_model()
    plain = make_elastic()
    hook, unhook = install(model.get_submodule(place))
    handle = make_elastic(model)
    for mode in handle.modes:
        before = hook.calls
        found = forced(handle, mode, call, output)
        assert hook.calls == before + 1
        assert torch.equal(found, forced(plain, mode, call, output)), mode
    handle.remove()
    before = hook.calls
    assert torch.equal(output(model, call), output(stock, call))
    assert hook.calls == before + 1
    unhook()
    assert torch.equal(output(model, call), output(stock, call))
    vars(model.get_submodule(place)).pop("forward", None)  # both libraries leave one behind
    assert_stock(model, stock)


@installers
@pytest.mark.parametrize("place", PLACES)
def test_hooks_from_afterwards_survive_removal(
    make_model, make_elastic, make_call, output, install, place
):
    call, model, stock = make_call(), make_model(), make_model()
    plain, handle = make_elastic(), make_elastic(model)
    hook, _ = install(model.get_submodule(place))
    found = forced(handle, WEAK, call, output)
    assert torch.equal(found, forced(plain, WEAK, call, output))
    assert hook.calls == 1
    handle.remove()
    assert torch.equal(output(model, call), output(stock, call))
    assert hook.calls == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("place", ["", "proj_out_2"])
def test_hooks_of_both_libraries_on_one_module_all_run(
    make_model, make_elastic, make_call, output, order, place
):
    call, model, stock = make_call(), make_model(), make_model()
    both = [hook_accelerate, hook_diffusers]
    hooks = [both[i](model.get_submodule(place))[0] for i in order]
    handle = make_elastic(model)
    expected = forced(make_elastic(), WEAK, call, output)
    assert torch.equal(forced(handle, WEAK, call, output), expected)
    assert [hook.calls for hook in hooks] == [1, 1]
    handle.remove()
    assert torch.equal(output(model, call), output(stock, call))
    assert [hook.calls for hook in hooks] == [2, 2]


def inject_peft(model):
    peft = pytest.importorskip("peft")
    places = ["to_q", "to_v", "net.0.proj"]
    config = peft.LoraConfig(r=2, target_modules=places, init_lora_weights=False)
    torch.manual_seed(5)
    return peft.inject_adapter_in_model(config, model)


@both_merges
def test_peft_before_elastify(make_model, make_elastic, make_call, output, merge):
    """A user's own LoRA acts in every mode, merged or not, and outlives the conversion."""
    call, lora, fused = make_call(), inject_peft(make_model()), inject_peft(make_model())
    expected = output(lora, call)
    handle = make_elastic(lora, merge=merge)
    assert torch.equal(output(lora, call), expected)
    for module in fused.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    same = make_elastic(fused)
    found, wanted = (forced(h, WEAK, call, output) for h in (handle, same))
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    handle.remove()
    assert torch.equal(output(lora, call), expected)


def test_peft_after_elastify(make_model, make_elastic, make_call, output):
    call = make_call()
    expected = output(inject_peft(make_model()), call)
    handle = make_elastic()
    plain = forced(handle, WEAK, call, output)
    inject_peft(handle.model)
    assert torch.equal(output(handle.model, call), expected)
    assert not torch.allclose(forced(handle, WEAK, call, output), plain, atol=1e-3)
    handle.remove()
    assert torch.equal(output(handle.model, call), expected)


def test_the_adapter_of_a_model_with_a_users_lora_fits_a_plain_base(
    make_model, make_elastic, make_call, output
):
    handle, call = make_elastic(), make_call()
    expected = forced(handle, WEAK, call, output)
    names = set(handle.adapter().tensors)
    inject_peft(handle.model)
    adapter = handle.adapter()
    assert set(adapter.tensors) == names
    again = elastify(make_model(), adapter)
    assert torch.equal(forced(again, WEAK, call, output), expected)


def test_new_tensors_are_not_called_lora_and_stock_keys_stay(make_model, make_elastic):
    stock = list(make_model().state_dict())
    keys = list(make_elastic().model.state_dict())
    assert [key for key in keys if key in stock] == stock
    assert not [key for key in keys if "lora" in key]


def test_blocks_keep_their_class(make_model, make_elastic):
    model, stock = make_elastic().model, make_model()
    for ours, theirs in zip(model.transformer_blocks, stock.transformer_blocks, strict=True):
        assert type(ours) is type(theirs)


def test_mixed_and_missing_timesteps_are_refused(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call(2)
    handle.schedule = Schedule.weak_first(0.5)
    mixed = {**call, "timestep": torch.tensor([900.0, 100.0])}
    with pytest.raises(ValueError, match=r"from 0.1 to 0.9, .*legal: .*handle.using\(mode\)"):
        output(handle.model, mixed)
    assert forced(handle, WEAK, mixed, output).isfinite().all()
    with pytest.raises(ValueError, match=r"timestep = None; .*so give one"):
        output(handle.model, {**call, "timestep": None})


def test_weak_guidance_without_guidance_rows_warns_once(make_elastic, make_call, output):
    handle = make_elastic()
    handle.schedule = Schedule.constant(FULL, guide=WEAK, guidance="weak")
    with pytest.warns(UserWarning, match="weak guidance, but this call has no guidance branch"):
        output(handle.model, make_call(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(handle.model, make_call(2))


def test_illegal_targets_are_named(make_model):
    class Pipe:
        unet = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="Pipe has no transformer; legal: a diffusers DiT"):
        elastify(Pipe(), FlexiDiT())
    with pytest.raises(ValueError, match=r"'Linear' is not supported; legal: \w+Model"):
        elastify(torch.nn.Linear(1, 1), FlexiDiT())
    model = make_model()
    model.elastic = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="already has an attribute 'elastic'"):
        elastify(model, FlexiDiT())


def test_illegal_schedules_and_budgets_are_named(make_elastic):
    handle = make_elastic(scales=(2,))
    before = handle.schedule
    with pytest.raises(ValueError, match="asks for patch4; legal for this adapter: full, patch2"):
        handle.schedule = Schedule.weak_first(0.5, 4)
    mixed = Schedule([Segment(start=1, stop=0, guide=Mode(8))])
    with pytest.raises(ValueError, match="asks for patch8"):
        handle.schedule = mixed
    for budget in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"budget = {budget}; legal: \(0, 1\]"):
            handle.budget = budget
    with pytest.raises(ValueError, match=r"budget = 0.01; legal: 0\.\d+ \(the cheapest mode"):
        handle.budget = 0.01
    assert handle.schedule == before


def test_plans_of_a_bare_model_need_a_scheduler(make_elastic):
    handle = make_elastic()
    with pytest.raises(ValueError, match="scheduler = None; a bare model has none"):
        handle.plan(10)


def test_a_budget_is_the_plans_ratio(make_elastic):
    handle = make_elastic()
    levels = [1 - (i + 0.5) / 200 for i in range(200)]
    for budget in (0.3, 0.6, 1.0):
        handle.budget = budget
        assert handle.budget == budget
        assert handle.plan_levels(levels).ratio == pytest.approx(budget, abs=0.005)
    handle.schedule = Schedule.constant()
    assert handle.budget is None
