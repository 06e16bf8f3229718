"""Multiply-adds of a forward pass in any mode, in closed form.

1 MAC = 2 FLOPs. DiT papers print MACs and call them "Gflops"; we always name which. Every product
of two matrices counts (linear layers, patch embedding, attention scores and mixing); element-wise
work does not. The forms agree with `torch.utils.flop_counter` on the meta device; on the CPU that
counter misses fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ditdial.checks import did_you_mean
from ditdial.cost.blocks import Linears, Seen, SparseCost
from ditdial.ops.gates import kept_tokens
from ditdial.ops.patching import coarse_grid
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.plan import Plan
from ditdial.plan.schedule import Schedule


@dataclass(frozen=True)
class Attention:
    """Attention of some blocks: the products of queries with keys and of weights with values.

    Args:
        blocks: how many.        width: heads times head width.
        kind: ``self`` (all tokens of a picture), ``joint`` (together with the text), ``cross`` (to
            the text), ``spatial`` (within a frame) or ``temporal`` (across frames).
    """

    blocks: int
    width: int
    kind: str = "self"

    def macs(self, frames: int, per_frame: int, text: int) -> float:
        """Multiply-adds for ``frames`` x ``per_frame`` tokens and ``text`` text tokens."""
        return self.seen(Seen.on((frames, 1, per_frame)), text)

    def seen(self, seen: Seen, text: int) -> float:
        """Multiply-adds where some tokens ask and some are asked."""
        return 2 * self.blocks * self.width * seen.pairs(self.kind, text)


@dataclass(frozen=True)
class Kept:
    """Shares of one block's heads and channels, and of the tokens that enter its feed-forward."""

    heads: float = 1.0
    channels: float = 1.0
    tokens: float = 1.0


ALL = Kept()


@dataclass(frozen=True, kw_only=True)
class RoutedLinears:
    """Linear layers of a block that narrow, in what one token takes there.

    That is multiply-adds, or inputs plus outputs of those layers that carry low-rank updates.

    Args:
        query, key: narrow with the heads: in layers of queries and of what attention returns, and
            in layers of keys and values.
        exit: narrows with the heads, but a token skips it together with its channels.
        channel: narrows with the channels.
        entry: a token skips it with its channels, and it does not narrow.
        head_text, channel_text: of a text token, what narrows with the heads and the channels.
    """

    query: float = 0.0
    key: float = 0.0
    exit: float = 0.0
    channel: float = 0.0
    entry: float = 0.0
    head_text: float = 0.0
    channel_text: float = 0.0

    def of(self, seen: Seen, entering: float, text: int, kept: Kept) -> float:
        """What all tokens take; ``entering`` of them have channels."""
        heads = seen.queries * self.query + seen.keys * self.key
        heads += entering * self.exit + text * self.head_text
        channels = entering * self.channel + text * self.channel_text
        return kept.heads * heads + kept.channels * channels + entering * self.entry


@dataclass(frozen=True, kw_only=True)
class Routable:
    """What routers can leave out of one block.

    Args:
        attention: of the block; heads left out shorten its products and its linear layers.
        linear: multiply-adds in these.
        skips_tokens: whether image tokens may skip the channels.
        width: of the tokens that the token router reads.
    """

    attention: Attention
    linear: RoutedLinears
    skips_tokens: bool = True
    width: int = 0

    def macs(self, seen: Seen, text: int, kept: Kept) -> float:
        """Multiply-adds of the block's routed part; `ALL` for the base's."""
        attention = kept.heads * self.attention.seen(seen, text)
        return attention + self.linear.of(seen, self.entering(seen, kept), text, kept)

    def entering(self, seen: Seen, kept: Kept) -> float:
        """Image tokens that have channels."""
        return seen.stream * (kept.tokens if self.skips_tokens else 1.0)

    def fixed_share(self, seen: Seen, share: float) -> float:
        """Share of the tokens that a fixed number of them is, in each row that blocks see."""
        rows = {"spatial": seen.stream // seen.frames, "temporal": seen.frames}
        tokens = rows.get(self.attention.kind, seen.stream)
        return kept_tokens(tokens, share) / tokens

    def router_macs(self, tokens: int) -> float:
        """Multiply-adds of the token router; those that read the timestep run once per run."""
        return tokens * token_router_macs(self.width) if self.skips_tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Low-rank updates that are added apart from the weights.

    Args:
        rank: of each.
        units: inputs plus outputs of all layers that carry one, as far as picture tokens go
            through them.
        text_units: as far as text tokens do.
        modes: names of the parts of modes that have them; None for all coarse modes.
        blocks: of each block, by its tokens, where sparse modes have them.
        routed: of each block, what narrows, where routed modes do.
    """

    rank: int
    units: int
    text_units: int = 0
    modes: frozenset[str] | None = None
    blocks: tuple[Linears, ...] = ()
    routed: tuple[RoutedLinears, ...] = ()

    def in_mode(self, mode: Mode) -> bool:
        """Whether a mode has them."""
        return not mode.is_full and (self.modes is None or not self.modes.isdisjoint(mode.parts))


def token_router_macs(width: int) -> int:
    """Multiply-adds of DyDiT's token router for one token: two layers, a sixteenth as wide."""
    return width * (width // 16) + width // 16


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """What the cost of a diffusion transformer depends on.

    Args:
        width: model width.
        grid: base tokens ``(frames, height, width)``.
        patch_in, patch_out: numbers in one base patch, entering and leaving.
        token_macs: multiply-adds of one token in the linear layers of all blocks.
        attention: of all blocks.
        text_tokens: text tokens of one picture.
        text_macs: multiply-adds of one text token in the linear layers of all blocks.
        text_once: those of them that depend on the prompt alone, not on the step.
        picture_macs: what one picture costs once: modulation, conditioning, text projections.
        adapted, adapted_text: inputs plus outputs of all layers that may carry low-rank updates, as
            far as picture tokens and text tokens go through them.
        updates: those that are there; none if merged or absent.
        skips: coarse modes also multiply each base patch vector on its way past the model.
        routable: what routed modes can leave out, block by block.
        sparse: what blocks multiply on two token grids, where sparse modes have them.
        kept: what is left in there in a mode at a noise level; None as a level asks for the mean
            over all.

    Attributes:
        known: what modes cost that cost the same at all noise levels, as far as somebody has asked.
    """

    width: int
    grid: tuple[int, int, int]
    patch_in: int
    patch_out: int
    token_macs: float
    attention: tuple[Attention, ...]
    text_tokens: int = 0
    text_macs: float = 0.0
    text_once: float = 0.0
    picture_macs: float = 0.0
    adapted: int = 0
    adapted_text: int = 0
    updates: tuple[Updates, ...] = ()
    skips: bool = False
    routable: tuple[Routable, ...] = ()
    sparse: SparseCost | None = None
    kept: Callable[[Mode, float | None], Sequence[Kept]] | None = None
    known: dict[Mode, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def tokens(self, mode: Mode) -> int:
        """Tokens of one picture in a mode."""
        return math.prod(coarse_grid(self.grid, mode.patch_scale))

    def block_macs(self, mode: Mode, level: float | None = None) -> float:
        """Attention and feed-forward of all blocks: the accounting of the FlexiDiT paper."""
        return self.dense_macs(mode) - self.left_out(mode, level) - self.thinned(mode)

    def thinned(self, mode: Mode) -> float:
        """What blocks leave out that see fewer tokens than others."""
        if mode.token_grid is None:
            return 0.0
        if self.sparse is None:
            raise ValueError(
                f"mode {mode.name!r} has a sparse grid, and the plan of its blocks is not known; "
                "legal: modes of method 'sparsedit'"
            )
        grid = coarse_grid(self.grid, mode.patch_scale)
        return self.sparse.left_out(grid, mode.token_grid, self.text_tokens)

    def left_out(
        self, mode: Mode, level: float | None = None, kept: Sequence[Kept] | None = None
    ) -> float:
        """What routers leave out of the blocks in a mode, less what they multiply themselves.

        Args:
            level: noise level in [0, 1].
            kept: of each block, as counted; by default what `kept` says of the mode.
        """
        if not mode.is_routed:
            return 0.0
        text, routed = self.text_tokens, self._routed(mode, level, kept)
        routers = sum(block.router_macs(seen.stream) for block, seen, _ in routed)
        return -routers + sum(
            block.macs(seen, text, ALL) - block.macs(seen, text, share)
            for block, seen, share in routed
        )

    def _routed(
        self, mode: Mode, level: float | None, kept: Sequence[Kept] | None
    ) -> list[tuple[Routable, Seen, Kept]]:
        """Each block, its tokens and what is kept of it."""
        seen = self._seen(mode, len(self.routable))
        if kept is None:
            assert self.kept is not None, "a routed mode needs to know what its routers keep"
            kept = self.kept(mode, level)
            if mode.token_keep is not None:
                kept = [
                    replace(share, tokens=block.fixed_share(tokens, share.tokens))
                    for block, tokens, share in zip(self.routable, seen, kept, strict=True)
                ]
        return list(zip(self.routable, seen, kept, strict=True))

    def _seen(self, mode: Mode, blocks: int) -> list[Seen]:
        """Tokens of each block."""
        grid = coarse_grid(self.grid, mode.patch_scale)
        if mode.token_grid is None or self.sparse is None:
            return [Seen.on(grid)] * blocks
        return self.sparse.seen(grid, mode.token_grid)

    def dense_macs(self, mode: Mode) -> float:
        """`block_macs` with nothing left out by routers."""
        frames, height, width = coarse_grid(self.grid, mode.patch_scale)
        attention = sum(
            layer.macs(frames, height * width, self.text_tokens) for layer in self.attention
        )
        linear = self.tokens(mode) * self.token_macs + self.text_tokens * self.text_macs
        return linear + attention

    def macs(
        self, mode: Mode, level: float | None = None, kept: Sequence[Kept] | None = None
    ) -> float:
        """Everything a forward pass of one picture multiplies.

        Args:
            level: noise level in [0, 1], on which routed modes depend; None for the mean over all.
            kept: what a routed mode left in of each block, as counted.
        """
        if mode.is_routed:
            return self._macs(mode, level, kept)
        if mode not in self.known:
            self.known[mode] = self._macs(mode, level, kept)
        return self.known[mode]

    def _macs(self, mode: Mode, level: float | None, kept: Sequence[Kept] | None) -> float:
        grouped = self.tokens(mode) * math.prod(mode.patch_scale)
        projections = grouped * (self.patch_in + self.patch_out) * self.width
        blocks = self.dense_macs(mode) - self.left_out(mode, level, kept) - self.thinned(mode)
        whole = blocks + projections + self.picture_macs
        for updates in self.updates:
            if updates.in_mode(mode):
                whole += updates.rank * self._updated(updates, mode, level, kept)
        if self.skips and not mode.has_base_patch:
            whole += math.prod(self.grid) * self.patch_in * self.patch_out
        return whole

    def _updated(
        self, updates: Updates, mode: Mode, level: float | None, kept: Sequence[Kept] | None
    ) -> float:
        """Inputs plus outputs of layers with low-rank updates, each times its tokens."""
        units: float = self.tokens(mode) * updates.units + self.text_tokens * updates.text_units
        if mode.is_sparse:
            dense = Seen.on(coarse_grid(self.grid, mode.patch_scale))
            seen = self._seen(mode, len(updates.blocks))
            units -= sum(
                block.of(dense) - block.of(tokens)
                for block, tokens in zip(updates.blocks, seen, strict=True)
            )
        if not mode.is_routed:
            return units
        text = self.text_tokens
        for linear, (block, tokens, share) in zip(
            updates.routed, self._routed(mode, level, kept), strict=True
        ):
            units -= linear.of(tokens, tokens.stream, text, ALL)
            units += linear.of(tokens, block.entering(tokens, share), text, share)
        return units

    def with_low_rank(self, rank: int) -> TransformerShape:
        """The same network with unmerged low-rank updates of this rank in all coarse modes."""
        updates = Updates(rank=rank, units=self.adapted, text_units=self.adapted_text)
        return replace(self, updates=(updates,) if rank else ())


def dit_shape(
    *, width: int, depth: int, latent: int, patch: int, channels: int = 4, out_channels: int = 8
) -> TransformerShape:
    """A `DiTTransformer2DModel` (square latents).

    Each of its blocks has a time embedding of its own (256 sinusoids into a two-layer perceptron),
    and the first one's is computed again for the output.
    """
    side, d = latent // patch, width
    return TransformerShape(
        width=d,
        grid=(1, side, side),
        patch_in=patch * patch * channels,
        patch_out=patch * patch * out_channels,
        token_macs=depth * 12 * d * d,
        attention=(Attention(depth, d),),
        picture_macs=(6 * depth + 2) * d * d + (depth + 1) * (256 * d + d * d),
        adapted=depth * 18 * d,
    )


SHAPES: dict[str, TransformerShape] = {
    "dit-s-2-256": dit_shape(width=384, depth=12, latent=32, patch=2),
    "dit-b-2-256": dit_shape(width=768, depth=12, latent=32, patch=2),
    "dit-l-2-256": dit_shape(width=1024, depth=24, latent=32, patch=2),
    "dit-xl-2-256": dit_shape(width=1152, depth=28, latent=32, patch=2),
    "dit-xl-2-512": dit_shape(width=1152, depth=28, latent=64, patch=2),
}
"""Published models by name, for cost questions that need no weights."""


def named_shape(name: str) -> TransformerShape:
    """A published model's shape.

    Raises:
        ValueError: unknown name; the known ones are listed.
    """
    if name not in SHAPES:
        near = did_you_mean(name, SHAPES)
        raise ValueError(f"unknown model {name!r}; legal: {', '.join(SHAPES)}{near}")
    return SHAPES[name]


def weak_first_cost(
    model: str,
    fraction: float,
    *,
    guide_fraction: float | None = None,
    scale: int = 2,
    low_rank: int = 0,
    steps: int = 250,
    shape: TransformerShape | None = None,
) -> dict[str, Any]:
    """What a guided weak-first run of a model costs.

    Args:
        model: a name in `SHAPES`, or any name if ``shape`` is given.
        fraction, guide_fraction: shares of the steps run weak, as in `Schedule.weak_first`.
        scale: weak patch in base patches per axis.
        low_rank: rank of unmerged low-rank updates in the weak mode; 0 for merged or none.

    Returns:
        ``macs_full`` and ``macs_weak`` of one forward pass of one picture, ``macs_plan`` (its mean
        over the run), ``ratio``, and ``ratio_paper`` in the accounting of the FlexiDiT paper
        (blocks only).

    Raises:
        ValueError: unknown model, or a number out of range.
    """
    shape = shape or named_shape(model)
    if low_rank < 0:
        raise ValueError(f"low_rank = {low_rank}; legal: >= 0")
    if steps < 1:
        raise ValueError(f"steps = {steps}; legal: >= 1")
    shape = shape.with_low_rank(low_rank)
    schedule = Schedule.weak_first(fraction, scale, guide_fraction=guide_fraction)
    levels = [(steps - 1 - i) / steps for i in range(steps)]
    plan = Plan.bind(schedule, levels, shape.macs, guidance=True)
    paper = Plan.bind(schedule, levels, shape.block_macs, guidance=True)
    full = shape.macs(FULL)
    return {
        "model": model,
        "tokens_full": shape.tokens(FULL),
        "tokens_weak": shape.tokens(Mode(scale)),
        "macs_full": full,
        "macs_weak": shape.macs(Mode(scale)),
        "macs_plan": full * plan.ratio,
        "flops_full": 2 * full,
        "flops_plan": 2 * full * plan.ratio,
        "ratio": plan.ratio,
        "ratio_paper": paper.ratio,
        "steps": steps,
    }
