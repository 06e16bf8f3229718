"""The two token grids of a pass in a sparse mode (SparseDiT, 2412.06028, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditdial.backbones.streamed import Streamed
from ditdial.ops.pooling import Sides

Phases = tuple[Tensor, Tensor]
"""Cosines and sines."""


@dataclass(eq=False)
class TokenGrids:
    """State of one forward pass in a sparse mode.

    Attributes:
        streamed: where tokens meet in the blocks.
        dense, sparse: sides of the two grids.
        positions: position vectors ``(1, N, D)`` of the dense tokens, if they are added again.
        input: the dense tokens that the present sparse-dense module began with.
        own, other: how many tokens of its own a block has that sees two grids, and the tokens of
            the other grid.
        keys: what keys and values are made from there, where that cannot be passed.
        tables: rotary phases of the text, of the dense tokens and of the sparse ones.
        turns: those of queries and of keys of the picture, in a block that sees two grids.
    """

    streamed: Streamed
    dense: Sides
    sparse: Sides
    positions: Tensor | None = None
    input: Tensor | None = None
    own: int = 0
    other: Tensor | None = None
    keys: Tensor | None = None
    tables: tuple[Phases, Phases, Phases] | None = None
    turns: tuple[Phases, Phases] | None = None
