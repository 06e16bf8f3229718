"""A piece of a schedule: its levels, what becomes of the scheduler, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ditdial.evaluation.stages import Piece, check_scheduler, path_of

FLOW_UNIPC = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "karras": lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "terminal": lambda: FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW_UNIPC),
    "dpm": lambda: DPMSolverMultistepScheduler(),
    "dpm-sigma-min": lambda: DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"),
}
each = pytest.mark.parametrize("name", SCHEDULERS)
N = 10


def cut(name, **piece):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(N)
    stock = copy.deepcopy(scheduler)
    return stock, scheduler, Piece(whole=N, **piece).cut(scheduler)


def levels(scheduler):
    """Noise levels of all steps, and 0."""
    if path_of(scheduler).kind == "flow_prediction":
        return [*scheduler.sigmas[:-1].tolist(), 0.0]
    return [*(scheduler.timesteps / 1000).tolist(), 0.0]


@each
def test_the_whole_schedule_is_a_piece_of_itself(name):
    for piece in ({"steps": N}, {"steps": N, "stop": 0.0}):
        stock, found, told = cut(name, **piece)
        torch.testing.assert_close(found.sigmas, stock.sigmas, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.timesteps, stock.timesteps, rtol=1e-6, atol=0)
        assert told == pytest.approx(levels(stock))
        assert found.num_inference_steps == N


@each
@pytest.mark.parametrize("first", [1, 4, 9])
def test_two_pieces_that_meet_at_a_level_are_the_schedule(name, first):
    stock, coarse, told = cut(name, steps=first)
    _, fine, rest = cut(name, steps=N - first, start=told[-1], stop=0.0)
    assert told[-1] == rest[0] == pytest.approx(levels(stock)[first])
    times = torch.cat([coarse.timesteps, fine.timesteps])
    torch.testing.assert_close(times, stock.timesteps, rtol=1e-6, atol=0)
    sigmas = torch.cat([coarse.sigmas[:-1], fine.sigmas])
    torch.testing.assert_close(sigmas, stock.sigmas, rtol=1e-5, atol=1e-7)
    assert coarse.sigmas[-1] == fine.sigmas[0] > 0


@each
def test_a_piece_starts_and_ends_at_the_levels_that_are_asked_for(name):
    _, found, told = cut(name, steps=3, start=0.77, stop=0.31)
    assert (told[0], told[-1], len(told)) == (0.77, 0.31, 4)
    assert (np.diff(told) < 0).all()
    assert found.timesteps.shape == (3,)
    assert found.timesteps[0] == pytest.approx(770, abs=0.5)
    scales = [path_of(found).scales(level) for level in told]
    is_flow = path_of(found).kind == "flow_prediction"
    expected = [s if is_flow else s / a for a, s in scales]
    assert found.sigmas.tolist() == pytest.approx(expected)


def test_steps_are_even_along_the_schedule():
    """A third of the way from the second step to the fifth is the third one."""
    stock, found, told = cut("shifted", steps=3, start=None, stop=None)
    assert told == pytest.approx(stock.sigmas[:4].tolist())
    start, stop = stock.sigmas[1].item(), stock.sigmas[7].item()
    _, found, told = cut("shifted", steps=3, start=start, stop=stop)
    assert told == pytest.approx(stock.sigmas[[1, 3, 5, 7]].tolist())
    torch.testing.assert_close(found.timesteps, stock.timesteps[[1, 3, 5]])


@each
@pytest.mark.parametrize(
    "piece", [{"start": 0.3, "stop": 0.5}, {"start": 0.4, "stop": 0.4}, {"stop": 1.0}]
)
def test_a_piece_falls(name, piece):
    with pytest.raises(ValueError, match=r"noise levels of 2 steps from .*; legal: falling ones"):
        cut(name, steps=2, **piece)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        EulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ],
    ids=lambda each: type(each).__name__,
)
def test_schedulers_without_levels_to_choose_among_are_refused(scheduler):
    with pytest.raises(ValueError, match=f"scheduler {type(scheduler).__name__}; legal"):
        check_scheduler(scheduler)


@each
def test_schedulers_that_fit(name):
    check_scheduler(SCHEDULERS[name]())
