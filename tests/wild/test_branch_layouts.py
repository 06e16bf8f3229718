"""Guidance branches in a layout that is not the stock one: told apart, or refused by name."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tests.backbones.pipes import PIPES, PROMPTS
from tests.wild import modular
from tests.wild.pictures import quiet

from ditdial import FULL, Mode, Schedule, Segment

WEAK = Mode(2)
COARSE_GUIDE = Schedule.constant(FULL, guide=WEAK)
NO_GUIDE = Schedule([Segment(start=1, stop=0, gain=0)])
WEAK_GUIDANCE = Schedule.weak_first(0.0, guidance="weak")
PAG = PIPES["pixart-sigma"]


def unless_refused(draw):
    """What a run gives; None if our own error refuses it (a bare one goes through)."""
    try:
        return draw()
    except (ValueError, RuntimeError) as error:
        if "legal" not in str(error):
            raise
        return None


def perturbed():
    """Perturbed-attention guidance: rows of the null, of the prompt, and of the prompt again."""
    parts = PAG.pipe().components
    return quiet(diffusers.PixArtSigmaPAGPipeline(**parts, pag_applied_layers="blocks.1"))


def relative(found, expected):
    """Distance of two pictures in units of their spread."""
    return ((found - expected).norm() / (expected - expected.mean()).norm()).item()


def test_the_coarse_guide_of_three_row_groups_acts_or_is_refused():
    pipe = perturbed()
    expected = PAG.draw(pipe)
    handle = PAG.elastic(pipe)
    handle.schedule = COARSE_GUIDE
    found = unless_refused(lambda: PAG.draw(pipe))
    if found is not None:
        assert {call.guide for call in handle.report().calls} == {WEAK}
        assert handle.report().ratio < 0.9
        assert relative(found, expected) > 1e-3


def test_prompts_from_equal_noise_in_three_row_groups_do_not_mix_branches():
    pipe = perturbed()
    handle = PAG.elastic(pipe)
    handle.schedule = COARSE_GUIDE
    together = unless_refused(lambda: PAG.draw(pipe, PROMPTS, (11, 11)))
    if together is None:
        return
    for index, prompt in enumerate(PROMPTS):
        alone = PAG.draw(pipe, [prompt], [11])
        assert relative(together[index], alone[0]) < 1e-3


def test_full_mode_of_three_row_groups_is_the_stock_picture():
    pipe = perturbed()
    expected = PAG.draw(pipe, PROMPTS, (11, 11))
    PAG.elastic(pipe)
    assert torch.equal(PAG.draw(pipe, PROMPTS, (11, 11)), expected)


@pytest.mark.filterwarnings("ignore:the schedule asks for weak guidance")
@pytest.mark.parametrize(
    "schedule",
    [COARSE_GUIDE, NO_GUIDE, WEAK_GUIDANCE],
    ids=["coarse guide", "gain 0", "weak guidance"],
)
def test_modular_blocks_give_the_picture_of_the_stock_pipeline_or_refuse(schedule):
    stock = PIPES["sd3"].pipe()
    PIPES["sd3"].elastic(stock).schedule = schedule
    expected = modular.draw_in_one_batch(stock)
    pipe = modular.blocks()
    handle = PIPES["sd3"].elastic(pipe)
    handle.schedule = schedule
    found = unless_refused(lambda: modular.draw(pipe))
    if found is not None:
        assert handle.report().ratio < 0.9
        modular.assert_same_picture(found, expected)


def test_modular_blocks_in_full_mode_give_their_stock_picture_bit_for_bit():
    expected = modular.draw(modular.blocks())
    pipe = modular.blocks()
    PIPES["sd3"].elastic(pipe)
    assert torch.equal(modular.draw(pipe), expected)
    modular.assert_same_picture(expected, modular.draw_in_one_batch(PIPES["sd3"].pipe()))


def test_a_calibration_through_modular_blocks_is_that_of_the_stock_pipeline():
    measured = []
    for pipe, draw in (
        (PIPES["sd3"].pipe(), modular.draw_in_one_batch),
        (modular.blocks(), modular.draw),
    ):
        handle = PIPES["sd3"].elastic(pipe)
        facts = {"guidance_scale": modular.SCALE, "rounds": 1}
        measured.append(handle.calibrate(lambda n, pipe=pipe, draw=draw: draw(pipe), **facts))
    stock, blocks = ([point.step_error for point in each.points] for each in measured)
    torch.testing.assert_close(torch.tensor(blocks), torch.tensor(stock), rtol=1e-3, atol=1e-9)
