"""Text layers computed once per run: the same latents, fewer products, nothing out of date."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tests.backbones.pipes import PIPES, PROMPTS, STEPS
from tests.backbones.tiny import CASES
from tests.elastic_models import run_as
from torch import nn

from ditdial import FULL, FlexiDiT, Mode, Schedule, Segment, elastify
from ditdial.backbones.layers import named
from ditdial.layers.state import TextKey

WEAK = Mode(2)
PIPELINES = ("pixart-sigma", "wan", "latte")
MODELS = ("pixart", "wan", "latte")
EMBEDDERS = {
    "pixart": "caption_projection.linear_1",
    "wan": "condition_embedder.text_embedder.linear_1",
    "latte": "caption_projection.linear_1",
}


@dataclass(frozen=True)
class Run:
    """A schedule, and how often it needs each text layer.

    Args:
        alone: without guidance.
        apart, together: guided, by pipelines that call once per branch, and by those that batch.
    """

    schedule: Schedule
    alone: int
    apart: int
    together: int


def switching(**middle) -> Schedule:
    """Another way to run between the noise levels 0.7 and 0.3."""
    return Schedule(
        [
            Segment(start=1, stop=0.7),
            Segment(start=0.7, stop=0.3, **middle),
            Segment(start=0.3, stop=0),
        ]
    )


RUNS = {
    "full": Run(Schedule.constant(FULL), 1, 2, 1),
    "weak-first": Run(Schedule.weak_first(0.5), 1, 2, 1),
    "weak-between": Run(switching(mode=WEAK), 1, 2, 1),
    # Batches: both prompts at first, each by itself, both again.
    "weak-guide-between": Run(switching(guide=WEAK), 1, 2, 3),
    "weak-guidance": Run(Schedule.weak_first(0.0, guidance="weak"), 1, 1, 1),
    "weak-guidance-between": Run(switching(guide=WEAK, guidance="weak", gain=0.4), 1, 2, 2),
    "guided-late": Run(
        Schedule([Segment(start=1, stop=0.6, gain=0), Segment(start=0.6, stop=0)]), 1, 2, 2
    ),
}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
pipelines = pytest.mark.parametrize("name", PIPELINES)
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def computed(monkeypatch):
    """How often each linear layer's stock ``forward`` ran."""
    counts, stock = Counter(), nn.Linear.forward

    def forward(self, x):
        counts[self] += 1
        return stock(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return counts


def text_layers(handle):
    return [layer for _, layer in named(handle.model, handle.backbone.prompt_only)]


def assert_planned(handle, case, *, guided=True):
    plan = handle.plan(STEPS, guidance=guided, grid=case.grid, text_tokens=case.text)
    report = handle.report()
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-9)
    assert report.macs == pytest.approx(plan.macs, rel=1e-9)


@pipelines
@runs
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_a_run_is_the_same_and_computes_each_prompt_once(name, run, guided, computed):
    case = PIPES[name]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = run.schedule if guided else unguided(run.schedule)
    expected, ratio = case.draw(pipe, guided=guided), handle.report().ratio
    run_as(handle, keep_text=True)
    for _ in range(2):
        computed.clear()
        assert torch.equal(case.draw(pipe, guided=guided), expected)
        wanted = (run.apart if case.two_calls else run.together) if guided else run.alone
        assert [computed[layer] for layer in text_layers(handle)] == [wanted] * 4
        assert_planned(handle, case, guided=guided)
        assert handle.report().ratio < ratio
    run_as(handle, keep_text=False)
    computed.clear()
    assert torch.equal(case.draw(pipe, guided=guided), expected)
    assert min(computed[layer] for layer in text_layers(handle)) >= STEPS
    assert_planned(handle, case, guided=guided)


@pytest.mark.parametrize("guidance", ["cfg", "weak"])
def test_packed_calls_keep_no_text(guidance):
    case = PIPES["pixart-sigma"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    run_as(handle, packed=True)
    handle.schedule = switching(guide=WEAK, guidance=guidance)
    expected = case.draw(pipe)
    run_as(handle, keep_text=True)
    assert torch.equal(case.draw(pipe), expected)
    assert_planned(handle, case)


@pipelines
def test_every_run_has_its_own_prompt(name):
    case = PIPES[name]
    pipe, plain = case.pipe(), case.pipe()
    handle, other = case.elastic(pipe), case.elastic(plain)
    run_as(handle, keep_text=True)
    handle.schedule = other.schedule = Schedule.weak_first(0.5)
    for words in (*PROMPTS, "old red house", PROMPTS[0]):
        assert torch.equal(case.draw(pipe, [words]), case.draw(plain, [words]))


@pipelines
def test_an_interrupted_call_is_not_counted(name):
    case = PIPES[name]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    run_as(handle, keep_text=True)

    def interrupt(*_):
        if len(handle.report().calls) == STEPS - 1:
            raise KeyboardInterrupt

    hook = pipe.transformer.proj_out.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.draw(pipe)
    hook.remove()
    case.draw(pipe)
    assert_planned(handle, case)


@pipelines
def test_removing_forgets_what_was_kept(name, assert_stock):
    case = PIPES[name]
    pipe, stock = case.pipe(), case.pipe()
    handle = case.elastic(pipe)
    run_as(handle, keep_text=True)
    case.draw(pipe)
    handle.remove()
    assert torch.equal(case.draw(pipe), case.draw(stock))
    assert_stock(pipe.transformer, stock.transformer)


def unguided(schedule):
    """The same modes without weak guidance, which would warn that it is not applied."""
    return Schedule(
        [Segment(start=s.start, stop=s.stop, mode=s.mode, gain=s.gain) for s in schedule.segments]
    )


def elastic(name, *, keep=True):
    handle = elastify(CASES[name].model(), FlexiDiT(rank=3, scales=(2,)))
    handle.schedule = Schedule.weak_first(0.25)
    if keep:
        run_as(handle, keep_text=True)
    return handle


def call_of(name, time, prompt=None):
    call = CASES[name].call(1, CASES[name].grids[0], time)
    return call if prompt is None else call | {"encoder_hidden_states": prompt}


@torch.no_grad()
def output(handle, call):
    return handle.model(**call).sample


@models
def test_a_prompt_changed_in_place_is_another_prompt(name, computed):
    handle, plain = elastic(name), elastic(name, keep=False)
    prompt = call_of(name, 900.0)["encoder_hidden_states"]
    output(handle, call_of(name, 900.0, prompt))
    prompt.mul_(-1)
    later = call_of(name, 700.0, prompt)
    computed.clear()
    found = output(handle, later)
    assert all(computed[layer] == 1 for layer in text_layers(handle))
    assert torch.equal(found, output(plain, later))


@models
def test_memory_used_again_is_another_prompt(name):
    """Prompts made and dropped one after the other in one run."""
    handle, plain = elastic(name), elastic(name, keep=False)
    for index, time in enumerate((900.0, 700.0, 500.0, 300.0, 100.0)):
        shape = call_of(name, time)["encoder_hidden_states"].shape
        prompt = torch.full(shape, index - 2.0).cos_()
        found = output(handle, call_of(name, time, prompt))
        assert torch.equal(found, output(plain, call_of(name, time, prompt)))
        del prompt


@models
def test_part_of_a_prompt_is_another_prompt(name):
    handle, plain = elastic(name), elastic(name, keep=False)
    prompt = call_of(name, 900.0)["encoder_hidden_states"]
    output(handle, call_of(name, 900.0, prompt))
    later = call_of(name, 700.0, prompt[:, :3])
    later.pop("encoder_attention_mask", None)
    assert torch.equal(output(handle, later), output(plain, later))


@models
def test_a_text_layers_weight_changed_within_a_run_is_seen(name):
    handle, plain = elastic(name), elastic(name, keep=False)
    prompt = call_of(name, 900.0)["encoder_hidden_states"]
    output(handle, call_of(name, 900.0, prompt))
    for each in (handle, plain):
        with torch.no_grad():
            text_layers(each)[0].weight.mul_(-1)
    later = call_of(name, 700.0, prompt)
    assert torch.equal(output(handle, later), output(plain, later))


def negate(handle, layer):
    weight = handle.model.get_submodule(layer).weight
    weight.data = weight.data.neg()


def negate_in_place(handle, layer):
    # Past the version counter, as PEFT does when it fuses a LoRA.
    handle.model.get_submodule(layer).weight.data.neg_()


def add_lora(handle, layer):
    torch.manual_seed(4)
    config = LoraConfig(r=2, target_modules=[layer], init_lora_weights=False)
    inject_adapter_in_model(config, handle.model)


@models
@pytest.mark.parametrize("change", [negate, negate_in_place, add_lora])
@pytest.mark.parametrize("where", ["embedder", "block"])
def test_weights_changed_between_two_runs_are_seen(name, change, where):
    """Of one prompt tensor; also in the embedder, which the text layers know nothing of."""
    handle, plain = elastic(name), elastic(name, keep=False)
    calls = [call_of(name, 900.0)]
    prompt = calls[0]["encoder_hidden_states"]
    calls.append(call_of(name, 600.0, prompt))
    before = [output(handle, call) for call in calls]
    blocks = "blocks" if name == "wan" else "transformer_blocks"
    for each in (handle, plain):
        change(each, EMBEDDERS[name] if where == "embedder" else f"{blocks}.0.attn2.to_k")
    for call, old in zip(calls, before, strict=True):
        found = output(handle, call)
        assert torch.equal(found, output(plain, call))
        assert not torch.allclose(found, old, atol=1e-5)


@models
def test_off_while_gradients_are_recorded(name, computed):
    handle, plain = elastic(name), elastic(name, keep=False)
    prompt = call_of(name, 900.0)["encoder_hidden_states"]
    output(handle, call_of(name, 900.0, prompt))  # keeps
    computed.clear()
    for each in (handle, plain):
        for time in (700.0, 500.0):
            each.model.zero_grad()
            each.model(**call_of(name, time, prompt)).sample.square().mean().backward()
    assert all(computed[layer] == 2 for layer in text_layers(handle))
    for own, right in zip(text_layers(handle), text_layers(plain), strict=True):
        assert torch.equal(own.weight.grad, right.weight.grad)
    macs = [call.macs for call in plain.report().calls]
    assert [call.macs for call in handle.report().calls[1:]] == macs


@models
def test_off_in_a_mode_set_by_hand(name, computed):
    handle = elastic(name)
    prompt = call_of(name, 900.0)["encoder_hidden_states"]
    with handle.using(WEAK):
        for time in (900.0, 700.0):
            output(handle, call_of(name, time, prompt))
    assert all(computed[layer] == 2 for layer in text_layers(handle))
    assert handle.report().calls[0].macs == handle.report().calls[1].macs


def test_a_plan_of_a_compiled_model_counts_on_nothing_kept():
    handle = elastic("wan")
    levels = [0.9, 0.6, 0.3]
    kept = handle.plan_levels(levels).ratio
    handle.model.compile(backend="eager")
    compiled = handle.plan_levels(levels).ratio
    run_as(handle, keep_text=False)
    assert kept < compiled == handle.plan_levels(levels).ratio


def test_refused_where_text_changes_from_step_to_step():
    handle = elastify(CASES["flux"].model(), FlexiDiT(rank=3, scales=(2,)))
    message = r"keep_text = True; legal for FluxTransformer2DModel: False \(its text tokens change"
    with pytest.raises(ValueError, match=message):
        run_as(handle, keep_text=True)
    run_as(handle, keep_text=False)
    assert handle.execution.keep_text is False


def test_the_key_of_a_copied_prompt_names_the_copys_memory():
    key = TextKey(torch.ones(2, 3), run=1)
    assert key.same(TextKey(key.tensor, run=1))
    other = copy.deepcopy(key)
    assert not other.same(key)
    assert other.same(TextKey(other.tensor, run=1))
