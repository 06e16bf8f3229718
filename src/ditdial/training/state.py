"""Training checkpoints: one folder of safetensors and JSON, complete or absent, never pickled.

A checkpoint is written into a hidden folder, flushed to disk, and renamed into place; a reader sees
whole ones only. A manifest holds the hash of each file, so that whatever changes on the disk
afterwards is noticed: a file that was cut, lost, or has one other bit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditdial.plain import files, json_files
from ditdial.training.ema import WeightAverage
from ditdial.training.limits import mapping

MANIFEST, FACTS = "manifest.json", "state.json"

Optimizers = list[torch.optim.Optimizer]


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written; the message names it, the file and what is wrong."""


def save_state(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizers: Optimizers,
    average: WeightAverage,
    facts: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``folder/step-XXXXXXXX`` atomically; keep the newest ``keep`` checkpoints up to it.

    Raises:
        OSError: naming the checkpoint that could not be written; the others are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".partial-*"):  # by a process that was killed while it wrote
        _remove(left)
    target = folder / f"step-{step:08d}"
    with files.writing_folder(target) as partial:
        for name, tensors in _tensors(module, optimizers, average).items():
            with naming_the_file(partial / name):
                save_file({k: v.contiguous() for k, v in tensors.items()}, partial / name)
        state = {"step": step, "average_updates": average.updates, **facts}
        (partial / FACTS).write_text(json.dumps(state))
        hashes = {file.name: _hash(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json_files.dumps(hashes))
    # A later one, of a run that came farther and was damaged, is of no use but to its owner.
    for old in [state for state in list_states(folder) if _step_of(state) <= step][:-keep]:
        _remove(old)
    return target


@contextlib.contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Errors of safetensors about the disk, which name no file, as errors of the system."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def list_states(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; whether they are damaged is not looked at."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if re.fullmatch("step-[0-9]{8,}", path.name)]
    return sorted((path for path in named if path.is_dir()), key=_step_of)


def load_state(
    path: Path, module: nn.Module, optimizers: Optimizers, average: WeightAverage
) -> dict[str, Any]:
    """Restore everything `save_state` wrote and return the facts in ``state.json``.

    Everything is read and looked at before anything is changed.

    Raises:
        DamagedCheckpointError: a file is missing or not what was written, or holds what does not
            fit this run.
    """
    expected = _tensors(module, optimizers, average)
    with _damage(path):
        _check_files(path, {*expected, FACTS})
        facts = json_files.read(path / FACTS, "the facts of a checkpoint", mapping)
        legal = f"the step {_step_of(path)}, and a whole number of updates"
        whole = type(facts["average_updates"]) is int and facts["average_updates"] >= 0
        if facts["step"] != _step_of(path) or not whole:
            raise ValueError(f"{FACTS} holds {facts}; legal: {legal}")
        saved = {name: load_file(path / name) for name in expected}
        for name in ("model.safetensors", "buffers.safetensors", "average.safetensors"):
            _check_tensors(name, saved[name], expected[name])
        states = [
            _optimizer_state(name, saved[name], optimizer)
            for name, optimizer in zip(_optimizer_files(optimizers), optimizers, strict=True)
        ]
    with torch.no_grad():
        for name, tensors in _model_tensors(module).items():
            for key, value in tensors.items():
                value.copy_(saved[name][key])
    average.load(saved["average.safetensors"], facts["average_updates"])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return facts


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever reading a checkpoint raises says which one it is."""
    try:
        yield
    except (ValueError, LookupError, TypeError, OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"checkpoint {str(path)!r}: {error}") from error


def _check_files(path: Path, expected: set[str]) -> None:
    hashes = json_files.read(path / MANIFEST, "the manifest of a checkpoint", mapping)
    if hashes.keys() != expected:
        names = ", ".join(sorted(hashes.keys() ^ expected))
        raise ValueError(f"it and the recipe do not agree about {names}")
    for name, noted in hashes.items():
        if not (path / name).is_file():
            raise FileNotFoundError(f"{name} is missing")
        if _hash(path / name) != noted:
            raise ValueError(f"{name} is not what was written")


def _check_tensors(file: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse what would be broadcast, cast or left out when it is copied."""
    if found.keys() != expected.keys():
        raise ValueError(f"{file} holds other parameters than this recipe trains")
    for name, value in found.items():
        described = [(tuple(each.shape), each.dtype) for each in (value, expected[name])]
        if described[0] != described[1]:
            raise ValueError(f"{file}: {name} is {described[0]}; legal: {described[1]}")
        if file != "buffers.safetensors" and not value.isfinite().all():
            raise ValueError(f"{file}: {name} holds numbers that are not finite")


def _optimizer_state(
    file: str, flat: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """The state of each parameter, by its place among the optimiser's."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        shape = tuple(parameters[int(index)].shape)
        if tuple(value.shape) not in ((), shape) or not value.isfinite().all():
            raise ValueError(f"{file}: {key} is of shape {tuple(value.shape)}; legal: {shape}")
        # A copy: what was read is the file itself, mapped into memory.
        state.setdefault(int(index), {})[name] = value.clone()
    return state


def _tensors(
    module: nn.Module, optimizers: Optimizers, average: WeightAverage
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file."""
    states = [_flatten(optimizer.state_dict()["state"]) for optimizer in optimizers]
    held = {**_model_tensors(module), "average.safetensors": average.average}
    return held | dict(zip(_optimizer_files(optimizers), states, strict=True))


def _model_tensors(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Trained parameters, and what training may keep beside parameters: running means."""
    parameters = dict(module.named_parameters())
    trained = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    buffers = {k: v for k, v in module.state_dict().items() if k not in parameters}
    return {"model.safetensors": trained, "buffers.safetensors": buffers}


def _optimizer_files(optimizers: Optimizers) -> list[str]:
    return [f"optimizer-{index}.safetensors" for index in range(len(optimizers))]


def _flatten(state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    """Remove a folder; a process that is killed meanwhile leaves no half checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    hidden = path.with_name(f".partial-{secrets.token_hex(16)}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)
