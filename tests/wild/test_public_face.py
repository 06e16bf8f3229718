"""What a user types, spelled wrong or of the wrong kind; and what a user misses."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from tests.backbones.pipes import PIPES
from tests.wild import hub
from tests.wild.pictures import noise

from ditdial import (
    FULL,
    Adapter,
    Calibration,
    DDiTController,
    FlexiDiT,
    Mode,
    Schedule,
    Segment,
    elastify,
)
from ditdial.reference import reference_adapter

WEAK = Mode(2)


@pytest.mark.parametrize("name", ["bugdet", "merge", "schedul", "pipe"])
def test_a_handle_takes_no_attribute_that_it_does_not_have(make_elastic, name):
    handle = make_elastic()
    with pytest.raises(AttributeError):
        setattr(handle, name, 0.5)


def test_a_handle_takes_those_that_it_has(make_elastic):
    handle = make_elastic()
    handle.budget = 0.8
    handle.schedule = Schedule.weak_first(0.5)
    assert handle.budget is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", None),
        ("budget", "0.5"),
        ("budget", [0.5]),
        ("budget", WEAK),
        ("schedule", WEAK),
        ("schedule", "weak"),
        ("schedule", 0.5),
        ("schedule", None),
        ("controller", 0.5),
    ],
    ids=lambda value: str(value),
)
def test_a_value_of_another_type_is_refused_by_name(make_elastic, name, value):
    handle = make_elastic()
    with pytest.raises(ValueError, match=rf"{name} = .*legal"):
        setattr(handle, name, value)
    assert handle.schedule == Schedule.constant(FULL)


@pytest.mark.parametrize(
    "adapter", [3, None, FlexiDiT, [FlexiDiT], 0.5], ids=lambda x: repr(x)[:24]
)
def test_what_is_no_adapter_and_no_method_is_refused_by_name(make_model, assert_stock, adapter):
    model = make_model()
    with pytest.raises(ValueError, match=r"adapter = .*legal"):
        elastify(model, adapter)
    assert_stock(model, make_model())


def test_a_revision_of_a_hub_id_is_the_one_that_is_read(
    make_elastic, make_model, make_call, output, monkeypatch, tmp_path
):
    folders = {}
    for revision, rank in (("main", 4), ("v1", 2)):
        handle = make_elastic(rank=rank)
        folders[revision] = handle.adapter(revision=revision).save_pretrained(tmp_path / revision)
    hub.keep(monkeypatch, tmp_path / "cache", "owner/name", folders)
    assert Adapter.from_pretrained("owner/name").notes == {"revision": "main"}
    handle = elastify(make_model(), "owner/name", revision="v1")
    expected = elastify(make_model(), folders["v1"])
    assert handle.method.rank == 2
    with handle.using(WEAK), expected.using(WEAK):
        assert torch.equal(output(handle.model, make_call()), output(expected.model, make_call()))


def test_a_calibration_is_saved_into_a_folder_that_is_not_there_yet(tmp_path):
    calibration = Adapter.from_pretrained(reference_adapter()).calibration
    assert calibration is not None
    calibration.save(tmp_path / "not" / "there")
    assert (tmp_path / "not" / "there" / "calibration.json").is_file()


def test_a_calibration_is_saved_as_the_file_that_is_named(tmp_path):
    calibration = Adapter.from_pretrained(reference_adapter()).calibration
    assert calibration is not None
    saved = calibration.save(tmp_path / "not" / "there.json")
    assert Calibration.load(saved) == calibration
    assert json.loads((tmp_path / "not" / "there.json").read_text())


def levels(seed):
    return sorted(torch.rand(3, generator=noise(seed)).tolist(), reverse=True)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.constant(FULL),
        Schedule.constant(WEAK),
        Schedule([Segment(start=1, stop=0.5, gain=0), Segment(start=0.5, stop=0, mode=WEAK)]),
        Schedule.weak_guidance_below(0.7),
    ],
    ids=["full", "weak", "no guidance", "weak guidance"],
)
def test_a_schedule_comes_back_from_json_as_it_was(schedule):
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_a_schedule_with_every_guide_given_comes_back_from_json_as_it_was():
    weak_first = Schedule.weak_first(0.5, guide_fraction=0.7)
    assert Schedule.from_json(weak_first.to_json()) == weak_first
    for seed in range(5):
        edges = [1.0, *levels(seed), 0.0]
        schedule = Schedule(
            Segment(start=start, stop=stop, mode=FULL, guide=WEAK, guidance="weak", gain=0.4)
            for start, stop in zip(edges, edges[1:], strict=False)
        )
        assert Schedule.from_json(schedule.to_json()) == schedule


class OwnScheduler(diffusers.FlowMatchEulerDiscreteScheduler):
    """A user's own kind of a known scheduler."""


def test_a_subclass_of_a_flow_scheduler_is_a_flow_scheduler_wherever_it_is_asked():
    case = PIPES["sd3"]
    expected, found = (
        with_clean_latents(case, scheduler)
        for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler, OwnScheduler)
    )
    assert torch.equal(found, expected)


def with_clean_latents(case, scheduler_class):
    """What a controller gives that looks at predicted clean latents."""
    pipe = case.pipe()
    pipe.scheduler = scheduler_class(shift=3.0)
    handle = case.elastic(pipe, scales=(2,))
    handle.controller = DDiTController(tau=1.0, coarse=(WEAK,), order=1, signal="clean")
    return case.draw(pipe)
