"""Tasks by the name a recipe gives."""

from __future__ import annotations

from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from ditdial.methods import DyDiT
from ditdial.plain.checks import did_you_mean
from ditdial.training.adapter import TRAINED, AdapterTask
from ditdial.training.base import BaseTask
from ditdial.training.classifier import ClassifierTask
from ditdial.training.config import Recipe
from ditdial.training.loop import Task
from ditdial.training.width import WidthTask

TASKS: dict[str, type[BaseTask | AdapterTask | WidthTask | ClassifierTask]] = {
    "base": BaseTask,
    "adapter": AdapterTask,
    "width": WidthTask,
    "classifier": ClassifierTask,
}

TRAINERS: dict[str, str] = {**dict.fromkeys(TRAINED, "adapter"), DyDiT.name: "width"}
"""The task that trains each method; a combination has none."""

TRAINED_CLASSES = (DiTTransformer2DModel.__name__,)
"""Model classes that tasks train, in pixel space; adapters of others are trained elsewhere."""


def build_task(recipe: Recipe) -> Task:
    """The task of a recipe.

    Raises:
        ValueError: unknown task, or settings out of range.
    """
    if recipe.task not in TASKS:
        near = did_you_mean(recipe.task, TASKS)
        raise ValueError(f"task = {recipe.task!r}; legal: {', '.join(TASKS)}{near}")
    return TASKS[recipe.task](recipe)
