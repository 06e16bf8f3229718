"""What one token takes in a linear layer: inputs times outputs, and inputs plus outputs.

The first are multiply-adds of the layer; the second, times a rank, those of a low-rank update of
it. Routers narrow one side of a layer, or a part of one, so that each amount comes with what
narrows it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Side = Mapping[str, int]
"""Numbers on one side of a layer, by what narrows them (see `ditdial.cost.blocks.Term`)."""


@dataclass(frozen=True)
class Linear:
    """The two sides of a linear layer."""

    inputs: Side
    outputs: Side

    def products(self) -> Counter[str]:
        """Inputs times outputs, by what narrows them; at most one of the two sides does."""
        found: Counter[str] = Counter()
        for before, width in self.inputs.items():
            for after, height in self.outputs.items():
                assert "nothing" in (before, after)
                found[before if after == "nothing" else after] += width * height
        return found

    def sums(self) -> Counter[str]:
        """Inputs plus outputs, by what narrows them."""
        return Counter(self.inputs) + Counter(self.outputs)


def linears(module: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers inside a module, under their stock names, without those of a LoRA."""
    for name, layer in module.named_modules():
        wraps = hasattr(layer, "base_layer")  # as PEFT does; the layer itself comes next
        if hasattr(layer, "out_features") and not wraps and "lora_" not in name:
            yield name.replace(".base_layer", ""), layer


def linear_macs(module: Any, pattern: str = "") -> int:
    """Multiply-adds of one token in all linear layers whose names match a regular expression."""
    return sum(
        layer.in_features * layer.out_features
        for name, layer in linears(module)
        if re.search(pattern, name)
    )


def matrix_sizes(layer: Any) -> tuple[int, int]:
    """Rows and columns of the product in a linear layer, or in a convolution of patches."""
    if hasattr(layer, "out_features"):
        return layer.in_features, layer.out_features
    return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels
