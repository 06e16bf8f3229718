"""Tasks by the name a recipe gives."""

from __future__ import annotations

from elastic_dit.training.adapter import AdapterTask
from elastic_dit.training.base import BaseTask
from elastic_dit.training.classifier import ClassifierTask
from elastic_dit.training.config import Recipe
from elastic_dit.training.loop import Task
from elastic_dit.training.width import WidthTask

TASKS: dict[str, type[BaseTask | AdapterTask | WidthTask | ClassifierTask]] = {
    "base": BaseTask,
    "adapter": AdapterTask,
    "width": WidthTask,
    "classifier": ClassifierTask,
}


def build_task(recipe: Recipe) -> Task:
    """The task of a recipe.

    Raises:
        ValueError: unknown task, or settings out of range.
    """
    if recipe.task not in TASKS:
        raise ValueError(f"task = {recipe.task!r}; legal: {', '.join(TASKS)}")
    return TASKS[recipe.task](recipe)
