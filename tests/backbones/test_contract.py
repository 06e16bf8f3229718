"""One contract for every backbone, on tiny models with random weights."""

from __future__ import annotations

import pytest
import torch
from tests.backbones.tiny import CASES, Case
from tests.elastic_models import run_as
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ditdial import FULL, FlexiDiT, Mode, Schedule, elastify
from ditdial.backbones import BACKBONES
from ditdial.plan.mode import Mode as AnyMode
from ditdial.runtime.tensors import is_new

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
batched = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.batched], ids=[k for k, c in CASES.items() if c.batched]
)
TIME = 700.0


def modes(case: Case) -> list[AnyMode]:
    return [Mode(scale) for scale in case.scales]


def elastic(case: Case, **method):
    """Elastic, with noise on the new tensors, so that every mode gives something of its own."""
    torch.manual_seed(2)
    handle = elastify(case.model(), FlexiDiT(**{"rank": 3, "scales": case.scales, **method}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in handle.model.named_parameters():
            if is_new(name) and "flex_" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return handle


def stacked(sample):
    return torch.stack(sample) if isinstance(sample, list) else sample


@torch.no_grad()
def output(model, call):
    return stacked(model(**call).sample)


def fits(mode, grid) -> bool:
    return all(k <= max(n, 1) for k, n in zip(mode.patch_scale, grid, strict=True))


def test_every_backbone_has_a_case():
    assert {case.model_class for case in CASES.values()} == set(BACKBONES)


@cases
def test_full_mode_is_the_stock_model_bit_for_bit(case):
    stock, handle = case.model(), elastic(case)
    for grid in case.grids:
        call = case.call(2, grid, TIME)
        assert torch.equal(output(handle.model, call), output(stock, call))
        found = handle.model(**call, return_dict=False)[0]
        assert torch.equal(stacked(found), output(stock, call))


@cases
def test_one_patch_per_token_through_the_coarse_path_is_the_stock_model(case):
    """Patch order, positions, un-grouping and rewritten arguments, all at once."""
    stock = case.model()
    handle = elastify(case.model(), FlexiDiT(recipe="shared", scales=case.scales))
    handle._engine.wiring.new.live = True
    for grid in case.grids:
        call = case.call(2, grid, TIME)
        expected, found = output(stock, call), output(handle.model, call)
        difference = (found - expected).norm() / expected.norm()
        assert difference < 1e-6, grid


@cases
@pytest.mark.parametrize("recipe", ["lora", "shared"])
def test_coarse_modes_give_the_stock_shape_on_ragged_grids_too(case, recipe):
    handle = elastic(case, recipe=recipe)
    for grid in case.grids:
        call = case.call(2, grid, TIME)
        full = output(handle.model, call)
        for mode in modes(case):
            if not fits(mode, grid):
                continue
            with handle.using(mode):
                coarse = output(handle.model, call)
            assert coarse.shape == full.shape
            assert coarse.isfinite().all()
            assert not torch.allclose(coarse, full, atol=1e-3), (mode, grid)


@cases
def test_a_row_is_the_same_alone_and_in_a_batch(case):
    handle = elastic(case)
    for mode in (FULL, *modes(case)):
        with handle.using(mode):
            both = output(handle.model, case.call(2, case.grids[0], TIME))
            alone = output(handle.model, case.call(1, case.grids[0], TIME))
        torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)


@cases
def test_a_coarse_mode_depends_on_every_base_token(case):
    handle = elastic(case)
    call = case.call(1, case.grids[0], TIME)
    latent = stacked(call[case.sample]).clone().requires_grad_()
    for mode in modes(case):
        given = list(latent) if isinstance(call[case.sample], list) else latent
        with handle.using(mode):
            sample = stacked(handle.model(**{**call, case.sample: given}).sample)
        gradient = torch.autograd.grad(sample.square().sum(), latent)[0]
        assert (gradient != 0).all(), mode


@batched
def test_branches_in_one_batch_equal_two_calls(case):
    handle, grid, count = elastic(case), case.grids[0], 2
    call = case.guided(count, grid, TIME)
    branches = handle.backbone.arguments.branches(handle.model, call, None)
    assert branches is not None
    weak = modes(case)[0]
    handle.schedule = Schedule.constant(FULL, guide=weak)
    split = output(handle.model, call)
    for index, mode in ((branches.conditional, FULL), (branches.guidance, weak)):
        with handle.using(mode):
            whole = output(handle.model, call)
        torch.testing.assert_close(split[index], whole[index], atol=1e-5, rtol=1e-5)


@batched
@pytest.mark.parametrize("merge", [False, True])
def test_packed_equals_split(case, merge):
    handle, grid = elastic(case), case.grids[1]
    handle._engine.wiring.state.merged = merge
    if handle.backbone.packed is None:
        with pytest.raises(ValueError, match=r"packed = True; legal for .*: False"):
            run_as(handle, packed=True)
        return
    call = case.guided(2, grid, TIME)
    for weak in modes(case):
        handle.schedule = Schedule.constant(FULL, guide=weak, guidance="weak")
        run_as(handle, packed=False)
        split = output(handle.model, call)
        run_as(handle, packed=True)
        torch.testing.assert_close(output(handle.model, call), split, atol=2e-5, rtol=2e-5)


def test_branches_in_two_calls_get_their_own_modes():
    for case in (c for c in CASES.values() if not c.batched):
        handle, weak = elastic(case), modes(case)[0]
        call, other = case.call(1, case.grids[0], TIME), case.call(2, case.grids[0], TIME)
        null = {k: v[1:] if torch.is_tensor(v) and len(v) == 2 else v for k, v in other.items()}
        null["hidden_states"] = call["hidden_states"]
        with torch.no_grad(), handle.using(FULL):
            c = handle.model(**call).sample
        with torch.no_grad(), handle.using(weak):
            plain, autoguide = handle.model(**null).sample, handle.model(**call).sample

        def step(call=call, null=null, handle=handle):
            with torch.no_grad():
                with handle.model.cache_context("cond"):
                    first = handle.model(**call).sample
                with handle.model.cache_context("uncond"):
                    return first, handle.model(**null).sample

        handle.schedule = Schedule.constant(FULL, guide=weak)
        assert all(map(torch.equal, step(), (c, plain)))
        handle.schedule = Schedule.weak_first(0.0, weak, guidance="weak", gain=0.4)
        first, second = step()
        assert torch.equal(first, c)
        torch.testing.assert_close(second, torch.lerp(c, autoguide, 0.4))
        assert [x.mode for x in handle.report().calls][-2:] == [FULL, weak]
        handle.schedule = Schedule.weak_first(0.0, weak, guidance="weak", gain=0.0)
        assert all(map(torch.equal, step(), (c, c)))
        assert [x.mode for x in handle.report().calls][-1] is None


@cases
def test_remove_is_exact(case, assert_stock):
    model, stock = case.model(), case.model()
    with elastify(model, FlexiDiT(scales=case.scales)) as handle, handle.using(modes(case)[0]):
        output(model, case.call(1, case.grids[0], TIME))
    assert_stock(model, stock)
    call = case.call(1, case.grids[0], TIME)
    assert torch.equal(output(model, call), output(stock, call))


@cases
@pytest.mark.parametrize("recipe", ["lora", "shared"])
def test_adapters_survive_the_disk(case, recipe, tmp_path):
    handle = elastic(case, recipe=recipe)
    folder = handle.adapter().save_pretrained(tmp_path / "adapter")
    again = elastify(case.model(), folder)
    call = case.call(1, case.grids[0], TIME)
    for mode in (FULL, *modes(case)):
        with handle.using(mode), again.using(mode):
            assert torch.equal(output(again.model, call), output(handle.model, call))


@cases
@pytest.mark.parametrize("recipe", ["lora", "shared"])
def test_the_closed_form_is_what_the_counter_counts_on_the_meta_device(case, recipe):
    handle = elastic(case, recipe=recipe)
    for grid in case.grids[:2]:
        call = case.call(1, grid, TIME)
        # Position ids on the meta device do not tell the shape of a grid that is not square.
        if case.counts_on_meta and ("img_ids" not in call or grid[1] == grid[2]):
            handle.model.to("meta")
            call = tree_map_only(torch.Tensor, lambda x: x.to("meta"), call)
        else:
            handle = elastic(case, recipe=recipe)
        size = handle.backbone.size(handle.model, call)
        for mode in (FULL, *modes(case)):
            if not fits(mode, grid):
                continue
            with torch.no_grad(), handle.using(mode), sdpa_kernel(SDPBackend.MATH):
                handle.model(**call)  # the shared recipe projects its weights once
                with FlopCounterMode(display=False) as counter:
                    handle.model(**call)
            shape = handle._engine.shape(handle.model, size)
            assert shape.macs(mode) == counter.get_total_flops() / 2, (mode, grid)


@cases
def test_a_latent_smaller_than_a_coarse_patch_is_refused(case):
    call = case.call(1, case.grids[0], TIME)
    message = r"'patch16' does not fit the .* base grid .*legal: at most"
    if case.model_class == "DiTTransformer2DModel":  # one size only, known beforehand
        with pytest.raises(ValueError, match=message):
            elastic(case, scales=(16,))
        return
    handle = elastic(case, scales=(16,))
    with handle.using(Mode(16)), pytest.raises(ValueError, match=message):
        output(handle.model, call)
    with handle.using(FULL):
        output(handle.model, call)


@cases
def test_frames_are_joined_only_where_a_token_may_hold_several(case):
    build = lambda: elastify(case.model(), FlexiDiT(scales=((2, 1, 1),)))  # noqa: E731
    if "t" in BACKBONES[case.model_class].axes:
        assert build().modes[1] == Mode((2, 1, 1))
    else:
        with pytest.raises(ValueError, match=r"'patch2x1x1' joins frames; .*legal: patchK"):
            build()


@cases
def test_gradients_reach_every_new_tensor_of_a_mode(case):
    handle = elastic(case)
    for mode in modes(case):
        handle.model.zero_grad()
        with handle.using(mode):
            sample = handle.model(**case.call(1, case.grids[0], TIME)).sample
        stacked(sample).square().mean().backward()
        for name, parameter in handle.model.named_parameters():
            if is_new(name) and name.split(".")[-1] == mode.name:
                assert parameter.grad is not None, name
