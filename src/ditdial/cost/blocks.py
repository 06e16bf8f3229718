"""Multiply-adds of blocks that run on two token grids (SparseDiT, 2412.06028, section 3).

`SparseBlock` says what one block multiplies and which role it has; `SparseCost` sums what a sparse
mode leaves out of all of them. Averages and up-sampling are no products of matrices and count as
nothing, as everywhere in `ditdial.cost.shape`.

The paper counts two things otherwise, and its figures come out with ``published = True``: its
pooling block multiplies a constant N x N matrix with the values of all tokens, and its merge
multiplies sparse tokens after they are spread over the dense grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

Grid = tuple[int, int, int]

ROLES = ("pool", "generate", "gather", "sparse", "recover", "dense")
"""What a block does with its two grids, in the order of a module; ``pool`` blocks come before.
``generate`` makes the sparse tokens, ``gather`` is the same once they are there.
"""


class Seen(NamedTuple):
    """Tokens of one picture in a block: that ask, that are asked and that it returns."""

    queries: int
    keys: int
    stream: int
    frames: int

    @classmethod
    def on(cls, grid: Grid) -> Seen:
        """All those of one grid."""
        n = math.prod(grid)
        return cls(n, n, n, grid[0])

    def pairs(self, kind: str, text: int) -> int:
        """Which see each other in an attention of a kind (see `ditdial.cost.shape.Attention`)."""
        return {
            "self": self.queries * self.keys,
            "joint": (self.queries + text) * (self.keys + text),
            "cross": self.stream * text,
            "spatial": self.queries * self.keys // self.frames,
            "temporal": self.queries * self.frames,
        }[kind]


@dataclass(frozen=True, kw_only=True)
class Linears:
    """Linear layers of a block by the tokens that go through, in what one token takes there.

    That is multiply-adds, or inputs plus outputs of those layers that carry low-rank updates.

    Args:
        query: makes queries, and takes what attention returns.
        key: makes keys and values.
        rest: the stream's own tokens.
    """

    query: int
    key: int
    rest: int

    def of(self, seen: Seen) -> int:
        """What all tokens take."""
        return seen.queries * self.query + seen.keys * self.key + seen.stream * self.rest


@dataclass(frozen=True, kw_only=True)
class SparseBlock:
    """What one block multiplies.

    Args:
        role: of `ROLES`.
        attention: kind of each attention that picture tokens go through (see
            `ditdial.cost.shape.Attention`), and its heads times head width.
        linear: of its linear layers.
        cross: heads times head width of its attention to the text.
        merge: multiply-adds of one token in one of a recover block's two merging layers.
    """

    role: str
    attention: tuple[tuple[str, int], ...]
    linear: Linears
    cross: int = 0
    merge: int = 0

    def macs(self, dense: Grid, sparse: Grid, text: int, *, published: bool = False) -> int:
        """Everything, for one picture, but what the text's own tokens multiply."""
        seen = self.seen(dense, sparse)
        n, m = math.prod(dense), math.prod(sparse)
        attention = 2 * self.cross * seen.pairs("cross", text)
        if self.role == "pool" and published:
            half = (self.linear.query + self.linear.key) // 2  # neither queries nor keys
            constant = sum(width for _, width in self.attention) * n * self._apart(n, dense[0])
            return attention + constant + n * (half + self.linear.rest)
        attention += sum(2 * width * seen.pairs(kind, text) for kind, width in self.attention)
        merge = ((n if published else m) + n) * self.merge if self.role == "recover" else 0
        return attention + merge + self.linear.of(seen)

    def _apart(self, n: int, frames: int) -> int:
        """Tokens that attend to each other."""
        return n // frames if self.attention[0][0] == "spatial" else n

    def seen(self, dense: Grid, sparse: Grid) -> Seen:
        """Its tokens."""
        n, m, frames = math.prod(dense), math.prod(sparse), dense[0]
        if self.role == "pool":
            means = n // self._apart(n, frames)
            return Seen(means, means, n, frames)
        return {
            "generate": Seen(m, n, m, frames),
            "gather": Seen(m, n, m, frames),
            "sparse": Seen(m, m, m, frames),
            "recover": Seen(n, m, n, frames),
            "dense": Seen(n, n, n, frames),
        }[self.role]


@dataclass(frozen=True, kw_only=True)
class SparseCost:
    """The blocks of a model in order, with their roles.

    Args:
        published: count as the paper does.
    """

    blocks: tuple[SparseBlock, ...]
    published: bool = False

    def left_out(self, dense: Grid, token_grid: tuple[int, int], text: int) -> int:
        """Multiply-adds that a sparse mode saves for one picture."""
        sparse = (dense[0], *token_grid)
        return sum(
            replace(block, role="dense").macs(dense, dense, text)
            - block.macs(dense, sparse, text, published=self.published)
            for block in self.blocks
        )

    def seen(self, dense: Grid, token_grid: tuple[int, int]) -> list[Seen]:
        """Tokens of each block."""
        return [block.seen(dense, (dense[0], *token_grid)) for block in self.blocks]
