"""Runs that are killed at random, and checkpoints that rot: the export is that of the unbroken run.

The killed runs are copies of this process, so that a kill costs no new start of Python.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.wild.bounded import with_own_lock

from ditdial.training.base import BaseTask
from ditdial.training.config import load_recipe
from ditdial.training.data import ImageData
from ditdial.training.loop import train
from ditdial.training.state import list_states

WEIGHTS = "diffusion_pytorch_model.safetensors"
KILLS, DAMAGES = 30, 10
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
"""Audit events of what changes files, or opens one to be flushed."""

pytestmark = pytest.mark.slow


def run(path, *overrides, resume=False):
    recipe = load_recipe(path, overrides)
    return train(recipe, BaseTask(recipe), ImageData(recipe.data), resume=resume)


def die_at(change, folder):
    """Kill this process when it is about to make the given change of files in a folder."""
    made = 0

    def hook(event, arguments):
        nonlocal made
        if event in CHANGES and any(str(folder) in str(each) for each in arguments):
            made += 1
            if made == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(path, *, seconds=None, change=None, folder=None):
    """Whether a resumed copy of the run was killed, after some time or at some change of files."""
    child = os.fork()
    if not child:
        with_own_lock()
        code = 1
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
            if change is not None:
                die_at(change, folder)
            run(path, resume=True)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def same(export, expected):
    found = load_file(export / WEIGHTS)
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def unbroken(base_recipe, tmp_path):
    """The tensors of the export, and how long the run took."""
    started = time.monotonic()
    export = run(base_recipe, f"output={str(tmp_path / 'unbroken')!r}")
    return load_file(export / WEIGHTS), time.monotonic() - started


def test_killed_anywhere_a_run_ends_as_the_unbroken_one(base_recipe, tmp_path, unbroken):
    expected, seconds = unbroken
    chance, output, kills = random.Random(0), tmp_path / "run", 0
    while kills < KILLS:
        how = {"seconds": chance.uniform(0, seconds)}
        if kills % 2:
            how = {"change": chance.randint(1, 120), "folder": output}
        if killed(base_recipe, **how):
            kills += 1
        else:  # it came to its end: another one
            assert same(output / "export", expected)
            shutil.rmtree(output)
        if kills % 3 == 0:
            assert same(run(base_recipe, resume=True), expected)
            shutil.rmtree(output)
    assert same(run(base_recipe, resume=True), expected)
    names = {path.name for path in (output / "checkpoints").iterdir()}
    assert names == {"step-00000009", "step-00000012"}


def one_bit(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def lost(path, chance):
    path.unlink()


def zeros(path, chance):
    """As a file may be after a power cut: its size is there, its content is not."""
    path.write_bytes(bytes(path.stat().st_size))


def a_folder(path, chance):
    path.unlink()
    path.mkdir()


def test_a_checkpoint_that_rotted_is_never_used(base_recipe, tmp_path, unbroken, caplog):
    expected, _ = unbroken
    output, kept = tmp_path / "run", tmp_path / "kept"
    shutil.rmtree(run(base_recipe))
    shutil.copytree(output, kept)
    chance = random.Random(1)
    for place in range(DAMAGES):
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        before, newest = list_states(output / "checkpoints")
        file = chance.choice(sorted(newest.iterdir()))
        (one_bit, cut, lost, zeros, a_folder)[place % 5](file, chance)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert same(run(base_recipe, resume=True), expected)
        warned = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        assert any(newest.name in told and file.name in told for told in warned), (file, warned)
        assert f"resumed from {before}" in caplog.text


def test_without_a_checkpoint_that_is_whole_a_run_is_not_started_anew(base_recipe, tmp_path):
    shutil.rmtree(run(base_recipe))
    for state in list_states(tmp_path / "run" / "checkpoints"):
        one_bit(state / "average.safetensors", random.Random(2))
    with pytest.raises(ValueError, match=r"step-00000012.*average.*step-00000009.*average"):
        run(base_recipe, resume=True)
    assert not (tmp_path / "run" / "export").exists()
