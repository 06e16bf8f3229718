"""Guidance across modes: whatever the executor, it is two separate calls and one formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elastic_dit import FULL, Mode, Schedule, Segment

WEAK, WEAKER = Mode(2), Mode(4)
COUNT = 3
both_recipes = pytest.mark.parametrize("recipe", ["lora", "shared"])
both_merges = pytest.mark.parametrize("merge", [False, True])
pairs = pytest.mark.parametrize(
    ("mode", "guide"),
    [(FULL, WEAK), (WEAK, FULL), (WEAK, WEAKER), (WEAKER, WEAK), (FULL, WEAKER)],
)


def constant(mode, guide=None, guidance="cfg", gain=1.0):
    facts = {"mode": mode, "guide": guide, "guidance": guidance, "gain": gain}
    return Schedule([Segment(start=1, stop=0, **facts)])


def branches(handle, call, mode, guide, output, *, condition="null"):
    """Conditional and guidance prediction, each from a call of its own in a forced mode."""
    first = {name: value[:COUNT] for name, value in call.items()}
    second = {name: value[COUNT:] for name, value in call.items()}
    if condition == "true":
        second["class_labels"] = first["class_labels"]
    with handle.using(mode):
        c = output(handle.model, first)
    with handle.using(guide):
        g = output(handle.model, second)
    return c, g


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@both_recipes
@both_merges
@pairs
def test_split_equals_two_separate_calls(
    make_elastic, make_call, output, recipe, merge, mode, guide
):
    handle, call = make_elastic(recipe=recipe, merge=merge), make_call(COUNT, guided=True)
    expected = torch.cat(branches(handle, call, mode, guide, output))
    handle.schedule = constant(mode, guide)
    assert torch.equal(output(handle.model, call), expected)
    (as_tuple,) = handle.model(**call, return_dict=False)
    torch.testing.assert_close(as_tuple, expected)


@both_recipes
@both_merges
@pairs
@pytest.mark.parametrize("guidance", ["cfg", "weak"])
def test_packed_equals_split(make_elastic, make_call, output, recipe, merge, mode, guide, guidance):
    handle, call = make_elastic(recipe=recipe, merge=merge), make_call(COUNT, guided=True)
    for gain in (1.0, 0.4):
        handle.schedule = constant(mode, guide, guidance, gain)
        handle.packed = False
        split = output(handle.model, call)
        handle.packed = True
        packed = output(handle.model, call)
        assert relative(packed, split) < 1e-5
        assert relative(packed[COUNT:], split[COUNT:]) < 1e-5
        # The pictures of a packed call do not see each other.
        alone = {name: value[[1, COUNT + 1]] for name, value in call.items()}
        assert relative(output(handle.model, alone), split[[1, COUNT + 1]]) < 1e-5


def test_packed_state_does_not_outlive_an_error(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    expected = output(handle.model, call)
    handle.schedule, handle.packed = constant(FULL, WEAK), True
    bad = {**call, "class_labels": call["class_labels"].clone()}
    bad["class_labels"][1] = 99
    with pytest.raises(IndexError):
        output(handle.model, bad)
    handle.schedule = Schedule.constant()
    assert torch.equal(output(handle.model, call), expected)


@both_merges
def test_the_same_mode_in_both_branches_is_one_call(make_elastic, make_call, output, merge):
    handle, call = make_elastic(merge=merge), make_call(COUNT, guided=True)
    handle.schedule = constant(WEAK)
    with handle.using(WEAK):
        expected = output(handle.model, call)
    assert torch.equal(output(handle.model, call), expected)
    c, g = branches(handle, call, WEAK, WEAK, output)
    torch.testing.assert_close(expected, torch.cat([c, g]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gain", [0.0, 0.4, 1.0, 2.5])
@pytest.mark.parametrize(("mode", "guide"), [(FULL, FULL), (WEAK, WEAK), (FULL, WEAK)])
def test_gain_scales_the_excess_of_the_guidance_scale(
    make_elastic, make_call, output, mode, guide, gain
):
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    c, g = branches(handle, call, mode, guide, output)
    handle.schedule = constant(mode, guide, gain=gain)
    found_c, found_g = output(handle.model, call).chunk(2)
    scale = 3.0
    found = found_g + scale * (found_c - found_g)
    expected = g + (1 + gain * (scale - 1)) * (c - g)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_gain_of_zero_runs_the_conditional_rows_only(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    handle.schedule = constant(WEAK, gain=0)
    found_c, found_g = output(handle.model, call).chunk(2)
    assert torch.equal(found_c, found_g)
    (record,) = handle.report().calls
    macs = handle.shape.macs
    assert (record.mode, record.guide, record.rows) == (WEAK, None, 2 * COUNT)
    assert record.macs == COUNT * macs(WEAK)
    assert record.full_macs == 2 * COUNT * macs(FULL)


@pytest.mark.parametrize("packed", [False, True])
def test_weak_guidance_is_the_weak_model_on_the_true_condition(
    make_elastic, make_call, output, packed
):
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    handle.schedule, handle.packed = Schedule.weak_first(0.0, guidance="weak"), packed
    c, g = branches(handle, call, FULL, WEAK, output, condition="true")
    s1 = 4.0
    s2 = 1 + (s1 - 1) / 2.5
    found_c, found_g = output(handle.model, call).chunk(2)
    found = found_g + s1 * (found_c - found_g)
    assert relative(found, g + s2 * (c - g)) < 1e-5
    ordinary = branches(handle, call, FULL, WEAK, output)[1]
    assert relative(ordinary, g) > 1e-2  # the condition does matter


def test_segments_follow_the_time(make_elastic, make_call, output):
    handle = make_elastic()
    handle.schedule = Schedule.weak_first(0.3, guide_fraction=0.6)
    for time, modes in ((900, (WEAK, WEAK)), (500, (FULL, WEAK)), (100, (FULL, FULL))):
        call = make_call(COUNT, time, guided=True)
        found = output(handle.model, call)
        expected = torch.cat(branches(handle, call, *modes, output))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_one_timestep_for_the_whole_batch(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    handle.schedule = constant(FULL, WEAK)
    expected = output(handle.model, call)
    for packed in (False, True):
        handle.packed = packed
        found = output(handle.model, {**call, "timestep": call["timestep"][:1]})
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_single_guided_picture(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call(1, guided=True)
    handle.schedule = constant(FULL, WEAK)
    split = output(handle.model, call)
    handle.packed = True
    assert relative(output(handle.model, call), split) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_reported_cost_is_what_was_multiplied(make_elastic, make_call, packed):
    """`CallRecord.macs`: multiply-adds of all rows as run, against torch's own counter."""
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    handle.schedule, handle.packed = constant(FULL, WEAK), packed
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        handle.model(**call)
    assert handle.report().macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
