"""Multiply-adds of a forward pass in any mode, in closed form.

1 MAC = 2 FLOPs. DiT papers print MACs and call them "Gflops"; we always name which. Every product
of two matrices counts (linear layers, patch embedding, attention scores and mixing); element-wise
work does not. The forms agree with `torch.utils.flop_counter` on the meta device; on the CPU that
counter misses fused attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from elastic_dit.mode import FULL, Mode
from elastic_dit.schedule import Plan, Schedule


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """What the cost of a plain DiT depends on.

    Args:
        width: model width d.        depth: number of blocks L.
        grid: base tokens ``(height, width)``.
        patch_in, patch_out: numbers in one base patch, entering and leaving.
        mlp_ratio: hidden width of the feed-forward over d.
        time_features: width of the sinusoidal time embedding that each conditioning MLP reads.
        conditioners: conditioning MLPs per forward pass (diffusers' DiT has one in every block, and
            runs the first one again for the output).
        low_rank: rank of the low-rank update on self-attention and feed-forward in coarse modes; 0
            if merged or absent.
    """

    width: int
    depth: int
    grid: tuple[int, int]
    patch_in: int
    patch_out: int
    mlp_ratio: float = 4.0
    time_features: int = 256
    conditioners: int = 0
    low_rank: int = 0

    def tokens(self, mode: Mode) -> int:
        """Tokens of one picture in a mode."""
        _, kh, kw = mode.patch_scale
        return math.ceil(self.grid[0] / kh) * math.ceil(self.grid[1] / kw)

    def block_macs(self, mode: Mode) -> float:
        """Self-attention and feed-forward of all blocks: the accounting of the FlexiDiT paper."""
        n, d = self.tokens(mode), self.width
        return self.depth * (n * d * d * (4 + 2 * self.mlp_ratio) + 2 * n * n * d)

    def macs(self, mode: Mode) -> float:
        """Everything a forward pass of one picture multiplies."""
        d, n = self.width, self.tokens(mode)
        area = mode.patch_scale[1] * mode.patch_scale[2]
        projections = n * area * (self.patch_in + self.patch_out) * d
        modulation = self.depth * 6 * d * d + 2 * d * d
        conditioning = self.conditioners * (self.time_features * d + d * d)
        return (
            self.block_macs(mode) + projections + modulation + conditioning + self._low_rank(mode)
        )

    def packing_macs(self, a: Mode, b: Mode) -> float:
        """What attention multiplies in vain where two modes share one masked sequence."""
        return self.depth * 4 * self.tokens(a) * self.tokens(b) * self.width

    def _low_rank(self, mode: Mode) -> float:
        if mode.is_full or not self.low_rank:
            return 0.0
        hidden = self.mlp_ratio * self.width
        inputs_and_outputs = 4 * 2 * self.width + 2 * (self.width + hidden)
        return self.depth * self.tokens(mode) * self.low_rank * inputs_and_outputs

    def with_low_rank(self, rank: int) -> TransformerShape:
        """The same network with unmerged low-rank updates of this rank in coarse modes."""
        return replace(self, low_rank=rank)


def dit_shape(
    *, width: int, depth: int, latent: int, patch: int, channels: int = 4, out_channels: int = 8
) -> TransformerShape:
    """Shape of a `DiTTransformer2DModel` (square latents)."""
    side = latent // patch
    return TransformerShape(
        width=width,
        depth=depth,
        grid=(side, side),
        patch_in=patch * patch * channels,
        patch_out=patch * patch * out_channels,
        conditioners=depth + 1,
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
        raise ValueError(f"unknown model {name!r}; legal: {', '.join(SHAPES)}")
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
