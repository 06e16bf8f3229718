"""Multiply-adds of blocks that run on two token grids (SparseDiT, 2412.06028, section 3).

`SparseBlock` says what one block multiplies and which role it has; `SparseCost` sums what a sparse
mode leaves out of all of them. Averages and up-sampling are no products of matrices and count as
nothing, as everywhere in `elastic_dit.cost`.

The paper counts two things otherwise, and its figures come out with ``published = True``: its
pooling block multiplies a constant N x N matrix with the values of all tokens, and its merge
multiplies sparse tokens after they are spread over the dense grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

Grid = tuple[int, int, int]

ROLES = ("pool", "generate", "gather", "sparse", "recover", "dense")
"""What a block does with its two grids, in the order of a module; ``pool`` blocks come before.
``generate`` makes the sparse tokens, ``gather`` is the same once they are there.
"""


@dataclass(frozen=True, kw_only=True)
class Linears:
    """Multiply-adds per token in the linear layers of a block, by the tokens that go through.

    Args:
        query: makes queries, and takes what attention returns.
        key: makes keys and values.
        rest: the stream's own tokens.
    """

    query: int
    key: int
    rest: int


@dataclass(frozen=True, kw_only=True)
class SparseBlock:
    """What one block multiplies.

    Args:
        role: of `ROLES`.
        attention: kind of each attention that picture tokens go through (see
            `elastic_dit.cost.Attention`), and its heads times head width.
        linear: of its linear layers.
        adapted: inputs plus outputs of those that carry low-rank updates.
        cross: heads times head width of its attention to the text.
        merge: multiply-adds of one token in one of a recover block's two merging layers.
    """

    role: str
    attention: tuple[tuple[str, int], ...]
    linear: Linears
    adapted: Linears = Linears(query=0, key=0, rest=0)
    cross: int = 0
    merge: int = 0

    def macs(self, dense: Grid, sparse: Grid, text: int, *, published: bool = False) -> int:
        """Everything, for one picture, but what the text's own tokens multiply."""
        frames = dense[0]
        queries, keys, stream = self._tokens(dense, sparse)
        n, m = math.prod(dense), math.prod(sparse)
        pairs = {
            "self": queries * keys,
            "joint": (queries + text) * (keys + text),
            "spatial": queries * keys // frames,
            "temporal": queries * frames,
        }
        attention = 2 * self.cross * stream * text
        if self.role == "pool" and published:
            half = (self.linear.query + self.linear.key) // 2  # neither queries nor keys
            constant = sum(width for _, width in self.attention) * n * self._apart(n, frames)
            return attention + constant + n * (half + self.linear.rest)
        attention += sum(2 * width * pairs[kind] for kind, width in self.attention)
        merge = ((n if published else m) + n) * self.merge if self.role == "recover" else 0
        return attention + merge + _through(self.linear, queries, keys, stream)

    def adapted_units(self, dense: Grid, sparse: Grid) -> int:
        """Inputs plus outputs of adapted layers, each times the tokens that go through it."""
        return _through(self.adapted, *self._tokens(dense, sparse))

    def _apart(self, n: int, frames: int) -> int:
        """Tokens that attend to each other."""
        return n // frames if self.attention[0][0] == "spatial" else n

    def _tokens(self, dense: Grid, sparse: Grid) -> tuple[int, int, int]:
        """Queries, keys and tokens of the stream."""
        n, m = math.prod(dense), math.prod(sparse)
        if self.role == "pool":
            means = n // self._apart(n, dense[0])
            return means, means, n
        return {
            "generate": (m, n, m),
            "gather": (m, n, m),
            "sparse": (m, m, m),
            "recover": (n, m, n),
            "dense": (n, n, n),
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
            _dense(block).macs(dense, dense, text)
            - block.macs(dense, sparse, text, published=self.published)
            for block in self.blocks
        )

    def adapted_left_out(self, dense: Grid, token_grid: tuple[int, int]) -> int:
        """Inputs plus outputs of adapted layers that it saves, each times its tokens."""
        sparse = (dense[0], *token_grid)
        return sum(
            _dense(block).adapted_units(dense, dense) - block.adapted_units(dense, sparse)
            for block in self.blocks
        )


def _dense(block: SparseBlock) -> SparseBlock:
    return replace(block, role="dense")


def _through(linear: Linears, queries: int, keys: int, stream: int) -> int:
    return queries * linear.query + keys * linear.key + stream * linear.rest
