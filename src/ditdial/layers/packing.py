"""Branches of different modes in one call: where the tokens of each lie.

Tokens are laid out in strips, ``(strips of all, strip, D)``, whose length divides the token counts
of all parts: 64 and 16 tokens make strips of 16. What works token by token needs no change; every
other layer runs part by part (`ditdial.layers.state.State.each`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditdial.plan.mode import Mode


@dataclass(frozen=True)
class Part:
    """Rows of a packed batch that share a mode: ``rows`` pictures of ``tokens`` tokens each.

    Args:
        makes_tokens: whether new modules make the tokens.
    """

    mode: Mode
    rows: int
    tokens: int
    makes_tokens: bool = False


@dataclass(frozen=True)
class Layout:
    """The parts of a packed batch, in their order.

    Attributes:
        strip: tokens of one row of the packed batch.
        strips: rows of the packed batch, of each part.
    """

    parts: tuple[Part, ...]
    strip: int = field(init=False, compare=False)
    strips: tuple[int, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # Every layer of a call asks for these: they are worked out once.
        strip = math.gcd(*(part.tokens for part in self.parts))
        object.__setattr__(self, "strip", strip)
        strips = tuple(part.rows * part.tokens // strip for part in self.parts)
        object.__setattr__(self, "strips", strips)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Of each part."""
        return tuple([part.mode for part in self.parts])

    @property
    def rows(self) -> tuple[int, ...]:
        """Pictures of each part."""
        return tuple([part.rows for part in self.parts])

    def pack(self, pieces: Sequence[Tensor]) -> Tensor:
        """``(pictures, tokens, D)`` of each part -> ``(strips of all, strip, D)``.

        Rows of different lengths become rows of one length without padding, since the strip divides
        all of them.
        """
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
