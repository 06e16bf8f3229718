"""Recipes: what is wrong in one is named, with its value and what would be legal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditdial.training.adapter import AdapterSettings
from ditdial.training.base import BaseSettings
from ditdial.training.config import DataConfig, LoopConfig, OptimConfig, from_table, load_recipe
from ditdial.training.optim import learning_rate

RECIPES = Path(__file__).parents[2] / "recipes"
GOOD = """
task = "base"
seed = 3

[data]
path = "somewhere"
std = 1

[base]
num_layers = 2

[loop]
images = 100
batch_size = 16
"""


@pytest.fixture
def write(tmp_path):
    def make(text=GOOD):
        path = tmp_path / "tiny.toml"
        path.write_text(text)
        return path

    return make


def test_a_recipe_is_read_with_its_defaults(write):
    recipe = load_recipe(write())
    assert (recipe.task, recipe.seed, recipe.output) == ("base", 3, "runs/tiny")
    assert recipe.data == DataConfig(path="somewhere", std=1.0)
    assert isinstance(recipe.data.std, float)
    assert recipe.settings == {"num_layers": 2}
    assert recipe.optim == OptimConfig()
    assert recipe.loop.steps == 7
    assert json.loads(recipe.to_json())["loop"]["images"] == 100


def test_overrides(write):
    changes = ["data.path=other place", "loop.images=32", "seed=5", "optim.lr=1e-3", "output=x"]
    recipe = load_recipe(write(), [*changes, "loop.compile=true", "base.num_layers=4"])
    assert (recipe.data.path, recipe.loop.images, recipe.seed) == ("other place", 32, 5)
    assert (recipe.optim.lr, recipe.output, recipe.loop.compile) == (1e-3, "x", True)
    assert recipe.settings == {"num_layers": 4}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_legal(path):
    recipe = load_recipe(path)
    tasks = {"base": BaseSettings, "adapter": AdapterSettings}
    if recipe.task in tasks:
        from_table(tasks[recipe.task], recipe.settings, recipe.task)
    assert recipe.optim.warmup_steps < recipe.loop.steps


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.colour=1", r"\[data\] has no key 'colour'; legal keys: channels, .*image_size"),
        ("loop.batchsize=1", r"\[loop\] has no key 'batchsize'; legal keys: batch_size"),
        ("optim.momentum=1", r"\[optim\] has no key 'momentum'; legal keys: beta2"),
        ("optimizer.lr=1", r"unknown entries \['optimizer'\]; legal: \['base', 'data', 'loop'"),
        ("loop.images=many", r"\[loop\] images = 'many' is a str; legal: int"),
        ("loop.images=1.5", r"\[loop\] images = 1.5 is a float; legal: int"),
        ("loop.images=true", r"\[loop\] images = True is a bool; legal: int"),
        ("loop.compile=1", r"\[loop\] compile = 1 is a int; legal: bool"),
        ("data.path=3", r"\[data\] path = 3 is a int; legal: str"),
        ("optim.lr='fast'", r"\[optim\] lr = 'fast' is a str; legal: float"),
        ("data.image_size=0", "data.image_size = 0 is out of range; legal: >= 1"),
        ("data.channels=2", "data.channels = 2 is out of range; legal: 1 or 3"),
        ("data.std=0", "data.std = 0.0 is out of range; legal: > 0"),
        ("data.std=nan", "data.std = nan is out of range; legal: > 0"),
        ("data.pad_value=256", "data.pad_value = 256 is out of range; legal: 0..255"),
        ("optim.name=sgd", "optim.name = 'sgd' is out of range; legal: 'adamw' or 'muon'"),
        ("optim.lr=0", "optim.lr = 0.0 is out of range; legal: > 0"),
        ("optim.lr=nan", "optim.lr = nan is out of range; legal: > 0"),
        ("optim.weight_decay=-1", "optim.weight_decay = -1.0 is out of range; legal: >= 0"),
        ("optim.beta2=1", r"optim.beta2 = 1.0 is out of range; legal: \(0, 1\)"),
        ("optim.warmup_steps=-1", "optim.warmup_steps = -1 is out of range; legal: >= 0"),
        ("optim.schedule=step", "optim.schedule = 'step' .*legal: 'constant' or 'cosine'"),
        ("optim.grad_clip=0", "optim.grad_clip = 0.0 is out of range; legal: > 0"),
        ("optim.ema_decay=1", r"optim.ema_decay = 1.0 is out of range; legal: \[0, 1\)"),
        ("loop.images=0", "loop.images = 0 is out of range; legal: >= 1"),
        ("loop.batch_size=0", "loop.batch_size = 0 is out of range; legal: >= 1"),
        ("loop.mixed_precision=fp8", r"loop.mixed_precision = 'fp8' .*legal: no \| bf16 \| fp16"),
        ("loop.checkpoint_every=0", "loop.checkpoint_every = 0 is out of range; legal: >= 1"),
        ("loop.keep_checkpoints=0", "loop.keep_checkpoints = 0 is out of range; legal: >= 1"),
        ("loop.log_every=0", "loop.log_every = 0 is out of range; legal: >= 1"),
        ("task=3", "task = 3; legal: the name of a task"),
        ("seed=fast", "seed = 'fast'.*legal: a whole number"),
        ("seed=1.5", r"seed = 1.5.*legal: a whole number"),
        ("output=3", "output = 3.*legal: a folder"),
        ("data=3", r"data = 3|\[data\]"),
        ("base=3", r"base = 3|\[base\]"),
        ("nothing", "override 'nothing' is not of the form table.key=value"),
        ("=3", "override '=3' is not of the form table.key=value"),
        ("data.path.deep=3", "override 'data.path.deep=3': 'path' is not a table"),
    ],
)
def test_illegal_entries_are_named(write, override, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(write(), [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task = ", "tiny.toml' is not valid TOML"),
        ("[data]\npath = 'x'", "task = None; legal: the name of a task"),
        ("task = 'base'\n[data]\npath = 'x'", r"\[loop\] lacks images"),
        ("task = 'base'\n[loop]\nimages = 3", r"\[data\] lacks path"),
    ],
)
def test_illegal_recipes_are_named(write, text, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(write(text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe '.*none.toml' does not exist"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (BaseSettings, {"num_layers": 0}, "base.num_layers = 0 is out of range; legal: >= 1"),
        (BaseSettings, {"label_dropout": 1.0}, r"base.label_dropout = 1.0 .*legal: \[0, 1\)"),
        (BaseSettings, {"level_std": 0.0}, "base.level_std = 0.0 is out of range; legal: > 0"),
        (BaseSettings, {"position_scale": 0}, "base.position_scale = 0 .*legal: >= 1"),
        (BaseSettings, {"patch_size": "4"}, "patch_size = '4' is a str; legal: int"),
        (AdapterSettings, {"min_levels": [0.5]}, r"min_levels = \[0.5\] .*legal: 2 numbers in"),
        (AdapterSettings, {"min_levels": [0, 1]}, r"min_levels = \[0, 1\] .*\[0, 1\), one per"),
        (AdapterSettings, {"min_levels": ["a", "b"]}, r"min_levels = .*legal"),
        (AdapterSettings, {"scales": "24"}, "scales = '24'.*legal"),
        (AdapterSettings, {"scales": 2}, "scales = 2.*legal"),
        (AdapterSettings, {"full_share": 1.0}, r"adapter.full_share = 1.0 .*legal: \[0, 1\)"),
        (AdapterSettings, {"weak_fraction": 1.1}, r"adapter.weak_fraction = 1.1 .*legal: \[0, 1\]"),
        (AdapterSettings, {"level_std": -1.0}, "adapter.level_std = -1.0 .*legal: > 0"),
    ],
)
def test_illegal_settings_of_tasks_are_named(cls, settings, words):
    whole = {
        BaseSettings: {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "patch_size": 4,
            "num_classes": 10,
        },
        AdapterSettings: {"base": "somewhere"},
    }[cls]
    with pytest.raises(ValueError, match=words):
        from_table(cls, {**whole, **settings}, cls.__name__.removesuffix("Settings").lower())


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match=r"\[base\] lacks num_layers, num_attention_heads"):
        from_table(BaseSettings, {}, "base")


def test_learning_rate():
    warm = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(warm, i, 100) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = OptimConfig(lr=1.0, warmup_steps=0, schedule="cosine")
    rates = [learning_rate(cosine, i, 8) for i in (0, 4, 8)]
    assert rates == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)
    assert LoopConfig(images=17, batch_size=16).steps == 2
