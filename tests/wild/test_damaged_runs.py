"""Training runs that meet damage, a full disk, another run or odd numbers: the last good state."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import png
from tests.wild.bounded import bounded

from ditdial.training.base import BaseTask
from ditdial.training.config import load_recipe
from ditdial.training.data import ImageData
from ditdial.training.loop import train
from ditdial.training.state import list_states

EXPORTED = "diffusion_pytorch_model.safetensors"
REFUSALS = ("ValueError", "FileExistsError", "RuntimeError", "BlockingIOError")


def run(path, *overrides, resume=False):
    recipe = load_recipe(path, overrides)
    return train(recipe, BaseTask(recipe), ImageData(recipe.data), resume=resume)


@pytest.fixture
def finished(base_recipe, tmp_path):
    """A run that kept two checkpoints, what it exported, and its recipe; the export is gone."""
    export = run(base_recipe)
    tensors = {name: value.clone() for name, value in load_file(export / EXPORTED).items()}
    shutil.rmtree(export)
    states = list_states(tmp_path / "run" / "checkpoints")
    assert len(states) == 2
    return states, tensors, base_recipe


def shortened(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def removed(path):
    path.unlink()


def broadcast(path):
    save_file({name: value[:1].clone() for name, value in load_file(path).items()}, path)


def not_a_number(path):
    save_file({name: value * torch.nan for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", shortened),
        ("model.safetensors", emptied),
        ("optimizer-0.safetensors", shortened),
        ("buffers.safetensors", removed),
        ("state.json", shortened),
        ("state.json", removed),
        ("average.safetensors", broadcast),
        ("average.safetensors", not_a_number),
        ("model.safetensors", not_a_number),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    finished, caplog, tmp_path, file, damage
):
    (before, newest), expected, recipe = finished
    damage(newest / file)
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export = run(recipe, resume=True)
    told = [record.getMessage() for record in caplog.records]
    told += [str(each.message) for each in caught]
    assert any(newest.name in message and "resumed" not in message for message in told), told
    found = load_file(export / EXPORTED)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert before.name in "".join(told)


def test_the_record_of_a_recipe_is_not_written_again_when_its_run_is_resumed(finished, tmp_path):
    _, _, recipe = finished
    record = tmp_path / "run" / "recipe.json"
    before = record.stat()
    run(recipe, resume=True)
    after = record.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_log_of_a_resumed_run_is_not_written_through_a_link(finished, tmp_path):
    _, _, recipe = finished
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    (tmp_path / "run" / "log.partial").symlink_to(precious)
    run(recipe, resume=True)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "run" / "log.jsonl").is_symlink()


def test_a_full_disk_leaves_no_half_record_of_a_recipe(base_recipe, tmp_path):
    recipe = load_recipe(base_recipe)
    data = ImageData(recipe.data)
    outcome = bounded(lambda: str(train(recipe, BaseTask(recipe), data)), file_size=200)
    assert outcome.kind == "error"
    record = tmp_path / "run" / "recipe.json"
    assert not record.exists() or json.loads(record.read_text())


def test_a_run_in_a_folder_that_another_one_is_writing_is_refused(base_recipe, tmp_path):
    recipe, outcomes = load_recipe(base_recipe), []

    class Busy(BaseTask):
        def progress(self, share):
            if share >= 0.5 and not outcomes:
                outcomes.append(bounded(lambda: str(run(base_recipe, resume=True))))

    train(recipe, Busy(recipe), ImageData(recipe.data))
    (outcome,) = outcomes
    assert outcome.kind == "error", outcome
    assert outcome.error in REFUSALS, outcome
    assert str(tmp_path / "run") in outcome.text


def test_a_run_whose_loss_exploded_exports_nothing(base_recipe, tmp_path):
    with pytest.raises((FloatingPointError, ValueError), match="loss"):
        run(base_recipe, "optim.lr=1.0", "optim.warmup_steps=0")
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optim.lr", "inf"),
        ("optim.weight_decay", "inf"),
        ("data.mean", "nan"),
        ("data.mean", "inf"),
        ("data.std", "inf"),
        ("base.level_mean", "nan"),
        ("base.level_mean", "-inf"),
        ("base.level_std", "inf"),
    ],
)
def test_a_number_of_a_recipe_that_is_not_finite_is_refused_by_name(base_recipe, field, value):
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        BaseTask(load_recipe(base_recipe, [f"{field}={value}"]))


def test_a_row_that_names_a_file_outside_the_data_is_refused(tmp_path, base_recipe):
    import datasets
    import numpy as np

    outside = tmp_path / "outside.png"
    outside.write_bytes(png(np.zeros((16, 16), np.uint8)))
    folder = tmp_path / "rows"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": None, "path": str(outside)}], "label": [0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    recipe = load_recipe(base_recipe, [f"data.path={str(folder)!r}"])
    with pytest.raises(ValueError, match=r"outside\.png"):
        ImageData(recipe.data)
