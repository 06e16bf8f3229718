"""Branches of different modes in one call: where the tokens of each lie.

Tokens are laid out in strips, ``(strips of all, strip, D)``, whose length divides the token counts
of all parts: 64 and 16 tokens make strips of 16. What works token by token needs no change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ditdial.plan.mode import Mode

MASKED: Literal["masked"] = "masked"
"""Packed, with one call of attention under a block-diagonal mask."""

Packing = bool | Literal["masked"]
"""Whether, and how, branches of different modes share one call."""


@dataclass(frozen=True)
class Part:
    """Rows of a packed batch that share a mode: ``rows`` pictures of ``tokens`` tokens each."""

    mode: Mode
    rows: int
    tokens: int


@dataclass(frozen=True)
class Layout:
    """The parts of a packed batch, in their order.

    Attributes:
        masked: attention runs once for all parts, under a mask.
        labels: of each part.
        modes: of each part, as are the following, which all layers of a call ask for.
        rows: pictures.
        tokens: of a picture.
        lengths: tokens of all pictures.
        strips: rows of the packed batch.
        strip: tokens of one row of the packed batch.
    """

    parts: tuple[Part, ...]
    masked: bool = False
    labels: tuple[Any, ...] = field(default=(), compare=False)
    modes: tuple[Mode, ...] = field(init=False, compare=False)
    rows: tuple[int, ...] = field(init=False, compare=False)
    tokens: tuple[int, ...] = field(init=False, compare=False)
    lengths: tuple[int, ...] = field(init=False, compare=False)
    strips: tuple[int, ...] = field(init=False, compare=False)
    strip: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        modes, rows, tokens = zip(*((x.mode, x.rows, x.tokens) for x in self.parts), strict=True)
        strip = math.gcd(*tokens)
        lengths = tuple(x.rows * x.tokens for x in self.parts)
        facts = {"modes": modes, "rows": rows, "tokens": tokens, "lengths": lengths, "strip": strip}
        for name, fact in (facts | {"strips": tuple(n // strip for n in lengths)}).items():
            object.__setattr__(self, name, fact)

    def pack(self, pieces: Sequence[Tensor]) -> Tensor:
        """``(pictures, tokens, D)`` per part -> ``(strips of all, strip, D)``."""
        return torch.cat([piece.reshape(-1, self.strip, piece.shape[-1]) for piece in pieces])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The inverse of `pack`."""
        pieces = packed.split(self.strips)
        return [
            piece.reshape(part.rows, part.tokens, -1)
            for piece, part in zip(pieces, self.parts, strict=True)
        ]

    def owners(self) -> Tensor:
        """The row of the batch that each strip belongs to."""
        strips = [n // self.strip for part in self.parts for n in [part.tokens] * part.rows]
        return torch.arange(len(strips)).repeat_interleave(torch.tensor(strips))

    def apart(self, dtype: torch.dtype) -> Tensor:
        """What keeps one picture of each part apart in a sequence: added to scores, ``(n, n)``."""
        same = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool) for n in self.tokens])
        return torch.zeros(same.shape, dtype=dtype).masked_fill(~same, -torch.inf)
