"""Two requests on one model at once: each keeps its own run, wherever the other comes in."""

from __future__ import annotations

import copy
import itertools
import threading

import diffusers
import pytest
import torch
from tests.backbones.pipes import EMBEDDED, PIPES
from tests.wild.pictures import noise, quiet
from tests.wild.turns import PATIENCE, in_turns

from ditdial import FULL, Mode, Schedule

WEAK = Mode(2)
CASES = {
    "qwenimage": EMBEDDED["qwenimage"],
    **{name: PIPES[name] for name in ("flux", "sd3", "wan", "chroma")},
}
REQUESTS = ((4, 11), (6, 12))
"""Steps and seed of each."""

COARSE_GUIDE = Schedule.constant(FULL, guide=WEAK)
WEAK_GUIDANCE = Schedule.weak_first(0.3, guidance="weak")
BUDGETS = {"sd3": 0.8}
"""Shares that a run of a few tiny steps can keep; 0.85 for the others."""

cases = pytest.mark.parametrize("name", CASES)


def two_pipelines(case):
    """Pipelines around one model, each with a scheduler of its own."""
    first = case.pipe()
    parts = {**first.components, "scheduler": copy.deepcopy(first.scheduler)}
    return first, quiet(type(first)(**parts))


def ask(case, handle, what):
    if isinstance(what, Schedule):
        handle.schedule = what
    else:
        handle.budget = what


def alone(case, what):
    """What each request gives on a model that nobody else uses; of the stock model for None."""
    pictures = []
    for request in REQUESTS:
        pipe = case.pipe()
        if what is not None:
            ask(case, case.elastic(pipe), what)
        pictures.append(draw(case, pipe, request))
    return pictures


def draw(case, pipe, request, **changes):
    steps, seed = request
    return case.draw(pipe, seeds=(seed,), num_inference_steps=steps, **changes)


def by_steps(case, pipe, request):
    """A run that hands over after each step."""

    def run(hand_over):
        def after_step(pipe, index, time, facts):
            hand_over()
            return facts

        return draw(case, pipe, request, callback_on_step_end=after_step)

    return run


def by_calls(case, pipe, request, here):
    """A run that hands over before each model call, where a hook of the model does so."""

    def run(hand_over):
        here.hand_over = hand_over
        return draw(case, pipe, request)

    return run


def hook_calls(model):
    """Have a model's calls hand over to another thread."""
    here = threading.local()
    model.register_forward_pre_hook(lambda *_: here.hand_over())
    return here


def assert_each(found, expected):
    for picture, right in zip(found, expected, strict=True):
        assert torch.equal(picture, right)


@cases
def test_stock_pipelines_that_take_turns_each_give_their_own_picture(name):
    case = CASES[name]
    expected = alone(case, None)
    pipes = two_pipelines(case)
    runs = [by_steps(case, *each) for each in zip(pipes, REQUESTS, strict=True)]
    assert_each(in_turns(runs), expected)
    here = hook_calls(pipes[0].transformer)
    runs = [by_calls(case, *each, here) for each in zip(pipes, REQUESTS, strict=True)]
    assert_each(in_turns(runs), expected)


def assert_turns_by_steps(case, what):
    expected = alone(case, what)
    pipes = two_pipelines(case)
    ask(case, case.elastic(pipes[0]), what)
    runs = [by_steps(case, *each) for each in zip(pipes, REQUESTS, strict=True)]
    assert_each(in_turns(runs), expected)


def assert_turns_by_calls(case):
    """The guide is coarse, so that a call taken for the other branch changes the picture."""
    expected = alone(case, COARSE_GUIDE)
    pipes = two_pipelines(case)
    ask(case, case.elastic(pipes[0]), COARSE_GUIDE)
    here = hook_calls(pipes[0].transformer)
    runs = [by_calls(case, *each, here) for each in zip(pipes, REQUESTS, strict=True)]
    assert_each(in_turns(runs), expected)


@pytest.mark.parametrize("what", [COARSE_GUIDE, WEAK_GUIDANCE], ids=["coarse guide", "weak"])
@pytest.mark.parametrize("name", ["qwenimage", "chroma"])
def test_runs_of_a_schedule_that_take_turns_by_steps_each_equal_the_run_alone(name, what):
    case = CASES[name]
    assert_turns_by_steps(case, what)


@cases
def test_runs_of_a_budget_that_take_turns_by_steps_each_equal_the_run_alone(name):
    case, share = CASES[name], BUDGETS.get(name, 0.85)
    assert_turns_by_steps(case, share)


@pytest.mark.parametrize("name", [name for name in CASES if name != "sd3"])
def test_runs_that_take_turns_by_model_calls_each_equal_the_run_alone(name):
    """A second call comes between the two branches of a step."""
    case = CASES[name]
    assert_turns_by_calls(case)


def test_runs_with_both_branches_in_a_call_take_turns_by_model_calls():
    case = CASES["sd3"]
    assert_turns_by_calls(case)


@cases
def test_a_run_inside_the_callback_of_another_leaves_it_as_it_was(name):
    case, share = CASES[name], BUDGETS.get(name, 0.85)
    expected = alone(case, share)
    first, second = two_pipelines(case)
    ask(case, case.elastic(first), share)
    inner = []

    def after_step(pipe, index, time, facts):
        if index == 1:
            inner.append(draw(case, second, REQUESTS[1]))
        return facts

    outer = draw(case, first, REQUESTS[0], callback_on_step_end=after_step)
    assert_each([outer, *inner], expected)


def first_block(model):
    """The first of the repeated blocks."""
    lists = [x for x in model.children() if isinstance(x, torch.nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))[0]


@pytest.mark.parametrize("name", ["qwenimage", "sd3", "wan"])
def test_a_request_in_the_middle_of_another_ones_model_call_leaves_it_as_it_was(name):
    """Either it runs at once, or it waits until that call is over."""
    case, what = CASES[name], Schedule.weak_first(0.5)
    expected = alone(case, what)
    first, second = two_pipelines(case)
    ask(case, case.elastic(first), what)
    drawn = {}

    def answer():
        try:
            drawn["second"] = draw(case, second, REQUESTS[1])
        except Exception as error:
            drawn["second"] = error

    other = threading.Thread(target=answer, daemon=True)

    def come_in(*_):
        hook.remove()
        other.start()
        other.join(2.0)

    hook = first_block(first.transformer).register_forward_pre_hook(come_in)
    drawn["first"] = draw(case, first, REQUESTS[0])
    other.join(PATIENCE)
    for error in [x for x in drawn.values() if isinstance(x, Exception)]:
        raise error
    assert_each([drawn["first"], drawn["second"]], expected)


class Stepping(diffusers.StableDiffusion3Pipeline):
    """Gives its latents back after every step, so that others may run in between."""

    @torch.no_grad()
    def __call__(self, steps, seed):
        self._guidance_scale, self._clip_skip, self._joint_attention_kwargs = 4.0, None, None
        words, null, pooled, pooled_null = self.encode_prompt(
            "red cat", None, None, max_sequence_length=6
        )
        latents = torch.randn(1, 4, 16, 16, generator=noise(seed))
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            guide, answer = self.transformer(
                hidden_states=torch.cat([latents] * 2),
                timestep=time.expand(2),
                encoder_hidden_states=torch.cat([null, words]),
                pooled_projections=torch.cat([pooled_null, pooled]),
                return_dict=False,
            )[0].chunk(2)
            velocity = guide + 4.0 * (answer - guide)
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
            yield latents


def stepping(shift):
    """Such a pipeline with a scheduler of its own."""
    parts = PIPES["sd3"].pipe().components
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return Stepping(**parts)


def test_two_runs_of_generators_that_interleave_step_by_step_each_equal_the_run_alone():
    """Without threads, with other timesteps and another number of steps each."""
    case, share, shifts = PIPES["sd3"], 0.8, (3.0, 1.0)
    expected = []
    for shift, request in zip(shifts, REQUESTS, strict=True):
        pipe = stepping(shift)
        ask(case, case.elastic(pipe), share)
        expected.append(list(pipe(*request)))
    first = stepping(shifts[0])
    second = Stepping(
        **{**first.components, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)}
    )
    ask(case, case.elastic(first), share)
    runs = [pipe(*request) for pipe, request in zip((first, second), REQUESTS, strict=True)]
    found = [[], []]
    for _ in range(max(steps for steps, _ in REQUESTS)):
        for run, latents in zip(runs, found, strict=True):
            latents += itertools.islice(run, 1)
    for latents, right in zip(found, expected, strict=True):
        assert len(latents) == len(right)
        assert torch.equal(latents[-1], right[-1])
