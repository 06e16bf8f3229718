"""Guidance across modes: whatever the executor, it is two separate calls and one formula."""

from __future__ import annotations

import pytest
import torch
from diffusers import CacheMixin, DiTTransformer2DModel
from tests.elastic_models import run_as
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditdial import FULL, FlexiDiT, Mode, Schedule, Segment, elastify
from ditdial.layers.packing import Layout, Part
from ditdial.runtime.guidance import Remembered, run_batch, run_guidance
from ditdial.runtime.model_class import ENGINE

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
        run_as(handle, packed=False)
        split = output(handle.model, call)
        run_as(handle, packed=True)
        packed = output(handle.model, call)
        assert relative(packed, split) < 1e-5
        assert relative(packed[COUNT:], split[COUNT:]) < 1e-5
        # The pictures of a packed call do not see each other.
        alone = {name: value[[1, COUNT + 1]] for name, value in call.items()}
        assert relative(output(handle.model, alone), split[[1, COUNT + 1]]) < 1e-5


@both_recipes
def test_packed_gradients_are_those_of_split_branches(make_elastic, make_call, recipe):
    """Even if the call before it left its constants in inference mode."""
    handle, call = make_elastic(recipe=recipe), make_call(COUNT, guided=True)
    handle.schedule, found = constant(FULL, WEAK), []
    for packed in (False, True):
        run_as(handle, packed=packed)
        with torch.inference_mode():
            handle.model(**call)
        handle.model.zero_grad()
        handle.model(**call).sample.square().mean().backward()
        found.append({k: p.grad for k, p in handle.model.named_parameters() if p.grad is not None})
    split, together = found
    assert split.keys() == together.keys()
    for key, gradient in split.items():
        torch.testing.assert_close(together[key], gradient, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("packed", [False, True])
def test_a_packed_call_attends_part_by_part(make_elastic, make_call, output, monkeypatch, packed):
    """Norms and feed-forward are one call each in a packed run."""
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    handle.schedule = constant(FULL, WEAK)
    run_as(handle, packed=packed)
    attended, fed = [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *args, attn_mask=None, **kwargs):
        attended.append((query.shape[2], attn_mask is not None))
        return attend(query, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for block in handle.model.transformer_blocks:
        block.ff.register_forward_hook(lambda *_: fed.append(None))
    output(handle.model, call)
    depth = len(handle.model.transformer_blocks)
    assert len(attended) == 2 * depth
    assert len(fed) == (depth if packed else 2 * depth)
    tokens = [handle._engine.wiring.state.tokens(mode) for mode in (FULL, WEAK)]
    assert set(attended) == {(count, False) for count in tokens}


@pytest.mark.parametrize(("tokens", "strip"), [((64, 16), 16), ((9, 4), 1), ((12, 4, 6), 2)])
def test_packed_tokens_lie_in_strips(tokens, strip):
    layout = Layout(tuple(Part(FULL, rows, count) for rows, count in enumerate(tokens, 1)))
    pieces = [torch.randn(part.rows, part.tokens, 5) for part in layout.parts]
    packed = layout.pack(pieces)
    assert packed.shape == (sum(x.numel() for x in pieces) // (5 * strip), strip, 5)
    for piece, found in zip(pieces, layout.unpack(packed), strict=True):
        assert torch.equal(found, piece)


def test_strips_know_their_picture():
    layout = Layout((Part(FULL, 2, 4), Part(WEAK, 3, 2)))
    pictures = torch.arange(5.0)[:, None, None]
    pieces = [pictures[:2].expand(2, 4, 1), pictures[2:].expand(3, 2, 1)]
    assert layout.pack(pieces)[:, 0, 0].tolist() == layout.owners().tolist()


def test_packed_state_does_not_outlive_an_error(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    expected = output(handle.model, call)
    handle.schedule = constant(FULL, WEAK)
    run_as(handle, packed=True)
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
    handle.schedule = Schedule.weak_first(0.0, guidance="weak")
    run_as(handle, packed=packed)
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
        run_as(handle, packed=packed)
        found = output(handle.model, {**call, "timestep": call["timestep"][:1]})
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_single_guided_picture(make_elastic, make_call, output):
    handle, call = make_elastic(), make_call(1, guided=True)
    handle.schedule = constant(FULL, WEAK)
    split = output(handle.model, call)
    run_as(handle, packed=True)
    assert relative(output(handle.model, call), split) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_reported_cost_is_what_was_multiplied(make_elastic, make_call, packed):
    """`CallRecord.macs`: multiply-adds of all rows as run, against torch's own counter."""
    handle, call = make_elastic(), make_call(COUNT, guided=True)
    handle.schedule = constant(FULL, WEAK)
    run_as(handle, packed=packed)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        handle.model(**call)
    assert handle.report().macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


class Branch:
    """The two branches of a step as separate calls of one elastic model."""

    def __init__(self, handle, call):
        self.model, self.handle = handle.model, handle
        self.wiring = handle.model.__dict__[ENGINE].wiring
        self.batch = call
        self.first = {name: value[:COUNT] for name, value in call.items()}
        self.second = {name: value[COUNT:] for name, value in call.items()}
        self.ran = []

    def forward(self, call, mode, branch=""):
        """The stock forward in a mode; keeps the modes and labels it was called with."""
        self.ran.append((mode, call["class_labels"].tolist()))
        with torch.no_grad(), self.handle.using(mode):
            return self.model(**call)

    def remember(self, mode):
        """What the engine keeps of a conditional call."""
        with torch.no_grad(), self.handle.using(mode):
            return Remembered(self.first, self.model(**self.first).sample)

    def guide(self, segment, conditional, **changes):
        """`run_guidance` on the guidance call."""
        call = self.second | changes
        return run_guidance(self.wiring, self.forward, call, segment, conditional)


def segment(mode, guide=None, guidance="cfg", gain=1.0):
    return constant(mode, guide, guidance, gain).segments[0]


@pytest.fixture
def branch(make_elastic, make_call):
    return Branch(make_elastic(), make_call(COUNT, guided=True))


TRUE, NULL = [1, 2, 3], [10, 10, 10]


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize(
    ("guide", "guidance"),
    # Where the guide is not coarser, weak guidance is ordinary guidance.
    [(None, "cfg"), (WEAK, "cfg"), (FULL, "cfg"), (None, "weak"), (FULL, "weak")],
)
def test_an_ordinary_guidance_call_is_the_stock_call_in_the_guides_mode(
    branch, output, guide, guidance, remembered
):
    one = segment(FULL, guide, guidance)
    found = branch.guide(one, branch.remember(FULL) if remembered else None)
    with branch.handle.using(guide or FULL):
        assert torch.equal(found.sample, output(branch.model, branch.second))
    assert branch.ran == [(guide or FULL, NULL)]
    (as_tuple,) = branch.guide(one, None, return_dict=False)
    assert torch.equal(as_tuple, found.sample)


@pytest.mark.parametrize("gain", [0.4, 1.0, 2.5])
def test_a_weak_guidance_call_sees_the_true_condition(branch, output, gain):
    one, conditional = segment(FULL, WEAK, "weak", gain), branch.remember(FULL)
    c, g = branches(branch.handle, branch.batch, FULL, WEAK, output, condition="true")
    found = branch.guide(one, conditional)
    assert branch.ran == [(WEAK, TRUE)]
    torch.testing.assert_close(found.sample, c + gain * (g - c), atol=1e-5, rtol=1e-5)
    if gain == 1:
        assert torch.equal(found.sample, g)
    (as_tuple,) = branch.guide(one, conditional, return_dict=False)
    assert torch.equal(as_tuple, found.sample)
    assert branch.second["class_labels"].tolist() == NULL  # the caller's arguments stay


@pytest.mark.parametrize("gain", [0.4, 2.5])
@pytest.mark.parametrize(("mode", "guide"), [(FULL, FULL), (WEAK, WEAK), (FULL, WEAK)])
def test_a_gain_is_folded_into_the_guidance_call(branch, output, mode, guide, gain):
    found = branch.guide(segment(mode, guide, gain=gain), branch.remember(mode)).sample
    assert branch.ran == [(guide, NULL)]
    c, g = branches(branch.handle, branch.batch, mode, guide, output)
    torch.testing.assert_close(found, c + gain * (g - c), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", ["cfg", "weak"])
def test_a_guidance_call_of_no_gain_repeats_the_conditional_prediction(branch, guidance):
    one, conditional = segment(FULL, WEAK, guidance, 0.0), branch.remember(FULL)
    assert torch.equal(branch.guide(one, conditional).sample, conditional.sample)
    (as_tuple,) = branch.guide(one, conditional, return_dict=False)
    assert torch.equal(as_tuple, conditional.sample)
    assert branch.ran == []


@pytest.mark.parametrize(
    ("guide", "guidance", "gain"),
    [(WEAK, "weak", 1.0), (WEAK, "weak", 0.4), (None, "cfg", 0.4), (WEAK, "cfg", 0.0)],
)
def test_a_guidance_call_that_comes_first_is_refused_if_it_needs_the_other(
    branch, guide, guidance, gain
):
    with pytest.raises(RuntimeError, match=r"called the guidance branch before it; legal: .*'cfg'"):
        branch.guide(segment(FULL, guide, guidance, gain), None)
    assert branch.ran == []


every_kind = pytest.mark.parametrize(
    ("mode", "guide", "guidance", "gain"),
    [
        (FULL, None, "cfg", 1.0),
        (FULL, WEAK, "cfg", 1.0),
        (WEAK, FULL, "cfg", 0.4),
        (WEAK, None, "cfg", 2.5),
        (FULL, WEAK, "weak", 1.0),
        (WEAK, WEAKER, "weak", 0.4),
        (WEAK, FULL, "weak", 1.0),
        (WEAK, WEAKER, "weak", 0.0),
    ],
)


@every_kind
def test_two_calls_are_one_batch(branch, mode, guide, guidance, gain):
    """Whether a pipeline calls the model once or twice, its branches are the same."""
    one = segment(mode, guide, guidance, gain)
    layout = branch.wiring.backbone.arguments.branches(branch.model, branch.batch, None)
    batch = run_batch(branch.wiring, branch.forward, branch.batch, one, layout, packed=False)
    conditional = branch.remember(mode)
    found = branch.guide(one, conditional).sample
    expected_c, expected_g = batch.sample.chunk(2)
    torch.testing.assert_close(conditional.sample, expected_c, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected_g, atol=1e-5, rtol=1e-5)


class TwoCallDiT(DiTTransformer2DModel, CacheMixin):
    """A DiT whose pipeline names its branches, as those of text-conditional models do."""


@pytest.fixture
def two_call(make_model, perturb):
    torch.manual_seed(2)
    model = TwoCallDiT.from_config(make_model().config).eval()
    model.load_state_dict(make_model().state_dict())
    handle = elastify(model, FlexiDiT(rank=4))
    perturb(handle._engine.wiring.new, seed=3)
    return handle


def step(handle, call, output, order=("cond", "uncond")):
    """One step of a pipeline that calls the model once per branch."""
    half = {"cond": slice(0, COUNT), "uncond": slice(COUNT, None)}
    results = {}
    for name in order:
        with handle.model.cache_context(name):
            own = {key: value[half[name]] for key, value in call.items()}
            results[name] = output(handle.model, own)
    return torch.cat([results["cond"], results["uncond"]])


@every_kind
def test_named_branches_are_one_batch(two_call, make_call, output, mode, guide, guidance, gain):
    call = make_call(COUNT, guided=True)
    two_call.schedule = constant(mode, guide, guidance, gain)
    expected = output(two_call.model, call)
    batch = two_call.report()
    found = step(two_call, make_call(COUNT, 900, guided=True), output)  # a higher level: a new run
    assert not torch.allclose(found, expected, atol=1e-3)
    found = step(two_call, call, output)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    records = two_call.report().calls
    assert [r.branch for r in records] == ["cond", "uncond"] * 2
    assert [r.mode for r in records[2:]] == [mode, (guide or mode) if gain else None]
    assert all(r.guide is None and r.rows == COUNT for r in records)
    assert sum(r.macs for r in records[2:]) == pytest.approx(batch.macs)
    assert sum(r.full_macs for r in records[2:]) == pytest.approx(batch.calls[0].full_macs)


def test_a_named_guidance_branch_needs_the_conditional_one_of_its_own_step(
    two_call, make_call, output
):
    call = make_call(COUNT, guided=True)
    two_call.schedule = constant(FULL, WEAK, "weak")
    with pytest.raises(RuntimeError, match="called the guidance branch before it"):
        step(two_call, call, output, ("uncond", "cond"))
    step(two_call, call, output)
    with pytest.raises(RuntimeError, match="called the guidance branch before it"):
        step(two_call, call, output, ("uncond", "cond"))  # the last step's does not count
    two_call.schedule = constant(FULL, WEAK)
    expected = output(two_call.model, call)
    found = step(two_call, call, output, ("uncond", "cond"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
