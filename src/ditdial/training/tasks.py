"""Tasks by the name a recipe gives."""

from __future__ import annotations

from ditdial.training.adapter import AdapterTask
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


def build_task(recipe: Recipe) -> Task:
    """The task of a recipe.

    Raises:
        ValueError: unknown task, or settings out of range.
    """
    if recipe.task not in TASKS:
        raise ValueError(f"task = {recipe.task!r}; legal: {', '.join(TASKS)}")
    return TASKS[recipe.task](recipe)
