"""What a model has on it is looked for where somebody may have changed it, and nowhere else."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from accelerate import cpu_offload
from tests.backbones.pipes import PIPES, PROMPTS, STEPS

from ditdial import FlexiDiT, Mode, Schedule, elastify
from ditdial.runtime.surgery import Surgery

NAMES = ("dit", "pixart-alpha", "sd3", "flux", "wan", "latte", "z-image", "lumina2")
WITH_CALLBACK = ("sd3", "flux", "wan")


@pytest.fixture
def looks(monkeypatch):
    """One entry for each time that a model was looked over."""
    seen = []
    stock = Surgery.look_over

    def looking(self, model):
        seen.append(model)
        stock(self, model)

    monkeypatch.setattr(Surgery, "look_over", looking)
    return seen


def coarse(name):
    case = PIPES[name]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.constant(Mode(2))
    handle.merge = True
    return case, pipe, handle


@pytest.mark.parametrize("name", NAMES)
def test_once_for_each_call_of_a_pipeline(name, looks):
    case, pipe, _ = coarse(name)
    first = case.draw(pipe)
    assert len(looks) == 1
    torch.testing.assert_close(case.draw(pipe), first, rtol=0, atol=0)
    assert len(looks) == 2


@pytest.mark.parametrize("name", WITH_CALLBACK)
def test_what_a_callback_changes_counts_from_the_next_step_on(name, looks):
    case, pipe, handle = coarse(name)
    layer = next(iter(handle._engine.surgery.pairs.values()))[0]
    stock, expected = layer.weight.detach().clone(), []

    def drawn(*, merge):
        handle.merge = merge
        with torch.no_grad():
            layer.weight.copy_(stock)

        def callback(pipe, step, time, kwargs):
            if step == 0:
                with torch.no_grad():
                    layer.weight.mul_(1.5)
            return kwargs

        return case.draw(pipe, callback_on_step_end=callback)

    expected, looks[:] = drawn(merge=False), []
    found = drawn(merge=True)
    assert len(looks) == STEPS * (1 + case.two_calls)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.weight.copy_(stock)
    assert not torch.allclose(case.draw(pipe), expected, atol=1e-4)


def test_at_every_call_outside_a_pipeline(looks):
    case, pipe, handle = coarse("dit")
    case.draw(pipe)
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.full((2,), 3),
        "class_labels": torch.tensor([1, 2]),
    }
    looks.clear()
    with torch.no_grad():
        for _ in range(3):
            handle.model(**call)
    assert len(looks) == 3


@pytest.mark.parametrize(
    ("module", "times"),
    [
        ("diffusers.pipelines.dit.pipeline_dit", 1),
        ("diffusers.modular_pipelines.modular_pipeline", STEPS),  # runs blocks of the user's
        ("my_pipelines", STEPS),
    ],
)
def test_at_every_call_of_a_pipeline_that_may_run_a_users_code(looks, module, times):
    case, pipe, _ = coarse("dit")
    stock = type(pipe).__call__.__wrapped__
    own = types.FunctionType(
        stock.__code__,
        {**stock.__globals__, "__name__": module},
        "__call__",
        stock.__defaults__,
        stock.__closure__,
    )
    pipe.__class__ = type("Own", (type(pipe),), {"__call__": torch.no_grad()(own)})
    case.draw(pipe)
    assert len(looks) == times


def test_at_every_call_where_the_scheduler_is_not_as_diffusers_made_it(looks):
    case, pipe, _ = coarse("dit")
    pipe.scheduler.step = pipe.scheduler.step
    case.draw(pipe)
    assert len(looks) == STEPS


def test_at_every_call_of_an_offloaded_model(looks):
    case, pipe, handle = coarse("dit")
    cpu_offload(handle.model, execution_device=torch.device("cpu"))
    case.draw(pipe)
    assert len(looks) == STEPS


def test_a_run_in_a_run_has_a_look_of_its_own(looks):
    """A pipeline's call inside another's, by the same scheduler's class, is not the same call."""
    case, pipe, _ = coarse("dit")
    other_case, other, _ = coarse("sd3")
    looks.clear()

    def callback(pipe_, step, time, kwargs):
        case.draw(pipe)
        return kwargs

    other_case.draw(other, callback_on_step_end=callback)
    assert len(looks) == 2 * STEPS


def test_the_call_is_not_kept_alive():
    case, pipe, handle = coarse("sd3")
    case.draw(pipe, PROMPTS[:1])
    call = handle._engine.timeline.pipeline_call
    assert call is not None
    assert not any(isinstance(value, types.FrameType) for value in vars(call).values())
    assert not call.goes_on(pipe.scheduler.timesteps)


def test_a_copy_knows_of_no_call():
    case, pipe, handle = coarse("dit")
    case.draw(pipe)
    copied = copy.deepcopy(handle.model)
    assert copied._elastic_engine.timeline.pipeline_call is None


def test_wrong_arguments_are_told_by_name(make_model, make_call):
    model, call = make_model(), make_call()
    x = call["hidden_states"]
    wrong: dict[str, tuple[tuple, dict]] = {
        "missing": ((), {}),
        "multiple": ((x,), {"hidden_states": x}),
        "unexpected": ((x,), {"noise": 1}),
        "too many": ((x, *[None] * 9), {}),
    }
    elastify(model, FlexiDiT())
    for word, (args, kwargs) in wrong.items():
        with pytest.raises(TypeError, match=word):
            model(*args, **kwargs)
    torch.testing.assert_close(
        model(call["hidden_states"], call["timestep"], call["class_labels"]).sample,
        model(**call).sample,
        rtol=0,
        atol=0,
    )
