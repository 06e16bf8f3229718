"""A budget is kept by every diffusers pipeline of a supported class, and the plan is what runs."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.wild.every_pipeline import FAMILIES, Built, every_pipeline

from ditdial import FlexiDiT, elastify
from ditdial.backbones import BACKBONES
from ditdial.runtime.model_class import engine_of
from ditdial.runtime.tensors import is_new

BUDGETS = (0.3, 0.6, 0.9)
STEPS = {1.0: 8, 0.6: 12, 0.3: 24}
"""Of the whole schedule by strength: seven or eight of them are made."""

REFUSED = {
    "Flux2KleinKVPipeline": (
        r"kv_cache_mode = 'extract' .*; legal with them: full mode",
        "the keys and values of the reference pictures are kept, block by block, in full mode",
    ),
    "ZImageOmniPipeline": (
        r"siglip_feat_dim = 24; legal: None",
        "its transformer takes lists of pictures and of their features in each row",
    ),
}
"""Pipelines that are refused by name before their first step: the error, and its reason."""

PLANNED_AFTERWARDS = {
    "VisualClozeGenerationPipeline": "shifts its schedule by the tokens of all its pictures",
    "VisualClozePipeline": "makes two runs, of which the second is reported",
}
"""Pipelines whose noise levels no plan knows beforehand: the reason. Given them, it is the same."""


@dataclass(frozen=True)
class Cell:
    """One pipeline, strength and budget."""

    name: str
    strength: float
    budget: float

    def __str__(self) -> str:
        return f"{self.name} {self.strength} {self.budget}"


def cells_of(name):
    """All cells of one pipeline."""
    strengths = STEPS if Built(name).has_strength else (1.0,)
    return [Cell(name, strength, budget) for strength in strengths for budget in BUDGETS]


CELLS = [cell for name in every_pipeline() for cell in cells_of(name)]
SAMPLE = [random.Random(name).choice(cells_of(name)) for name in every_pipeline()]


@dataclass
class Sizes:
    """What each call's cost depends on, as its backbone reads it."""

    of: list[Any] = field(default_factory=list)

    def __call__(self, model: Any, call: Any, output: Any) -> None:
        self.of.append(engine_of(model).wiring.backbone.size(model, call))


def elastic(pipe, component=None):
    """Make a pipeline elastic, with noise on the new tensors."""
    torch.manual_seed(2)
    handle = elastify(pipe, FlexiDiT(rank=3), component=component)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in handle.model.named_parameters():
            if is_new(name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return handle


def keeping(handle, budget, draw):
    """Draw within a budget, or within the least one above it that the model's size allows."""
    for _ in range(3):  # the model's usual size may allow less than that of the run, and once more
        try:
            handle.budget = budget
            draw()
        except ValueError as error:
            least = re.match(r"budget = .*; legal: (\d\.\d+) \(", str(error))
            if least is None:
                raise
            budget = float(least[1])
        else:
            return budget
    raise AssertionError(f"no budget was legal, {budget} included")


def modes_of(step):
    """Modes of the branches of a step, which were in one call or in several."""
    first, *others = step
    if others:
        return first.mode, others[0].mode
    return first.mode, first.guide if first.guided else None


def facts_of(handle, sizes):
    """What a plan is told of the size of calls: that of the first, and the last one's text."""
    grid, text, *rest = sizes[0]
    facts = {"grid": grid, "text_tokens": (text, sizes[-1][1])}
    if rest and "Lumina2" not in handle.backbone.model_class:  # the padding of its text
        facts["token_times" if isinstance(rest[0], bool) else "reference_tokens"] = rest[0]
    return facts


def assert_as_planned(handle, sizes, budget):
    """The report keeps the budget, and is what a plan says that is told the run's facts.

    Returns:
        These facts, with the noise levels.
    """
    report = handle.report()
    assert report.ratio <= budget
    levels = list(dict.fromkeys(call.level for call in report.calls))
    steps = [[call for call in report.calls if call.level == level] for level in levels]
    facts = facts_of(handle, sizes[-len(report.calls) :])
    facts["guidance"] = [sum(call.passes for call in step) for step in steps]
    plan = handle.plan_levels(levels, **facts)
    assert [modes_of(step) for step in steps] == [(step.mode, step.guide) for step in plan.steps]
    assert report.ratio == pytest.approx(plan.ratio, rel=1e-3)
    return facts | {"levels": levels}


def check(cell, elastic=elastic):
    """Run one cell, of a pipeline that is made elastic in some way."""
    built, steps = Built(cell.name), STEPS[cell.strength]
    pipe = built.pipe()
    handle, sizes = elastic(pipe), Sizes()
    engine_of(handle.model).observers.append(sizes)
    arguments = built.call(steps=steps, strength=cell.strength)
    budget = keeping(handle, cell.budget, lambda: pipe(**arguments))
    facts = assert_as_planned(handle, sizes.of, budget)
    assert len(facts["levels"]) >= 6
    if cell.name not in PLANNED_AFTERWARDS:
        levels = facts.pop("levels")
        before = handle.plan(steps, strength=cell.strength, **facts)
        assert [step.level for step in before.steps] == pytest.approx(levels, abs=1e-4)
        assert before.ratio == pytest.approx(handle.report().ratio, rel=1e-3)


def check_or_refusal(cell):
    """Run one cell, or see it refused before its first step."""
    if cell.name not in REFUSED:
        return check(cell)
    message, _ = REFUSED[cell.name]
    with pytest.raises(ValueError, match=message):
        check(cell)


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_a_budget_holds_in_every_pipeline(cell):
    check_or_refusal(cell)


@pytest.mark.fuzz
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_budget_holds_in_every_pipeline_at_every_strength(cell):
    check_or_refusal(cell)


def test_the_list_is_of_all_classes_and_its_exceptions_are_in_it():
    assert set(FAMILIES) == set(every_pipeline().values()) == set(BACKBONES)
    assert {*REFUSED, *PLANNED_AFTERWARDS} <= set(every_pipeline())


def test_few_pipelines_are_refused_and_none_that_makes_a_picture_of_text_or_of_another():
    refused = [cell for cell in CELLS if cell.name in REFUSED]
    assert len(refused) <= len(CELLS) / 10
    for name in REFUSED:
        assert "Img2Img" not in name
        assert "image" in Built(name).takes  # to edit
