"""Multiply-adds of a forward pass in any mode, in closed form.

A pass of one picture costs the sum over its blocks (`ditdial.cost.blocks`), plus the projections of
patches into the model and out of it, plus what a picture costs once, plus low-rank updates.

Every product of two matrices counts (linear layers, patch embedding, attention scores and mixing);
element-wise work does not. 1 multiply-add (MAC) = 2 FLOPs. DiT papers print MACs and call them
"Gflops"; we always name which. The forms agree with `torch.utils.flop_counter` on the meta device;
on the CPU that counter misses fused attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ditdial.cost.blocks import Block, Grid, Kept, Term, Tokens
from ditdial.ops.patching import coarse_grid
from ditdial.plan.mode import Mode


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Low-rank updates that are added apart from the weights.

    Args:
        rank: of each.
        blocks: inputs plus outputs of the layers that carry one, as terms of each block.
        parts: names of the parts of modes that have them.
    """

    rank: int
    blocks: tuple[tuple[Term, ...], ...]
    parts: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class PatchCost:
    """The layers that base patches go through outside the blocks.

    Args:
        width: of the model.
        into, out: numbers in one base patch, entering and leaving.
        skips: coarse modes also multiply each base patch vector on its way past the model.
    """

    width: int
    into: int
    out: int
    skips: bool = False

    @property
    def macs(self) -> int:
        """Multiply-adds of one base patch on its ways in and out, alone or in a group."""
        return (self.into + self.out) * self.width


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """What the cost of a diffusion transformer depends on.

    Args:
        grid: base tokens ``(frames, height, width)``.
        patches: their ways into the model and out of it.
        blocks: what each of them multiplies, in the order that routers and plans know them in.
        text_tokens: text tokens of one picture.
        others: tokens of reference pictures in the same sequence.
        token_macs: multiply-adds of one token outside the blocks, where each has a time of its own.
        picture_macs: multiply-adds of one picture whatever the mode: modulation, conditioning, text
            projections.
        updates: low-rank updates; none if merged or absent.
        kept: what routers leave in of each block, in a mode at a noise level, as far as that is
            known beforehand; None as a level asks for the mean over all.

    Attributes:
        known: what modes cost that cost the same at all noise levels, as far as somebody has asked.
        smaller: the shapes of low bands, likewise.
    """

    grid: Grid
    patches: PatchCost
    blocks: tuple[Block, ...]
    text_tokens: int = 0
    others: int = 0
    token_macs: int = 0
    picture_macs: float = 0
    updates: tuple[Updates, ...] = ()
    kept: Callable[[Mode, float | None], Sequence[Kept]] | None = None
    known: dict[Mode, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    smaller: dict[Mode, TransformerShape] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def tokens(self, mode: Mode) -> int:
        """Tokens of one picture in a mode."""
        if mode.is_low_band:
            return self.at(mode).tokens(mode.inside)
        return math.prod(coarse_grid(self.grid, mode.patch_scale))

    def at(self, mode: Mode) -> TransformerShape:
        """The shape of the smaller latent that a mode gives the model."""
        return replace(self, grid=(self.grid[0], *mode.small(self.grid[1:])))

    @property
    def text_once(self) -> float:
        """Multiply-adds of one text token in layers that see the prompt alone, not the step."""
        counts = Tokens.on(self.grid, text=1).counts
        terms = (term for block in self.blocks for term in block.terms)
        return sum(term.each * counts[term.by] for term in terms if term.narrows == "prompt")

    def macs(
        self, mode: Mode, level: float | None = None, kept: Sequence[Kept] | None = None
    ) -> float:
        """Multiply-adds of one forward pass of one picture.

        Args:
            level: noise level in [0, 1], on which routed modes depend; None for the mean over all.
            kept: what a routed mode left in of each block, as counted; by default what is known of
                the mode beforehand.

        Raises:
            ValueError: a sparse mode, and blocks without roles.
        """
        if mode.is_low_band:
            if mode not in self.smaller:
                self.smaller[mode] = self.at(mode)
            return self.smaller[mode].macs(mode.inside, level, kept)
        if mode.is_routed:
            return self._macs(mode, level, kept)
        if mode not in self.known:
            self.known[mode] = self._macs(mode, level, kept)
        return self.known[mode]

    def block_macs(
        self, mode: Mode, level: float | None = None, kept: Sequence[Kept] | None = None
    ) -> float:
        """Those of all blocks alone: the accounting of the FlexiDiT and DyDiT papers."""
        if mode.is_low_band:
            return self.at(mode).block_macs(mode.inside, level, kept)
        found = self._blocks(mode, level, kept)
        return sum(block.macs(tokens, share) for block, tokens, share in found)

    def _macs(self, mode: Mode, level: float | None, kept: Sequence[Kept] | None) -> float:
        whole = self.block_macs(mode, level, kept) + self.patch_macs(mode) + self.picture_macs
        whole += self.tokens(mode) * self.token_macs
        for updates in self.updates:
            if not updates.parts.isdisjoint(mode.parts):
                found = zip(updates.blocks, self._blocks(mode, level, kept), strict=True)
                whole += updates.rank * sum(
                    block.total(terms, tokens, share) for terms, (block, tokens, share) in found
                )
        return whole

    def with_times(self, macs: int, *, per_token: bool) -> TransformerShape:
        """The same with an embedding of the time, of each token or of a picture."""
        if per_token:
            return replace(self, token_macs=macs)
        return replace(self, picture_macs=self.picture_macs + macs)

    def patch_macs(self, mode: Mode) -> float:
        """Multiply-adds of patches on their ways into the model, out of it and past it."""
        grouped = math.prod(coarse_grid(self.grid, mode.patch_scale)) * math.prod(mode.patch_scale)
        macs = (grouped + self.others) * self.patches.macs
        if self.patches.skips and not mode.has_base_patch:
            macs += math.prod(self.grid) * self.patches.into * self.patches.out
        return macs

    def seen(self, mode: Mode) -> Grid:
        """The grid of all tokens in the blocks' sequence, text apart."""
        grid = coarse_grid(self.grid, mode.patch_scale)
        return (1, 1, math.prod(grid) + self.others) if self.others else grid

    def _blocks(
        self, mode: Mode, level: float | None, kept: Sequence[Kept] | None
    ) -> Iterator[tuple[Block, Tokens, Kept | None]]:
        """Each block, its tokens and what is kept of it."""
        dense, text, grid = self.seen(mode), self.text_tokens, mode.token_grid
        if grid is None:
            seen = [Tokens.on(dense, text)] * len(self.blocks)
        elif any(block.role is None for block in self.blocks):
            raise ValueError(
                f"mode {mode.name!r} has a sparse grid, and the plan of its blocks is not known; "
                "legal: modes of method 'sparsedit'"
            )
        else:
            seen = [block.tokens(dense, (dense[0], *grid), text) for block in self.blocks]
        if not mode.is_routed:
            return zip(self.blocks, seen, itertools.repeat(None))
        if kept is None:
            assert self.kept is not None, "a routed mode needs to know what its routers keep"
            kept = self.kept(mode, level)
            if mode.token_keep is not None:
                kept = [
                    block.fixed(share, tokens)
                    for block, tokens, share in zip(self.blocks, seen, kept, strict=True)
                ]
        return zip(self.blocks, seen, kept, strict=True)
