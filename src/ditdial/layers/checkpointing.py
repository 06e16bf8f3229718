"""Gradient checkpointing: blocks are recomputed in the mode that they first ran in."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ditdial.layers.state import Router


@contextlib.contextmanager
def remembered_in_checkpoints(model: nn.Module, router: Router) -> Iterator[None]:
    """Let gradient checkpointing recompute each block in the mode it first ran in.

    Recomputation happens in the backward pass, when the router may long be in another mode.
    """
    if not torch.is_grad_enabled():
        yield  # the search below costs 1 % of a small model's forward pass
        return
    name = "_gradient_checkpointing_func"
    owners = [m for m in model.modules() if m.__dict__.get(name) is not None]
    originals = [owner.__dict__[name] for owner in owners]

    def remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            then = (router.mode, router.layout, router.grid, router.narrow)
            # The forward pass goes on with what a block makes of its streams.
            present, streams = router.streams, copy.copy(router.streams)
            first = [True]

            def again(*inner: Any, **named: Any) -> Any:
                now = (router.mode, router.layout, router.grid, router.narrow)
                outside = router.streams
                _return_to(router, then)
                router.streams = present if first else streams
                first.clear()
                try:
                    return function(*inner, **named)
                finally:
                    _return_to(router, now)
                    router.streams = outside

            return checkpoint(again, *args, **kwargs)

        return run

    for owner, original in zip(owners, originals, strict=True):
        owner.__dict__[name] = remembering(original)
    try:
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.__dict__[name] = original


def _return_to(router: Router, state: tuple[Any, ...]) -> None:
    router.mode, router.layout, router.grid, router.narrow = state
