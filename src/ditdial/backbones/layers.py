"""Names of layers inside the blocks of diffusers' models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ditdial.host.loras import innermost


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The modules that take branches of different modes in one packed call, by `matching` names.

    Args:
        modulation: those whose output modulates all tokens of a picture.
        attention: those that image tokens attend to each other in.
    """

    modulation: tuple[str, ...]
    attention: tuple[str, ...]


Layers = tuple[tuple[str, tuple[str, ...]], ...]
"""Names of layers inside the blocks of a list, for each list."""

MODULATION = r"\.norm[^.]*\.linear$"
"""Layers in norms that make shifts, scales and gates of the conditioning vector."""


def attention(name: str) -> tuple[str, ...]:
    """Layers of an `Attention` that image tokens go through."""
    return tuple(f"{name}.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0"))


def feed_forward(name: str) -> tuple[str, ...]:
    """Layers of a `FeedForward`."""
    return f"{name}.net.0.proj", f"{name}.net.2"


def embedders(owner: str) -> tuple[str, str]:
    """Layers of a combined embedding of time and something else that see the time alone."""
    return f"{owner}.time_proj", f"{owner}.timestep_embedder"


def named(model: Any, layers: Layers) -> Iterator[tuple[str, nn.Linear]]:
    """Those layers themselves, without the wrappers of LoRAs, with their names in the model."""
    for blocks, names in layers:
        for index, block in enumerate(model.get_submodule(blocks)):
            for name in names:
                yield f"{blocks}.{index}.{name}", innermost(block.get_submodule(name))


def matching(model: Any, patterns: tuple[str, ...]) -> Iterator[Any]:
    """Submodules by name; ``*`` stands for every entry of a list, and what is None is left out."""
    for pattern in patterns:
        found = [model]
        for part in pattern.split("."):
            found = [
                child
                for module in found
                for child in (module if part == "*" else [getattr(module, part)])
                if child is not None
            ]
        yield from found
