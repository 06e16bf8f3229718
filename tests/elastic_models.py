"""Tiny elastic models with noise on the new tensors, and runs of them, for ecosystem tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tests.backbones.tiny import CASES
from torch import Tensor

from ditdial import FULL, Execution, FlexiDiT, Mode, elastify, handle_of
from ditdial.handle import Handle
from ditdial.runtime.tensors import is_new

WEAK = Mode(2)
MERGED = Execution(merge=True)


def checkpointed_gradients(handle: Handle, call: dict[str, Any], mode: Mode) -> set[str]:
    """Names of the parameters that a mode's loss reaches, as surely with checkpointing as without.

    The backward pass finds the model in another mode.
    """
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            handle.model.enable_gradient_checkpointing()
        handle.model.zero_grad()
        with handle.using(mode):
            loss = handle.model(**call).sample.square().mean()
        with handle.using(FULL):
            loss.backward()
        found.append({k: p.grad for k, p in handle.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-5, rtol=1e-4, msg=key)
    return set(found[0])


def call_of(name: str, time: float = 700.0, count: int = 2) -> dict[str, Any]:
    """A call at a class's first grid."""
    case = CASES[name]
    return case.call(count, case.grids[0], time)


@torch.no_grad()
def shake(model: Any, keep: Callable[[str], bool], seed: int = 3) -> None:
    """Add noise to some parameters, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if keep(key):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise.to(parameter.dtype))


def elastic(name: str, model: Any = None, recipe: str = "lora", **options: Any) -> Handle:
    """An elastic model that differs from its base in every new tensor."""
    model = model or CASES[name].model()
    torch.manual_seed(2)
    handle = elastify(model, FlexiDiT(rank=3, scales=(2,), recipe=recipe), **options)
    shake(handle.model, is_new)
    return handle


@torch.no_grad()
def run(handle_or_model: Any, call: dict[str, Any], mode: Mode | None = None) -> Tensor:
    """The prediction of a call, in a mode if one is given."""
    model = getattr(handle_or_model, "model", handle_or_model)
    if mode is None:
        return model(**call).sample
    with handle_of(model).using(mode):
        return model(**call).sample


def run_as(handle: Any, **changes: Any) -> None:
    """Change how a handle's calls are run, and leave the rest of its execution as it is."""
    handle.execution = replace(handle.execution, **changes)
