"""Multiply-adds of live layers: what a backbone's `TransformerShape` is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditdial.cost.shape import Kept, TransformerShape
from ditdial.plan.mode import Mode


def linear_macs(module: Any, pattern: str = "", *, but: str | None = None) -> int:
    """Inputs times outputs of all linear layers whose names match, and do not match ``but``."""
    return sum(
        layer.in_features * layer.out_features
        for name, layer in module.named_modules()
        if hasattr(layer, "out_features")
        and "lora_" not in name
        and re.search(pattern, name)
        and not (but and re.search(but, name))
    )


def with_other_pictures(shape: TransformerShape, tokens: int) -> TransformerShape:
    """The same network with ``tokens`` of reference pictures in its joint sequence (full mode)."""
    each = shape.token_macs - shape.text_macs + (shape.patch_in + shape.patch_out) * shape.width
    return replace(
        shape,
        text_tokens=shape.text_tokens + tokens,
        picture_macs=shape.picture_macs + tokens * each,
    )


def filled(tokens: int, multiple: int) -> int:
    """Tokens and the filler up to a multiple."""
    return tokens + -tokens % multiple


@dataclass(frozen=True, kw_only=True)
class FilledShape(TransformerShape):
    """A model that fills its tokens up to a multiple.

    Blocks go through the filler too, and in full mode so do the first layer and the last.
    """

    multiple: int

    def tokens(self, mode: Mode) -> int:
        return filled(super().tokens(mode), self.multiple)

    def dense_macs(self, mode: Mode) -> float:
        tokens, text = self.tokens(mode), self.text_tokens
        attention = sum(layer.macs(1, tokens, text) for layer in self.attention)
        return attention + tokens * self.token_macs + text * self.text_macs

    def macs(
        self, mode: Mode, level: float | None = None, kept: Sequence[Kept] | None = None
    ) -> float:
        if mode.has_base_patch:  # the last layer projects the text as well
            return super().macs(mode, level, kept) + self.text_tokens * self.patch_out * self.width
        filler = (self.tokens(mode) - super().tokens(mode)) * math.prod(mode.patch_scale)
        return (
            super().macs(mode, level, kept) - filler * (self.patch_in + self.patch_out) * self.width
        )
