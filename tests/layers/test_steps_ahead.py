"""What level and label decide, computed for a run's steps at once: same numbers, never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from peft import LoraConfig, inject_adapter_in_model
from tests.backbones.pipes import PIPES, STEPS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ditdial import (
    Combined,
    DDiT,
    DDiTController,
    DyDiT,
    FlexiDiT,
    Mode,
    Schedule,
    Segment,
    SparseDiT,
    elastify,
    steps_ahead,
)
from ditdial.reference import load_reference, reference_adapter
from ditdial.sampling.batches import sample

LABELS = [3, 1, 4]
SEEDS = [0, 1, 2]
SCHEDULES = {
    "coarse": Schedule.constant(Mode(2)),
    "two sizes": Schedule(
        [Segment(start=1, stop=0.5, mode=Mode(4)), Segment(start=0.5, stop=0, mode=Mode(2))]
    ),
    "weak first": Schedule.weak_first(0.5),
    "weak guidance": Schedule.weak_first(0.0, guidance="weak"),
    "weak guide": Schedule.weak_first(0.4, guide_fraction=0.8),
}
packings = pytest.mark.parametrize("packed", [False, True, "masked"])
schedules_and_packings = pytest.mark.parametrize(
    ("name", "packed"),
    [*((name, False) for name in SCHEDULES), ("weak guidance", True), ("weak guide", "masked")],
)
PIPELINES = ("dit", "sd3", "flux")


@pytest.fixture
def calls(monkeypatch):
    """Rows that each embedder and each layer behind one was given, call by call.

    By layer, and by how often the step had asked it before.
    """
    seen: dict[tuple[nn.Module, int], list[int]] = {}
    stock = steps_ahead.BatchTables._table

    def counted(self, key, inputs, make):
        def making():
            made = make()
            seen.setdefault(key, []).append(len(made))
            return made

        return stock(self, key, inputs, making)

    monkeypatch.setattr(steps_ahead.BatchTables, "_table", counted)
    return seen


@pytest.fixture
def pipe():
    return load_reference()


@pytest.fixture
def handle(pipe):
    return ahead(pipe, reference_adapter("lora"))


def ahead(pipe, adapter):
    handle = elastify(pipe, adapter)
    assert not handle.plan_ahead
    handle.plan_ahead = True
    return handle


def draw(handle, steps=6, scale=2.0, labels=LABELS):
    pipe = handle._engine.timeline.pipe()
    return sample(pipe, labels, SEEDS[: len(labels)], guidance_scale=scale, steps=steps).images


def apart(handle, **given):
    """The same run with every step by itself."""
    handle.plan_ahead = False
    images = draw(handle, **given)
    handle.plan_ahead = True
    return images


@schedules_and_packings
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_run_is_the_same(handle, calls, scale, name, packed):
    handle.schedule, handle.packed = SCHEDULES[name], packed
    expected = apart(handle, scale=scale)
    assert not calls
    found = draw(handle, scale=scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert calls
    plan = handle.plan(6, guidance=scale != 1)
    assert handle.report().macs == pytest.approx(len(LABELS) * plan.macs, rel=1e-9)


def test_each_layer_runs_once_for_all_steps(handle, calls):
    handle.schedule = Schedule.constant(Mode(2))
    draw(handle)
    pairs = list(handle.backbone.embedded(handle.model))
    asked = [(layer, 0) for one, behind in pairs for layer in (one, *behind)]
    asked.append((pairs[0][0], 1))  # DiT asks its first embedder again in the end
    assert len(asked) == 2 * 6 + 2
    assert calls == {key: [6 * 2 * len(LABELS)] for key in asked}


def test_only_coarse_steps_are_looked_ahead_to(handle, calls):
    handle.schedule = Schedule.weak_first(0.5)
    draw(handle)
    coarse = sum(not record.mode.is_full for record in handle.report().calls)
    assert 0 < coarse < 6
    assert all(rows == [coarse * 2 * len(LABELS)] for rows in calls.values())


def test_steps_of_the_base_are_the_stock_ones(pipe, handle):
    """Bit for bit, also in a run whose other steps are looked ahead to."""
    handle.schedule = Schedule.weak_first(0.5)
    seen = {}

    def keep(model, args, kwargs, output):
        seen[kwargs["timestep"][0].item()] = args, kwargs, output.sample

    hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    draw(handle)
    hook.remove()
    handle.remove()
    for time, is_stock in ((min(seen), True), (max(seen), False)):
        args, kwargs, found = seen[time]
        with torch.no_grad():
            assert torch.equal(found, pipe.transformer(*args, **kwargs).sample) == is_stock


@packings
def test_both_branches_of_a_mixed_step_are_looked_ahead_to(handle, calls, packed):
    handle.schedule, handle.packed = Schedule.weak_first(0.0, guidance="weak"), packed
    draw(handle)
    rows = [6 * 2 * len(LABELS)] if packed else [6 * len(LABELS)] * 2
    assert all(found == rows for found in calls.values())
    assert len(calls) == 2 * 6 + 2


def test_sinusoids_are_made_once_for_all_embedders(handle, monkeypatch):
    made = []
    stock = Timesteps.forward

    def counted(self, times):
        made.append(len(times))
        return stock(self, times)

    monkeypatch.setattr(Timesteps, "forward", counted)
    handle.schedule = Schedule.constant(Mode(2))
    draw(handle)
    assert made == [6 * 2 * len(LABELS)]
    made.clear()
    apart(handle)
    assert made == [2 * len(LABELS)] * 6 * 7


@schedules_and_packings
def test_products_of_a_run_are_those_of_its_steps(handle, name, packed):
    """By torch's own count."""
    handle.schedule, handle.packed = SCHEDULES[name], packed
    counts = []
    for run in (apart, draw):
        with FlopCounterMode(display=False) as counter:
            run(handle)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_labels_and_weights_of_another_run(handle):
    handle.schedule = Schedule.constant(Mode(4))
    draw(handle)
    others = [7, 8, 9]
    expected = apart(handle, labels=others)
    torch.testing.assert_close(draw(handle, labels=others), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        handle.model.transformer_blocks[1].norm1.linear.weight.mul_(1.05)
    changed = apart(handle, labels=others)
    assert not torch.allclose(changed, expected, atol=1e-3)
    torch.testing.assert_close(draw(handle, labels=others), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["emb.timestep_embedder.linear_1", "linear"])
def test_weights_that_change_in_a_run(pipe, handle, layer):
    """They count from the next step on, through all that depends on them."""
    weight = handle.model.transformer_blocks[2].norm1.get_submodule(layer).weight
    stock = weight.detach().clone()
    handle.schedule = Schedule.constant(Mode(2))
    step, steps = pipe.scheduler.step, []

    def stepping(*args, **kwargs):
        steps.append(args)
        if len(steps) == 2:
            with torch.no_grad():
                weight.mul_(1.5)
        return step(*args, **kwargs)

    pipe.scheduler.step = stepping
    expected = apart(handle)
    with torch.no_grad():
        weight.copy_(stock)
    steps.clear()
    torch.testing.assert_close(draw(handle), expected, rtol=1e-4, atol=1e-5)


def test_long_runs_are_looked_ahead_to_in_parts(handle, calls, monkeypatch):
    monkeypatch.setattr(steps_ahead, "BYTES", 4 * 2 * len(LABELS) * handle._engine.ahead.row_bytes)
    handle.schedule = Schedule.constant(Mode(2))
    expected = apart(handle, steps=10)
    found = draw(handle, steps=10)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rows = 2 * len(LABELS)
    assert all(found == [4 * rows, 4 * rows, 2 * rows] for found in calls.values())


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("schedule", ["coarse", "weak first", "weak guidance"])
def test_stock_pipelines(name, schedule, calls):
    case = PIPES[name]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = SCHEDULES[schedule]
    handle.plan_ahead = False
    expected = case.draw(pipe)
    assert not calls
    handle.plan_ahead = True
    torch.testing.assert_close(case.draw(pipe), expected, rtol=1e-4, atol=1e-4)
    assert calls
    plan = handle.plan(STEPS, guidance=True, grid=case.grid, text_tokens=case.text)
    assert handle.report().ratio == pytest.approx(plan.ratio, rel=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        DDiT(scales=(2,), rank=2),
        DyDiT(widths=(0.5,), groups=4, head_bias=0.1, token_bias=0.1),
        SparseDiT.for_depth(6, stages=((0.0, 3),)),
        Combined(
            parts=(
                FlexiDiT(scales=(2,), rank=2),
                SparseDiT.for_depth(6, stages=((0.0, 3),)),
                DyDiT(widths=(0.5,), groups=4, head_bias=0.1, token_bias=0.1),
            )
        ),
    ],
    ids=["ddit", "dydit", "sparsedit", "combined"],
)
def test_other_methods(pipe, method, perturb, calls):
    handle = ahead(pipe, method)
    perturb(handle.sizes)
    handle.schedule = Schedule(
        [Segment(start=1, stop=0.4, mode=handle.modes[-1]), Segment(start=0.4, stop=0)]
    )
    expected = apart(handle)
    torch.testing.assert_close(draw(handle), expected, rtol=1e-4, atol=1e-5)
    assert calls


def test_a_lora_on_a_layer_behind_an_embedder(handle, calls):
    config = LoraConfig(r=2, lora_alpha=0.2, target_modules=["norm1.linear"])
    torch.manual_seed(0)
    inject_adapter_in_model(config, handle.model)
    for name, parameter in handle.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    handle.schedule = Schedule.constant(Mode(2))
    expected = apart(handle)
    torch.testing.assert_close(draw(handle), expected, rtol=1e-4, atol=1e-5)
    assert calls


@pytest.mark.parametrize("way", ["training", "forced", "bare", "moved"])
def test_where_nothing_is_known_ahead(handle, calls, way, make_call, output):
    handle.schedule = Schedule.constant(Mode(2))
    if way == "moved":
        handle.model.enable_layerwise_casting(torch.bfloat16, torch.float32)
        draw(handle)
    elif way == "forced":
        with handle.using(Mode(2)):
            draw(handle)
    elif way == "bare":
        output(handle.model, make_call())
    else:
        handle.model(**make_call()).sample.sum().backward()
    assert not calls


def test_steps_that_are_chosen_one_by_one_are_not_known_ahead(pipe, calls):
    handle = ahead(pipe, reference_adapter("ddit"))
    handle.controller = DDiTController(tau=1e3, coarse=handle.modes[1:])
    draw(handle, steps=12)
    assert handle.report().ratio < 1
    assert not calls


def test_a_solved_plan_is(pipe, calls):
    handle = ahead(pipe, reference_adapter("lora"))
    handle.budget = 0.6
    expected = apart(handle, steps=12)
    torch.testing.assert_close(draw(handle, steps=12), expected, rtol=1e-4, atol=1e-5)
    assert calls


def test_merging_turns_it_on(pipe, calls):
    handle = elastify(pipe, reference_adapter("lora"), merge=True)
    assert handle.plan_ahead
    handle.schedule = Schedule.constant(Mode(2))
    draw(handle)
    assert calls


def test_copies_and_removal(handle):
    handle.schedule = Schedule.constant(Mode(2))
    expected = draw(handle)
    other = copy.deepcopy(handle.model)
    assert not other.__dict__["_elastic_engine"].ahead.tables
    torch.testing.assert_close(draw(handle), expected)
    model = handle.model
    handle.remove()
    stock = load_reference().transformer
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in stock.named_modules()
    }
    assert all(
        vars(m).keys() == vars(stock.get_submodule(n)).keys() for n, m in model.named_modules()
    )
