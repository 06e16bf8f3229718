"""Several schedules in turn: each draws what it would draw alone, and is judged on it."""

from __future__ import annotations

import json

import pytest
import torch

from ditdial import Mode, Schedule, elastify
from ditdial.evaluation.contenders import Contender, Pictures, draw_in_turn
from ditdial.evaluation.measure import measure
from ditdial.reference import load_reference, reference_adapter, reference_judge
from ditdial.sampling.batches import sample

WEAK = Schedule.weak_first(0.5)


@pytest.fixture(scope="module")
def elastic():
    pipe = load_reference()
    return pipe, elastify(pipe, reference_adapter("lora"))


def test_each_contender_draws_as_if_alone(elastic):
    pipe, handle = elastic
    pictures = Pictures.counted(pipe, 5, 7)
    assert (pictures.labels, pictures.seeds) == ([0, 1, 2, 3, 4], [7, 8, 9, 10, 11])
    rows = [Contender(WEAK, 1.3), Contender(Schedule.constant(), 1.0)]
    draw_in_turn(pipe, handle, rows, pictures, steps=4, batch_size=2)
    for row in rows:
        handle.schedule = row.schedule
        alone = sample(pipe, *vars(pictures).values(), guidance_scale=row.scale, steps=4)
        torch.testing.assert_close(row.images, alone.images, atol=1e-4, rtol=0)
        assert row.ratio == row.plan.ratio
        assert row.seconds > 0
    assert [step.guide is None for step in rows[1].plan.steps] == [True] * 4
    assert {step.mode for step in rows[0].plan.steps} > {Mode(2)}


def test_a_row_of_results_has_facts_and_figures(elastic):
    pipe, handle = elastic
    row = measure(
        pipe, handle, reference_judge(), WEAK, scale=1.3, steps=4, images=20, sets=2, batch_size=8
    )
    assert (row["steps"], row["images"], row["sets"], row["scale"]) == (4, 20, 2, 1.3)
    handle.schedule = WEAK
    plan = handle.plan(4)
    assert (row["ratio"], row["gmacs"]) == (plan.ratio, plan.macs / 1e9)
    assert Schedule.from_dict(row["schedule"]) == WEAK
    assert len(row["psnr_sets"]) == 2
    assert 10 < row["psnr"] < 60
    assert 0 < row["time_ratio"] < 2
    json.dumps(row)


def test_without_a_full_run_there_is_no_likeness(elastic):
    pipe, handle = elastic
    facts = {"scale": 1.0, "steps": 2, "images": 4, "sets": 2, "compare": False}
    row = measure(pipe, handle, reference_judge(), WEAK, **facts)
    assert row["time_ratio"] is None
    assert "psnr" not in row
    assert "frechet" in row
