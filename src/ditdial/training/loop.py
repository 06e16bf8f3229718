"""The one training loop: accelerate, EMA, logs, atomic checkpoints, exact resume.

Nothing random lives across steps. The noise of step ``n`` on process ``r`` comes from a generator
seeded by ``(seed, n, r)`` and the samples from ``(seed, position)``, so a resumed run repeats the
unbroken one bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ditdial.plain import files
from ditdial.training.config import Recipe
from ditdial.training.data import ImageData
from ditdial.training.ema import WeightAverage
from ditdial.training.log import Log
from ditdial.training.optim import build_optimizers, learning_rate
from ditdial.training.output import CHECKPOINTS, EXPORT, LOG, check_output, claimed
from ditdial.training.state import (
    DamagedCheckpointError,
    list_states,
    load_state,
    naming_the_file,
    save_state,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

WORTHLESS = 2.0
"""Times the loss of knowing nothing, or that of the start, from which a run has exploded.

Losses on the way say little: one of 22,000 was back at 0.9 after ninety steps. What counts is what
would be exported, on the pictures of the last steps. Targets have unit variance, so who predicts
nothing has the loss 1, or the mean square of the pictures where they are not normalised; a start
may be worse. No noise of batches doubles the larger of these: healthy runs end below 1.0 times,
those of a far too large rate between 2 and 1e12 times.
"""

CHECKED = 8
"""Steps whose pictures the finished weights are judged by."""

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""What torch's errors say on devices and on the CPU."""


class Task(Protocol):
    """What a training run is about: a module, its loss, and what to write at the end."""

    @property
    def module(self) -> nn.Module:
        """What is trained: its parameters that require gradients."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels of the data are below it."""
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
        BlockingIOError: another run is at work in the output folder.
        FileExistsError: the output folder holds a run already and ``resume`` is off.
        ValueError: the run to resume was started with another recipe, or none of its checkpoints
            can be used; labels that the task does not know; too little memory.
        FloatingPointError: the loss stopped being finite, or is worse in the end than that of a
            model that knows nothing; nothing is exported.
        OSError: a file that cannot be written; checkpoints that are there stay.
    """
    check_output(recipe, resume=resume)
    accelerator, loop = _accelerator(recipe, task), recipe.loop
    with contextlib.ExitStack() as stack:
        stack.enter_context(_naming_memory(recipe))
        if accelerator.is_main_process:
            stack.enter_context(claimed(recipe, resume=resume))
        accelerator.wait_for_everyone()
        run = Run(recipe, task, data, accelerator, resume=resume)
        bar = stack.enter_context(run.progress_bar())
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

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        data: ImageData,
        accelerator: Accelerator,
        *,
        resume: bool,
    ) -> None:
        self.recipe, self.task, self.data = recipe, task, data
        self.output, self.accelerator = Path(recipe.output), accelerator
        data.check_labels(task.num_classes)
        self.records = Log(self.output / LOG)
        accelerator.init_trackers("tensorboard")
        task.to(accelerator.device)
        if recipe.loop.device_data:
            data.to(accelerator.device)
        self.raw = task.module
        optimizers = build_optimizers(self.raw, recipe.optim)
        self.average = WeightAverage(self.raw.to(accelerator.device), recipe.optim.ema_decay)
        facts = self._resume(optimizers) if resume else {}
        self.step: int = facts.get("step", 0)
        self.first_loss: float = facts.get("first_loss", 0.0)
        if accelerator.is_main_process:
            self.records.truncate(self.step)
        # After the checkpoint has been read: prepared optimizers are wrapped.
        model, *self.optimizers = accelerator.prepare(self.raw, *optimizers)
        self.model: Any = torch.compile(model) if recipe.loop.compile else model
        self.started = time.monotonic() - facts.get("seconds", 0.0)

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
        loss = self._loss(self.model, self.step, *self._batch(self.step))
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.raw.parameters(), recipe.optim.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(self.raw)
        self.step += 1
        if self.step == 1:
            self.first_loss = self.finite(loss)
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
        facts = {"seconds": self.seconds, "first_loss": self.first_loss}
        keep = self.recipe.loop.keep_checkpoints
        plain = [getattr(o, "optimizer", o) for o in self.optimizers]
        folder = self.output / CHECKPOINTS
        save_state(folder, self.step, self.raw, plain, self.average, facts, keep=keep)

    def export(self) -> Path:
        """Write the finished artefact from the averaged weights; returns its folder.

        Raises:
            FloatingPointError: they are worth nothing.
        """
        self.accelerator.wait_for_everyone()
        folder, loop = self.output / EXPORT, self.recipe.loop
        self.average.copy_to(self.raw)
        self._check_worth()
        if self.accelerator.is_main_process:
            facts: dict[str, object] = {"images_seen": loop.steps * loop.batch_size}
            with files.writing_folder(folder) as partial, naming_the_file(folder):
                self.task.export(partial, facts | {"train_seconds": round(self.seconds, 1)})
                _keep_others(folder, partial)
        self.accelerator.end_training()
        return folder

    @torch.no_grad()
    def _check_worth(self) -> None:
        """Refuse weights that are no better than none, by the loss of the last steps' pictures."""
        losses, squares, steps = [], [], self.recipe.loop.steps
        for step in range(max(0, steps - CHECKED), steps):
            images, labels = self._batch(step)
            losses.append(self._loss(self.raw, step, images, labels))
            squares.append(images.square().mean())
        found = torch.stack([torch.stack(losses).mean(), torch.stack(squares).mean()])
        loss, square = self.accelerator.reduce(found, reduction="mean").tolist()
        most = WORTHLESS * max(1.0, square, self.first_loss)
        if not loss <= most:
            raise FloatingPointError(
                f"the loss of the finished weights is {loss:.4g}, that of the first step was "
                f"{self.first_loss:.4g}; legal: at most {most:.4g}. The run has exploded (optim.lr "
                f"= {self.recipe.optim.lr}), and nothing is exported"
            )

    def _resume(self, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """The facts of the newest checkpoint that is whole, once it is read; none without any.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        states, refused = list_states(self.output / CHECKPOINTS), []
        for state in reversed(states):
            try:
                facts = load_state(state, self.raw, optimizers, self.average)
            except DamagedCheckpointError as error:
                logger.warning("%s; it is not used", error)
                refused.append(str(error))
                continue
            logger.info("resumed from %s", state)
            return facts
        if refused:
            raise ValueError(f"no checkpoint can be used: {'; '.join(refused)}")
        return {}

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of the images and labels of a step."""
        size, process = self.recipe.loop.batch_size, self.accelerator.process_index
        share = size // self.accelerator.num_processes
        first = step * size + process * share
        return self.data.batch(first, share, self.recipe.seed, self.accelerator.device)

    def _loss(self, model: Any, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """Of a model on its share of a step, with the noise of that step."""
        recipe, accelerator = self.recipe, self.accelerator
        seed = _seed(recipe.seed, step, accelerator.process_index)
        generator = torch.Generator().manual_seed(seed)
        self.task.progress(step / recipe.loop.steps)
        with accelerator.autocast():
            return self.task.loss(model, images, labels, generator)


def _accelerator(recipe: Recipe, task: Task) -> Accelerator:
    """The devices of a run.

    Raises:
        ValueError: a batch that cannot be shared evenly among the processes, or a precision that
            the device does not have.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    ddp = DistributedDataParallelKwargs(find_unused_parameters=task.find_unused_parameters)
    precision = recipe.loop.mixed_precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with="tensorboard",
            project_dir=str(Path(recipe.output)),
            kwargs_handlers=[ddp],
        )
    except ValueError as error:
        raise ValueError(f"loop.mixed_precision = {precision!r}: {error}") from error
    size, world = recipe.loop.batch_size, accelerator.num_processes
    if size % world:
        raise ValueError(f"loop.batch_size = {size} must be a multiple of {world} processes")
    return accelerator


@contextlib.contextmanager
def _naming_memory(recipe: Recipe) -> Iterator[None]:
    """Too little memory, of which torch tells by three kinds of error, names what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        if isinstance(error, RuntimeError) and not any(words in told for words in NO_MEMORY):
            raise
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"loop.batch_size = {recipe.loop.batch_size}: a step takes more memory than there is "
            f"({''.join(first)}); legal: fewer pictures, or a smaller model"
        ) from error


def _keep_others(old: Path, new: Path) -> None:
    """Take over from an earlier export what this one does not write: its owner's measurements."""
    for entry in old.iterdir() if old.is_dir() else ():
        if not (new / entry.name).exists():
            copy = shutil.copytree if entry.is_dir() and not entry.is_symlink() else shutil.copy2
            copy(entry, new / entry.name)


def _seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4096 + rank


def _check_finite(loss: float, module: nn.Module, step: int) -> None:
    weights = (p for p in module.parameters() if p.requires_grad)
    if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in weights):
        raise FloatingPointError(
            f"loss or weights are not finite at step {step} (loss {loss}); "
            "the last checkpoint is untouched"
        )
