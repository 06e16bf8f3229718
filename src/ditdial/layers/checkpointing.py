"""Gradient checkpointing: blocks are recomputed in the mode that they first ran in."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ditdial.layers.state import State

CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute of diffusers' models that holds what checkpoints their blocks."""


@contextlib.contextmanager
def remembered_in_checkpoints(model: nn.Module, state: State) -> Iterator[None]:
    """Let gradient checkpointing recompute each block in the mode it first ran in.

    Recomputation happens in the backward pass, when the state may long be another.
    """
    if not torch.is_grad_enabled():
        yield  # the search below costs 1 % of a small model's forward pass
        return
    owners = [m for m in model.modules() if m.__dict__.get(CHECKPOINT) is not None]
    originals = [owner.__dict__[CHECKPOINT] for owner in owners]
    for owner, original in zip(owners, originals, strict=True):
        owner.__dict__[CHECKPOINT] = _remembering(original, state)
    try:
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.__dict__[CHECKPOINT] = original


def _remembering(checkpoint: Callable[..., Any], state: State) -> Callable[..., Any]:
    """A checkpoint that returns to the state of its first run before it runs a block again."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = state.snapshot()
        # The forward pass goes on with what a block makes of its grids; a later run has a copy.
        later = first._replace(grids=copy.copy(first.grids))
        waiting = [first, later]

        def again(*inner: Any, **named: Any) -> Any:
            then = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            with state.as_in(then):
                return function(*inner, **named)

        return checkpoint(again, *args, **kwargs)

    return run
