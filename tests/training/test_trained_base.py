"""Bases: opened when they are what the recipe trains, and refused by their field when not."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import WIDTH_TABLE

from ditdial.training.config import load_recipe
from ditdial.training.tasks import build_task

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def opened(adapter_recipe, base_recipe, recipe_with, tmp_path):
    """``opened(field, *overrides)``: a task that opens the base; ``field`` says which task's."""
    files = {"adapter": adapter_recipe, "base": base_recipe}
    files["width"] = recipe_with("width", WIDTH_TABLE)

    def make(task, *overrides, folder=tmp_path / "base"):
        field = "init_from" if task == "base" else "base"
        return build_task(load_recipe(files[task], [f"{task}.{field}={str(folder)!r}", *overrides]))

    return make


TASKS = pytest.mark.parametrize("task", ["adapter", "width", "base"])


def field_of(task):
    return r"base\.init_from = " if task == "base" else rf"{task}\.base = "


@TASKS
@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "PixArtTransformer2DModel"},
        {"_class_name": None},
        {"in_channels": 3},
        {"in_channels": "1"},
        {"out_channels": 2},
        {"patch_size": 5},
        {"patch_size": 0},
        {"patch_size": "4"},
        {"num_layers": 3},
        {"num_layers": 1},
        {"num_layers": "many"},
        {"num_layers": 10**9},
        {"num_layers": -1},
        {"sample_size": 10**9},
        {"sample_size": 16.5},
        {"attention_head_dim": 10**9},
        {"num_embeds_ada_norm": 10**12},
        {"num_embeds_ada_norm": None},
        {"attention_head_dim": 8},
        {"num_embeds_ada_norm": 5},
    ],
    ids=str,
)
def test_a_base_of_another_kind_is_refused(opened, tmp_path, task, change):
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=field_of(task)):
        opened(task)


@TASKS
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_named(opened, tmp_path, task, content):
    (tmp_path / "base" / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json|base"):
        opened(task)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def emptied(path):
    path.write_bytes(b"")


def noise(path):
    path.write_bytes(bytes(range(256)) * 20)


def without_one(path):
    tensors = load_file(path)
    tensors.pop("proj_out_2.weight")
    save_file(tensors, path)


def not_finite(path):
    save_file({**load_file(path), "proj_out_2.bias": torch.full((16,), torch.nan)}, path)


def another_shape(path):
    save_file({**load_file(path), "proj_out_2.bias": torch.zeros(1)}, path)


@TASKS
@pytest.mark.parametrize("damage", [cut, emptied, noise, without_one, not_finite, another_shape])
def test_damaged_weights_are_refused(opened, tmp_path, task, damage):
    damage(tmp_path / "base" / WEIGHTS)
    with pytest.raises(ValueError, match=field_of(task)):
        opened(task)


@TASKS
def test_a_base_without_weights_is_refused(opened, tmp_path, task):
    (tmp_path / "base" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=field_of(task)):
        opened(task)


SCHEDULERS = {
    "DDIMScheduler": {},
    "DDPMScheduler": {"prediction_type": "sample"},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"prediction_type": "epsilon"},
    "UniPCMultistepScheduler": {},
}
FLOWS = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    },
    "DDIMScheduler": {"prediction_type": "v_prediction"},
}


@pytest.fixture
def in_pipeline(opened, tmp_path):
    """``in_pipeline(scheduler, config)``: the base as the transformer of a pipeline with it."""

    def make(name, config, *, link=False):
        pipe = tmp_path / "pipe"
        shutil.move(tmp_path / "base", pipe / "transformer")
        getattr(diffusers, name)(**config).save_pretrained(pipe / "scheduler")
        if link:
            (tmp_path / "linked").symlink_to(pipe / "transformer")
        return tmp_path / "linked" if link else pipe / "transformer"

    return make


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("link", [False, True])
def test_the_scheduler_of_its_pipeline_says_what_a_base_predicts(opened, in_pipeline, name, link):
    folder = in_pipeline(name, SCHEDULERS[name], link=link)
    with pytest.raises(ValueError, match=rf"adapter\.base = .*velocities; its {name}"):
        opened("adapter", folder=folder)


@pytest.mark.parametrize("name", FLOWS)
def test_a_base_that_predicts_velocities_is_opened(opened, in_pipeline, name):
    assert opened("adapter", folder=in_pipeline(name, FLOWS[name])).module is not None


def test_a_damaged_scheduler_is_refused(opened, in_pipeline):
    folder = in_pipeline("DDIMScheduler", {})
    (folder.parent / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="scheduler"):
        opened("adapter", folder=folder)
