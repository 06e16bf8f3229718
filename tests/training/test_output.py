"""The output folder: one run at a time, nothing overwritten, no half file on a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tests.wild.bounded import bounded, command

from ditdial.training.base import BaseTask
from ditdial.training.config import load_recipe
from ditdial.training.data import ImageData
from ditdial.training.lock import NAME, check_unlocked, locked
from ditdial.training.log import Log
from ditdial.training.loop import check_output, train
from ditdial.training.state import list_states

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(path, *overrides, resume=False):
    recipe = load_recipe(path, overrides)
    return train(recipe, BaseTask(recipe), ImageData(recipe.data), resume=resume)


def same(one, other):
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


# The lock


def test_a_lock_is_of_one_run_says_whose_and_ends(tmp_path):
    check_unlocked(tmp_path)
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        for attempt in (lambda: check_unlocked(tmp_path), lambda: locked(tmp_path).__enter__()):
            with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on .*, since 20"):
                attempt()
    check_unlocked(tmp_path)
    with locked(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    code = "import sys, time, pathlib; from ditdial.training.lock import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} "):
        check_unlocked(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    check_unlocked(tmp_path)


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_no_lock_is_written_through_what_stands_in_its_place(tmp_path, kind):
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    make = {"link": os.symlink, "hard link": os.link}
    if kind in make:
        make[kind](precious, folder / NAME)
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(folder / NAME)
    for attempt in (lambda: check_unlocked(folder), lambda: locked(folder).__enter__()):
        with pytest.raises(OSError, match=NAME):
            attempt()
    assert precious.read_text() == "precious"


# What stands in the way


@pytest.fixture
def finished(base_recipe, tmp_path):
    """A finished run's folder; its export stands beside it as well."""
    shutil.copytree(run(base_recipe), tmp_path / "kept")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "dangling link"])
@pytest.mark.parametrize(
    "name",
    ["", "recipe.json", "log.jsonl", "checkpoints", "export", "run.lock", "tensorboard"],
)
def test_what_stands_in_the_way_is_named_and_stays(finished, base_recipe, tmp_path, name, kind):
    place = finished / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    make = {"file": lambda: place.write_text("mine"), "folder": place.mkdir}
    make |= {"pipe": lambda: os.mkfifo(place), "dangling link": lambda: place.symlink_to("none")}
    make[kind]()
    recipe, data = load_recipe(base_recipe), ImageData(load_recipe(base_recipe).data)
    outcome = bounded(lambda: str(train(recipe, BaseTask(recipe), data, resume=True)))
    assert outcome.kind in ("done", "error"), outcome
    if outcome.kind == "error":
        assert outcome.error in ("ValueError", *OS_ERRORS), outcome
        assert str(finished) in outcome.text
    else:
        assert same(finished / "export", tmp_path / "kept")
    if kind == "file" and place.is_file() and name not in ("run.lock", "log.jsonl"):
        assert place.read_text() == "mine"


OS_ERRORS = (
    "OSError",
    "FileExistsError",
    "NotADirectoryError",
    "IsADirectoryError",
    "FileNotFoundError",
)


@pytest.mark.parametrize("left", ["checkpoints", "log.jsonl", "export"])
def test_a_folder_with_remains_of_an_unknown_run_is_not_written_into(finished, base_recipe, left):
    for entry in finished.iterdir():
        if entry.name != left:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    before = sorted(finished.rglob("*"))
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(base_recipe)
    with pytest.raises(ValueError, match=rf"holds {left} and no recipe\.json"):
        run(base_recipe, resume=True)
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_a_damaged_record_is_named(finished, base_recipe, content):
    (finished / "recipe.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"recipe\.json|another recipe"):
        check_output(load_recipe(base_recipe), resume=True)


def test_exporting_again_keeps_what_its_owner_put_there(finished, base_recipe, tmp_path):
    (finished / "export" / "notes.txt").write_text("mine")
    (finished / "export" / "pictures").mkdir()
    (finished / "export" / "pictures" / "one.txt").write_text("mine")
    run(base_recipe, resume=True)
    assert (finished / "export" / "notes.txt").read_text() == "mine"
    assert (finished / "export" / "pictures" / "one.txt").read_text() == "mine"
    assert same(finished / "export", tmp_path / "kept")


# Full disks


@pytest.mark.parametrize("size", [0, 20, 300, 1500, 6000, 40_000, 100_000, 150_000, 200_000])
def test_on_a_full_disk_a_run_ends_with_a_name_and_goes_on_later(
    base_recipe, tmp_path, size, monkeypatch
):
    whole = run(base_recipe, f"output={str(tmp_path / 'whole')!r}")
    recipe = load_recipe(base_recipe)
    data = ImageData(recipe.data)
    outcome = bounded(lambda: str(train(recipe, BaseTask(recipe), data)), file_size=size)
    output = tmp_path / "run"
    if outcome.kind == "error":
        assert outcome.error in ("OSError", "FileExistsError"), outcome
        assert not (output / "export").exists()
        assert str(output) in outcome.text or "File too large" in outcome.text
    for state in list_states(output / "checkpoints"):
        assert json.loads((state / "manifest.json").read_text())
    assert not list(output.rglob(".partial-*"))
    assert same(run(base_recipe, resume=True), whole)


# The log


@pytest.mark.parametrize(
    "line",
    [b"{", b"\xff\xfe", b"[]", b"3", b"{}", b'{"step": "x"}', b"[" * 100_000, b'{"step": null}'],
)
def test_a_damaged_line_of_the_log_costs_that_line_only(tmp_path, line, caplog):
    path = tmp_path / "log.jsonl"
    good = [json.dumps({"step": step}).encode() for step in range(1, 5)]
    path.write_bytes(b"\n".join([*good[:2], line, *good[2:]]) + b"\n")
    Log(path).truncate(3)
    assert path.read_bytes() == b"\n".join(good[:3]) + b"\n"
    assert f"1 lines of {path} are damaged" in caplog.text


def test_a_log_is_not_appended_to_through_a_link(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    (tmp_path / "log.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match=r"log\.jsonl"):
        Log(tmp_path / "log.jsonl").append({"step": 1})
    assert precious.read_text() == "precious"


# The command


def test_the_command_ends_with_two_and_a_line(base_recipe, tmp_path):
    place = tmp_path / "file"
    place.write_text("mine")
    for output in (place, place / "below"):
        outcome = command("train", str(base_recipe), "--output", str(output))
        assert outcome["code"] == 2, outcome
        assert str(place) in outcome["err"]
        assert "Traceback" not in outcome["err"]
    assert place.read_text() == "mine"
    overrides = ["--set", "optim.lr=1.0", "--set", "optim.warmup_steps=0"]
    outcome = command("train", str(base_recipe), *overrides)
    assert outcome["code"] == 2
    assert "exploded" in outcome["err"]
    assert not (tmp_path / "run" / "export").exists()
