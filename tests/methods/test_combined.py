"""Combinations: patch size, token grids and routed width in one mode, on stock classes."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tests.backbones.pipes import PIPES, STEPS, transformer
from tests.backbones.tiny import CASES
from tests.elastic_models import checkpointed_gradients, run, run_as
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditdial import (
    FULL,
    Adapter,
    Combined,
    DDiT,
    DyDiT,
    FlexiDiT,
    Mode,
    PixelDiTPipeline,
    PPFlow,
    Schedule,
    Segment,
    SparseDiT,
    elastify,
    handle_of,
)
from ditdial.layers.low_rank import MERGED as MERGED_WEIGHTS
from ditdial.methods import method_from_config
from ditdial.plan.execution import Execution
from ditdial.reference import load_reference, reference_adapter
from ditdial.runtime.tensors import is_new

GRIDS = {
    "dit": (1, 8, 8),
    "pixart": (1, 7, 8),
    "sd3": (1, 7, 8),
    "flux": (1, 7, 8),
    "wan": (3, 7, 8),
    "latte": (3, 7, 8),
}
JOINT = ("sd3", "flux")
names = pytest.mark.parametrize("name", GRIDS)
LAYERS = 8

PATCH, GRID, HALF = Mode(2), Mode(token_grid=(3, 2)), Mode(width=0.5)
BOTH = Mode(2, token_grid=(3, 2))
ALL = Mode(2, token_grid=(3, 2), width=0.5)
ALL_KEPT = Mode(2, token_grid=(3, 2), width=0.5, token_keep=0.4)
PRODUCTS = (
    BOTH,
    Mode(2, width=0.5),
    Mode(2, width=0.5, token_keep=0.4),
    Mode(token_grid=(3, 2), width=0.5),
    Mode(token_grid=4, width=0.5, token_keep=0.4),
    ALL,
    ALL_KEPT,
)
SINGLE = (PATCH, GRID, HALF, Mode(width=0.5, token_keep=0.4))


def depth(name):
    """FLUX has blocks of two kinds, and modules that go from one kind to the other."""
    return {"num_layers": 3, "num_single_layers": 5} if name == "flux" else {"num_layers": LAYERS}


def deep(name, **changes):
    case = CASES[name]
    return replace(case, config={**case.config, **depth(name), **changes}).model()


def sparsedit(name, **settings):
    pool = 0 if name in JOINT else 1
    plan = {"pool": pool, "modules": 2, "group": (1, 1, 1, 0), "top": 2 - pool, "rank": 2}
    stages = ((0.5, (3, 2)), (0, 4))
    return SparseDiT(**{**plan, "stages": stages, "recipe": "lora", **settings})


def parts_of(name, recipe="td-lora"):
    width = DyDiT(groups=2, recipe=recipe, rank=2)
    return [FlexiDiT(scales=(2,), rank=3), sparsedit(name), width]


@torch.no_grad()
def shake(handle, seed=3):
    """Noise on the new tensors; routers that leave out about half."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in handle.model.named_parameters():
        if is_new(key) and ".routers." not in key:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise.to(parameter.dtype))
    routed = handle._engine.wiring.new.routing
    for routers in routed.routers.values() if routed else ():
        for key, parameter in routers.named_parameters():
            scale = 0.3 if key.endswith("bias") else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def combined(name, model=None, recipe="td-lora", **options):
    torch.manual_seed(2)
    handle = elastify(model or deep(name), parts_of(name, recipe), **options)
    shake(handle)
    return handle


def call_of(name, count=2, time=700.0):
    return CASES[name].call(count, GRIDS[name], time)


def gated(handle, call, mode):
    handle._engine.surgery.widths.routing.gated = True
    try:
        return run(handle, call, mode)
    finally:
        handle._engine.surgery.widths.routing.gated = False


@names
def test_sliced_equals_gated(name):
    handle = combined(name)
    call = call_of(name)
    full, found = run(handle, call, FULL), {}
    for mode in (*SINGLE, *PRODUCTS):
        found[mode] = run(handle, call, mode)
        assert found[mode].shape == full.shape
        if mode.is_routed:
            error = gated(handle, call, mode) - found[mode]
            assert error.norm() < 1e-6 * found[mode].norm(), mode
    outputs = [full, *found.values()]
    for index, one in enumerate(outputs):  # no part of a mode is left out
        for other in outputs[:index]:
            assert (one - other).norm() > 1e-4 * full.norm()


@names
def test_a_row_alone_is_the_row_in_a_batch(name):
    handle, call = combined(name), call_of(name, 3)
    rows = [handle.backbone.arguments.rows(call, slice(row, row + 1)) for row in range(3)]
    for mode in PRODUCTS:
        together = run(handle, call, mode)
        for row, alone in enumerate(rows):
            found = run(handle, alone, mode)[0]
            torch.testing.assert_close(found, together[row], atol=2e-5, rtol=1e-4)


@names
@pytest.mark.parametrize("merge", [False, True])
def test_planned_is_counted(name, merge):
    """By torch's counter, by the record, and beforehand where the number of tokens is fixed."""
    handle, call = (
        combined(name, recipe="full", execution=Execution(merge=merge)),
        call_of(name, 1),
    )
    shape = handle._engine.shape(handle.model, handle.backbone.size(handle.model, call))
    for mode in (FULL, *SINGLE, *PRODUCTS):
        with torch.no_grad(), handle.using(mode):
            handle.model(**call)  # what a run does once
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                handle.model(**call)
        counted = counter.get_total_flops() / 2
        assert handle.report().calls[-1].macs == pytest.approx(counted, rel=1e-9), mode
        if not mode.is_routed or mode.token_keep is not None:
            assert shape.macs(mode, 0.7) == pytest.approx(counted, rel=1e-9), mode
    assert shape.macs(ALL_KEPT) < min(shape.macs(m) for m in (PATCH, BOTH, Mode(2, width=0.5)))


@names
def test_one_part_alone_is_its_method_alone(name, tmp_path):
    """Adapters of each part from folders, joined: their own modes and full mode do not change."""
    call, folders, alone = call_of(name), [], {}
    stock = run(deep(name), call)
    for part in parts_of(name):
        torch.manual_seed(2)
        handle = elastify(deep(name), part)
        shake(handle, seed=len(folders))
        for mode in SINGLE:
            if part.has(mode):
                alone[mode] = run(handle, call, mode)
        folders.append(handle.adapter().save_pretrained(tmp_path / part.name))
    handle = elastify(
        deep(name), [folders[2], Adapter.from_pretrained(folders[0]), str(folders[1])]
    )
    assert torch.equal(run(handle, call), stock)
    for mode in SINGLE:
        assert torch.equal(run(handle, call, mode), alone[mode]), mode
    together = [run(handle, call, mode) for mode in PRODUCTS]
    handle.adapter().save_pretrained(tmp_path / "together")
    again = elastify(deep(name), tmp_path / "together")
    assert again.method == handle.method
    for mode, expected in zip(PRODUCTS, together, strict=True):
        assert torch.equal(run(again, call, mode), expected)


@names
def test_full_mode_is_stock_and_remove_is_exact(name, assert_stock):
    stock, call = deep(name), call_of(name)
    expected = run(stock, call)
    handle = combined(name)
    assert torch.equal(run(handle, call, FULL), expected)
    for mode in PRODUCTS:
        run(handle, call, mode)
        assert torch.equal(run(handle, call, FULL), expected)
    handle.remove()
    assert_stock(handle.model, stock)
    leftovers = [k for m in handle.model.modules() for k in m.__dict__ if k.startswith("_ditdial")]
    assert leftovers == []


@names
def test_merged_updates_are_the_same(name):
    handle, call = combined(name), call_of(name)
    expected = [run(handle, call, mode) for mode in (*SINGLE, *PRODUCTS)]
    run_as(handle, merge=True)
    for mode, output in zip((*SINGLE, *PRODUCTS), expected, strict=True):
        torch.testing.assert_close(run(handle, call, mode), output, atol=2e-5, rtol=1e-4)
    layer = handle.model.get_submodule(next(iter(handle._engine.surgery.tensors.pairs)))
    merged = layer.__dict__[MERGED_WEIGHTS]
    copies = {id(weight): key for key, (_, weight) in reversed(merged.items())}
    assert set(copies.values()) == {"patch2", "grid3x2", "grid4", "patch2_grid3x2"}  # widths share


def test_changed_updates_are_merged_and_cut_anew():
    handle, call = (
        combined("dit", execution=Execution(merge=True)),
        call_of("dit"),
    )
    handle._engine.surgery.widths.slices, before = 4, None
    for _ in range(4):
        with torch.no_grad():
            for _, _, B in handle._engine.surgery.tensors.pairs.values():
                B["patch2"].mul_(1.5)
        found = run(handle, call, ALL)
        assert (gated(handle, call, ALL) - found).norm() < 1e-6 * found.norm()
        assert before is None or not torch.equal(found, before)
        before = found


DRAWN = {
    "dit": ("dit", {"num_embeds_ada_norm": 1000}),
    "pixart": ("pixart-sigma", {"use_additional_conditions": False}),
    "sd3": ("sd3", {}),
    "flux": ("flux", {}),
    "wan": ("wan", {}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_schedule_of_products_in_a_stock_pipeline(name):
    """In full mode the stock picture; mixed schedules run and cost as planned."""
    case, changes = PIPES[DRAWN[name][0]], DRAWN[name][1]
    pipe = case.pipe()
    pipe.register_modules(transformer=transformer(name, **depth(name), **changes))
    expected = case.draw(pipe)
    patch, _, width = parts_of(name)
    handle = elastify(pipe, [patch, sparsedit(name, stages=((0, 2),)), width])
    shake(handle)
    assert torch.equal(case.draw(pipe), expected)
    least = Mode(2, token_grid=2, width=0.5, token_keep=0.4)
    handle.schedule = Schedule(
        [
            Segment(start=1.0, stop=0.7, mode=least),
            Segment(start=0.7, stop=0.4, mode=Mode(2, token_grid=2), guide=least),
            Segment(start=0.4, stop=0.0, mode=FULL, guide=PATCH),
        ]
    )
    drawn = case.draw(pipe)
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, expected)
    plan, report = handle.plan(STEPS, grid=case.grid, text_tokens=case.text), handle.report()
    assert least in {call.mode for call in report.calls}
    assert len({call.mode for call in report.calls}) > 1
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-9)
    assert plan.ratio < 0.9
    handle.remove()
    assert torch.equal(case.draw(pipe), expected)


def test_guidance_branches_in_modes_of_their_own_equal_two_calls():
    handle = combined("dit")
    call = CASES["dit"].guided(2, GRIDS["dit"], 700.0)
    halves = [handle.backbone.arguments.rows(call, part) for part in (slice(0, 2), slice(2, 4))]
    for modes in ((BOTH, ALL), (HALF, BOTH), (FULL, ALL_KEPT), (ALL, ALL)):
        handle.schedule = Schedule.constant(modes[0], guide=modes[1])
        expected = torch.cat([run(handle, h, m) for h, m in zip(halves, modes, strict=True)])
        torch.testing.assert_close(run(handle, call), expected, atol=2e-5, rtol=1e-4)


def test_routers_are_those_of_base_tokens():
    handle = combined("dit")
    widths = handle._engine.surgery.widths
    for level in (0.9, 0.2):
        own = widths.at(handle.model, HALF, level)
        for mode in (ALL, ALL_KEPT, Mode(token_grid=4, width=0.5)):
            assert widths.at(handle.model, mode, level) is own
    between = Mode(2, token_grid=(3, 2), width=0.8)
    assert handle.method.has(between)
    call = call_of("dit")
    sliced = run(handle, call, between)
    assert (gated(handle, call, between) - sliced).norm() < 1e-6 * sliced.norm()


def test_coarse_patches_of_dydit_keep_their_own_routers():
    torch.manual_seed(2)
    handle = elastify(deep("dit"), [sparsedit("dit"), DyDiT(groups=2, scales=(2,))])
    shake(handle)
    widths, call = handle._engine.surgery.widths, call_of("dit")
    apart = [widths.at(handle.model, mode, 0.5)["heads"] for mode in (HALF, ALL)]
    assert not torch.equal(*apart)
    for mode in (PATCH, BOTH, Mode(2, width=0.5), ALL):
        assert mode in handle.modes
        if mode.is_routed:
            sliced = run(handle, call, mode)
            assert (gated(handle, call, mode) - sliced).norm() < 1e-6 * sliced.norm()


@pytest.mark.parametrize("patches", [DDiT(scales=(2,), rank=3), PPFlow(stages=((0.5, 2),))])
@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_other_methods_of_patch_size(name, patches):
    torch.manual_seed(2)
    handle = elastify(deep(name), [DyDiT(groups=2), patches, sparsedit(name)])
    shake(handle)
    call = call_of(name, 1)
    assert [part.name for part in handle.method.parts] == [patches.name, "sparsedit", "dydit"]
    assert torch.equal(run(handle, call, FULL), run(deep(name), call))
    shape = handle._engine.shape(handle.model, handle.backbone.size(handle.model, call))
    for mode in (PATCH, BOTH, ALL_KEPT):
        sliced = run(handle, call, mode)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), handle.using(mode), sdpa_kernel(SDPBackend.MATH):
            handle.model(**call)  # routers of the timestep are asked once, at the first call
            with counter:
                handle.model(**call)
        assert counter.get_total_flops() / 2 == pytest.approx(shape.macs(mode, 0.7), rel=1e-9)
        if mode.is_routed:
            assert (gated(handle, call, mode) - sliced).norm() < 1e-6 * sliced.norm()


def test_one_adapter_may_hold_base_weights(tmp_path, assert_stock):
    call, stock, folders = call_of("dit"), deep("dit"), {}
    full = {"recipe": "full"}
    for part in (sparsedit("dit", **full), DyDiT(groups=2, **full), parts_of("dit")[0]):
        handle = elastify(deep("dit"), part)
        shake(handle)
        if part.trains_base:
            with torch.no_grad():
                handle.model.transformer_blocks[0].ff.net[2].weight.mul_(1.5)
        if part.name == "sparsedit":
            expected = run(handle, call, FULL), run(handle, call, GRID)
        folders[part.name] = handle.adapter().save_pretrained(tmp_path / part.name)
    with pytest.raises(ValueError, match="adapters of 'sparsedit' and 'dydit' each hold base wei"):
        elastify(deep("dit"), [folders["sparsedit"], folders["dydit"]])
    handle = elastify(deep("dit"), [folders["flexidit"], folders["sparsedit"], DyDiT(groups=2)])
    own = handle.method.parts[1].default_schedule
    assert handle.schedule.to_json() == own.to_json()  # it says where its weights serve
    assert torch.equal(run(handle, call, FULL), expected[0])
    assert torch.equal(run(handle, call, GRID), expected[1])
    handle.adapter().save_pretrained(tmp_path / "all")
    handle.remove()
    assert_stock(handle.model, stock)
    again = elastify(deep("dit"), tmp_path / "all")
    assert torch.equal(run(again, call, GRID), expected[1])
    untrained = elastify(deep("dit"), [sparsedit("dit", recipe="full"), DyDiT(groups=2)])
    assert untrained.schedule.modes == {FULL}


def test_modes_are_those_that_fit():
    handle = elastify(
        deep("dit"), [FlexiDiT(scales=(2, 4)), sparsedit("dit", stages=((0.5, 3), (0, 6)))]
    )
    found = [mode.name for mode in handle.modes]
    assert found == ["full", "grid3", "grid6", "patch2", "patch2_grid3", "patch4"]
    bad = Mode(2, token_grid=6)
    assert bad in handle.method.modes
    message = r"'patch2_grid6' does not fit the 4x4 tokens .*at most 4x4"
    with pytest.raises(ValueError, match=message), handle.using(bad):
        pass
    with pytest.raises(ValueError, match=message):
        handle.schedule = Schedule.constant(bad)
    with pytest.raises(ValueError, match=message):
        elastify(deep("dit"), handle.method, schedule=Schedule.constant(bad))
    message = r"mode 'width50'; legal: full, grid3, grid6, patch2, "
    with pytest.raises(ValueError, match=message), handle.using(HALF):
        pass
    with pytest.raises(ValueError, match=r"schedule asks for patch3; legal for this adapter: full"):
        handle.schedule = Schedule.constant(Mode(3))
    pixart = elastify(deep("pixart"), [FlexiDiT(scales=(4,)), sparsedit("pixart")])
    with pytest.raises(ValueError, match=r"'patch4_grid4' does not fit the 2x2 tokens"):
        run(pixart, call_of("pixart"), Mode(4, token_grid=4))


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_rotary_phases_that_turn_too_far_are_refused(name):
    handle = elastify(deep(name), [FlexiDiT(scales=(3, 4)), sparsedit(name, stages=((0, 2),))])
    assert [mode.name for mode in handle.modes] == [
        "full",
        "grid2",
        "patch3",
        "patch3_grid2",
        "patch4",
    ]
    with pytest.raises(ValueError, match=r"'patch4_grid2' .*half a circle.*at most 3 base patches"):
        run(handle, call_of(name), Mode(4, token_grid=2))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), r"parts = \[\]; legal: at least two methods"),
        ((DDiT(),), r"parts = \['ddit'\]; legal: at least two"),
        ((DDiT(), DyDiT(), FlexiDiT()), r"legal: one that changes the patch size \(flexidit, ddit"),
        ((DyDiT(), DyDiT(widths=(0.3,))), r"legal: one that changes the width \(dydit\)"),
        ((SparseDiT(), SparseDiT()), r"legal: one that changes the token grid"),
        ((DDiT(), DyDiT(scales=(2,))), r"scales = \(2,\) of part 'dydit' beside part 'ddit'"),
        (
            (DDiT(), Combined(parts=(SparseDiT(), DyDiT()))),
            r"part Combined.*; legal: a method, one",
        ),
        (("ddit", DyDiT()), r"part 'ddit'; legal: a method, one of flexidit, ddit"),
        (({"name": "dit", "settings": {}}, DyDiT()), r"legal: a 'name' \(flexidit, ddit"),
        (({"name": "ddit"}, DyDiT()), r"legal: a 'name' .* and 'settings'"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Combined(parts=parts)


def test_refused_before_anything_has_changed(tmp_path, assert_stock):
    model = deep("dit")
    with pytest.raises(ValueError, match=r"adapter = \[\]; legal: at least one"):
        elastify(model, [])
    other = replace(CASES["dit"], config={**CASES["dit"].config, **depth("dit"), "patch_size": 4})
    elastify(other.model(), DyDiT(groups=2)).adapter().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"made for another base; .*patch_size"):
        elastify(model, [FlexiDiT(scales=(2,)), tmp_path / "other"])
    with pytest.raises(ValueError, match=r"are 8 blocks; legal: 2, all that"):
        elastify(CASES["dit"].model(), parts_of("dit"))
    with pytest.raises(ValueError, match=r"packed = True; .* method 'combined': False"):
        run_as(combined("dit"), packed=True)
    method = Combined(parts=tuple(parts_of("dit")))
    with pytest.raises(ValueError, match=r"configuration of method 'combined' is not understood"):
        method_from_config("combined", {"parts": [{"name": "ddit", "settings": {"size": 2}}] * 2})
    settings = method.to_config()
    settings["parts"][0]["settings"]["rank"] = 0
    with pytest.raises(ValueError, match=r"rank = 0; legal"):
        method_from_config("combined", settings)
    assert_stock(model, deep("dit"))


def test_settings_survive_a_round_trip():
    method = Combined(parts=tuple(reversed(parts_of("dit"))))
    plain = json.loads(json.dumps(method.to_config()))
    assert method_from_config("combined", plain) == method == Combined(parts=tuple(parts_of("dit")))
    assert hash(method) == hash(Combined(parts=tuple(parts_of("dit"))))


def test_modes_are_the_product():
    method = Combined(parts=(FlexiDiT(scales=(2,)), SparseDiT(), DyDiT(widths=(0.7, 0.5))))
    assert len(method.modes) == len(set(method.modes)) == 2 * 5 * 3 - 1
    assert FULL not in method.modes
    assert all(method.has(mode) for mode in (FULL, *method.modes))
    assert method.has(Mode(2, token_grid=6, width=0.6, token_keep=0.3))
    assert not method.has(Mode(4, token_grid=6, width=0.6))
    assert not method.has(Mode(2, token_grid=5))
    assert not Combined(parts=(SparseDiT(), FlexiDiT())).has(HALF)
    assert not Combined(parts=(SparseDiT(), DyDiT(tokens=False))).has(Mode(width=0.5, token_keep=1))


def small(side):
    """Four blocks."""
    plan = {"pool": 0, "modules": 1, "group": (1, 1, 1, 0), "top": 1}
    return SparseDiT(**plan, stages=((0, side),), recipe="lora", rank=2)


def test_a_budget_chooses_among_products(make_model, tmp_path):
    pipe = PixelDiTPipeline(make_model(num_layers=4), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    parts = [FlexiDiT(scales=(2,), rank=3), small(3), DyDiT(groups=8, tokens=False)]
    handle = elastify(pipe, parts)
    shake(handle)

    def sample(number):
        return pipe([1, 2], seeds=[number, 9], num_inference_steps=6, output_type="pt")

    with pytest.raises(ValueError, match="the cheapest mode throughout"):
        handle.budget = 0.01
    handle.budget = 0.6  # without a calibration: weak first
    assert handle.plan(6).ratio == pytest.approx(0.6, abs=0.15)
    handle.calibrate(sample, guidance_scale=2.5, rounds=1)
    floor = min(handle.shape.macs(mode) for mode in handle.modes) / handle.shape.macs(FULL)
    handle.budget = floor * 1.15
    plan = handle.plan(6)
    assert Mode(2, token_grid=3, width=0.5) in {step.mode for step in plan.steps}
    sample(0)
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-9)
    handle.adapter().save_pretrained(tmp_path)
    again = elastify(make_model(num_layers=4), tmp_path)
    assert again.calibration.choices == handle.calibration.choices
    assert handle.report().to_json()


def test_one_graph_per_mode():
    torch._dynamo.reset()
    model = deep("dit", num_layers=4)
    handle = elastify(model, [FlexiDiT(scales=(2,), rank=3), small((3, 2)), DyDiT(groups=2)])
    shake(handle)
    call, modes = call_of("dit"), (BOTH, ALL_KEPT)
    expected = [run(handle, call, mode) for mode in modes]
    counter = CompileCounterWithBackend("eager")
    handle.model.compile(backend=counter, fullgraph=True, dynamic=False)
    graphs = []
    for mode, output in zip(modes * 2, expected * 2, strict=True):
        torch.testing.assert_close(run(handle, call, mode), output, atol=2e-5, rtol=1e-4)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2]


def test_inside_a_larger_graph_routed_modes_are_refused():
    handle, call = combined("dit"), call_of("dit")
    inside = handle._engine.passes.run_inside
    with torch.no_grad(), handle.using(BOTH):
        assert torch.equal(inside(handle.model, call).sample, run(handle, call, BOTH))
    message = r"mode 'width50' cuts its layers .* inside a larger graph"
    with handle.using(HALF), pytest.raises(RuntimeError, match=message):
        inside(handle.model, call)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_copies_and_pickles_are_elastic_by_themselves(name):
    handle, call = combined(name), call_of(name)
    expected = [run(handle, call, mode) for mode in PRODUCTS]
    twins = copy.deepcopy(handle.model), pickle.loads(pickle.dumps(handle.model))
    with torch.no_grad():
        for parameter in handle.model.parameters():
            parameter.zero_()
    for twin in twins:
        for mode, output in zip(PRODUCTS, expected, strict=True):
            assert torch.equal(run(handle_of(twin), call, mode), output)


@names
def test_gradients_reach_every_part_and_survive_checkpointing(name):
    handle = combined(name)
    handle._engine.surgery.widths.routing.gated = True
    reached = checkpointed_gradients(handle, call_of(name), ALL)
    new = {k for k, _ in handle.model.named_parameters() if is_new(k) and not k.endswith(".grid4")}
    assert new <= reached


def test_fused_projections_serve_what_needs_no_rows():
    handle, call = combined("pixart"), call_of("pixart")
    expected = run(handle, call, PATCH)
    handle.model.fuse_qkv_projections()
    torch.testing.assert_close(run(handle, call, PATCH), expected, atol=2e-5, rtol=1e-4)
    for mode, message in ((BOTH, "one fused projection"), (ALL, "has fused projections")):
        with pytest.raises(RuntimeError, match=message):
            run(handle, call, mode)
    handle.model.unfuse_qkv_projections()
    run(handle, call, ALL)


def test_half_precision_beside_routers_of_single_precision():
    handle = combined("dit", deep("dit").bfloat16())
    call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call_of("dit").items()}
    for mode in (PATCH, BOTH, ALL):
        found = run(handle, call, mode)
        assert found.dtype == torch.bfloat16
        assert torch.isfinite(found).all()


def test_adapters_of_the_reference_model_go_together():
    """FlexiDiT's low-rank updates beside DyDiT's retrained base, which DyDiT's modes keep."""
    pipe = load_reference()
    pipe.set_progress_bar_config(disable=True)

    def draw():
        arguments = {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 2.0}
        return torch.as_tensor(pipe([3, 7], seeds=[0, 1], **arguments).images)

    expected = draw()
    handle = elastify(pipe, reference_adapter("dydit"))
    handle.schedule = Schedule.constant(HALF)
    half = draw()
    handle = elastify(pipe, [reference_adapter(), reference_adapter("dydit")])
    assert handle.calibration is None
    handle.schedule = Schedule.constant(HALF)
    assert torch.equal(draw(), half)
    mixed = Mode(2, width=0.5, token_keep=0.5)
    handle.schedule = Schedule.weak_first(0.5, mixed)
    plan = handle.plan(4)
    assert not torch.equal(draw(), half)
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-9)
    assert mixed in {call.mode for call in handle.report().calls}
    handle.remove()
    assert torch.equal(draw(), expected)


def test_shares_are_no_product():
    """What a sparse grid and a width leave is not what each leaves of the other."""
    handle = combined("dit")
    whole = handle.shape.macs(FULL)
    grid, width, both = (
        handle.shape.macs(m) / whole for m in (GRID, HALF, Mode(token_grid=(3, 2), width=0.5))
    )
    assert both < min(grid, width)
    assert both != pytest.approx(grid * width, rel=0.01)
