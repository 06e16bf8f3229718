"""The one training loop: accelerate, EMA, logs, atomic checkpoints, exact resume.

Nothing random lives across steps. The noise of step ``n`` on process ``r`` comes from a generator
seeded by ``(seed, n, r)`` and the samples from ``(seed, position)``, so a resumed run repeats the
unbroken one bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ditdial.training.config import Recipe
from ditdial.training.data import ImageData
from ditdial.training.ema import WeightAverage
from ditdial.training.log import Log
from ditdial.training.optim import build_optimizers, learning_rate
from ditdial.training.state import list_states, load_state, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    check_output(recipe, resume=resume)
    run, loop = Run(recipe, task, data, resume=resume), recipe.loop
    with run.progress_bar() as bar:
        while run.step < loop.steps:
            made = run.advance()
            bar.update()
            log_now, save_now = run.is_due(loop.log_every), run.is_due(loop.checkpoint_every)
            if not (log_now or save_now):
                continue
            loss = run.finite(made.loss)
            if log_now:
                run.log(loss, made)
                bar.set_postfix(loss=f"{loss:.4f}")
            if save_now:
                run.save()
    return run.export()


@dataclass(frozen=True)
class Made:
    """What one optimiser step gave: loss of this process's share, gradient norm, learning rate."""

    loss: Tensor
    norm: Tensor | None
    rate: float


class Run:
    """A recipe under way: the devices, what is trained on them, and how far it has come."""

    def __init__(self, recipe: Recipe, task: Task, data: ImageData, *, resume: bool) -> None:
        self.recipe, self.task, self.data = recipe, task, data
        self.output = Path(recipe.output)
        self.records = Log(self.output / "log.jsonl")
        self.accelerator = accelerator = _accelerator(recipe, task)
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "recipe.json").write_text(recipe.to_json())
        accelerator.wait_for_everyone()
        accelerator.init_trackers("tensorboard")
        task.to(accelerator.device)
        if recipe.loop.device_data:
            data.to(accelerator.device)
        self.raw = task.module
        optimizers = build_optimizers(self.raw, recipe.optim)
        self.average = WeightAverage(self.raw.to(accelerator.device), recipe.optim.ema_decay)
        self.step, elapsed = self._resume(optimizers) if resume else (0, 0.0)
        if accelerator.is_main_process:
            self.records.truncate(self.step)
        # After the checkpoint has been read: prepared optimizers are wrapped.
        model, *self.optimizers = accelerator.prepare(self.raw, *optimizers)
        self.model: Any = torch.compile(model) if recipe.loop.compile else model
        self.started = time.monotonic() - elapsed

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return time.monotonic() - self.started

    def progress_bar(self) -> tqdm:
        """A bar over the steps, shown by the main process."""
        hidden = not self.accelerator.is_main_process
        total, name = self.recipe.loop.steps, self.output.name
        return tqdm(total=total, initial=self.step, disable=hidden, desc=name)

    def advance(self) -> Made:
        """Make one optimiser step."""
        recipe, accelerator = self.recipe, self.accelerator
        rate = learning_rate(recipe.optim, self.step, recipe.loop.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        images, labels = self._batch()
        seed = _seed(recipe.seed, self.step, accelerator.process_index)
        generator = torch.Generator().manual_seed(seed)
        self.task.progress(self.step / recipe.loop.steps)
        with accelerator.autocast():
            loss = self.task.loss(self.model, images, labels, generator)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.raw.parameters(), recipe.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(self.raw)
        self.step += 1
        return Made(loss, norm, rate)

    def is_due(self, every: int) -> bool:
        """Whether something is done now that is done after so many steps, and after the last."""
        return self.step % every == 0 or self.step == self.recipe.loop.steps

    def finite(self, loss: Tensor) -> float:
        """The mean loss of all processes.

        Raises:
            FloatingPointError: it, or a trained weight, is not finite.
        """
        value = self.accelerator.reduce(loss.detach(), reduction="mean").item()
        _check_finite(value, self.raw, self.step)
        return value

    def log(self, loss: float, made: Made) -> None:
        """Write a line of the log, and tell the trackers."""
        record = {
            "step": self.step,
            "images": self.step * self.recipe.loop.batch_size,
            "loss": loss,
            "grad_norm": float(made.norm) if made.norm is not None else None,
            "lr": made.rate,
            "seconds": round(self.seconds, 3),
        }
        if self.accelerator.is_main_process:
            self.records.append(record)
        self.accelerator.log({"loss": loss, "lr": made.rate}, step=self.step)

    def save(self) -> None:
        """Write a checkpoint."""
        if not self.accelerator.is_main_process:
            return
        facts, keep = {"seconds": self.seconds}, self.recipe.loop.keep_checkpoints
        plain = [getattr(o, "optimizer", o) for o in self.optimizers]
        save_state(self._checkpoints, self.step, self.raw, plain, self.average, facts, keep=keep)

    def export(self) -> Path:
        """Write the finished artefact from the averaged weights; returns its folder."""
        self.accelerator.wait_for_everyone()
        folder, loop = self.output / "export", self.recipe.loop
        if self.accelerator.is_main_process:
            self.average.copy_to(self.raw)
            seen = loop.steps * loop.batch_size
            facts: dict[str, object] = {"images_seen": seen}
            self.task.export(folder, facts | {"train_seconds": round(self.seconds, 1)})
        self.accelerator.end_training()
        return folder

    @property
    def _checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def _resume(self, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
        """Step and seconds of the newest checkpoint, once it is read; 0 where there is none."""
        states = list_states(self._checkpoints)
        if not states:
            return 0, 0.0
        facts = load_state(states[-1], self.raw, optimizers, self.average)
        logger.info("resumed from %s", states[-1])
        return facts["step"], facts["seconds"]

    def _batch(self) -> tuple[Tensor, Tensor]:
        """This process's share of the images and labels of the present step."""
        size, process = self.recipe.loop.batch_size, self.accelerator.process_index
        share = size // self.accelerator.num_processes
        first = self.step * size + process * share
        return self.data.batch(first, share, self.recipe.seed, self.accelerator.device)


def _accelerator(recipe: Recipe, task: Task) -> Accelerator:
    """The devices of a run.

    Raises:
        ValueError: a batch that cannot be shared evenly among the processes.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    ddp = DistributedDataParallelKwargs(find_unused_parameters=task.find_unused_parameters)
    accelerator = Accelerator(
        mixed_precision=recipe.loop.mixed_precision,
        log_with="tensorboard",
        project_dir=str(Path(recipe.output)),
        kwargs_handlers=[ddp],
    )
    size, world = recipe.loop.batch_size, accelerator.num_processes
    if size % world:
        raise ValueError(f"loop.batch_size = {size} must be a multiple of {world} processes")
    return accelerator


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
