"""Every field of every recipe with every kind of wrong value: trained with, or refused by name."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest
from tests.conftest import WIDTH_TABLE
from tests.fuzz.drawn import drawn
from tests.wild.bounded import bounded

from ditdial.training.adapter import AdapterSettings
from ditdial.training.base import BaseSettings
from ditdial.training.classifier import ClassifierSettings
from ditdial.training.config import DataConfig, LoopConfig, OptimConfig, load_recipe
from ditdial.training.data import ImageData
from ditdial.training.loop import train
from ditdial.training.tasks import build_task
from ditdial.training.width import WidthSettings

VALUES = (
    *("'./text'", "''", "true", "1.5", "-1", "0", "1", "3", "1000000000", "1000000000000"),
    *("9223372036854775807", "1" * 400, "nan", "inf", "-inf", "1e300", "1e-300", "2020-01-01"),
    *(
        "'bf16'",
        "'fp16'",
        "'test'",
        "[]",
        "[[1]]",
        "['a']",
        "[nan]",
        "[inf, 1.0]",
        "[1000000000, 2]",
        "[-1, 0]",
        "[true]",
    ),
    *("{a = 1}", '"\\u0000"', '"a\\u0000b"', f"'{'x' * 300}'", "0x" + "f" * 5000, "[" * 2000),
)

CLASSIFIER = """
[classifier]
num_classes = 2
width = 8
feature_dim = 8
"""

SPARSE = """
[adapter]
base = "{folder}/base"
method = "sparsedit"
modules = 1
pool = 0
top = 0
group = [1, 0, 1, 0]
stage_ends = [0.5, 0.0]
stage_modes = ["grid2", "grid3"]
"""

TABLES = {
    "data": DataConfig,
    "optim": OptimConfig,
    "loop": LoopConfig,
    "base": BaseSettings,
    "adapter": AdapterSettings,
    "width": WidthSettings,
    "classifier": ClassifierSettings,
}

FIELDS = [f"{name}.{f.name}" for name, cls in TABLES.items() for f in dataclasses.fields(cls)]
KINDS = ["lora", "shared", "ddit", "ppflow", "sparsedit"]
CASES = [(field.split(".")[0], field) for field in FIELDS if not field.startswith("adapter.")]
CASES += [(kind, field) for field in FIELDS if field.startswith("adapter.") for kind in KINDS]
CASES += [("base", name) for name in ("task", "output", "seed", "data", "optim", "loop", "base")]
MARKED = [
    # A path may be that of a folder full of files, all of which are looked at.
    pytest.param(
        *case,
        marks=[pytest.mark.fuzz] if case[0] in KINDS[1:] or case[1] == "data.path" else [],
    )
    for case in CASES
]


@pytest.fixture
def recipe_of(base_recipe, adapter_recipe, recipe_with):
    """``recipe_of(kind)``: a file, and overrides that make it a recipe of that kind."""

    def find(kind):
        if kind in ("base", "data", "optim", "loop"):
            return base_recipe, []
        if kind == "width":
            return recipe_with("width", WIDTH_TABLE), []
        if kind == "classifier":
            return recipe_with("classifier", CLASSIFIER), ["data.image_size=32"]
        if kind == "sparsedit":
            return recipe_with("adapter", SPARSE), []
        name = "recipe" if kind in ("lora", "shared") else "method"
        return adapter_recipe, [f"adapter.{name}={kind}"]

    return find


def refused(path, overrides, field, value, *, trains):
    """What is wrong with how a value was refused; nothing where it was used or refused well."""
    override = f"{field}={value}"
    try:
        recipe = load_recipe(path, [*overrides, override])
        task = build_task(recipe)
        if field.startswith("data.") or trains:
            data = ImageData(recipe.data)
            if trains:
                train(recipe, task, data)
    except (ValueError, OSError, FloatingPointError) as error:
        named = field.split(".")[-1] in str(error) or isinstance(error, OSError)
        named = named or isinstance(error, FloatingPointError)
        return "" if named else f"{override[:80]}: {error}"[:300]
    except Exception as error:
        return f"{override[:80]}: {type(error).__name__}: {error}"[:300]
    return ""


def reads_the_hub(field, value):
    """Whether a value would be taken for the name of a data set on the hub."""
    return field == "data.path" and value.startswith("'x")


@pytest.mark.parametrize(("kind", "field"), MARKED, ids=lambda part: part)
def test_each_value_is_used_or_refused_by_its_name(recipe_of, kind, field):
    path, overrides = recipe_of(kind)

    def each():
        found = (
            refused(path, overrides, field, value, trains=False)
            for value in VALUES
            if not reads_the_hub(field, value)
        )
        return [told for told in found if told]

    outcome = bounded(each, seconds=120, memory=2**31)
    assert outcome.kind == "done", outcome
    assert not outcome.value


@pytest.mark.fuzz
@pytest.mark.parametrize(("kind", "field"), drawn(CASES, 100, "any recipe"), ids=lambda part: part)
def test_each_value_that_is_not_refused_trains(recipe_of, tmp_path, kind, field):
    path, overrides = recipe_of(kind)
    small = ["loop.images=32"] * (field != "loop.images")

    def each():
        found = []
        for place, value in enumerate(VALUES):
            endless = (
                field in ("loop.images", "loop.compile")
                and refused(path, overrides, field, value, trains=False) == ""
            )
            if endless or field == "output":
                continue
            output = [f"output='{tmp_path}/run-{place}'", *small]
            found.append(refused(path, [*overrides, *output], field, value, trains=True))
        return [told for told in found if told]

    outcome = bounded(each, seconds=200, memory=2**32)
    assert outcome.kind == "done", outcome
    assert not outcome.value


def test_every_table_of_a_recipe_is_tried(recipe_of):
    for kind in ("base", "width", "classifier", "sparsedit", "lora"):
        path, _ = recipe_of(kind)
        tables = tomllib.loads(path.read_text()).items()
        assert {name for name, value in tables if isinstance(value, dict)} <= TABLES.keys()
