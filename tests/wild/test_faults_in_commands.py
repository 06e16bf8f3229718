"""Commands that are given odd input: exit code 2, the file or number named, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.wild import hub
from tests.wild.bounded import bounded, command

from ditdial.reference import reference_adapter, reference_folder

QUICK = ("--labels", "1", "--steps", "2")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """A command writes into the folder it is called in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def assert_refused(outcome, *words):
    assert outcome["code"] == 2, outcome
    assert all(word in outcome["err"] for word in words), outcome


# Texts of errors


def test_an_error_keeps_words_in_brackets(elsewhere):
    (elsewhere / "r.toml").write_text('task = "base"\n[data]\npath = "."\n[optim]\nspeed = 1\n')
    assert_refused(command("train", "r.toml"), "[optim]", "speed")


@pytest.mark.parametrize("name", ["[/x]", "[bold]x[/y]"])
def test_an_error_about_a_name_that_looks_like_markup_is_printed(name):
    assert_refused(command("report", name), name)


# Files that cannot be read or written


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("report", "x" * 300), "xxx"),
        (("sample", "out", "--schedule", "x" * 300), "xxx"),
        (("sample", "taken/out", *QUICK), "taken"),
        (("train", "r.toml", "--output", "taken/run"), "taken"),
        (("eval", "--output", "folder", "--images", "20", "--steps", "1", "--sets", "2"), "folder"),
    ],
    ids=["long name", "long schedule", "sample below a file", "train below a file", "a folder"],
)
def test_a_file_that_cannot_be_is_an_error_with_its_name(elsewhere, stripes, arguments, word):
    (elsewhere / "folder").mkdir()
    (elsewhere / "taken").write_text("mine")
    (elsewhere / "r.toml").write_text(
        f'task = "base"\n[data]\npath = "{stripes}"\nimage_size = 16\nchannels = 1\n[loop]\n'
        "images = 4\n[base]\nnum_layers = 1\nnum_attention_heads = 1\nattention_head_dim = 8\n"
        "patch_size = 8\nnum_classes = 2\n"
    )
    assert_refused(command(*arguments), word)
    assert (elsewhere / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "taken", *QUICK),
        ("eval", "--output", "taken/e.json", "--images", "20", "--steps", "1"),
    ],
    ids=["sample", "eval"],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(elsewhere, monkeypatch, arguments):
    from ditdial import PixelDiTPipeline

    (elsewhere / "taken").write_text("mine")
    worked, call = [], PixelDiTPipeline.__call__

    def working(self, *args, **kwargs):
        worked.append(True)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PixelDiTPipeline, "__call__", working)
    assert_refused(command(*arguments), "taken")
    assert not worked


def test_a_full_disk_ends_with_one_line(elsewhere):
    outcome = bounded(lambda: command("sample", "out", *QUICK), file_size=64)
    assert outcome.kind == "done", outcome
    assert_refused(outcome.value, "out")


def test_a_folder_without_permission_ends_with_one_line():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    folder.chmod(0o555)

    def as_another_user():
        os.chdir(folder)
        if os.getuid() == 0:  # who may write everywhere
            os.setuid(65534)
        return command("sample", "out", *QUICK)

    try:
        outcome = bounded(as_another_user)
    finally:
        shutil.rmtree(folder)
    assert outcome.kind == "done", outcome
    assert_refused(outcome.value, "out")


# Numbers


def test_a_range_of_a_million_million_labels_is_refused():
    labels = ("--labels", "0-999999999999")
    outcome = bounded(lambda: command("sample", "out", *labels), memory=2**29, seconds=10)
    assert outcome.kind == "done", outcome
    assert_refused(outcome.value, "labels", "999999999999")


def test_a_model_of_a_thousand_million_layers_is_not_built(elsewhere):
    (elsewhere / "model").mkdir()
    config = {"_class_name": "DiTTransformer2DModel", "num_layers": 10**9}
    (elsewhere / "model" / "config.json").write_text(json.dumps(config))
    outcome = bounded(lambda: command("probe", "model"), memory=2**29, seconds=5)
    assert outcome.kind == "done", outcome
    assert_refused(outcome.value, "num_layers", "1000000000")


def test_an_evaluation_of_no_pictures_is_refused(elsewhere):
    assert_refused(command("eval", "--images", "0", "--output", "e.json"), "images = 0")
    assert not list(elsewhere.iterdir())


NUMBERS = {
    "sample": ["--seed", "--steps", "--labels", "--guidance-scale", "--budget", "--tau"],
    "eval": ["--steps", "--images", "--sets", "--guidance-scale", "--weak-fraction"],
    "calibrate": ["--steps", "--images", "--bands", "--guidance-scale"],
    "demo": ["--images"],
    "cost": ["--steps", "--scale", "--weak-fraction", "--guide-fraction", "--low-rank"],
}
PLACES = {
    "sample": ("out",),
    "eval": ("--output", "out", "--images", "8", "--sets", "1", "--steps", "1"),
    "calibrate": ("--output", "out", "--images", "4", "--steps", "2"),
    "demo": ("--output", "out"),
    "cost": ("--model", "dit-xl-2-256"),
}
HARMLESS = ("--scale", "--low-rank", "--guidance-scale", "--tau")
"""What a closed form, or one more multiplication, takes of any size."""


@pytest.mark.parametrize("value", ["-1", "999999999999999999999999", "nan", "inf"])
@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in NUMBERS.items() for option in options]
)
def test_a_number_out_of_range_is_named_before_any_work(elsewhere, name, option, value):
    outcome = bounded(
        lambda: command(name, *PLACES[name], f"{option}={value}"), memory=2**29, seconds=10
    )
    assert outcome.kind == "done", outcome
    if outcome.value["code"] or option not in HARMLESS:
        assert_refused(outcome.value)
        words = (option, option.strip("-").replace("-", "_"), value, str(float(value)))
        assert any(word in outcome.value["err"] for word in words), outcome
        assert not list(elsewhere.iterdir())


# JSON and weights


@pytest.mark.parametrize(
    "data",
    [
        {"calls": [1]},
        {"rows": {"a": 1}},
        {"rows": [{"a": 1}, 2]},
        {"calls": [{"mode": "full"}], "ratio": 1.0},
    ],
)
def test_a_report_of_odd_json_is_named(elsewhere, data):
    (elsewhere / "odd.json").write_text(json.dumps(data))
    assert_refused(command("report", "odd.json"), "odd.json")


@pytest.mark.parametrize("reader", ["report", "probe"])
def test_a_deeply_nested_file_is_named(elsewhere, reader):
    (elsewhere / "model").mkdir()
    for name in ("config.json", "deep.json"):
        (elsewhere / "model" / name).write_text("[" * 100_000)
    target = "model" if reader == "probe" else "model/deep.json"
    assert_refused(command(reader, target), "model")


def test_a_model_of_pickled_weights_is_refused(elsewhere):
    shutil.copytree(reference_folder() / "pipeline", elsewhere / "pipe")
    folder = elsewhere / "pipe" / "transformer"
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    adapter = ("--adapter", str(reference_adapter()))
    outcome = command("sample", "out", "--model", "pipe", *adapter, *QUICK)
    assert_refused(outcome, "safetensors")
    assert not (elsewhere / "out").exists()


# Names of adapters


def test_an_adapter_folder_needs_no_dot_and_slash(elsewhere):
    shutil.copytree(reference_adapter(), elsewhere / "mine")
    outcome = command("sample", "out", "--adapter", "mine", "--budget", "0.7", *QUICK)
    assert outcome["code"] == 0, outcome


def test_a_calibration_of_an_adapter_of_the_hub_makes_no_folder_of_its_name(
    elsewhere, monkeypatch, tmp_path
):
    hub.keep(monkeypatch, tmp_path / "cache", "owner/name", {"main": reference_adapter()})
    facts = ("--adapter", "owner/name", "--steps", "2", "--images", "1", "--force")
    outcome = command("calibrate", *facts)
    assert outcome["code"] in (0, 2), outcome
    assert not (elsewhere / "owner").exists()


@pytest.mark.parametrize("name", ["sample", "eval", "calibrate"])
def test_a_revision_of_an_adapter_of_the_hub_is_the_one_that_is_read(
    elsewhere, monkeypatch, tmp_path, name
):
    broken = tmp_path / "broken"
    broken.mkdir()
    folders = {"main": broken, "v1": reference_adapter()}
    hub.keep(monkeypatch, tmp_path / "cache", "owner/name", folders)
    numbers = {"sample": ("--labels", "1"), "eval": ("--images", "4", "--sets", "1")}
    asked = (name, *PLACES[name], *numbers.get(name, ("--images", "1")), "--steps", "2")
    asked += ("--adapter", "owner/name")
    assert_refused(command(*asked), "config.json")
    assert_refused(command(*asked, "--revision", "v2"), "owner/name", "v2")
    assert not list(elsewhere.iterdir())
    outcome = command(*asked, "--revision", "v1")
    assert outcome["code"] == 0, outcome


def test_a_revision_of_a_folder_is_refused(elsewhere):
    for adapter in ("lora", str(reference_adapter())):
        asked = ("sample", "out", "--adapter", adapter, "--revision", "v1", *QUICK)
        assert_refused(command(*asked), "revision = 'v1'", adapter)


def test_an_adapter_of_the_hub_is_read_from_the_cache(elsewhere, monkeypatch, tmp_path):
    """What the test before starts from."""
    hub.keep(monkeypatch, tmp_path / "cache", "owner/name", {"main": reference_adapter()})
    outcome = command("sample", "out", "--adapter", "owner/name", *QUICK)
    assert outcome["code"] == 0, outcome
