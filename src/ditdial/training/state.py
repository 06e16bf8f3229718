"""Training checkpoints: one folder of safetensors and JSON, complete or absent, never pickled.

A checkpoint is written into a hidden folder, flushed to disk, and renamed into place; a reader sees
whole ones only.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditdial.training.ema import WeightAverage


def save_state(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: WeightAverage,
    facts: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``folder/step-XXXXXXXX`` atomically; keep the newest ``keep`` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    trained = {
        name: p.detach().contiguous() for name, p in module.named_parameters() if p.requires_grad
    }
    save_file(trained, partial / "model.safetensors")
    save_file(_buffers(module), partial / "buffers.safetensors")
    save_file(average.average, partial / "average.safetensors")
    for index, optimizer in enumerate(optimizers):
        save_file(
            _flatten(optimizer.state_dict()["state"]), partial / f"optimizer-{index}.safetensors"
        )
    (partial / "state.json").write_text(
        json.dumps({"step": step, "average_updates": average.updates, **facts})
    )
    for file in partial.iterdir():
        _flush(file)
    _flush(partial)
    if target.exists():  # the same step of an earlier, identical run
        shutil.rmtree(target)
    os.replace(partial, target)
    _flush(folder)
    for old in list_states(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_states(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load_state(
    path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], average: WeightAverage
) -> dict[str, Any]:
    """Restore everything `save_state` wrote and return the facts in ``state.json``."""
    facts = json.loads((path / "state.json").read_text())
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    saved = load_file(path / "model.safetensors")
    if saved.keys() != parameters.keys():
        raise ValueError(f"checkpoint {str(path)!r} holds other parameters than this recipe trains")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
        buffers = _buffers(module)
        for name, value in load_file(path / "buffers.safetensors").items():
            buffers[name].copy_(value)
    average.load(load_file(path / "average.safetensors"), facts["average_updates"])
    for index, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        state["state"] = _unflatten(load_file(path / f"optimizer-{index}.safetensors"))
        optimizer.load_state_dict(state)
    return facts


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """What training may keep beside parameters: running means."""
    parameters = {name for name, _ in module.named_parameters()}
    state = module.state_dict()
    return {name: value for name, value in state.items() if name not in parameters}


def _flatten(state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": torch.as_tensor(value).contiguous()
        for index, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def _unflatten(flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
