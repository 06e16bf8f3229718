"""What a block multiplies: a sum of products, one for each kind of work in it.

A `Term` says what one token takes in some layers of a block, or one pair of tokens in an attention,
which tokens of the block these are, and what can leave a share of the work out:

    multiply-adds of a block = sum over its terms of  each * count[by] * share[narrows]

A mode decides the counts alone (`Tokens`) and routers the shares alone (`Kept`), so that coarse,
sparse and narrow modes, and all that are made of them, cost by the same formula. A low-rank update
of rank r multiplies r times the inputs plus outputs of its layer: the formula serves it too, with
inputs plus outputs in the place of multiply-adds in ``each``.

Averages and up-sampling are no products of matrices and count as nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ditdial.ops.gates import kept_tokens

Grid = tuple[int, int, int]

ROLES = {
    "pool": ("dense", "dense"),
    "generate": ("sparse", "dense"),
    "gather": ("sparse", "dense"),
    "sparse": ("sparse", "sparse"),
    "recover": ("dense", "sparse"),
    "dense": ("dense", "dense"),
}
"""What a block does between two token grids (SparseDiT, 2412.06028, section 3).

Each with the grid that asks in its attention and the one that is asked. ``pool`` blocks come first;
the others are in the order of a module. ``generate`` makes the sparse tokens, ``gather`` is the
same once they are there.
"""


class Term(NamedTuple):
    """Work of one kind in a block.

    Args:
        each: multiply-adds of one token, or of one pair of tokens.
        by: which tokens or pairs: a name of `Tokens.counts`.
        narrows: what can leave a share of it out: ``heads`` or ``channels`` that routers choose, a
            ``prompt`` that was seen before, or ``nothing``.
    """

    each: float
    by: str
    narrows: str = "nothing"


@dataclass(frozen=True)
class Kept:
    """Shares of one block's heads and channels, and of the tokens that enter its feed-forward."""

    heads: float = 1
    channels: float = 1
    tokens: float = 1


ALL = Kept()


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of one picture in a block.

    Args:
        queries, keys: that ask in its attention, and that are asked.
        stream: that go through everything else.
        frames: rows of tokens that a spatial attention keeps apart.
        text: of the prompt.
        merged: of both grids together, where the block merges them.
    """

    queries: int
    keys: int
    stream: int
    frames: int
    text: int = 0
    merged: int = 0

    @classmethod
    def on(cls, grid: Grid, text: int = 0) -> Tokens:
        """All those of one grid."""
        n = math.prod(grid)
        return cls(queries=n, keys=n, stream=n, frames=grid[0], text=text)

    @functools.cached_property
    def counts(self) -> dict[str, float]:
        """How many there are of each kind of token, and of pairs that meet in each attention.

        ``query`` tokens have queries and take what attention returns, ``key`` tokens have keys and
        values. ``entering`` are those of the stream that a feed-forward lets in: all of them unless
        routers choose. ``framed`` are text tokens that are repeated for every frame.
        """
        return {
            "query": self.queries,
            "key": self.keys,
            "stream": self.stream,
            "entering": self.stream,
            "merged": self.merged,
            "text": self.text,
            "framed": self.text * self.frames,
            "self": self.queries * self.keys,
            "joint": (self.queries + self.text) * (self.keys + self.text),
            "cross": self.stream * self.text,
            "spatial": self.queries * self.keys // self.frames,
            "temporal": self.queries * self.frames,
        }


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block, or several that work alike, as a sum of terms.

    Args:
        role: what it does with two token grids, of `ROLES`; None where nobody planned it.
        router: multiply-adds of one token in the router that decides whether it enters the
            feed-forward; 0 where all tokens do. Routers of the timestep run once per run.
    """

    terms: tuple[Term, ...]
    role: str | None = None
    router: int = 0

    def tokens(self, dense: Grid, sparse: Grid, text: int) -> Tokens:
        """Its tokens between two grids, in its role."""
        assert self.role is not None
        grids = {"dense": dense, "sparse": sparse}
        queries, keys = (math.prod(grids[name]) for name in ROLES[self.role])
        stream, merged = queries, queries + keys if self.role == "recover" else 0
        if self.role == "pool":
            # Equal weights make attention an average, taken before anything is multiplied.
            queries = keys = dense[0] if self._has("spatial") else 1
        return Tokens(
            queries=queries, keys=keys, stream=stream, frames=dense[0], text=text, merged=merged
        )

    def macs(self, tokens: Tokens, kept: Kept | None = None) -> float:
        """Multiply-adds of one forward pass of one picture; ``kept`` is None without routers."""
        routers = 0 if kept is None else tokens.stream * self.router
        return self.total(self.terms, tokens, kept) + routers

    def total(self, terms: Iterable[Term], tokens: Tokens, kept: Kept | None = None) -> float:
        """The sum of terms on its tokens: its own, or those of the low-rank updates in it."""
        kept = kept or ALL
        shares = {"heads": kept.heads, "channels": kept.channels, "prompt": 1, "nothing": 1}
        counts = tokens.counts
        if self.router:
            counts = counts | {"entering": tokens.stream * kept.tokens}
        return sum(each * counts[by] * shares[narrows] for each, by, narrows in terms)

    def narrowing(self) -> Block:
        """The part of it that routers can leave out."""
        return replace(
            self, terms=tuple(x for x in self.terms if x.narrows in ("heads", "channels"))
        )

    def fixed(self, kept: Kept, tokens: Tokens) -> Kept:
        """What is kept where a fixed number of tokens is, in each row that the block sees."""
        row = tokens.stream
        if self._has("spatial"):
            row = tokens.stream // tokens.frames
        elif self._has("temporal"):
            row = tokens.frames
        return replace(kept, tokens=kept_tokens(row, kept.tokens) / row)

    def _has(self, kind: str) -> bool:
        return any(term.by == kind for term in self.terms)
