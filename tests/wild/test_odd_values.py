"""Values of the wrong kind: public settings refuse them by name, or take them as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import types

import pytest

import ditdial
from ditdial import (
    FULL,
    METHODS,
    Adapter,
    Calibration,
    Combined,
    FlexiDiT,
    Mode,
    Schedule,
    SparseDiT,
    elastify,
    handle_of,
)
from ditdial.plan.choice import Choice
from ditdial.reference import load_reference, reference_adapter

ODD = (
    *(None, "x", "", b"x", -1, 0, 2, 0.5, -0.5, math.nan, math.inf, 1j, True),
    *([], (), {}, {1, 2}, [None], ("x",), (1, 2), object(), Mode, Mode(2)),
)

NEEDED = {
    "Account": {"share": 0.5},
    "Budget": {"share": 0.5},
    "Combined": {"parts": (FlexiDiT(), SparseDiT())},
    "DDiTController": {"tau": 1.0},
    "Schedule": {"segments": Schedule.constant().segments},
    "Segment": {"start": 1, "stop": 0},
}
SETTINGS = {"Execution", "Mode", *NEEDED, *(method.__name__ for method in METHODS.values())}
RECORDS = {"Adapter", "Calibration", "Plan", "Report"}
"""What is measured, saved or told; the first two are tried below."""

OTHERS = {"Backbone", "Controller", "Handle", "Method", "PixelDiTPipeline"}
"""What is no record and takes no settings when it is made."""


class Legal(ValueError):
    """A refusal that says what is legal."""


def named(make):
    """Raise `Legal` where something says what is legal, and what it raises otherwise."""
    try:
        make()
    except ValueError as error:
        if "legal: " in str(error):
            raise Legal from error
        raise


def refused_by_name(make, field, value):
    """An odd value is legal, or it is refused with its name and what is legal."""
    try:
        make()
    except ValueError as error:
        text = str(error)
        assert "legal: " in text, f"{field} = {value!r}: {text}"
        names = (field, field.removesuffix("s"), "budget")
        assert any(name in text for name in names), f"{field} = {value!r}: {text}"
    except Exception as error:
        pytest.fail(f"{field} = {value!r}: {type(error).__name__}: {error}")


def test_every_public_class_is_tried():
    found = {name for name in ditdial.__all__ if isinstance(getattr(ditdial, name), type)}
    assert found == SETTINGS | RECORDS | OTHERS


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings(name):
    cls, needed = getattr(ditdial, name), NEEDED.get(name, {})
    for field in inspect.signature(cls).parameters:
        for value in ODD:
            refused_by_name(lambda f=field, v=value: cls(**{**needed, f: v}), field, value)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_no_setting_takes_what_is_nothing_of_the_kind(name):
    cls, needed = getattr(ditdial, name), NEEDED.get(name, {})
    for field in inspect.signature(cls).parameters:
        for value in (b"x", 1j, object(), {1, 2}, types):
            with pytest.raises(ValueError, match="legal"):
                cls(**{**needed, field: value})


@pytest.fixture(scope="module")
def pipe():
    pipe = load_reference()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def handle(pipe):
    with elastify(pipe, reference_adapter()) as handle:
        yield handle


@pytest.mark.parametrize("record", [Adapter, Calibration])
def test_records(record):
    adapter = Adapter.from_pretrained(reference_adapter())
    known = adapter if record is Adapter else adapter.calibration
    for field in dataclasses.fields(record):
        for value in (b"x", 1j, object(), "x", [None], Mode):
            with pytest.raises(ValueError, match="legal"):
                dataclasses.replace(known, **{field.name: value})


@pytest.mark.parametrize("name", ["plan", "plan_levels", "frontier", "using"])
def test_questions_to_the_handle(handle, name):
    asked = {"using": {"mode": FULL}, "plan_levels": {"levels": [1.0, 0.5]}}
    needed = asked.get(name, {"num_inference_steps": 3})
    for field in inspect.signature(getattr(handle, name)).parameters:
        for value in ODD:

            def ask(field=field, value=value):
                found = getattr(handle, name)(**{**needed, field: value})
                if name == "using":
                    with found:
                        pass

            if not (field == "levels" and value in ([], ())):  # "a plan needs a timestep"
                refused_by_name(ask, field, value)


@pytest.mark.parametrize("field", ["schedule", "controller", "budget", "calibration", "execution"])
def test_wishes_of_the_handle(handle, field):
    for value in ODD:
        refused_by_name(lambda v=value: setattr(handle, field, v), field, value)


def test_arguments_of_the_pipeline(pipe):
    for field in ("class_labels", "guidance_scale", "num_inference_steps", "seeds", "generator"):
        for value in ODD:
            arguments = {"class_labels": [1], "num_inference_steps": 1, field: value}
            refused_by_name(lambda a=arguments: pipe(**a), field, value)


STEP = Schedule.constant().segments[0].choice
MAKERS = {
    "constant": {},
    "throughout": {"choice": STEP},
    "weak_first": {"fraction": 0.5},
    "weak_guidance_below": {"level": 0.5},
    "of_steps": {"levels": [1.0, 0.5], "choices": [STEP, Choice(mode=Mode(2))]},
}


@pytest.mark.parametrize("name", MAKERS)
def test_makers_of_schedules(name):
    make = getattr(Schedule, name)
    for field in inspect.signature(make).parameters:
        for value in ODD:
            with contextlib.suppress(Legal):
                named(lambda f=field, v=value: make(**{**MAKERS[name], f: v}))


@pytest.mark.parametrize("text", [None, 3, b"x", [], Mode])
@pytest.mark.parametrize("made", [Schedule, Calibration])
def test_readers_of_text(made, text):
    with pytest.raises(ValueError, match=r"text = .*; legal: a text"):
        made.from_json(text)


@pytest.mark.parametrize("value", [3, "transformer_3", [], Mode, 1j])
def test_components(pipe, value):
    with pytest.raises(ValueError, match=r"component = .*; legal"):
        handle_of(pipe, component=value)
    with pytest.raises(ValueError, match=r"component = .*; legal"):
        elastify(pipe, FlexiDiT(), component=value)


def test_a_class_is_no_method(pipe):
    for source in (FlexiDiT, Combined, Mode):
        with pytest.raises(ValueError, match=r"adapter = .*; legal: an"):
            elastify(pipe, source)


SCHEDULES = (
    Schedule.constant(),
    Schedule.weak_first(1 / 3),
    Schedule.weak_first(0.2, 4, guide_fraction=2 / 3, guidance="weak", gain=1 / 7),
    Schedule.weak_guidance_below(0.1 + 0.2, Mode((2, 1, 1))),
    Schedule.constant(Mode(width=0.37, token_keep=0.51), guide=Mode(2, token_grid=(3, 5))),
    Schedule.of_steps([0.9, 2 / 3, 1e-9], [STEP, Choice(mode=Mode(2), gain=0), STEP]),
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_what_its_json_says(schedule):
    """All fields, and floats to the last bit."""
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.to_json() == schedule.to_json()
