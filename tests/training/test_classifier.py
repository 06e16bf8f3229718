"""The classifier task: a tiny run of the real loop learns, exports and records its accuracy."""

import io
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ditdial.evaluation.features import SmallClassifier, load_features
from ditdial.training.classifier import ClassifierTask, accuracy, shift_images
from ditdial.training.config import load_recipe
from ditdial.training.data import ImageData
from ditdial.training.loop import train

RECIPE = """
task = "classifier"
output = "{folder}/run"

[data]
path = "{folder}/data"
channels = 1
mean = 0.3
std = 0.4

[classifier]
num_classes = 2
width = 8
feature_dim = 8
label_smoothing = 0.05

[optim]
lr = 1e-2
warmup_steps = 2
schedule = "cosine"
ema_decay = 0.5

[loop]
images = 480
batch_size = 16
log_every = 1
checkpoint_every = 1000
"""


def write_split(folder, split: str, count: int) -> None:
    """Stripes, noisy: class 0 lies, class 1 stands."""
    generator = np.random.default_rng(count)
    encoded, labels = [], []
    for index in range(count):
        label = index % 2
        stripes = np.tile((np.arange(28) // 2 % 2 * 150)[:, None], (1, 28))
        pixels = (stripes.T if label else stripes) + generator.integers(0, 100, (28, 28))
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(label)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features)
    table.to_parquet(folder / f"{split}.parquet")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write_split(tmp_path / "data", "train", 64)
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return load_recipe(path)


def test_tiny_run_learns_and_records_its_accuracy(recipe, tmp_path) -> None:
    write_split(tmp_path / "data", "test", 32)
    export = train(recipe, ClassifierTask(recipe), ImageData(recipe.data))
    losses = [
        json.loads(row)["loss"] for row in (tmp_path / "run/log.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])

    facts = json.loads((export / "training.json").read_text())
    assert facts["test_images"] == 32
    assert facts["test_accuracy"] > 0.9
    assert facts["images_seen"] == 480
    saved = SmallClassifier.from_pretrained(export).eval()
    test = ImageData(replace(recipe.data, split="test"))
    assert accuracy(saved, test) == facts["test_accuracy"]
    network, _ = load_features(str(export))
    assert network.num_features == 8


def test_export_without_a_test_split_says_so(recipe, tmp_path, caplog) -> None:
    ClassifierTask(recipe).export(tmp_path / "export", {"images_seen": 0})
    assert "no split 'test'" in caplog.text
    assert "test_accuracy" not in json.loads((tmp_path / "export/training.json").read_text())


def test_loss_sees_images_in_the_unit_range(recipe) -> None:
    task = ClassifierTask(recipe)
    data = ImageData(recipe.data)
    images, labels = data.batch(0, 8, 0, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    task.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    task.loss(task.module, images, labels, torch.Generator().manual_seed(0))
    assert seen[0].shape == images.shape
    assert seen[0].min() >= -1e-6
    assert seen[0].max() <= 1 + 1e-6


def test_loss_is_a_function_of_the_generator(recipe) -> None:
    task = ClassifierTask(recipe)
    images, labels = ImageData(recipe.data).batch(0, 8, 0, torch.device("cpu"))
    losses = [
        task.loss(task.module, images, labels, torch.Generator().manual_seed(seed)).item()
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_shift_moves_each_image_as_a_whole() -> None:
    images = torch.zeros(64, 2, 9, 11)
    images[:, :, 4, 5] = torch.tensor([0.25, 0.75])
    shifted = shift_images(images, 3, torch.Generator().manual_seed(0), fill=0.0)
    assert shifted.shape == images.shape
    assert torch.equal(shifted.sum(dim=(2, 3)), images.sum(dim=(2, 3)))
    rows, columns = (shifted[:, 1] == 0.75).nonzero()[:, 1:].T
    assert set((rows - 4).tolist()) == set(range(-3, 4))
    assert set((columns - 5).tolist()) == set(range(-3, 4))
    assert torch.equal(shifted[:, 0] * 3, shifted[:, 1])


def test_shift_by_nothing_is_the_identity_and_fill_moves_in() -> None:
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(shift_images(images, 0, torch.Generator(), fill=0.5), images)
    flat = shift_images(torch.zeros(16, 1, 8, 8), 2, torch.Generator().manual_seed(0), fill=0.5)
    assert set(flat.unique().tolist()) == {0.0, 0.5}


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("classifier.shift=40", "classifier.shift = 40"),
        ("classifier.label_smoothing=1.0", "classifier.label_smoothing"),
        ("classifier.depth=3", "no key 'depth'"),
        ("classifier.width=9", "width = 9"),
        ("data.image_size=64", "data.image_size = 64"),
    ],
)
def test_illegal_settings_are_named(recipe, tmp_path, override, match) -> None:
    with pytest.raises(ValueError, match=match):
        ClassifierTask(load_recipe(tmp_path / "tiny.toml", [override]))
