"""A user's LoRA: PEFT puts a wrapper in the place of each layer that a LoRA changes.

The wrapper holds the layer, maybe inside another wrapper, and the layer is put back when the last
LoRA goes. What an elastic model needs of a layer it needs of the innermost one, under the name that
this has without wrappers: it was there before any LoRA, and is there after the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

INNER = "base_layer"
"""Attribute of a wrapper, part of the names of what is inside; diffusers knows wrappers by it."""

Fused = Mapping[nn.Module, tuple[str, ...]]
"""The LoRAs that each wrapper has added to the weight of its layer."""


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module stands in the place of a layer that it holds."""
    return hasattr(module, INNER)


def innermost(layer: Any) -> Any:
    """The layer itself, of which a wrapper or several may stand in its place."""
    while is_wrapper(layer):
        layer = layer.base_layer
    return layer


def stock_name(name: str) -> str:
    """The name of a layer, or of a tensor of it, as it is without wrappers."""
    return name.replace(f".{INNER}", "")


def stock_keys(model: nn.Module) -> dict[str, str]:
    """The keys of a model's state dict, by their names without wrappers; none of what LoRAs add."""
    added = tuple(
        f"{name}.{child}."
        for name, wrapper in model.named_modules()
        if is_wrapper(wrapper)
        for child in wrapper._modules
        if child != INNER
    )
    return {stock_name(key): key for key in model.state_dict() if not key.startswith(added)}


def fused(model: nn.Module) -> Fused:
    """What is fused into the layers of a model, wrapper by wrapper."""
    wrappers = (_as_any(module) for module in model.modules() if hasattr(module, "merged_adapters"))
    return {wrapper: tuple(wrapper.merged_adapters) for wrapper in wrappers}


def fuse_as(now: Fused, before: Fused) -> None:
    """Fuse into weights that were just put in place what was fused into those they replace.

    Args:
        now: what wrappers say, of the weights that are gone.
        before: what is in the weights that have come; nothing where a wrapper is not named.
    """
    for wrapper, names in now.items():
        known, layer = before.get(wrapper, ()), _as_any(wrapper)
        if known == names:
            continue
        layer.merged_adapters = [*known]
        if known:
            layer.unmerge()
        if names:
            layer.merge(adapter_names=[*names])


def unfuse_disabled(model: nn.Module) -> None:
    """Take LoRAs that are disabled out of the weights, as each would do itself in the next pass.

    What is made of the weights before that pass must know of it.
    """
    for module in model.modules():
        wrapper = _as_any(module)
        if getattr(wrapper, "merged_adapters", None) and wrapper.disable_adapters:
            wrapper.unmerge()


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[bool]:
    """The weights of a model without what is fused into them, for a while; then the same bits.

    Yields:
        Whether anything is.
    """
    kept: list[tuple[Any, tuple[str, ...], list[tuple[Tensor, Tensor]]]] = []
    for wrapper, names in fused(model).items():
        if names:
            weights = [(x, x.data.clone()) for x in innermost(wrapper).parameters(recurse=False)]
            kept.append((wrapper, names, weights))
            _as_any(wrapper).unmerge()
    try:
        yield bool(kept)
    finally:
        for wrapper, names, weights in kept:
            wrapper.merged_adapters = [*names]
            for tensor, data in weights:
                tensor.data.copy_(data)


def _as_any(module: nn.Module) -> Any:
    return module
