"""The one training loop: accelerate, EMA, logs, atomic checkpoints, exact resume.

Nothing random lives across steps. The noise of step ``n`` on process ``r`` comes from a generator
seeded by ``(seed, n, r)`` and the samples from ``(seed, position)``, so a resumed run repeats the
unbroken one bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ditdial.training.config import Recipe
from ditdial.training.data import ImageData
from ditdial.training.ema import WeightAverage
from ditdial.training.optim import build_optimizers, learning_rate
from ditdial.training.state import list_states, load_state, save_state

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What a training run is about: a module, its loss, and what to write at the end."""

    @property
    def module(self) -> nn.Module:
        """What is trained: its parameters that require gradients."""
        ...

    @property
    def find_unused_parameters(self) -> bool:
        """Whether a step may leave some of those parameters unused."""
        ...

    def to(self, device: torch.device) -> None:
        """Move whatever the task owns beside ``module``."""
        ...

    def progress(self, share: float) -> None:
        """Told before each step: the share of the steps that are over."""
        ...

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Scalar loss of one batch; ``model`` is ``module``, perhaps wrapped for distribution."""
        ...

    def export(self, folder: Path, facts: dict[str, object]) -> None:
        """Write the finished artefact from the weights now in ``module``."""
        ...


def train(recipe: Recipe, task: Task, data: ImageData, *, resume: bool = False) -> Path:
    """Run a recipe to its end and export the averaged weights to ``<output>/export``.

    Args:
        resume: go on from the newest checkpoint in ``<output>/checkpoints`` (or start, if there is
            none).

    Raises:
        FileExistsError: the output folder holds a run already and ``resume`` is off.
        ValueError: the run to resume was started with another recipe.
        FloatingPointError: the loss stopped being finite.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    output = Path(recipe.output)
    checkpoints = output / "checkpoints"
    check_output(recipe, resume=resume)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=task.find_unused_parameters)
    accelerator = Accelerator(
        mixed_precision=recipe.loop.mixed_precision,
        log_with="tensorboard",
        project_dir=str(output),
        kwargs_handlers=[ddp],
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    if recipe.loop.batch_size % world:
        raise ValueError(
            f"loop.batch_size = {recipe.loop.batch_size} must be a multiple of {world} processes"
        )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.json").write_text(recipe.to_json())
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")

    device = accelerator.device
    task.to(device)
    if recipe.loop.device_data:
        data.to(device)
    raw = task.module
    optimizers = build_optimizers(raw, recipe.optim)
    average = WeightAverage(raw.to(device), recipe.optim.ema_decay)
    step, elapsed = 0, 0.0
    states = list_states(checkpoints)
    if resume and states:
        facts = load_state(states[-1], raw, optimizers, average)
        step, elapsed = facts["step"], facts["seconds"]
        logger.info("resumed from %s", states[-1])
    if accelerator.is_main_process:
        _truncate_log(output / "log.jsonl", step)
    model, *optimizers = accelerator.prepare(raw, *optimizers)
    if recipe.loop.compile:
        model = torch.compile(model)

    per_process = recipe.loop.batch_size // world
    total = recipe.loop.steps
    started = time.monotonic() - elapsed
    bar = tqdm(total=total, initial=step, disable=not accelerator.is_main_process, desc=output.name)
    while step < total:
        rate = learning_rate(recipe.optim, step, total)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        first = step * recipe.loop.batch_size + rank * per_process
        images, labels = data.batch(first, per_process, recipe.seed, device)
        generator = torch.Generator().manual_seed(_seed(recipe.seed, step, rank))
        task.progress(step / total)
        with accelerator.autocast():
            loss = task.loss(model, images, labels, generator)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(raw.parameters(), recipe.optim.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(raw)
        step += 1
        bar.update()
        log_now = step % recipe.loop.log_every == 0 or step == total
        save_now = step % recipe.loop.checkpoint_every == 0 or step == total
        if not (log_now or save_now):
            continue
        value = accelerator.reduce(loss.detach(), reduction="mean").item()
        _check_finite(value, raw, step)
        if log_now:
            record = {
                "step": step,
                "images": step * recipe.loop.batch_size,
                "loss": value,
                "grad_norm": float(norm) if norm is not None else None,
                "lr": rate,
                "seconds": round(time.monotonic() - started, 3),
            }
            if accelerator.is_main_process:
                with (output / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
            accelerator.log({"loss": value, "lr": rate}, step=step)
            bar.set_postfix(loss=f"{value:.4f}")
        if save_now and accelerator.is_main_process:
            facts = {"seconds": time.monotonic() - started}
            plain = [getattr(o, "optimizer", o) for o in optimizers]
            keep = recipe.loop.keep_checkpoints
            save_state(checkpoints, step, raw, plain, average, facts, keep=keep)
    bar.close()
    accelerator.wait_for_everyone()
    export = output / "export"
    if accelerator.is_main_process:
        average.copy_to(raw)
        images_seen = total * recipe.loop.batch_size
        task.export(
            export,
            {"images_seen": images_seen, "train_seconds": round(time.monotonic() - started, 1)},
        )
    accelerator.end_training()
    return export


def _seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4096 + rank


def _check_finite(loss: float, module: nn.Module, step: int) -> None:
    weights = (p for p in module.parameters() if p.requires_grad)
    if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in weights):
        raise FloatingPointError(
            f"loss or weights are not finite at step {step} (loss {loss}); "
            "the last checkpoint is untouched"
        )


def check_output(recipe: Recipe, *, resume: bool) -> None:
    """Refuse an output folder that holds another run, or a run that is not to be resumed.

    Raises:
        FileExistsError: it holds a run and ``resume`` is off.
        ValueError: it holds the run of another recipe.
    """
    output = Path(recipe.output)
    record = output / "recipe.json"
    if not record.exists():
        return
    if not resume:
        raise FileExistsError(
            f"{str(output)!r} holds a run already; resume it, or name another output"
        )
    if record.read_text() != recipe.to_json():
        raise ValueError(
            f"{str(output)!r} was started with another recipe; resuming needs the same one"
        )


def _truncate_log(path: Path, step: int) -> None:
    """Drop records that come after the checkpoint the run goes on from."""
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    kept = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the process was killed while writing this line
        if record["step"] <= step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    os.replace(partial, path)
