"""Train the small classifier whose features the metrics compare (`evaluation.features`)."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.evaluation.features import CLASSIFIER_SIDE, SmallClassifier
from ditdial.plain import json_files
from ditdial.plain.checks import require
from ditdial.training.config import DataConfig, Recipe, from_table
from ditdial.training.data import ImageData, splits
from ditdial.training.limits import AtMost, check_numbers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """Table ``[classifier]``: the network and its objective.

    Args:
        width, feature_dim: see `SmallClassifier`.
        shift: images are moved by up to this many pixels along each axis, at random.
        label_smoothing: share of each label spread over all classes.
    """

    num_classes: int
    width: Annotated[int, AtMost(1024)] = 32
    feature_dim: Annotated[int, AtMost(2**16)] = 64
    shift: int = 2
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        legal = f"0..{CLASSIFIER_SIDE - 1}"
        require(0 <= self.shift < CLASSIFIER_SIDE, "classifier.shift", self.shift, legal)
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "classifier.label_smoothing", smoothing, "[0, 1)")
        check_numbers(self, "classifier")


class ClassifierTask:
    """Cross-entropy training of a `SmallClassifier`."""

    find_unused_parameters = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings = settings = from_table(ClassifierSettings, recipe.settings, "classifier")
        side = recipe.data.image_size
        require(side == CLASSIFIER_SIDE, "data.image_size", side, f"{CLASSIFIER_SIDE}")
        self.test = held_out(recipe.data)
        torch.manual_seed(recipe.seed)
        self.module = SmallClassifier(
            in_channels=recipe.data.channels,
            num_classes=settings.num_classes,
            width=settings.width,
            feature_dim=settings.feature_dim,
        )

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return self.settings.num_classes

    def to(self, device: torch.device) -> None:
        """Nothing but the module."""

    def progress(self, share: float) -> None:
        """Every step is alike."""

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Cross entropy of shifted images, brought back from the data's statistics to [0, 1]."""
        data, settings = self.recipe.data, self.settings
        images = images * data.std + data.mean
        images = shift_images(images, settings.shift, generator, fill=data.pad_value / 255)
        logits = model(images).float()
        return F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)

    def export(self, folder: Path, facts: dict[str, object]) -> None:
        """Save the classifier; its accuracy, if the data has a split ``test``, stands beside it."""
        self.module.eval().save_pretrained(folder)
        facts = {**facts, "recipe": json.loads(self.recipe.to_json())}
        if self.test is not None:
            right = accuracy(self.module, self.test)
            facts |= {"test_accuracy": right, "test_images": len(self.test)}
        json_files.write(folder / "training.json", facts)


def shift_images(images: Tensor, limit: int, generator: torch.Generator, *, fill: float) -> Tensor:
    """Move each image by a whole number of pixels of its own.

    Args:
        images: ``(B, C, H, W)``.
        limit: most pixels along each axis.
        generator: draws the moves, on the CPU.
        fill: value of the pixels that move in.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (limit, limit, limit, limit), value=fill)
    top_B, left_B = torch.randint(0, 2 * limit + 1, (2, count), generator=generator)
    rows_BH1 = (top_B[:, None] + torch.arange(height))[:, :, None].to(images.device)
    columns_B1W = (left_B[:, None] + torch.arange(width))[:, None, :].to(images.device)
    sample_B11 = torch.arange(count, device=images.device)[:, None, None]
    # The indexed axes come first, with a slice between them: (B, H, W, C).
    return padded[sample_B11, :, rows_BH1, columns_B1W].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: SmallClassifier, data: ImageData, *, batch_size: int = 500) -> float:
    """Share of images that get the right class."""
    device, right = next(model.parameters()).device, 0
    for start in range(0, len(data), batch_size):
        rows = slice(start, start + batch_size)
        logits = model(data.images[rows].to(device).float() / 255)
        right += int((logits.argmax(dim=1) == data.labels[rows].to(device)).sum())
    return right / len(data)


def held_out(config: DataConfig) -> ImageData | None:
    """The split ``test``, read before any training so that it cannot fail behind it."""
    if "test" in splits(config):
        return ImageData(replace(config, split="test"))
    logger.warning("%r has no split 'test': no accuracy will be recorded", config.path)
    return None
