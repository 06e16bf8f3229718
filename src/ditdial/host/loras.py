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

Fused = Mapping[nn.Module, Mapping[str, float]]
"""The LoRAs that each wrapper has added to the weight of its layer, and the scale of each then."""

CHANGING = ("fuse_lora", "unfuse_lora", "set_adapters", "unload_lora", "delete_adapters")
"""Methods of diffusers' models that change what is fused, or the scales that PEFT unfuses at."""


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


def fused(model: nn.Module, known: Fused) -> Fused:
    """What is fused into the layers of a model, wrapper by wrapper.

    Args:
        known: at an earlier look. PEFT keeps no scale of what is fused: a LoRA's present scale is
            taken for one that was not there then, and may have been set since it was fused.
    """
    wrappers = (_as_any(module) for module in model.modules() if hasattr(module, "merged_adapters"))
    return {
        wrapper: {x: _scales(wrapper).get(x, 1.0) for x in wrapper.merged_adapters}
        | {x: s for x, s in known.get(wrapper, {}).items() if x in wrapper.merged_adapters}
        for wrapper in wrappers
    }


def fuse_as(now: Fused, before: Fused) -> None:
    """Fuse into weights that were just put in place what was fused into those they replace.

    Args:
        now: what is in the weights that are gone.
        before: what is in the weights that have come; nothing where a wrapper is not named.
    """
    for wrapper, scales in now.items():
        known, layer = before.get(wrapper, {}), _as_any(wrapper)
        if known.keys() == scales.keys():
            continue
        layer.merged_adapters = [*known]
        if not known.keys() <= scales.keys():
            layer.unmerge()  # at the present scales, as PEFT has done to the weights that are gone
        missing = [name for name in scales if name not in layer.merged_adapters]
        if missing:
            with _scaled(layer, scales):
                layer.merge(adapter_names=missing)


def unfuse_disabled(model: nn.Module) -> None:
    """Take LoRAs that are disabled out of the weights, as each would do itself in the next pass.

    What is made of the weights before that pass must know of it.
    """
    for module in model.modules():
        wrapper = _as_any(module)
        if getattr(wrapper, "merged_adapters", None) and wrapper.disable_adapters:
            wrapper.unmerge()


@contextlib.contextmanager
def unfused(model: nn.Module, known: Fused) -> Iterator[bool]:
    """The weights of a model without what is fused into them, for a while; then the same bits.

    Args:
        known: as for `fused`.

    Yields:
        Whether anything is.
    """
    kept: list[tuple[Any, list[str], list[tuple[Tensor, Tensor]]]] = []
    for wrapper, scales in fused(model, known).items():
        if scales:
            layer = _as_any(wrapper)
            weights = [(x, x.data.clone()) for x in innermost(layer).parameters(recurse=False)]
            kept.append((layer, [*layer.merged_adapters], weights))
            with _scaled(layer, scales):
                layer.unmerge()
    try:
        yield bool(kept)
    finally:
        for layer, names, weights in kept:
            layer.merged_adapters = names
            for tensor, data in weights:
                tensor.data.copy_(data)


@contextlib.contextmanager
def _scaled(wrapper: Any, scales: Mapping[str, float]) -> Iterator[None]:
    """A wrapper with other scales, for a while."""
    present = dict(_scales(wrapper))
    _scales(wrapper).update({x: scale for x, scale in scales.items() if x in present})
    try:
        yield
    finally:
        _scales(wrapper).update(present)


def _scales(wrapper: Any) -> dict[str, float]:
    """Of each LoRA; empty for PEFT's adapters of other kinds, some of which have none."""
    return getattr(wrapper, "scaling", {})


def _as_any(module: nn.Module) -> Any:
    return module
